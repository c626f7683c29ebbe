"""How sd-scripts and ComfyUI put a LoRA file into a model of the original code, written down anew for tests.

Facts from kohya-ss/sd-scripts (networks/lora.py, lora_sd3.py) and ComfyUI (comfy/lora.py, comfy/utils.py,
comfy/weight_adapter/lora.py): names, and W + strength · alpha / len(down) · up · down.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Slot = tuple[str, slice]
"""A weight of the original code, and its rows."""
ALL = slice(None)

RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
OUTSIDE = [
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
]


def unet_modules(unet: nn.Module) -> dict[str, str]:
    """Modules with parameters: diffusers' name to the original one, by walking the blocks in the original's order."""
    prefixes = [(new, old) for old, new in OUTSIDE]
    number = 1
    for b, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            prefixes += [
                (f"down_blocks.{b}.resnets.{i}.{new}", f"input_blocks.{number}.0.{old}") for old, new in RESNET
            ]
            prefixes.append((f"down_blocks.{b}.attentions.{i}", f"input_blocks.{number}.1"))
            number += 1
        if block.downsamplers:
            prefixes.append((f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{number}.0.op"))
            number += 1
    for i, place in enumerate((0, 2)):
        prefixes += [(f"mid_block.resnets.{i}.{new}", f"middle_block.{place}.{old}") for old, new in RESNET]
    prefixes.append(("mid_block.attentions.0", "middle_block.1"))
    number = 0
    for b, block in enumerate(unet.up_blocks):
        attends = len(getattr(block, "attentions", ()))
        for i in range(len(block.resnets)):
            prefixes += [(f"up_blocks.{b}.resnets.{i}.{new}", f"output_blocks.{number}.0.{old}") for old, new in RESNET]
            prefixes.append((f"up_blocks.{b}.attentions.{i}", f"output_blocks.{number}.1"))
            if block.upsamplers and i == len(block.resnets) - 1:
                place = 2 if attends else 1
                prefixes.append((f"up_blocks.{b}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"))
            number += 1
    found = {}
    for key in unet.state_dict():
        name = key.rpartition(".")[0]
        matches = [(new, old) for new, old in prefixes if name == new or name.startswith(f"{new}.")]
        assert len(matches) == 1, name
        new, old = matches[0]
        found[name] = old + name.removeprefix(new)
    return found


def to_original_unet(unet: nn.Module) -> State:
    names = unet_modules(unet)
    return {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v.clone() for k, v in unet.state_dict().items()}


JOINT = [
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
]
SD3_OUTSIDE = [
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
]
QKV = [
    ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
]


def mmdit_slots(transformer: nn.Module) -> dict[str, Slot]:
    """Modules of diffusers' transformer: the original module and the rows of it."""
    slots: dict[str, Slot] = {new: (old, ALL) for old, new in SD3_OUTSIDE}
    for i, block in enumerate(transformer.transformer_blocks):
        width = block.attn.to_q.out_features
        for old, new in JOINT:
            slots[f"transformer_blocks.{i}.{new}"] = (f"joint_blocks.{i}.{old}", ALL)
        for old, parts in QKV:
            for third, new in enumerate(parts):
                rows = slice(third * width, (third + 1) * width)
                slots[f"transformer_blocks.{i}.{new}"] = (f"joint_blocks.{i}.{old}", rows)
    return slots


def to_original_mmdit(transformer: nn.Module) -> State:
    """The original's weights; its last modulations hold shift before scale, diffusers' scale before shift."""
    slots, pieces = mmdit_slots(transformer), {}
    state = transformer.state_dict()
    last = len(transformer.transformer_blocks) - 1
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    found: State = {"pos_embed": state.pop("pos_embed.pos_embed").clone()}
    for key, value in state.items():
        name, _, end = key.rpartition(".")
        if name in swapped:
            value = torch.cat(value.chunk(2)[::-1])
        original, rows = slots[name]
        pieces.setdefault(f"{original}.{end}", []).append((rows.start or 0, value))
    for key, parts in pieces.items():
        found[key] = torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])]).clone()
    return found


def apply_file(file: State, named: dict[str, Slot], weights: State) -> int:
    """Adds a LoRA file to original weights, in place; every key must be used. Returns the modules changed."""
    left = set(file)
    changed = 0
    for name, (original, rows) in named.items():
        if f"{name}.lora_up.weight" not in file:
            continue
        up, down = file[f"{name}.lora_up.weight"], file[f"{name}.lora_down.weight"]
        scale = file[f"{name}.alpha"].item() / len(down)
        weight = weights[f"{original}.weight"][rows]
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        left -= {f"{name}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
        changed += 1
    assert not left, sorted(left)
    return changed


def sd_scripts_names(kind: str, denoiser: nn.Module) -> dict[str, Slot]:
    """'lora_unet_' and the module's name in the code sd-scripts trains: diffusers' for SD 1.x, else the original's."""
    if kind == "sd3":  # only the layers of joint blocks
        originals = {original for original, _ in mmdit_slots(denoiser).values() if original.startswith("joint_blocks.")}
    else:
        originals = set(unet_modules(denoiser).values())
    if kind == "sd1":
        return {f"lora_unet_{new.replace('.', '_')}": (old, ALL) for new, old in unet_modules(denoiser).items()}
    return {f"lora_unet_{name.replace('.', '_')}": (name, ALL) for name in originals}


def comfyui_names(kind: str, denoiser: nn.Module) -> dict[str, Slot]:
    """Original names behind 'lora_unet_', and diffusers' behind 'lora_unet_' (UNets) or 'lora_transformer_' (SD 3)."""
    if kind == "sd3":
        slots, prefix = mmdit_slots(denoiser), "lora_transformer_"
    else:
        slots, prefix = {new: (old, ALL) for new, old in unet_modules(denoiser).items()}, "lora_unet_"
    named = {f"lora_unet_{old.replace('.', '_')}": (old, ALL) for old, _ in slots.values()}
    return named | {prefix + new.replace(".", "_"): slot for new, slot in slots.items()}
