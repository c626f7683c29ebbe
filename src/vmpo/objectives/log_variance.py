"""Log-variance around the group mean, by its score-function surrogate."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

LOG_VARIANCE = Objective(
    name="log_variance",
    level="step",
    centre="group",
    loss="surrogate",
    potential="return_to_go",
    per_step=False,
    bessel=True,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 5, 6 and 31",
)
"""1/(2(K−1)) Σ_t Σ_i A², A = log R_theta + r(x_0)/beta − group mean, by its gradient −1/(K−1) Σ A ∇log p_theta."""

TRAJECTORY_LOG_VARIANCE = Objective(
    name="trajectory_log_variance",
    level="trajectory",
    centre="group",
    loss="surrogate",
    potential="terminal",
    bessel=True,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 37 (left); Richter et al. 2020, arXiv 2010.10436",
)
"""½ Var(Σ_t log w_t) itself, not its bound: zero exactly where trajectories follow p_ref·exp(r(x_0)/beta).

Every step's coefficient is the whole trajectory's A; on-policy this is the gradient of KL(p_theta‖p_tilt) over paths.
"""
