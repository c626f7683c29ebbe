"""A published prompt set: where its file is, what it must be, and how it is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmpo.disk import write_text
from vmpo.errors import UserError
from vmpo.prompts.catalogue import CATALOGUE, Entry
from vmpo.prompts.download import cache_folder, check, checksum, download, is_offline
from vmpo.prompts.files import read_prompt_file
from vmpo.prompts.prompt_set import PromptSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedSet:
    """An entry of the catalogue with its place in the cache."""

    name: str
    entry: Entry

    @property
    def file(self) -> Path:
        """Where the published file is kept, as it was published."""
        return cache_folder() / "prompts" / f"{self.name}{Path(self.entry.url).suffix}"

    @property
    def _first_seen(self) -> Path:
        return self.file.with_name(f"{self.file.name}.sha256")

    @property
    def expected(self) -> str:
        """The checksum of the file: the catalogue's, else that of the first download, else empty."""
        if self.entry.checksum or not self._first_seen.is_file():
            return self.entry.checksum
        return self._first_seen.read_text().strip()

    def load(self, progress: Callable[[int, int | None], None] | None = None) -> PromptSet:
        """The distinct prompts; downloads the file if it is not in the cache.

        Raises:
            UserError: if it cannot be had, or what is in the cache is not what was published.
        """
        if self.file.is_file():
            self._check_cached()
        else:
            self._download(progress)
        records = read_prompt_file(self.file)[: self.entry.first]
        if self.entry.quoted:
            records = [(prompt, {**metadata, "target": _quoted(prompt)}) for prompt, metadata in records]
        return PromptSet.distinct(records)

    def _check_cached(self) -> None:
        try:
            if self.expected:
                check(self.file.read_bytes(), self.expected, f"'{self.file}'")
        except UserError as error:
            raise UserError(f"{error}; delete it, and 'vmpo prompts {self.name}' fetches it again") from error

    def _download(self, progress: Callable[[int, int | None], None] | None) -> None:
        if is_offline():
            raise UserError(
                f"prompt set '{self.name}' is not in the cache and HF_HUB_OFFLINE forbids downloads; run 'vmpo prompts "
                f"{self.name}' where there is a network, or put {self.entry.url} at '{self.file}'"
            )
        try:
            content = download(self.entry.url, self.file, self.expected, progress)
        except UserError as error:
            raise UserError(
                f"prompt set '{self.name}': {error}; where there is a network, 'vmpo prompts {self.name}' fetches it, "
                f"or put the file at '{self.file}'"
            ) from error
        if not self.expected:
            write_text(self._first_seen, checksum(content, "sha256") + "\n")
            logger.warning(
                "prompt set '%s': no checksum is known for %s; the one of this download is kept in %s, and later "
                "copies are compared with it",
                self.name,
                self.entry.url,
                self._first_seen,
            )


def _quoted(prompt: str) -> str:
    """The text between the first pair of double quotes, empty if there is none."""
    return prompt.split('"', 2)[1] if prompt.count('"') > 1 else ""


PUBLISHED: dict[str, PublishedSet] = {name: PublishedSet(name, entry) for name, entry in CATALOGUE.items()}
