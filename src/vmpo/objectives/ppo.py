"""PPO: clipped ratios around a learned value of the state."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

PPO = Objective(
    name="ppo",
    centre="value",
    loss="clipped",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    clip_range=0.2,
    reuse=2,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 19; Schulman et al. 2017, arXiv 1707.06347",
)
"""−Σ_t min(ρA, clip(ρ, 1−ε, 1+ε)A), A = r(x_0)/beta − M(t) − V(x_t), M + V fitted to the return.

ε = 0.2 as published.
"""

PPO_KL = replace(PPO, name="ppo_kl", kl_ref=1.0, source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 19 and 22")
"""PPO with an explicit KL to the reference, in nats beside r/beta."""

PPO_IMPLICIT_KL = replace(
    PPO,
    name="ppo_implicit_kl",
    level="to_go",
    potential="terminal",
    anchor="ref",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 19 and 23",
)
"""PPO with log p_ref/p_theta in the return; V is then the soft value of the policy, less what is known at x_t."""
