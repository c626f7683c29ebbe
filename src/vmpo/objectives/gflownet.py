"""GFlowNet detailed balance: every step's log-weight is driven to zero."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

DETAILED_BALANCE = Objective(
    name="detailed_balance",
    level="step",
    centre="zero",
    loss="squared",
    potential="difference",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 48 and 49; Zhang et al. 2024",
)
"""Σ_t (log w_t)², log w_t = (r(x_{t-1}) − r(x_t))/beta + log p_ref/p_theta: no centre, so it wants r(x_t) = V(x_t)."""

DETAILED_BALANCE_LEARNED = replace(
    DETAILED_BALANCE,
    name="detailed_balance_learned",
    potential="learned",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 50 with the additive potential of Eq. 54",
)
"""Detailed balance with intermediate rewards r(x̂_0) + beta·F(x_t), F(x_0) = 0, learned with the policy."""

DETAILED_BALANCE_PRODUCT = replace(
    DETAILED_BALANCE,
    name="detailed_balance_product",
    potential="learned_product",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 45 and 50",
)
"""Detailed balance with intermediate rewards F(x_t) r(x̂_0), F(x_0) = 1, as printed."""

DETAILED_BALANCE_NOISING = replace(
    DETAILED_BALANCE_LEARNED,
    name="detailed_balance_noising",
    anchor="noising",
    source="Zhang et al. 2024; Ou et al. 2026, Diffusion alignment beyond KL, Eq. 50 with q(x_t|x_{t-1}) for p_ref",
)
"""Detailed balance against the noising kernel: its target is exp(r(x_0)/beta) itself, without p_ref."""
