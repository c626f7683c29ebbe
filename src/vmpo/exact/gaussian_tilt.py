"""Exponentials of quadratics under Gaussians, batched: the two integrals a linear-Gaussian world is made of."""

from __future__ import annotations

import torch
from torch import Tensor

Quadratic = tuple[Tensor, Tensor, Tensor]  # const (C,), h (C, D), H (C, D, D) of const + h·x − ½ xᵀHx


def quadratic(x: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """h·x − ½ xᵀHx for each row: x (N, D), h (N, D), H (N, D, D); (N,)."""
    return (slope * x).sum(-1) - 0.5 * torch.einsum("ni,nij,nj->n", x, curvature, x)


def tilt(mean: Tensor, cov: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N(μ, S)·exp(h·x − ½ xᵀHx): its log normaliser (N,) in nats, mean (N, D) and covariance (N, D, D).

    With M = (I + S H)⁻¹ and u = h − H μ: covariance M S, mean μ + M S u, and
    log Z = h·μ − ½ μᵀHμ − ½ log det(I + S H) + ½ uᵀ M S u.
    """
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype)
    shrink = eye + cov @ curvature
    tilted_cov = torch.linalg.solve(shrink, cov.expand_as(shrink))
    tilted_cov = 0.5 * (tilted_cov + tilted_cov.mT)
    residual = slope - torch.einsum("nij,nj->ni", curvature, mean)
    step = torch.einsum("nij,nj->ni", tilted_cov, residual)
    log_z = quadratic(mean, slope, curvature) - 0.5 * torch.logdet(shrink) + 0.5 * (residual * step).sum(-1)
    return log_z, mean + step, tilted_cov


def expect(
    transfer: Tensor, offset: Tensor, variance: Tensor, const: Tensor, slope: Tensor, curvature: Tensor
) -> Quadratic:
    """x ↦ log E[exp(const + h·y − ½ yᵀHy)] for y ~ N(A x + c, s² I), which is again a quadratic.

    With M = (I + s² H)⁻¹, as a function of μ = A x + c it has slope M h, curvature M H and the constant
    const − ½ log det(I + s² H) + ½ s² hᵀ M h.

    Args:
        transfer: A, (D, D).
        offset: c, (D,).
        variance: s², a scalar.
        const, slope, curvature: (C,), h (C, D), H (C, D, D).
    """
    shrink = torch.eye(slope.shape[-1], dtype=slope.dtype) + variance * curvature
    narrowed = torch.linalg.solve(shrink, curvature)
    pull = torch.linalg.solve(shrink, slope)
    const = const - 0.5 * torch.logdet(shrink) + 0.5 * variance * (slope * pull).sum(-1)
    const = const + quadratic(offset.expand_as(pull), pull, narrowed)
    of_x = transfer.mT @ narrowed @ transfer
    return const, (pull - narrowed @ offset) @ transfer, 0.5 * (of_x + of_x.mT)
