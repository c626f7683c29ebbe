"""GRPO and its mean-only form: clipped policy gradients on the group-relative reward."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

GRPO = Objective(
    name="grpo",
    level="step",
    centre="group",
    loss="clipped",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    clip_range=0.2,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 20 and 21; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783",
)
"""−1/K Σ_i Σ_t min(ρA, clip(ρ, 1−ε, 1+ε)A), A = r(x_0)/beta − group mean: (K−1)/K of the leave-one-out advantage.

Without the reference in the weight beta only scales the loss, against an explicit KL to the reference if there is one
(Eq. 22 divided by beta).
"""

GRPO_KL = replace(
    GRPO, name="grpo_kl", kl_ref=1.0, source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 21 and 22"
)
"""GRPO with an explicit KL to the reference, in nats beside r/beta.

The group mean shrinks the advantage to (K−1)/K of the leave-one-out one, and with it the reward against the KL: it
rests at the temperature beta·K/(K−1).
"""

GRPO_IMPLICIT_KL = replace(
    GRPO,
    name="grpo_implicit_kl",
    level="to_go",
    potential="terminal",
    anchor="ref",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 21 and 23",
)
"""GRPO with Σ_{s from t on} log p_ref/p_theta in the return: reward and KL shrink alike, so the target stays."""

GRPO_STD = replace(
    GRPO,
    name="grpo_std",
    standardise="group",
    source="Shao et al. 2024, arXiv 2402.03300",
)
"""GRPO with A divided by the group's standard deviation (divisor K) + 1e-4, a biased policy gradient.

The floor is in the units of r/beta: beta = 1 gives that of the published code, in the units of the reward.
"""

FLOW_GRPO = replace(
    GRPO,
    name="flow_grpo",
    standardise="batch",
    advantage_clip=5.0,
    clip_range=1e-4,
    log_prob="mean",
    kl_ref=0.04,
    source="Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470, and its code: global std, clip 1e-4 of the mean log-density",
)
"""Flow-GRPO: group mean, standard deviation of the whole batch, ε = 1e-4 on the mean over dimensions, KL weight 0.04.

The floor of the deviation is in the units of r/beta. Flow-GRPO's code penalises mean_D (μ − μ_ref)²/(2g²), without the
step's time; here it is the exact KL divided by D.
"""
