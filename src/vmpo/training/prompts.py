"""Prompt sets: text files, JSON lines, or the embedded words."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmpo.errors import UserError
from vmpo.pretraining.words import caption, word_list

EMBEDDED = ("glyphs/train", "glyphs/test")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what rewards may want to know of each."""

    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: list[int]) -> PromptSet:
        """The prompts at `rows`."""
        return PromptSet([self.prompts[r] for r in rows], [self.metadata[r] for r in rows])


def embedded_prompts(split: str) -> PromptSet:
    """Sentences with one embedded word each in double quotes; the sentence's frame is drawn once, by word."""
    rng = random.Random(0)
    words = list(word_list(split))
    rng.shuffle(words)
    return PromptSet([caption(word, rng) for word in words], [{"word": word} for word in words])


def load_prompts(name: str) -> PromptSet:
    """Loads 'glyphs/train', 'glyphs/test', a .txt file (one prompt a line) or a .jsonl file (objects with 'prompt').

    Repeated prompts are kept once, so that a prompt is never two groups in one epoch.

    Raises:
        UserError: if the file is missing, empty or malformed, with the line.
    """
    if name in EMBEDDED:
        return embedded_prompts(name.removeprefix("glyphs/"))
    path = Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(
            f"prompt file '{name}' cannot be read: {reason}; embedded sets: {', '.join(EMBEDDED)}"
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
                found.setdefault(str(record["prompt"]), record)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"prompt file '{name}' line {number}: not a JSON object with the key 'prompt'"
                ) from error
        else:
            found.setdefault(line.strip(), {})
    if not found:
        raise UserError(f"prompt file '{name}' is empty; it must hold one prompt a line")
    return PromptSet(list(found), list(found.values()))


def epoch_prompts(total: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """Rows of the prompts of an epoch: successive slices of seeded permutations of the whole set.

    A function of (seed, epoch) alone, so a resumed run needs no position but the epoch.
    """
    rows: list[int] = []
    position = epoch * per_epoch
    while len(rows) < per_epoch:
        lap, offset = divmod(position + len(rows), total)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + lap)
        order = torch.randperm(total, generator=generator).tolist()
        fresh = [r for r in order[offset:] if r not in rows]
        rows += fresh[: per_epoch - len(rows)] or order[: per_epoch - len(rows)]
    return rows
