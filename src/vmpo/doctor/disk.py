"""Where the caches are, how full, and how much room is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vmpo.doctor.findings import Finding
from vmpo.doctor.hub_cache import cache_folder as hub_folder
from vmpo.features.published_file import cache_folder as torch_folder
from vmpo.prompts.download import cache_folder as vmpo_folder
from vmpo.training.memory import GIB, readable

LEAST = 2 * GIB  # free, or the next download or checkpoint may fail


def disk() -> list[Finding]:
    """The hub's cache, PyTorch's, vmpo's, and the current directory, where runs go; and whether there is a token."""
    folders = {"hub": hub_folder(), "torch": torch_folder(), "vmpo": vmpo_folder()}
    found = [_folder(name, folder, _used(folder)) for name, folder in folders.items()]
    return [*found, _folder("here", Path.cwd(), None), _token()]


def _folder(name: str, folder: Path, used: int | None) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{_short(folder)}: " + (f"{readable(used)} used, " if used is not None else "") + f"{readable(free)} free"
    if free < LEAST:
        return Finding(name, "problem", text, (f"make room in {there}",))
    return Finding(name, "ok", text)


def _used(folder: Path) -> int:
    # the hub's cache links to its files: a link is not counted again
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)


def _short(folder: Path) -> str:
    return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "ok", "set")
    return Finding(
        "hub token",
        "missing",
        "none; gated models, such as Stable Diffusion 3.5, need one",
        ("hf auth login   # after accepting the licence on the model's page",),
    )
