"""The KL objective: the importance-weighted reward less the KL to the reference."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

KL_OBJECTIVE = Objective(
    name="kl_objective",
    centre="zero",
    loss="ratio",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    kl_ref=1.0,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 3",
)
"""−Σ_t ρ r(x_0)/beta + KL(p_theta‖p_ref): Eq. 3 over beta, with no baseline, as printed."""
