"""Energy distance of two sets of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.errors import UserError


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of samples x (N, *shape) and y (M, *shape), 0 for equal laws.

    Pairs of a sample with itself are left out, so the estimate is unbiased and may be below 0.

    Source: Székely & Rizzo, 2013, "Energy statistics: a class of statistics based on distances".

    Raises:
        UserError: fewer than two samples on a side, or samples of different size.
    """
    a, b = x.detach().to(torch.float64).flatten(1), y.detach().to(torch.float64).flatten(1)
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"samples {tuple(x.shape)} and {tuple(y.shape)}: two or more on each side, of one size")
    return float(2.0 * torch.cdist(a, b).mean() - _within(a) - _within(b))


def _within(a: Tensor) -> Tensor:
    return 2.0 * torch.pdist(a).sum() / (len(a) * (len(a) - 1))
