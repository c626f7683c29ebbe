"""Weight files published at an address of their own: found in PyTorch's cache, or fetched into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vmpo.errors import UserError


def cache_folder() -> Path:
    """PyTorch's hub cache, which torchvision and the published packages fill too; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir())


@dataclass(frozen=True)
class PublishedFile:
    """A file and where it is published.

    Attributes:
        name: in the cache.
        url: of its home.
        sha256: of the file, or the leading digits its publisher states; empty where none are stated.
        folder: of the cache.
    """

    name: str
    url: str
    sha256: str = ""
    folder: str = "checkpoints"

    def fetch(self, needed_by: str, instead: str) -> Path:
        """The file in the cache, fetched once.

        Arguments:
            needed_by: what cannot work without it.
            instead: what the user can do otherwise, to end the sentence 'put it at ...'.

        Raises:
            UserError: if it is not there and cannot be fetched, or is another file than the published one.
        """
        from huggingface_hub import constants

        cached = cache_folder() / self.folder / self.name
        if cached.is_file():
            return cached
        where = f"put {self.url} at '{cached}'{instead}"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{needed_by} needs '{self.name}', and HF_HUB_OFFLINE forbids to fetch it; {where}")
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(cached), self.sha256 or None, progress=False)
        except (OSError, RuntimeError) as error:  # no network, a full disk, or another checksum
            reason = " ".join(str(error).split())
            raise UserError(f"{needed_by} needs '{self.name}', which cannot be fetched: {reason}; {where}") from error
        return cached
