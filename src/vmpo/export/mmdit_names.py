"""Modules of Stable Diffusion 3 in the original code: queries, keys and values are one matrix there.

sd-scripts trains SD 3 under the original names (networks/lora_sd3.py), and ComfyUI reads those too. sd-scripts itself
takes up the layers outside the blocks only in training.
"""

from __future__ import annotations

import re

import torch

from vmpo.errors import UserError
from vmpo.export.adapter import LoRAModule

IN_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
OUTSIDE = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}
FUSED = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
}
"""Name in diffusers: the fused matrix, and the third of its rows."""


def is_third(name: str) -> bool:
    """Whether a module of diffusers is a part of a fused matrix."""
    return name.split(".", 2)[-1] in FUSED


def original_mmdit_modules(modules: list[LoRAModule], num_layers: int) -> list[LoRAModule]:
    """The same changes of the weights, as LoRA of the original modules of a transformer with `num_layers` blocks.

    Raises:
        UserError: for a module that has no counterpart.
    """
    thirds: dict[str, dict[int, LoRAModule]] = {}
    for module in modules:
        if is_third(module.name):
            _, block, inner = module.name.split(".", 2)
            fused, third = FUSED[inner]
            thirds.setdefault(f"joint_blocks.{block}.{fused}", {})[third] = module
    whole = [_rename(module, num_layers) for module in modules if not is_third(module.name)]
    return whole + [_fuse(name, parts) for name, parts in thirds.items()]


def _rename(module: LoRAModule, num_layers: int) -> LoRAModule:
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module.name)
    if found and found[2] in IN_BLOCK:
        name = f"joint_blocks.{found[1]}.{IN_BLOCK[found[2]]}"
    elif module.name in OUTSIDE:
        name = OUTSIDE[module.name]
    else:
        raise UserError(
            f"the module '{module.name}' has no name in the original code, so its LoRA cannot be exported that way"
        )
    up = module.up
    if module.name in ("norm_out.linear", f"transformer_blocks.{num_layers - 1}.norm1_context.linear"):
        up = torch.cat(up.chunk(2)[::-1])  # the original's rows are shift and scale, those of diffusers scale and shift
    return LoRAModule(name, module.down, up, module.alpha)


def _fuse(name: str, parts: dict[int, LoRAModule]) -> LoRAModule:
    """LoRA of up to three row blocks as one: the downs stacked, the ups on the block diagonal; exact.

        [s_q·U_q D_q; s_k·U_k D_k; s_v·U_v D_v] = s · blockdiag(U_q, U_k, U_v) [D_q; D_k; D_v]

    The rank is the sum of theirs, hence alpha = s · (sum of ranks).
    """
    members = [parts[third] for third in sorted(parts)]
    scale = members[0].alpha / members[0].rank
    rank, height = sum(m.rank for m in members), len(members[0].up)
    up = members[0].up.new_zeros(3 * height, rank)
    column = 0
    for third in sorted(parts):
        part = parts[third]
        relative = part.alpha / part.rank / scale  # 1 unless modules were given different scales
        up[third * height : (third + 1) * height, column : column + part.rank] = part.up * relative
        column += part.rank
    return LoRAModule(name, torch.cat([m.down for m in members]), up, scale * rank)
