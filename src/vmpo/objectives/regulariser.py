"""Weights of an exact KL penalty added to an objective's rows."""

from __future__ import annotations

from torch import Tensor

from vmpo.objectives.objective import Objective


def kl_weight(objective: Objective, mask: Tensor) -> Tensor:
    """Weight of each row's KL(p_theta(·|x_t) ‖ p_old or p_ref) such that the total is on the scale of the objective.

        mean over rows, where the loss is one                        (as Eq. 8; Fan et al. 2023, arXiv 2305.16381)
        Σ_t, mean over trajectories, else                            (Eq. 22)

    The weight of the policy loss would be K/(K−1) too large where that divides by K−1.

    Args:
        objective: the objective the penalty is added to.
        mask: rows that count, (N, S) bool.

    Returns:
        (N, S), float32.
    """
    total = mask.sum() if objective.per_row else mask.any(1).sum()
    return mask.float() / total.clamp(min=1)
