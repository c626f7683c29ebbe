"""Log-variance around the group mean, by its score-function surrogate, under one sampling law or another."""

from __future__ import annotations

from dataclasses import replace

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

LOG_VARIANCE_DIFF = replace(
    LOG_VARIANCE,
    name="log_variance_diff",
    potential="difference",
    per_step=True,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 5 and 42",
)
"""The same with the difference potential: a mean for each prompt and step, from its group."""

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

SUBTRAJECTORY_LOG_VARIANCE = replace(
    LOG_VARIANCE_DIFF,
    name="subtrajectory_log_variance",
    level="subtrajectory",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 35 and 37; Madan et al. 2023, arXiv 2209.12782",
)
"""Σ λ^n ½Var(Σ_t log w_t)/Σ λ^n over all stretches of n steps, λ = 0.9: between the two sides of Eq. 37."""

LOG_VARIANCE_OLD = replace(
    TRAJECTORY_LOG_VARIANCE,
    name="log_variance_old",
    reuse=4,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 4 and 5 with h = p_old",
)
"""½ Var_h(Σ_t log w_t) with h = p_old: four updates on each rollout, without importance weights."""

LOG_VARIANCE_MIXTURE = replace(
    TRAJECTORY_LOG_VARIANCE,
    name="log_variance_mixture",
    reference_share=0.1,
    source="Ou et al. 2026, Eq. 4 with h = 0.9 p_theta + 0.1 p_ref; share of Ou et al. 2025, arXiv 2505.22524",
)
"""½ Var_h(Σ_t log w_t) with a tenth of the trajectories drawn from p_ref."""

LOG_VARIANCE_REPLAY = replace(
    TRAJECTORY_LOG_VARIANCE,
    name="log_variance_replay",
    replay=3,
    importance="trajectory",
    importance_range=(0.0, 2.0),
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 4 and 5, replayed with weights clip(p_theta/h, 0, 2)",
)
"""Log-variance on the newest rollout and the three before it, trajectories weighted by clipped p_theta/p_old."""
