"""An adapter as peft saves it: for `PeftModel.from_pretrained` on the bare denoiser."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file

from vmpo.export.adapter import Adapter


def save_peft(adapter: Adapter, base: str, folder: Path) -> None:
    """Writes `adapter_config.json`, which names every module, and `adapter_model.safetensors`."""
    first = adapter.modules[0]
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # peft divides it by r, whatever number it is
        rank_pattern={m.name: m.rank for m in adapter.modules if m.rank != first.rank},
        alpha_pattern={m.name: m.alpha for m in adapter.modules if m.alpha != first.alpha},
        target_modules=[m.name for m in adapter.modules],
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    state = {}
    for module in adapter.modules:
        state[f"base_model.model.{module.name}.lora_A.weight"] = module.down.contiguous()
        state[f"base_model.model.{module.name}.lora_B.weight"] = module.up.contiguous()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
