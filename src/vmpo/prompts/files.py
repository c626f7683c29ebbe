"""Prompt files: text, JSON lines and JSON lists, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmpo.errors import UserError
from vmpo.prompts.embedded import EMBEDDED
from vmpo.prompts.prompt_set import PromptSet

SUFFIXES = (".txt", ".jsonl", ".json")
Record = tuple[str, dict[str, Any]]


def read_prompt_file(path: Path) -> list[Record]:
    """Prompts and metadata of a file, in its order, repeated ones included.

    `.jsonl`: one object with 'prompt' a line; the whole object is the prompt's metadata. `.json`: a list of strings,
    or of objects with 'prompt' or 'text'. Anything else: one prompt a line, without metadata.

    Raises:
        UserError: if the file is missing, empty or malformed, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(
            f"prompt file '{path}' cannot be read: {reason}; embedded sets: {', '.join(EMBEDDED)}; published sets: "
            f"see 'vmpo prompts'"
        ) from error
    if path.suffix == ".json":
        records = _json_list(path, text)
    else:  # only \n ends a line: a prompt may hold the other separators of Unicode
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [_json_line(path, *line) if path.suffix == ".jsonl" else (line[1], {}) for line in lines]
    if not records:
        raise UserError(f"prompt file '{path}' is empty; it must hold one prompt a line")
    return records


def _json_line(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"prompt file '{path}' line {number}: not a JSON object with the key 'prompt' and its text")
    return prompt.strip(), record


def _json_list(path: Path, text: str) -> list[Record]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompt file '{path}' line {error.lineno}: no valid JSON: {error.msg}") from error
    if not isinstance(entries, list):
        raise UserError(f"prompt file '{path}' holds no list; a .json file must be a list of prompts")
    records: list[Record] = []
    for number, entry in enumerate(entries, 1):
        metadata = entry if isinstance(entry, dict) else {}
        prompt = metadata.get("prompt", metadata.get("text")) if isinstance(entry, dict) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f"prompt file '{path}' entry {number}: neither a text nor an object with 'prompt' or 'text'"
            )
        records.append((prompt.strip(), metadata))
    return records


def format_prompts(prompts: PromptSet, suffix: str) -> str:
    """The content of a `.jsonl` file (prompts with metadata) or, for any other suffix, of one prompt a line.

    Raises:
        UserError: if a prompt has a line break and the file is no `.jsonl`.
    """
    if suffix == ".jsonl":
        records = [{"prompt": p, **m} for p, m in zip(prompts.prompts, prompts.metadata, strict=True)]
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for prompt in prompts.prompts:
        if "\n" in prompt:
            raise UserError(f"a prompt has a line break, which a text file cannot hold; write .jsonl: {prompt!r}")
    return "".join(f"{prompt}\n" for prompt in prompts.prompts)
