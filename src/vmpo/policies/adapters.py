"""LoRA adapters of policies: added, listed, written and read in the format diffusers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from vmpo.errors import UserError
from vmpo.policies.pipeline import PipelinePolicy

FILE = "pytorch_lora_weights.safetensors"


def lora_config(policy_class: type[PipelinePolicy], rank: int, alpha: float, targets: list[str] | None) -> LoraConfig:
    """Hu et al. 2022, arXiv 2106.09685: W + alpha/rank·B·A, B zero at the start."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(targets or policy_class.lora_targets),
    )


def add_lora(policy: PipelinePolicy, rank: int, alpha: float, targets: list[str] | None, seed: int) -> None:
    """Adds a trainable adapter, float32, whose output starts at zero.

    Raises:
        UserError: if no module bears one of the names.
    """
    torch.manual_seed(seed)  # the adapter's start is part of the run's seed
    try:
        policy.denoiser.add_adapter(lora_config(type(policy), rank, alpha, targets))
    except ValueError as error:
        raise UserError(f"model.lora.targets {targets}: {str(error).splitlines()[0]}") from error
    for parameter in lora_parameters(policy):
        parameter.data = parameter.data.float()


def lora_parameters(policy: PipelinePolicy) -> list[nn.Parameter]:
    """The adapter's parameters, in a fixed order."""
    return [p for p in policy.denoiser.parameters() if p.requires_grad]


def save_lora(policy: PipelinePolicy, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` as diffusers loads it, rank and alpha included."""
    config = policy.denoiser.peft_config["default"].to_dict()
    state = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(policy.denoiser).items()}
    name = policy.denoiser_name
    layers = {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": config}
    policy.pipeline_class.save_lora_weights(folder, **layers)


def load_lora(policy: PipelinePolicy, folder: Path) -> None:
    """Loads an adapter written by `save_lora` or by diffusers.

    Raises:
        UserError: if there is none.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"no adapter at '{folder / FILE}'; 'vmpo train' writes one into its run folder's adapter/")
    policy.pipe.load_lora_weights(str(folder), adapter_name="default")
