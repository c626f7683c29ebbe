"""CLIP's two towers, frozen: unit vectors of pictures, with a gradient where one is wanted, and of prompts.

References:
    CLIP (Radford et al., 2021, arXiv:2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmpo.features.clip_tokens import tokenise
from vmpo.features.weights import load_pretrained, network_dtype

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

    from vmpo.features.preprocessing import Preprocessing


_networks: dict[tuple[str, str, str | None], CLIPModel] = {}  # one for all who ask for the same


def load_clip(weights: str, dtype: str = "fp32", device: str | None = None, option: str = "weights") -> CLIPModel:
    """A frozen CLIP from a folder in transformers' format or a hub repository, shared by all who ask for the same.

    Arguments:
        weights: the folder or repository.
        dtype: 'fp32', 'bf16' or 'fp16'.
        device: where it will be placed; None: with the pictures.
        option: the user's name for `weights`, for what is said when they are not there.

    Raises:
        UserError: if there is none, or for an unknown dtype.
    """
    from transformers import CLIPModel

    key = weights, dtype, device
    if key not in _networks:
        _networks[key] = load_pretrained(CLIPModel, weights, network_dtype(dtype), option)
    return _networks[key]


def place(network: nn.Module, images: Tensor, device: str | None) -> torch.device:
    """Moves the network to `device`, or to where the pictures are; returns where that is."""
    target = torch.device(device) if device else images.device
    network.to(target)
    return target


def mark_broken(values: Tensor, images: Tensor) -> Tensor:
    """Values (B, ...) on the pictures' device, NaN where a picture has a pixel that is not finite."""
    broken = ~images.detach().isfinite().flatten(1).all(1)
    return values.to(images.device).masked_fill(broken.view(-1, *[1] * (values.ndim - 1)), torch.nan)


def embed_images(
    model: CLIPModel, images: Tensor, preprocessing: Preprocessing, batch: int = 32, device: str | None = None
) -> Tensor:
    """Unit vectors (B, D), float32 or better, of pictures (B, 3, H, W) in [0, 1]; NaN for a non-finite picture.

    A gradient reaches the pictures if they ask for one; no graph is kept otherwise.
    """
    target = place(model, images, device)
    rows = []
    for chunk in images.split(batch):
        pixels = preprocessing(chunk).to(target, model.dtype)
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        rows.append(_unit(model.visual_projection(pooled)))
    return mark_broken(torch.cat(rows), images)


@torch.no_grad()
def embed_texts(
    model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str], device: torch.device, batch: int = 32
) -> Tensor:
    """Unit vectors (B, D), float32 or better, of prompts; each different prompt is embedded once."""
    different = list(dict.fromkeys(prompts))
    length = model.config.text_config.max_position_embeddings
    rows = []
    for start in range(0, len(different), batch):
        tokens = tokenise(tokenizer, different[start : start + batch], length).to(model.device)
        # no mask: attention is causal, so what follows the end-of-text token does not reach it
        rows.append(_unit(model.text_projection(model.text_model(input_ids=tokens).pooler_output)))
    place_of = {prompt: i for i, prompt in enumerate(different)}
    return torch.cat(rows)[[place_of[prompt] for prompt in prompts]].to(device)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
