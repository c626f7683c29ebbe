"""Folders of pictures that something else drew: which picture belongs to which prompt."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmpo.errors import UserError
from vmpo.prompts import PromptSet

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
INDEX_NAME = re.compile(r"(\d+)(?:[-_](\d+))?")
LAYOUTS = (
    "a metadata.jsonl or metadata.csv with file_name and prompt, pictures named by the prompt's index and the "
    "picture's (00003-1.png), or a folder an index (00003/samples/0001.png)"
)


@dataclass(frozen=True)
class FoundPicture:
    """A picture file and what the folder says of its prompt: the text, or else its index in the prompt set."""

    file: Path
    prompt: str | None = None
    index: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def find_pictures(folder: Path) -> list[FoundPicture]:
    """The pictures of a folder, each prompt's in their own order.

    Read are, whichever is there first: `metadata.jsonl` or `metadata.csv` (the Hugging Face image folder), sub-folders
    named by a prompt's index (GenEval: `00000/metadata.jsonl`, `00000/samples/0000.png`), and files `NNNNN-M.png` or
    `NNNNN.png`. Indices count from 0.

    Raises:
        UserError: if no picture can be given a prompt, or a file that the metadata names is not there.
    """
    for name, read in (("metadata.jsonl", _json_lines), ("metadata.csv", _csv_rows)):
        if (folder / name).is_file():
            return [_from_record(folder, name, number, row) for number, row in read(folder / name)]
    indexed = sorted((int(p.name), p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    found = [picture for index, sub in indexed for picture in _from_sub_folder(sub, index)] or _from_names(folder)
    if not found:
        raise UserError(f"no picture in '{folder}' can be matched to a prompt; what is read is {LAYOUTS}")
    return found


def prompts_named_in(found: list[FoundPicture], folder: Path) -> PromptSet:
    """The prompts that a folder's own metadata names, in the order of their first pictures.

    Raises:
        UserError: if the folder gives indices only.
    """
    first: dict[str, dict[str, Any]] = {}
    for picture in found:
        if picture.prompt is None:
            raise UserError(
                f"'{folder}' does not say what its pictures were drawn for ('{picture.file.name}' has an index only); "
                f"pass --prompts with the set the indices count in"
            )
        first.setdefault(picture.prompt, picture.metadata)
    return PromptSet(list(first), list(first.values()))


def match_pictures(found: list[FoundPicture], prompts: PromptSet, folder: Path) -> list[list[Path]]:
    """The picture files of each prompt, in order; pictures of other prompts are left out.

    Raises:
        UserError: if a prompt has no picture.
    """
    row = {prompt.strip(): index for index, prompt in enumerate(prompts.prompts)}
    files: list[list[Path]] = [[] for _ in row]
    for picture in found:
        index = picture.index if picture.prompt is None else row.get(picture.prompt)
        if index is not None and index < len(files):
            files[index].append(picture.file)
    bare = [index for index, pictures in enumerate(files) if not pictures]
    if bare:
        raise UserError(
            f"'{folder}' has no picture of {len(bare)} of the {len(files)} prompts; the first is number {bare[0]}, "
            f"'{prompts.prompts[bare[0]]}'"
        )
    return files


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}' line {number} is no JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number} must be an object with file_name and prompt")
        rows.append((number, row))
    return rows


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(enumerate(csv.DictReader(file), 2))


def _prompt_in(row: dict[str, Any]) -> str | None:
    text = row.get("prompt", row.get("text"))  # 'text' is what captioning sets call it
    return text.strip() if isinstance(text, str) and text.strip() else None


def _from_record(folder: Path, name: str, number: int, row: dict[str, Any]) -> FoundPicture:
    prompt, file_name = _prompt_in(row), row.get("file_name")
    if prompt is None or not isinstance(file_name, str):
        raise UserError(f"'{folder / name}' line {number} must have file_name and prompt (or text)")
    file = folder / file_name
    if not file.is_file():
        raise UserError(f"'{folder / name}' line {number} names '{file_name}', which is not there")
    return FoundPicture(file, prompt, metadata={k: v for k, v in row.items() if k != "file_name"})


def _from_sub_folder(sub: Path, index: int) -> list[FoundPicture]:
    row: dict[str, Any] = {}
    if (sub / "metadata.jsonl").is_file():
        row = next((row for _, row in _json_lines(sub / "metadata.jsonl")), {})
    inside = sub / "samples" if (sub / "samples").is_dir() else sub
    files = sorted((p for p in inside.iterdir() if p.suffix.lower() in ENDINGS and p.stem.isdigit()), key=_number)
    return [FoundPicture(file, _prompt_in(row), index, row) for file in files]


def _number(path: Path) -> int:
    return int(path.stem)


def _from_names(folder: Path) -> list[FoundPicture]:
    named = []
    for file in folder.iterdir():
        match = INDEX_NAME.fullmatch(file.stem)
        if match and file.suffix.lower() in ENDINGS:
            named.append((int(match[1]), int(match[2] or 0), file))
    return [FoundPicture(file, index=index) for index, _, file in sorted(named)]
