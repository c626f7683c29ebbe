"""Which sums of a trajectory's step log-weights an objective makes constant."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Level = Literal["step", "to_go", "subtrajectory", "trajectory"]


def mixing(level: Level, log_w: Tensor, decay: float = 0.9) -> Tensor:
    """The coefficient of each step's ∇log p_theta, from the (centred) log-weights of all steps of its trajectory.

        step             a_s                                     Σ_s ½a_s²                              (Eq. 5)
        trajectory       Σ_u a_u                                 ½(Σ_u a_u)²                            (Eq. 37, left)
        subtrajectory    Σ_{i≤s<j} λ^{j−i} Σ_{i≤u<j} a_u / Λ     Σ_{i<j} λ^{j−i} ½(Σ_{i≤u<j} a_u)² / Λ  (Eq. 35, 37)
        to_go            Σ_{u≥s} a_u                             of no loss: a policy gradient          (Eq. 16, 23)

    with Λ = Σ_{i<j} λ^{j−i}: the right-hand column is the loss of which −(left)·∇log p_theta is the gradient. It is
    linear in a, so log-weights may be centred before or after. 'to_go' leaves out the steps before s, which the
    choice made at s cannot change: on-policy the gradient of 'trajectory' without part of its noise.

    Args:
        level: see above.
        log_w: a, nats, (N, S), steps in sampling order.
        decay: λ.

    Returns:
        nats, (N, S).

    Source: Ou et al. 2026, Appendix C.1; the λ-weighting of Madan et al. 2023 (SubTB, arXiv 2209.12782).
    """
    if level == "step":
        return log_w
    if level == "trajectory":
        return log_w.sum(1, keepdim=True).expand_as(log_w)
    if level == "to_go":
        return log_w.flip(1).cumsum(1).flip(1)
    return log_w @ stretches(log_w.shape[1], decay).to(log_w)


@lru_cache(maxsize=16)
def stretches(num_steps: int, decay: float) -> Tensor:
    """Σ_{i<j} λ^{j−i} 1[i ≤ u < j] 1[i ≤ s < j] / Λ over all stretches of a trajectory, (S, S) float64."""
    total = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    mass = 0.0
    for i in range(num_steps):
        for j in range(i + 1, num_steps + 1):
            weight = decay ** (j - i)
            total[i:j, i:j] += weight
            mass += weight
    return total / mass
