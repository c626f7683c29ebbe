"""Rewards for tests, named in recipes as 'tests.scenarios:brightness': one that works and all the ways to fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Metadata = list[dict[str, Any]]


def brightness(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Ten times the mean of the red channel: cheap, deterministic, different for any two pictures."""
    return 10 * images[:, 0].mean((1, 2))


def some_nan(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Brightness, but every fourth picture of a batch fails."""
    score = brightness(images, prompts, metadata)
    score[1::4] = torch.nan
    return score


def all_nan(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    return torch.full((len(images),), torch.nan)


def raises(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    raise RuntimeError("the scorer is out of order")


def wrong_shape(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    return images[:, 0].mean(1)


def constant(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    return torch.full((len(images),), 0.5)


class Brightness:
    """Mean brightness, with its gradient."""

    differentiable = True
    range = "0 to 1"

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))
