"""Affine policies and quadratic state functions: the learnable classes that contain a linear-Gaussian optimum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.policies.policy import Conditioning


class AffineCorrection(nn.Module):
    """scale_k (W_{k,c} z + b_{k,c}) with z = (x − centre_k)/spread_k, 0 at the start.

    With scale_k = s_k/B_k (the kernel's std and its response to the output), a unit of b moves the kernel's mean by one
    of its standard deviations, and a unit of W does so at one standard deviation of x: all parameters have one scale.

    Args:
        centre: (T, D), the mean of x_k under p_ref.
        spread: (T, D), its standard deviations.
        scale: (T,).
        prompts: C.
    """

    def __init__(self, centre: Tensor, spread: Tensor, scale: Tensor, prompts: int) -> None:
        super().__init__()
        steps, dims = centre.shape
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())
        self.register_buffer("scale", scale.clone()[:, None])
        self.weight = nn.Parameter(centre.new_zeros(steps, prompts, dims, dims))
        self.bias = nn.Parameter(centre.new_zeros(steps, prompts, dims))

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The correction of the output at x (N, D), step (N,) and prompt (N,); (N, D)."""
        z = (x - self.centre[step]) / self.spread[step]
        moved = torch.einsum("nij,nj->ni", self.weight[step, prompt], z) + self.bias[step, prompt]
        return self.scale[step] * moved


class QuadraticStateFunction(nn.Module):
    """F(x, k, c) = θ_{k,c} · (1, z, the upper triangle of z zᵀ), z = (x − centre_k)/spread_k, in nats, 0 at the start.

    Args:
        centre: (T+1, D), the mean of x_k under p_ref.
        spread: (T+1, D), its standard deviations.
        prompts: C.
    """

    def __init__(self, centre: Tensor, spread: Tensor, prompts: int) -> None:
        super().__init__()
        positions, dims = centre.shape
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())
        self.register_buffer("upper", torch.triu_indices(dims, dims))
        features = 1 + dims + dims * (dims + 1) // 2
        self.theta = nn.Parameter(centre.new_zeros(positions, prompts, features))

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x (R, D) at positions (R,); (R,), nats."""
        z = (x.to(self.centre.dtype) - self.centre[position]) / self.spread[position]
        squares = z[:, self.upper[0]] * z[:, self.upper[1]]
        features = torch.cat([torch.ones_like(z[:, :1]), z, squares], 1)
        return (self.theta[position, conditioning.positive["prompt"]] * features).sum(1)
