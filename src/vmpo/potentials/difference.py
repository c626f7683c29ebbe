"""Difference: every step is credited with the reward it gains."""

from __future__ import annotations

import torch
from torch import Tensor


def difference(values: Tensor, beta: float) -> Tensor:
    """The gain of (intermediate) reward over each stochastic step.

        Δφ_s = (r(x_{s+1}) − r(x_s)) / beta,     Σ_s Δφ_s = (r(x_0) − r(x_T)) / beta   (Eq. 40 to 43)

    Args:
        values: r of the state before stochastic step s in column s < S, r(x_0) in column S, (N, S+1). A column s < S
            that is NaN in every row was not evaluated: the gain is credited to the step that reaches the next
            evaluated state, and the steps before it get 0. A NaN in some rows only is a failed reward.
        beta: reward temperature.

    Returns:
        Δφ in nats, (N, S); a row of NaN where any reward of the row failed.

    The x_T term. No transition can change x_T, so r(x_T) moves no transition's optimum and, on-policy, no expected
    gradient: it is a control variate that depends on the state alone. It does enter the spread of the weights: with the
    soft value as r(x_T) it removes the spread that comes from the starting noise. So it is subtracted where it was
    evaluated, and counts as 0 where it was not. Weights of the target p_ref·exp(r(x_0)/beta) itself, and its log Z,
    need `initial_log_potential` added back.

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Appendix C.2, option 2; Ou et al. 2025 for discrete models.
    """
    failed, evaluated = _failed_and_evaluated(values)
    delta_phi = values.new_zeros(len(values), values.shape[1] - 1)
    before = _initial(values, evaluated)
    for s in range(1, values.shape[1]):
        if evaluated[s]:
            delta_phi[:, s - 1] = (values[:, s] - before) / beta
            before = values[:, s]
    delta_phi[failed] = torch.nan
    return delta_phi


def initial_log_potential(values: Tensor, beta: float) -> Tensor:
    """log U(x_T) = r(x_T)/beta, with which the differences telescope to r(x_0)/beta (Eq. 36).

    Args:
        values: as in `difference`, (N, S+1).
        beta: reward temperature.

    Returns:
        nats, (N,); 0 if r(x_T) was not evaluated, NaN where any reward of the row failed.
    """
    failed, evaluated = _failed_and_evaluated(values)
    return (_initial(values, evaluated) / beta).masked_fill(failed, torch.nan)


def _failed_and_evaluated(values: Tensor) -> tuple[Tensor, list[bool]]:
    """Rows with a failed reward, (N,), and whether each column was evaluated (the last one always counts)."""
    missing = values.isnan()
    evaluated = ~missing.all(0)
    evaluated[-1] = True
    return missing[:, evaluated].any(1), evaluated.tolist()


def _initial(values: Tensor, evaluated: list[bool]) -> Tensor:
    return values[:, 0] if evaluated[0] and values.shape[1] > 1 else torch.zeros_like(values[:, 0])
