"""Scores on disk, one JSON line each, written as they come: what is there is never measured again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vmpo.disk import write_text
from vmpo.errors import UserError

Key = tuple[str, int, int]
Record = dict[str, Any]
WHOLE_PROMPT = -1
"""The image index of a record about all pictures of a prompt."""


def key_of(record: Record) -> Key:
    """(source, prompt, image) of a record; image is `WHOLE_PROMPT` where it is about a prompt."""
    return record["source"], record["prompt"], record.get("image", WHOLE_PROMPT)


class ScoreLog:
    """`scores.jsonl` (a line a picture) and `prompts.jsonl` (a line a prompt) of a folder, and the processes' parts.

    While it works each process appends to a file of its own, `scores.rank-NNNNN.jsonl`, and forces every line to the
    disk; `merge` makes the two whole files of all of them. A line that a crash cut off is no record.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.records: dict[Key, Record] = {}
        self.part = folder / f"scores.rank-{accelerator.process_index:05d}.jsonl"

    def append(self, records: list[Record]) -> None:
        """Adds records, or what they hold of `scores` to the records there, at once and for good.

        Raises:
            UserError: if the disk is full or the folder cannot be written.
        """
        if not records:
            return
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with self.part.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write '{self.part}': {error.strerror}") from error
        for record in records:
            self._take(record)

    def merge(self) -> None:
        """All processes' records into the whole files; every process knows them all afterwards."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._read()
            ordered = [self.records[key] for key in sorted(self.records)]
            for name, is_prompt in (("scores.jsonl", False), ("prompts.jsonl", True)):
                mine = [r for r in ordered if (key_of(r)[2] == WHOLE_PROMPT) == is_prompt]
                write_text(self.folder / name, "".join(json.dumps(record) + "\n" for record in mine))
            for part in self._parts():
                part.unlink()
        self.accelerator.wait_for_everyone()
        self._read()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("scores.rank-*.jsonl"))

    def _read(self) -> None:
        self.records = {}
        whole = [path for name in ("scores.jsonl", "prompts.jsonl") if (path := self.folder / name).is_file()]
        for path in [*whole, *self._parts()]:
            lines = path.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end was cut off
                try:
                    self._take(json.loads(line))
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(
                        f"'{path}' line {number} is no record of a score; mend or remove the line"
                    ) from error

    def _take(self, record: Record) -> None:
        known = self.records.setdefault(key_of(record), {})
        scores = {**known.get("scores", {}), **record["scores"]}
        known.update(record, scores=scores)
