"""GVPO: log-variance against the policy that drew the rollout."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

GVPO = Objective(
    name="gvpo",
    level="trajectory",
    centre="group",
    loss="surrogate",
    potential="terminal",
    anchor="old",
    bessel=True,
    importance="trajectory",
    reuse=2,
    source="Zhang et al. 2025, GVPO; Ou et al. 2026, Diffusion alignment beyond KL, Eq. 46",
)
"""−1/(K−1) Σ ρ A, A = r/beta − log p_theta/p_old − plain group mean; ρ and p_theta are the whole trajectory's.

Eq. 46 prints + log p_theta/p_old, which would reward leaving p_old; the gradient of GVPO's squared loss has the minus.
The tilt is relative to p_old: renewed at every rollout it compounds, to p_ref·exp(n r/beta) after n of them.
"""
