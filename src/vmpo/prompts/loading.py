"""From names of prompt sets to prompts."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from vmpo.errors import UserError
from vmpo.prompts.embedded import EMBEDDED, embedded_prompts
from vmpo.prompts.files import SUFFIXES, read_prompt_file
from vmpo.prompts.prompt_set import PromptSet
from vmpo.prompts.published import PUBLISHED

Progress = Callable[[int, int | None], None]


def load_prompts(name: str, progress: Progress | None = None) -> PromptSet:
    """Loads an embedded set, a published one (from the cache, else downloaded), a file, or a union 'a+b' of such.

    Repeated prompts are kept once, with the metadata of the first.

    Args:
        name: e.g. 'glyphs/train', 'hpdv2/photo+hpdv2/painting', 'prompts.txt', 'prompts.jsonl'.
        progress: called with the bytes that have come and their total (None if unknown) while a set is downloaded.

    Raises:
        UserError: if a set is unknown (with the nearest name), cannot be downloaded, or a file is malformed.
    """
    parts = [name] if Path(name).is_file() else name.split("+")
    loaded = [_load_one(part.strip(), progress) for part in parts]
    if len(loaded) == 1:
        return loaded[0]
    return PromptSet.distinct(pair for part in loaded for pair in zip(part.prompts, part.metadata, strict=True))


def _load_one(name: str, progress: Progress | None) -> PromptSet:
    if name in EMBEDDED:
        return embedded_prompts(name.removeprefix("glyphs/"))
    if name in PUBLISHED:
        return PUBLISHED[name].load(progress)
    path = Path(name)
    if path.suffix in SUFFIXES or path.is_file():
        return PromptSet.distinct(read_prompt_file(path))
    known = [*EMBEDDED, *PUBLISHED]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(
        f"no prompt set '{name}'; {hint}'vmpo prompts' lists the sets, and a file of your own ends in "
        f"{', '.join(SUFFIXES)}"
    )
