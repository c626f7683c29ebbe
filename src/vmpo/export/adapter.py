"""An adapter file taken apart: which modules it changes, by which matrices, at which scale."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vmpo.errors import UserError

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class LoRAModule:
    """W + alpha / rank · up · down (Hu et al. 2022, arXiv 2106.09685).

    Attributes:
        name: of the module within the denoiser, as diffusers calls it.
        down: (rank, in), or (rank, in, height, width) of a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        alpha: numerator of the scale.
    """

    name: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return len(self.down)


@dataclass(frozen=True)
class Adapter:
    """The adapter of a denoiser, 'unet' or 'transformer', and the LoRA configuration in its file's metadata."""

    file: Path
    denoiser: str
    config: dict[str, Any]
    modules: list[LoRAModule]


def read_adapter(file: Path) -> Adapter:
    """Reads a `pytorch_lora_weights.safetensors` that `vmpo train` wrote.

    Raises:
        UserError: if it is missing, damaged, or holds anything but plain LoRA of one denoiser.
    """
    if not file.is_file():
        raise UserError(f"no adapter at '{file}'; 'vmpo train' writes one into its run folder's adapter/")
    try:
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        tensors = load_file(file)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"adapter '{file}' cannot be read: {error}") from error
    denoiser = next(iter(tensors), "").partition(".")[0]
    if denoiser not in DENOISERS:
        raise UserError(f"adapter '{file}' holds no weights of a {' or '.join(DENOISERS)}")
    config = {k.removeprefix(f"{denoiser}."): v for k, v in metadata.items()}
    return Adapter(file, denoiser, config, _modules(file, denoiser, config, tensors))


def _modules(file: Path, denoiser: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[LoRAModule]:
    found = []
    down_end, up_end = ".lora_A.weight", ".lora_B.weight"
    for key in sorted(tensors):
        if not key.startswith(f"{denoiser}.") or not key.endswith((down_end, up_end)):
            raise UserError(f"adapter '{file}': '{key}' is no plain LoRA weight of the {denoiser}")
        if key.endswith(down_end):
            name = key.removeprefix(f"{denoiser}.").removesuffix(down_end)
            down, up = tensors[key], tensors.get(f"{denoiser}.{name}{up_end}")
            if up is None or up.shape[1] != len(down):
                raise UserError(f"adapter '{file}': '{key}' has no partner of the same rank")
            found.append(LoRAModule(name, down, up, _alpha(config, name, len(down))))
    return found


def _alpha(config: dict[str, Any], name: str, rank: int) -> float:
    """The numerator of a module's scale; a file that does not name it means alpha = rank, as in diffusers."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.get("lora_alpha", rank))
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
