"""Return-to-go: every step is credited with the reward of the clean sample."""

from __future__ import annotations

from torch import Tensor


def return_to_go(reward: Tensor, num_steps: int, beta: float, per_step: bool = True) -> Tensor:
    """The reward of the clean sample, the same at every step.

        Δφ_s = r(x_0) / (S·beta)        per_step=True   (Eq. 39; Σ_s Δφ_s = r(x_0)/beta, Eq. 36)
        Δφ_s = r(x_0) / beta            per_step=False  (Eq. 4 to 8 and 33, footnote 5)

    Which of the two keeps beta the temperature depends on the level of the objective. A weight of the whole trajectory
    counts the reward once a step, so it needs per_step=True. A step-level objective sums S gradients of which each sees
    the KL of its own transition only; there per_step=False descends Σ_t KL(p_theta‖p_ref) − E[r]/beta (Eq. 15), and
    per_step=True the same at temperature S·beta.

    Args:
        reward: r(x_0), (N,); NaN where the scorer failed.
        num_steps: number S of stochastic steps.
        beta: reward temperature.

    Returns:
        Δφ in nats, (N, S); a row of NaN where the reward is NaN.

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Appendix C.2, option 1.
    """
    share = reward / (num_steps * beta if per_step else beta)
    return share[:, None].expand(-1, num_steps).clone()
