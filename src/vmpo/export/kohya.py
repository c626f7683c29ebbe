"""One file with `lora_down`, `lora_up` and `alpha` by module: the format of kohya-ss sd-scripts, A1111 and ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from vmpo.errors import UserError
from vmpo.export.adapter import Adapter, LoRAModule
from vmpo.export.mmdit_names import is_third, original_mmdit_modules
from vmpo.export.unet_names import original_unet_name
from vmpo.policies.loading import model_folder, policy_class_of

CLASSES = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}


@dataclass(frozen=True)
class Base:
    """What the names of a model's modules depend on: its pipeline's class and its denoiser's configuration."""

    pipeline: str
    config: dict[str, Any]


def read_base(path: str, revision: str | None, denoiser: str) -> Base:
    """Reads the configurations of a model, no weights.

    Raises:
        UserError: if they cannot be had, or the model's kind is unknown.
    """
    policy = policy_class_of(path, revision)
    if policy.denoiser_name != denoiser:
        raise UserError(f"the adapter is of a {denoiser}, and model '{path}' has a {policy.denoiser_name}")
    try:
        config = CLASSES[denoiser].load_config(model_folder(path), subfolder=denoiser, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model '{path}' has no {denoiser}/config.json: {str(error).splitlines()[0]}") from error
    return Base(policy.pipeline_class.__name__, dict(config))


def kohya_state(adapter: Adapter, base: Base) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata as sd-scripts reads them: its own names of SD 1.x and 2.x are those of diffusers.

    Raises:
        UserError: for a module that has no name there.
    """
    if base.pipeline == "StableDiffusion3Pipeline":
        modules = original_mmdit_modules(adapter.modules, base.config["num_layers"])
        return _state("lora_unet_", modules), _metadata(adapter, "networks.lora_sd3", None)
    if base.pipeline == "StableDiffusionXLPipeline":
        modules = [LoRAModule(original_unet_name(m.name, base.config), m.down, m.up, m.alpha) for m in adapter.modules]
        return _state("lora_unet_", modules), _metadata(adapter, "networks.lora", "sdxl_base_v1-0")
    version = "sd_v2" if base.config.get("cross_attention_dim") == 1024 else "sd_v1"
    return _state("lora_unet_", adapter.modules), _metadata(adapter, "networks.lora", version)


def comfyui_state(adapter: Adapter, base: Base) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights as ComfyUI's lora.py reads them.

    As for sd-scripts, but that queries, keys and values of SD 3 stay apart, under diffusers' names behind
    'lora_transformer_', as OneTrainer writes them: ComfyUI itself puts them into the thirds of the fused matrices, and
    no zeros have to be stored.

    Raises:
        UserError: for a module that has no name there.
    """
    if base.pipeline != "StableDiffusion3Pipeline":
        return kohya_state(adapter, base)
    thirds = [module for module in adapter.modules if is_third(module.name)]
    others = [module for module in adapter.modules if not is_third(module.name)]
    renamed = original_mmdit_modules(others, base.config["num_layers"])
    return _state("lora_transformer_", thirds) | _state("lora_unet_", renamed), {}


def _state(prefix: str, modules: Iterable[LoRAModule]) -> dict[str, Tensor]:
    state = {}
    for module in modules:
        key = prefix + module.name.replace(".", "_")
        state[f"{key}.lora_down.weight"] = module.down.contiguous()
        state[f"{key}.lora_up.weight"] = module.up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(module.alpha)
    return state


def _metadata(adapter: Adapter, network: str, version: str | None) -> dict[str, str]:
    ranks, alphas = {m.rank for m in adapter.modules}, {m.alpha for m in adapter.modules}
    found = {
        "ss_network_module": network,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if version is not None:
        found |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return found
