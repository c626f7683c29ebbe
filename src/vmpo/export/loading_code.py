"""The lines of Python, or the place of the file, by which an export is used."""

from __future__ import annotations

from vmpo.export.adapter import Adapter
from vmpo.export.card_settings import is_hub_name
from vmpo.training.config import Config

DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
PLACES = {
    "kohya": "Put the .safetensors file into A1111's `models/Lora`, or give it to sd-scripts as `--network_weights`.\n",
    "comfyui": "Put the .safetensors file into ComfyUI's `models/loras`; the node LoraLoaderModelOnly loads it.\n",
}


def loading_code(config: Config, adapter: Adapter, to: str, repo: str | None) -> str:
    """Markdown: how the export is loaded, at full strength.

    Args:
        repo: its name on the hub; 'THIS_FOLDER' stands for it if None.
    """
    if to in PLACES:
        return PLACES[to]
    base = config.model.path if is_hub_name(config.model.path) else "BASE_MODEL"
    place, name = repo or "THIS_FOLDER", adapter.denoiser
    start, draw = ["import torch", "from diffusers import DiffusionPipeline"], 'image = pipe("PROMPT").images[0]'
    load = f'pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype={DTYPES[config.model.weights]}).to("cuda")'
    if to == "merged":
        lines = [*start, "", load.replace(f'"{base}"', f'"{place}"'), draw]
    elif to == "peft":
        wrap = f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{place}")'
        lines = [*start, "from peft import PeftModel", "", load, wrap, draw]
    else:
        lines = [*start, "", load, f'pipe.load_lora_weights("{place}")', draw]
    return "```python\n" + "\n".join(lines) + "\n```\n"
