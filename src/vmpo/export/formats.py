"""From a run folder to a folder in one of the formats."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vmpo.errors import UserError
from vmpo.evaluation.evaluate import read_run_config
from vmpo.export.adapter import Adapter, read_adapter
from vmpo.export.card import write_card
from vmpo.export.kohya import Base, comfyui_state, kohya_state, read_base
from vmpo.export.merged import merged_pipeline
from vmpo.export.peft import save_peft
from vmpo.policies.adapters import FILE
from vmpo.training.checkpoint import replace_folder
from vmpo.training.config import Config

FORMATS = {
    "diffusers": "pytorch_lora_weights.safetensors and a model card: pipe.load_lora_weights",
    "peft": "adapter_config.json and adapter_model.safetensors: PeftModel.from_pretrained",
    "kohya": "one file for kohya-ss sd-scripts and A1111",
    "comfyui": "one file for ComfyUI's models/loras",
    "merged": "the whole pipeline with the adapter in its weights",
}
Save = Callable[[Path], None]
ToState = Callable[[Adapter, Base], tuple[dict[str, Tensor], dict[str, str]]]


def export(
    run: Path,
    to: str,
    out: Path | None = None,
    *,
    adapter: str = "adapter",
    card: bool = False,
    repo: str | None = None,
    tables: Path | None = None,
) -> Path:
    """Writes a run's adapter to a new folder, whole or not at all; returns the folder.

    Args:
        to: one of FORMATS.
        out: the folder; RUN/export/FORMAT if None.
        adapter: folder of the adapter within the run.
        card: writes a model card even where the format has none by default.
        repo, tables: of `write_card`.

    Raises:
        UserError: if there is no such format, run or adapter, its base model is missing, or the folder exists.
    """
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(FORMATS)}"
        raise UserError(f"no export format '{to}'; {hint}")
    config = read_run_config(run)
    taken = read_adapter(run / adapter / FILE)
    folder = out or run / "export" / to
    if folder.exists():
        raise UserError(f"'{folder}' exists; name another with --out, or remove it")
    save = _PREPARE[to](taken, config)

    def fill(temporary: Path) -> None:
        save(temporary)
        if card or to == "diffusers":
            write_card(temporary, run, config, taken, to, repo=repo, tables=tables)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors are written for their owner alone

    replace_folder(fill, folder)
    return folder


def file_name(config: Config) -> str:
    """The run's name as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).strip("-.") or "adapter"


def _diffusers(adapter: Adapter, config: Config) -> Save:
    def save(folder: Path) -> None:
        shutil.copyfile(adapter.file, folder / adapter.file.name)

    return save


def _peft(adapter: Adapter, config: Config) -> Save:
    return lambda folder: save_peft(adapter, config.model.path, folder)


def _single_file(adapter: Adapter, config: Config, to_state: ToState) -> Save:
    state, metadata = to_state(adapter, read_base(config.model.path, config.model.revision, adapter.denoiser))
    return lambda folder: save_file(state, folder / f"{file_name(config)}.safetensors", metadata | {"format": "pt"})


def _merged(adapter: Adapter, config: Config) -> Save:
    pipe = merged_pipeline(adapter, config.model.path, config.model.revision, config.model.variant)
    return lambda folder: pipe.save_pretrained(folder)


_PREPARE: dict[str, Callable[[Adapter, Config], Save]] = {
    "diffusers": _diffusers,
    "peft": _peft,
    "kohya": lambda adapter, config: _single_file(adapter, config, kohya_state),
    "comfyui": lambda adapter, config: _single_file(adapter, config, comfyui_state),
    "merged": _merged,
}
