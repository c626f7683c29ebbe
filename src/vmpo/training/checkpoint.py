"""Full training state on disk, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from vmpo.errors import UserError

KEEP = 2


def replace_folder(fill: Any, target: Path) -> None:
    """Calls `fill(folder)` on a fresh folder beside `target` and puts it in the target's place.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            retired = target.with_name(f".{target.name}.old")
            shutil.rmtree(retired, ignore_errors=True)
            os.replace(target, retired)
            os.replace(temporary, target)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as Python, torch and safetensors report it
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write '{target}': {getattr(error, 'strerror', None) or error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("epoch-*") if (p / "state.pt").is_file())


def random_states() -> dict[str, Any]:
    """States of every global random generator."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Takes up what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """Writes the state after `epoch` epochs and the metrics so far; keeps the newest two."""

    def fill(temporary: Path) -> None:
        torch.save(state, temporary / "state.pt")
        (temporary / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    replace_folder(fill, folder / f"epoch-{epoch:06d}")
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The newest whole checkpoint's state and metrics, or None."""
    found = checkpoints(folder)
    if not found:
        return None
    state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=False)
    lines = (found[-1] / "metrics.jsonl").read_text().splitlines()
    return state, [json.loads(line) for line in lines]
