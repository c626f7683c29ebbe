"""VMPO: the squared log-weight around a learned centre."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

VMPO_DIFF = Objective(
    name="vmpo_diff",
    level="step",
    centre="learned",
    loss="squared",
    potential="difference",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8 and 43",
)
"""E[(log R_theta + (r(x_{t-1}) − r(x_t))/beta − M(t))²], R_theta = p_ref/p_theta.

Published settings: beta 0.01 (HPSv2) and 0.1 (ImageReward), learning rate 3e-4 for the policy and M, KL to the rollout
policy with weight 1, two optimiser steps a rollout of 128 trajectories.
"""

VMPO_R2G = Objective(
    name="vmpo_r2g",
    level="step",
    centre="learned",
    loss="squared",
    potential="return_to_go",
    per_step=False,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8 and 39 with footnote 5",
)
"""E[(log R_theta + r(x_0)/beta − M(t))²]; settings as VMPO-Diff.

The reward enters without 1/S, as in Eq. 8: so beta weighs the steps' KLs as it does in Eq. 15.
"""
