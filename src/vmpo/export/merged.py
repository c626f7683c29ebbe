"""The whole pipeline with the adapter in its weights."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from vmpo.errors import UserError
from vmpo.export.adapter import Adapter
from vmpo.policies.loading import model_folder, policy_class_of
from vmpo.policies.pipeline import PipelinePolicy

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merged_pipeline(adapter: Adapter, path: str, revision: str | None, variant: str | None) -> DiffusionPipeline:
    """Loads a model and adds the adapter to its weights: in float32, then rounded to the type they are stored in.

    Raises:
        UserError: if the model cannot be loaded.
    """
    policy_class = policy_class_of(path, revision)
    pipe = _load(path, policy_class, revision, variant)
    denoiser = getattr(pipe, policy_class.denoiser_name)
    stored = denoiser.dtype
    denoiser.float()
    try:
        pipe.load_lora_weights(str(adapter.file.parent), weight_name=adapter.file.name)
        pipe.fuse_lora(components=[policy_class.denoiser_name])
        pipe.unload_lora_weights()
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the adapter does not fit model '{path}': {str(error).splitlines()[0]}") from error
    denoiser.to(stored)
    return pipe


def _load(
    path: str, policy_class: type[PipelinePolicy], revision: str | None, variant: str | None
) -> DiffusionPipeline:
    try:
        folder = Path(model_folder(path))
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(path, revision=revision, variant=variant))
        present, absent = _components(folder, policy_class)
        dtypes = {name: _stored_dtype(folder / name, variant) for name in present}
        options: dict[str, Any] = dict.fromkeys(absent) | ({"variant": variant} if variant is not None else {})
        pipe = policy_class.pipeline_class.from_pretrained(
            folder, dtype={**dtypes, "default": torch.float32}, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model '{path}' could not be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _components(folder: Path, policy_class: type[PipelinePolicy]) -> tuple[list[str], list[str]]:
    """Components that the model has, and those it lacks but whose absence from_pretrained must be told."""
    index = json.loads((folder / "model_index.json").read_text())
    parameters = inspect.signature(policy_class.pipeline_class.__init__).parameters
    present: list[str] = []
    absent: list[str] = []
    for name, parameter in parameters.items():
        entry = index.get(name)
        if isinstance(entry, list):
            (present if entry[0] is not None else absent).append(name)
        elif entry is None and name != "self" and parameter.default is parameter.empty:
            absent.append(name)
    return present, absent


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """The type of most of a component's weights; float32 where there are no safetensors."""
    counts: Counter[str] = Counter()
    files = list(folder.glob("*.safetensors"))
    of_variant = [file for file in files if file.stem.partition(".")[2].startswith(variant or "")]
    plain = [file for file in files if "." not in file.stem]
    for file in (of_variant or plain) if variant else plain:
        with safe_open(file, "pt") as opened:
            counts.update(opened.get_slice(key).get_dtype() for key in list(opened.keys()))
    return DTYPES.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32
