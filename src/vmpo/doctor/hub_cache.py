"""What of a repository of the Hugging Face hub is in the cache; asks the hub nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmpo.features.tokenizers import VOCABULARIES

NETWORK = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def cache_folder() -> Path:
    """The hub's cache; HF_HOME or HF_HUB_CACHE moves it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_hub_name(source: str) -> bool:
    """Whether a source that is no path here can be a repository."""
    return source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def download_command(source: str, pattern: str = "") -> str:
    """How to get a repository, or what else to do about a path."""
    if not is_hub_name(source):
        return f"put it at '{source}', or name another path"
    return " ".join(part for part in ("hf download", source, pattern) if part)


def cached_file(repo: str, names: Sequence[str]) -> Path | None:
    """The first of some files of a repository that is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in names if is_hub_name(repo) else ():
        if isinstance(found := try_to_load_from_cache(repo, name, cache_dir=cache_folder()), str):
            return Path(found)
    return None


def has_weights(folder: Path) -> bool:
    """Whether the weights of one network are in a folder, all parts of them."""
    names = {file.name for file in folder.iterdir() if file.exists()} if folder.is_dir() else set()
    for index in (name for name in names if name.endswith(".index.json")):
        parts = set(json.loads((folder / index).read_text())["weight_map"].values())
        if parts <= names:
            return True
    # a part of several, model-00001-of-00002, does not count alone
    return any(name.endswith((".safetensors", ".bin")) and "-of-" not in name for name in names)


@dataclass(frozen=True)
class Need:
    """Something a repository or a local path must give.

    Attributes:
        source: hub repository, file or folder.
        files: any one of these will do.
        pattern: which files to download; empty: all.
    """

    source: str
    files: tuple[str, ...]
    pattern: str = ""

    @classmethod
    def file(cls, source: str, name: str) -> Need:
        """One file."""
        return cls(source, (name,), name)

    @classmethod
    def network(cls, source: str) -> Need:
        """A network in transformers' format."""
        return cls(source, NETWORK)

    @classmethod
    def vocabulary(cls, source: str) -> Need:
        """A tokenizer's files."""
        return cls(source, tuple(VOCABULARIES), "--include '*token*' --include 'vocab*' --include merges.txt")

    @property
    def met(self) -> bool:
        """Whether it is there."""
        local = Path(self.source)
        if local.is_file() or local.is_dir():
            return local.is_file() or any((local / name).is_file() for name in self.files)
        found = cached_file(self.source, self.files)
        return found is not None and (self.files != NETWORK or has_weights(found.parent))

    @property
    def command(self) -> str:
        """How to get it."""
        return download_command(self.source, self.pattern)
