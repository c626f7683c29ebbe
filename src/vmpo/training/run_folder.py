"""Making a run folder, or taking one up, with one process at a time in it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from accelerate import Accelerator
from filelock import FileLock

from vmpo.disk import lock_folder, write_text
from vmpo.errors import UserError
from vmpo.training.config import Config
from vmpo.training.provenance import provenance


def open_run_folder(folder: Path, lock: FileLock, config: Config, accelerator: Accelerator, resume: bool) -> bool:
    """Makes the folder with its config and provenance; returns whether it was there before.

    Raises:
        UserError: if the folder holds another run, is in use, or cannot be written.
    """
    main = accelerator.is_main_process
    if main:
        lock_folder(folder, lock, f"run folder '{folder}'")
    accelerator.wait_for_everyone()
    used = (folder / "config.yaml").exists()
    if used and not resume:
        raise UserError(f"run folder '{folder}' is already in use; pass --resume to go on, or another --run")
    settings = config.model_dump(mode="json")
    if used and yaml.safe_load((folder / "config.yaml").read_text()) != settings:
        raise UserError(
            f"run folder '{folder}' was begun with other settings; resume it with those it was begun with "
            f"(its config.yaml holds them)"
        )
    accelerator.wait_for_everyone()
    if main:
        try:
            for name in ("checkpoints", "samples"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder '{folder}' cannot be made: {error.strerror}") from error
        if not used:
            facts = provenance(config.seed, accelerator.num_processes)
            write_text(folder / "provenance.json", json.dumps(facts, indent=2))
            write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    accelerator.wait_for_everyone()
    return used
