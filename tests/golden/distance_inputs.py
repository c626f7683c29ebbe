"""Pictures and weights of the golden distances, made from seeds: nothing but the expected numbers is stored.

Weights are drawn name by name in alphabetical order, in the published formats and shapes, smaller where the published
code allows it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZES = [(64, 64), (96, 64), (48, 120), (112, 112), (301, 157), (77, 200), (40, 256), (64, 333)]
WIDTH = 128
Shapes = dict[str, tuple[int, ...]]


def picture(index: int, variant: int = 0) -> Tensor:
    """Picture (3, H, W) with 8-bit values in [0, 1]; `variant` 1 is another picture of the same size."""
    height, width = SIZES[index % len(SIZES)]
    rng = np.random.default_rng([index, variant])
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    kind = (index + 3 * variant) % 8
    grey = [
        lambda: rng.random((3, height, width)),
        lambda: np.stack([x / width, y / height, 1 - x / width]),
        lambda: np.stack([(x // 8 + y // 8) % 2 * tone for tone in (1.0, 0.6, 0.2)]),
        lambda: np.stack([np.hypot(x - width / 2, y - height / 2) < r * min(height, width) for r in (0.2, 0.3, 0.45)]),
        lambda: np.stack([0.5 + 0.5 * np.sin(x / k + y / (k + 3) + index) for k in (3, 7, 19)]),
        lambda: np.stack([np.full_like(x, tone) for tone in (0.1, 0.5, 0.9)]),
        lambda: rng.random((3, height, width)).cumsum(1).cumsum(2) % 1.0,
        lambda: np.stack([x % 16 < 4, y % 24 < 5, (x + y) % 10 < 3]),
    ][kind]()
    pixels = np.clip(np.asarray(grey, np.float64) + 0.03 * rng.standard_normal((3, height, width)), 0, 1)
    return torch.from_numpy(np.round(pixels * 255) / 255).float()


def drawn(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Tensors of normal numbers, scaled so that activations and gradients stay of order one."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = rng.standard_normal(shape).astype(np.float32)
        if "norm" in name or "pos_drop" in name:
            values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
        elif len(shape) in (2, 4) and "lora" not in name:
            values = values * (1.6 / np.sqrt(np.prod(shape[1:])))
        elif name.endswith("bias"):
            values = 0.2 * values
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


# LPIPS

CONVOLUTIONS: dict[str, list[tuple[int, int, int, int]]] = {  # index, channels in, channels, size
    "alex": [(0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3)],
    "vgg": [
        (index, before, channels, 3)
        for index, before, channels in zip(
            (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
            (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512),
            (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
            strict=True,
        )
    ],
}
HEADS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def write_lpips(folder: Path, net: str) -> tuple[Path, Path]:
    """Files of a backbone in torchvision's format, with a layer LPIPS does not use, and of heads."""
    shapes: Shapes = {"classifier.1.weight": (4, 4)}
    for index, before, channels, size in CONVOLUTIONS[net]:
        shapes |= {
            f"features.{index}.weight": (channels, before, size, size),
            f"features.{index}.bias": (channels,),
        }
    heads = drawn({f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate(HEADS[net])}, seed=2)
    torch.save(drawn(shapes, seed=1), folder / f"{net}_backbone.pth")
    torch.save({name: weight.abs() for name, weight in heads.items()}, folder / f"{net}_heads.pth")
    return folder / f"{net}_backbone.pth", folder / f"{net}_heads.pth"


# DreamSim


def vit_shapes(width: int, depth: int, patch: int, projection: int = 0, grid: int = 0, scaled: bool = False) -> Shapes:
    """Shapes of a vision transformer in the format of DINO's repository."""
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (grid or 224 // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"blocks.{index}." for index in range(depth)):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for layer, shape in layers.items():
            shapes |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        if scaled:
            shapes |= {f"{block}{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
    if projection:
        shapes |= {"pos_drop.weight": (width,), "pos_drop.bias": (width,), "proj": (width, projection)}
    if scaled:
        shapes |= {"mask_token": (1, width)}
    return shapes


def lora_shapes(depths: list[int], width: int, rank: int) -> Shapes:
    """Shapes of peft's adapter of the attention of every branch."""
    name = "base_model.model.extractor_list.{}.model.blocks.{}.attn.qkv.lora_{}.weight"
    places = [(branch, block) for branch, depth in enumerate(depths) for block in range(depth)]
    return {name.format(*place, "A"): (rank, width) for place in places} | {
        name.format(*place, "B"): (3 * width, rank) for place in places
    }


def write_adapter(folder: Path, shapes: Shapes, seed: int) -> None:
    """A folder as peft saves it; rank and alpha are those of the published training settings."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: 0.5 * w for name, w in drawn(shapes, seed).items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 0.5, "lora_dropout": 0.3, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["qkv"]}))


def write_dreamsim(folder: Path, variant: str, width: int = WIDTH, depth: int = 2, projection: int = 96) -> Path:
    """An unpacked release of a variant. The DINO branches have 12 blocks: the published code reads the twelfth."""
    folder.mkdir(parents=True, exist_ok=True)
    vit = {"width": width}
    if variant == "ensemble":
        torch.save(drawn(vit_shapes(depth=12, patch=16, **vit), 11), folder / "dino_vitbase16_pretrain.pth")
        for seed, name in ((12, "clip_vitb16"), (13, "open_clip_vitb16")):
            weights = drawn(vit_shapes(depth=depth, patch=16, projection=projection, **vit), seed)
            torch.save({"state_dict": weights}, folder / f"{name}_pretrain.pth.tar")
        write_adapter(folder / "ensemble_lora", lora_shapes([12, depth, depth], width, 16), 14)
    elif variant == "dinov2_vitb14":
        weights = drawn(vit_shapes(depth=12, patch=14, grid=37, scaled=True, **vit), 15)
        torch.save(weights, folder / "dinov2_vitb14_pretrain.pth")
        write_adapter(folder / "dinov2_vitb14_single_lora", lora_shapes([12], width, 16), 16)
    elif variant in ("clip_vitb32", "open_clip_vitb32"):
        seed = 17 if variant == "clip_vitb32" else 22
        weights = drawn(vit_shapes(depth=depth, patch=32, projection=projection, **vit), seed)
        torch.save({"state_dict": weights}, folder / f"{variant}_pretrain.pth.tar")
        write_adapter(folder / f"{variant}_single_lora", lora_shapes([depth], width, 16), 18)
    else:
        torch.save(drawn(vit_shapes(depth=12, patch=16, **vit), 21), folder / "dino_vitbase16_pretrain.pth")
        write_adapter(folder / f"{variant}_single_lora", lora_shapes([12], width, 16), 20)
    return folder
