"""The gradient of a transition's log-weight with respect to its states (Eq. 51 to 55)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmpo.kernels import Gaussian
from vmpo.training.rollout import Rollout

if TYPE_CHECKING:
    from vmpo.training.update import Updater


def matching_loss(updater: Updater, rollout: Rollout, local: Tensor, s: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
    """The policy's kernel, log p_theta and ‖∇ log w‖² of rows (local trajectory, stochastic step), (R,).

    The norms are summed over the objective's directions:

        forward    ∇_{x_{t-1}}: (μ_ref − μ_theta)/std² + ∇φ(x_{t-1})              (Eq. 52; a Gaussian's score, twice)
        backward   ∇_{x_t}:     ∇ log p_ref − ∇ log p_theta − ∇φ(x_t)             (Eq. 53)

    φ is the tempered intermediate reward of the rollout, plus F where it is learned (Eq. 55).

    Source: Liu et al. 2024 (∇-GFlowNet); Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 51 to 55.
    """
    if rollout.value_gradient is None:
        raise ValueError(f"objective '{updater.objective.name}' needs the gradients of intermediate rewards")
    direction, trajectory, k = updater.objective.direction, rollout.trajectory, updater.steps[s]
    x_t = trajectory.x[local, k].detach().requires_grad_(direction != "forward")
    # fused attention has no second derivative
    with nullcontext() if direction == "forward" else sdpa_kernel(SDPBackend.MATH):
        p = updater.distribution(x_t, k, rollout.conditioning[local])
    x_next = trajectory.x[local, k + 1]
    log_p, total = p.log_prob(x_next), torch.zeros((), dtype=p.mean.dtype, device=p.mean.device)
    if direction != "backward":
        variance = p.std.square().view(-1, *[1] * (x_t.ndim - 1))
        residual = (trajectory.mean_ref[local, s].to(p.mean) - p.mean) / variance + rollout.value_gradient[local, s + 1]
        learned = updater.terms.gradient(rollout, local, s + 1)
        residual = residual if learned is None else residual + learned
        total = total + residual.flatten(1).square().sum(1)
    if direction != "forward":
        with updater.policy.reference():
            log_p_ref = updater.distribution(x_t, k, rollout.conditioning[local]).log_prob(x_next)
        reference = torch.autograd.grad(log_p_ref.sum(), x_t)[0]
        policy = torch.autograd.grad(log_p.sum(), x_t, create_graph=True)[0]
        residual = reference - policy - rollout.value_gradient[local, s]
        learned = updater.terms.gradient(rollout, local, s)
        residual = residual if learned is None else residual - learned
        total = total + residual.flatten(1).square().sum(1)
    return p, log_p, total
