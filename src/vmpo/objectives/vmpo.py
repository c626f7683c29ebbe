"""VMPO: the squared log-weight around a learned centre."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

VMPO_DIFF = Objective(
    name="vmpo_diff",
    level="step",
    centre="learned",
    loss="squared",
    potential="difference",
    kl_old=1.0,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8 and 43",
)
"""E[(log R_theta + (r(x_{t-1}) − r(x_t))/beta − M(t))²], R_theta = p_ref/p_theta.

Published settings: beta 0.01 (HPSv2) and 0.1 (ImageReward), learning rate 3e-4 for the policy and M, KL to the rollout
policy with weight 1, two optimiser steps a rollout of 128 trajectories.
"""

VMPO_DIFF_PROMPT = replace(
    VMPO_DIFF, name="vmpo_diff_prompt", centre="prompt", source=VMPO_DIFF.source + ", with M(t, c) for M(t)"
)
"""VMPO-Diff with a centre for each prompt: log Z(c) differs between prompts, which one M(t) cannot follow."""

VMPO_R2G = Objective(
    name="vmpo_r2g",
    level="step",
    centre="learned",
    loss="squared",
    potential="return_to_go",
    per_step=False,
    kl_old=1.0,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8 and 39 with footnote 5",
)
"""E[(log R_theta + r(x_0)/beta − M(t))²]; settings as VMPO-Diff.

The reward enters without 1/S, as in Eq. 8: so beta weighs the steps' KLs as it does in Eq. 15.
"""

VMPO_R2G_PER_STEP = replace(
    VMPO_R2G,
    name="vmpo_r2g_per_step",
    per_step=True,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8, 38 and 39 with its factor 1/T",
)
"""VMPO-R2G with the 1/T of Eq. 39 kept: each step is tilted by r/(T·beta) only, a target weaker than exp(r/beta)."""

VMPO_R2G_PROMPT = replace(
    VMPO_R2G, name="vmpo_r2g_prompt", centre="prompt", source=VMPO_R2G.source + ", with M(t, c) for M(t)"
)
"""VMPO-R2G with a centre for each prompt."""

VMPO_LEARNED = replace(
    VMPO_DIFF,
    name="vmpo_learned",
    potential="learned_product",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 8 and 45",
)
"""VMPO-Diff with intermediate rewards F(x_t) r(x̂_0), F(x_0) = 1, learned with the policy.

The product cannot correct a state where r(x̂_0) = 0; `detailed_balance_learned` adds its F instead (Eq. 54).
"""
