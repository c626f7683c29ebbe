"""From a model's name or folder to a policy."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from vmpo.errors import UserError
from vmpo.policies.stable_diffusion_3 import StableDiffusion3Policy

POLICIES = {"StableDiffusion3Pipeline": StableDiffusion3Policy}
EMBEDDED = ("glyphs",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def model_folder(path: str) -> str:
    """The folder of an embedded model, or the path itself."""
    return str(resources.files("vmpo").joinpath(f"assets/{path}")) if path in EMBEDDED else path


def load_policy(
    path: str,
    *,
    height: int,
    width: int,
    guidance: float = 1.0,
    max_sequence_length: int = 256,
    weights: str = "fp32",
    autocast: str = "none",
    device: torch.device | str = "cpu",
) -> StableDiffusion3Policy:
    """Loads a pipeline, frozen and in evaluation mode, as a policy.

    Raises:
        UserError: if the weights are not there, or no policy is written for the pipeline's class.
    """
    folder = model_folder(path)
    name = pipeline_class(folder)
    if name not in POLICIES:
        raise UserError(
            f"model '{path}' is a {name}, which vmpo does not know; it knows {', '.join(POLICIES)}. "
            f"To add it, write src/vmpo/policies/<model>.py as docs/extending.md shows"
        )
    policy_class = POLICIES[name]
    dtype = DTYPES[weights]
    try:
        missing = {k: None for k in _absent_components(folder)}
        pipe = policy_class.pipeline_class.from_pretrained(folder, dtype=dtype, **missing)
    except (OSError, ValueError) as error:
        raise UserError(f"model '{path}' could not be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.to(device)
    return policy_class(pipe, height, width, guidance, max_sequence_length, DTYPES[autocast])


def pipeline_class(folder: str) -> str:
    """The class named in `model_index.json` of a folder or hub repository.

    Raises:
        UserError: if it cannot be found, with the way to get the weights.
    """
    try:
        index = DiffusionPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no diffusers model at '{folder}': it is neither a folder with a model_index.json nor a hub model that "
            f"can be reached; 'hf download {folder} --local-dir DIR' fetches one, then pass model.path=DIR"
        ) from error
    return str(index["_class_name"])


def _absent_components(folder: str) -> list[str]:
    # StableDiffusion3Pipeline refuses to load without T5 unless told so, although it runs without.
    index_file = Path(folder) / "model_index.json"
    if not index_file.is_file():
        return []
    index: dict[str, Any] = json.loads(index_file.read_text())
    absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
    expected = [k for k in ("text_encoder_3", "tokenizer_3") if index["_class_name"] == "StableDiffusion3Pipeline"]
    return [*absent, *(k for k in expected if k not in index)]


def add_lora(policy: StableDiffusion3Policy, rank: int, alpha: float, targets: list[str] | None, seed: int) -> None:
    """Adds a trainable adapter, float32, whose output starts at zero.

    Raises:
        UserError: if no module bears one of the names.
    """
    torch.manual_seed(seed)  # the adapter's start is part of the run's seed
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(targets or policy.lora_targets),
    )
    try:
        policy.denoiser.add_adapter(config)
    except ValueError as error:
        raise UserError(f"model.lora.targets {targets}: {str(error).splitlines()[0]}") from error
    for parameter in lora_parameters(policy):
        parameter.data = parameter.data.float()


def lora_parameters(policy: StableDiffusion3Policy) -> list[torch.nn.Parameter]:
    """The adapter's parameters, in a fixed order."""
    return [p for p in policy.denoiser.parameters() if p.requires_grad]


def save_lora(policy: StableDiffusion3Policy, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` as diffusers loads it, rank and alpha included."""
    config = policy.denoiser.peft_config["default"].to_dict()
    state = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(policy.denoiser).items()}
    policy.pipeline_class.save_lora_weights(
        folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
    )


def load_lora(policy: StableDiffusion3Policy, folder: Path) -> None:
    """Loads an adapter written by `save_lora` or by diffusers.

    Raises:
        UserError: if there is none.
    """
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise UserError(f"no adapter at '{file}'; 'vmpo train' writes one into its run folder's adapter/")
    policy.pipe.load_lora_weights(str(folder), adapter_name="default")
