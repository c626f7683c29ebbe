"""What every feature extractor is: pictures to numbers, and the distance those numbers are made for."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["cosine", "euclidean", "squared_euclidean"]
DISTANCES: tuple[str, ...] = get_args(Distance)


class FeatureExtractor(Protocol):
    """Pictures (B, 3, H, W) in [0, 1] to float32 features (B, F); a row is NaN where the picture is not finite.

    Attributes:
        name: of the column in a table, e.g. 'dreamsim'.
        distance: what the published distance of two pictures is in these features; see `paired_distances`.
    """

    name: str
    distance: Distance

    def __call__(self, images: Tensor) -> Tensor: ...


def in_metric_space(features: Tensor, distance: Distance) -> Tensor:
    """Features whose Euclidean geometry is that of the distance: of unit length for cosine, else unchanged."""
    return F.normalize(features, dim=-1) if distance == "cosine" else features


def paired_distances(distance: Distance, a: Tensor, b: Tensor) -> Tensor:
    """Distance of row i of a from row i of b, (B, F) × (B, F) → (B,); differentiable.

        cosine               1 − cos(a, b) = ½|a/|a| − b/|b||²
        euclidean            |a − b|
        squared_euclidean    |a − b|²

    The cosine distance is taken from the difference: 1 − cos loses the digits of near-equal pictures.
    """
    difference = in_metric_space(a, distance) - in_metric_space(b, distance)
    return _from_squares(distance, difference.square().sum(dim=-1))


def pairwise_distances(distance: Distance, features: Tensor) -> Tensor:
    """Distance of every two pictures of a prompt, (..., M, F) → (..., M, M), as in `paired_distances`."""
    x = in_metric_space(features, distance)
    # the exact formula, not the product form: near-equal pictures would lose all their digits
    lengths = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return lengths if distance == "euclidean" else _from_squares(distance, lengths.square())


def _from_squares(distance: Distance, squares: Tensor) -> Tensor:
    if distance == "cosine":
        return squares / 2
    return squares.sqrt() if distance == "euclidean" else squares
