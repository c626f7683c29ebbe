"""Vision transformers in the format of DINO's repository, as transformers' CLIP image tower.

DINO, DINOv2 and DreamSim's copies of CLIP and OpenCLIP share one network, blocks of pre-normalised attention
and MLP, and one set of names (`patch_embed.proj`, `blocks.3.attn.qkv`, ...). The CLIP tower of transformers is that
network too; what it lacks is folded into its weights:

    bias b of the patches       into their position embeddings,           p_i + b
    layer scale γ of DINOv2     into the layer before it,                 diag(γ) W and γ b
    absent norms, projection    identities
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmpo.errors import UserError
from vmpo.features.strict_loading import load_strictly

Output = Literal["token", "projection"]
HEAD_DIM = 64  # of every published network of this family
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def convert_vit(
    weights: dict[str, Tensor],
    *,
    activation: Literal["gelu", "quick_gelu"],
    eps: float,
    output: Output,
    image_size: int,
    source: str,
) -> Any:
    """A `CLIPVisionModelWithProjection` whose `image_embeds` are the network's output, (B, 3, S, S) → (B, F).

    Arguments:
        weights: the state dict.
        activation, eps: of the MLPs and the layer norms.
        output: the class token behind the last block, before any norm, or normalised and projected.
        image_size: S; position embeddings of another size are interpolated as DINO does.
        source: of the weights, for errors.

    Raises:
        UserError: if tensors are missing, unknown or misshapen.
    """
    try:
        return _convert(dict(weights), activation, eps, output, image_size, source)
    except KeyError as error:
        raise UserError(f"'{source}' does not hold the weights of a vision transformer: {error} is missing") from error


def _convert(
    weights: dict[str, Tensor], activation: str, eps: float, output: Output, image_size: int, source: str
) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        projection_dim=weights["proj"].shape[1] if output == "projection" else width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_DIM,
        image_size=image_size,
        patch_size=patch,
        hidden_act=activation,
        layer_norm_eps=eps,
    )
    model = CLIPVisionModelWithProjection(config)
    if output == "token":
        model.vision_model.pre_layrnorm = nn.Identity()
        model.vision_model.post_layernorm = nn.Identity()
        model.visual_projection = nn.Identity()
    load_strictly(model, _renamed(weights, depth, image_size // patch, output), source)
    return model


def _renamed(weights: dict[str, Tensor], depth: int, grid: int, output: Output) -> dict[str, Tensor]:
    tower = "vision_model."
    positions = _resized_positions(weights.pop("pos_embed"), grid)[0]
    positions[1:] += weights.pop("patch_embed.proj.bias")
    renamed = {
        f"{tower}embeddings.class_embedding": weights.pop("cls_token").flatten(),
        f"{tower}embeddings.patch_embedding.weight": weights.pop("patch_embed.proj.weight"),
        f"{tower}embeddings.position_embedding.weight": positions,
    }
    for index in range(depth):
        old, new = f"blocks.{index}.", f"{tower}encoder.layers.{index}."
        for layer, scale in (("attn.proj", "ls1.gamma"), ("mlp.fc2", "ls2.gamma")):
            gamma = weights.pop(old + scale, None)
            if gamma is not None:
                weights[f"{old}{layer}.weight"] = weights[f"{old}{layer}.weight"] * gamma[:, None]
                weights[f"{old}{layer}.bias"] = weights[f"{old}{layer}.bias"] * gamma
        for kind in ("weight", "bias"):
            for name, tensor in zip("qkv", weights.pop(f"{old}attn.qkv.{kind}").chunk(3), strict=True):
                renamed[f"{new}self_attn.{name}_proj.{kind}"] = tensor
            renamed |= {f"{new}{name}.{kind}": weights.pop(f"{old}{layer}.{kind}") for layer, name in _BLOCK.items()}
    norms = {kind: weights.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    weights.pop("mask_token", None)  # of DINOv2's training
    if output == "projection":
        renamed |= {f"{tower}post_layernorm.{kind}": norm for kind, norm in norms.items()}
        renamed |= {f"{tower}pre_layrnorm.{kind}": weights.pop(f"pos_drop.{kind}") for kind in norms}
        renamed["visual_projection.weight"] = weights.pop("proj").T
    return renamed | weights  # what is left is unknown and makes the loading fail


def _resized_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, 1 + N, F) → (1, 1 + grid², F). The offset of 0.1 patches is DINO's and moves the sampled points."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions.clone()
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, scale_factor=(grid + 0.1) / side, mode="bicubic")
    return torch.cat([positions[:, :1], resized.flatten(2).mT], dim=1)
