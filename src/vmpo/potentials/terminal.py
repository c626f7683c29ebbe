"""Terminal: the last step carries the whole reward."""

from __future__ import annotations

from torch import Tensor


def terminal(reward: Tensor, num_steps: int, beta: float) -> Tensor:
    """All of r(x_0)/beta on the last step, nothing before; for weights of whole trajectories.

        Δφ_s = 1[s = S−1] · r(x_0) / beta,     Σ_s Δφ_s = r(x_0)/beta   (Eq. 36)

    Args:
        reward: r(x_0), (N,); NaN where the scorer failed.
        num_steps: number S of stochastic steps.
        beta: reward temperature.

    Returns:
        Δφ in nats, (N, S); a row of NaN where the reward is NaN.

    Source: the sparse reward of Black et al. 2023 (arXiv 2305.13301) as a potential of Ou et al. 2026, Eq. 36.
    """
    delta_phi = reward.new_zeros(len(reward), num_steps)
    delta_phi[reward.isnan()] = reward.new_tensor(float("nan"))
    delta_phi[:, -1] = reward / beta
    return delta_phi
