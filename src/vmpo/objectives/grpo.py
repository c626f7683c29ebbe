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
    reference=False,
    clip_range=0.2,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 20 and 21; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783",
)
"""−1/K Σ_i Σ_t min(ρA, clip(ρ, 1−ε, 1+ε)A), A = r(x_0)/beta − group mean: (K−1)/K of the leave-one-out advantage.

Without the reference in the weight beta only scales the loss, against an explicit KL to the reference if there is one
(Eq. 22 divided by beta).
"""

GRPO_STD = replace(
    GRPO,
    name="grpo_std",
    standardise=True,
    source="Shao et al. 2024, arXiv 2402.03300; Liu et al. 2025 (Flow-GRPO), arXiv 2505.05470",
)
"""GRPO with A divided by the group's standard deviation (divisor K) + 1e-4, a biased policy gradient.

The floor is in the units of r/beta: beta = 1 gives that of the published code, in the units of the reward.
"""
