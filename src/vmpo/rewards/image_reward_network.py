"""ImageReward's network on transformers' BLIP classes, from the published names of its tensors.

References:
    ImageReward (Xu et al., 2023, arXiv:2304.05977) and its published code.
    BLIP (Li et al., 2022, arXiv:2201.12086): ViT-L/16 at 224 pixels, BERT-base with cross-attention.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.features.weights import from_state_dict
from vmpo.rewards.score_head import ScoreHead, load_score_head

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

HEAD_WIDTH = 64  # of an attention head in both encoders

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageRewardNetwork(nn.Module):
    """Preprocessed pictures (B, 3, S, S) and token ids (B, L) with their mask → head output (B,), float32 or better."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: ScoreHead) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return self.head(hidden[:, 0].to(self.head.layers[0].weight.dtype))


def image_reward_network(
    state: dict[str, Tensor], source: str, dtype: torch.dtype = torch.float32
) -> ImageRewardNetwork:
    """The frozen network of a published state dict; sizes are read off the tensors, the head stays in float32.

    Raises:
        UserError: if the tensors are not those of ImageReward.
    """
    from transformers import BlipTextModel, BlipVisionModel

    vision, text = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
    try:
        vision_config = _vision_config(vision)
        text_config = _text_config(text, vision_config.hidden_size)
    except KeyError as error:
        raise UserError(f"'{source}' is no checkpoint of ImageReward: it has no {error}") from error
    network = ImageRewardNetwork(
        from_state_dict(BlipVisionModel, vision_config, _renamed(vision), dtype, source),
        from_state_dict(BlipTextModel, text_config, text, dtype, source, add_pooling_layer=False),
        load_score_head(_part(state, "mlp."), source),
    )
    return network.eval()


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name in _VISION:  # a tensor of its own
            renamed[_VISION[name]] = tensor
            continue
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, index, rest = module.split(".", 2)
            renamed[f"encoder.layers.{index}.{_BLOCK[rest]}.{kind}"] = tensor
        else:
            renamed[f"{_VISION[module]}.{kind}"] = tensor
    return renamed


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _vision_config(state: dict[str, Tensor]) -> BlipVisionConfig:
    from transformers import BlipVisionConfig

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(state, "blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(state: dict[str, Tensor], vision_width: int) -> BlipTextConfig:
    from transformers import BlipTextConfig

    vocab_size, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(state, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        bos_token_id=vocab_size - 2,  # [DEC], which ImageReward never uses
        is_decoder=True,  # which here means: with cross-attention
    )
