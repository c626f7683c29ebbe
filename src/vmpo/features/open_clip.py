"""CLIP networks of open_clip's and OpenAI's checkpoints as networks of transformers.

References:
    OpenCLIP (Ilharco et al., 2021, https://github.com/mlfoundations/open_clip); the names of the tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.weights import from_state_dict

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

TEXT_HEAD_WIDTH = 64  # of every published CLIP

_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def clip_from_open_clip(
    state: dict[str, Tensor],
    source: str,
    dtype: torch.dtype = torch.float32,
    vision_head_width: int = 64,
    activation: Literal["gelu", "quick_gelu"] = "gelu",
) -> CLIPModel:
    """A frozen transformers.CLIPModel with the weights of an open_clip or OpenAI state dict of a vision transformer.

    Sizes are read off the tensors; what no tensor tells is given: the width of an attention head of the vision
    tower (64; 80 in ViT-H-14) and the activation ('quick_gelu' in OpenAI's networks).

    Raises:
        UserError: if the tensors are not those of such a network.
    """
    from transformers import CLIPModel

    try:
        config = _config(state, vision_head_width, activation)
    except KeyError as error:
        raise UserError(f"'{source}' is no open_clip checkpoint of a vision transformer: it has no {error}") from error
    return from_state_dict(CLIPModel, config, _renamed(state), dtype, source)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _OUTER:
            renamed[_OUTER[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif "transformer.resblocks." in name:
            renamed |= _block_tensors(name, tensor)
    return renamed


def _block_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    index, _, rest = name.split("transformer.resblocks.")[1].partition(".")
    prefix = f"{tower}.encoder.layers.{index}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{part}_proj.{kind}": value.contiguous() for part, value in parts}
    module, _, kind = rest.rpartition(".")
    return {f"{prefix}.{_BLOCK[module]}.{kind}": tensor}


def _config(state: dict[str, Tensor], vision_head_width: int, activation: str) -> CLIPConfig:
    from transformers import CLIPConfig

    def layers(prefix: str) -> int:
        return len({name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(prefix)})

    vocab_size, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    text = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers("transformer.resblocks."),
        "num_attention_heads": text_width // TEXT_HEAD_WIDTH,
        "max_position_embeddings": len(state["positional_embedding"]),
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,  # the text's embedding is read at its first one
        "pad_token_id": vocab_size - 1,
        "hidden_act": activation,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers("visual.transformer.resblocks."),
        "num_attention_heads": vision_width // vision_head_width,
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": activation,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])
