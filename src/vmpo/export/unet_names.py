"""Names of UNet modules in the original code of Stable Diffusion and SDXL, from those of diffusers.

The original numbers input, middle and output blocks; diffusers has levels with resnets, attentions and resamplers.
sd-scripts trains SDXL under the original names (networks/lora.py), ComfyUI reads both.
"""

from __future__ import annotations

import re
from typing import Any

from vmpo.errors import UserError

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_unet_name(name: str, config: dict[str, Any]) -> str:
    """The original name of a module of a UNet2DConditionModel with this configuration.

    Raises:
        UserError: if the module has none.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    layers = config["layers_per_block"]
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if block and isinstance(layers, int):
        side, level, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        if side == "down":
            number = 1 + level * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{number + layers}.0.op"
            return f"input_blocks.{number + index}.{_inner(kind, rest)}"
        number = level * (layers + 1)
        if kind == "upsamplers":
            attends = "CrossAttn" in config["up_block_types"][level]
            return f"output_blocks.{number + layers}.{2 if attends else 1}.conv"
        return f"output_blocks.{number + index}.{_inner(kind, rest)}"
    middle = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", name)
    if middle:  # resnet, attention, resnet
        place = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        return f"middle_block.{place}.{_inner(middle[1], middle[3])[2:]}"
    raise UserError(f"the module '{name}' has no name in the original code, so its LoRA cannot be exported that way")


def _inner(kind: str, rest: str) -> str:
    return f"0.{RESNET[rest]}" if kind == "resnets" else f"1.{rest}"
