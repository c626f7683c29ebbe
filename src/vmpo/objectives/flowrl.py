"""FlowRL: the squared trajectory weight around a learned log Z(c), with a clipped importance weight."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

FLOWRL = Objective(
    name="flowrl",
    level="trajectory",
    centre="prompt",
    loss="squared",
    potential="terminal",
    importance="trajectory",
    importance_range=(0.8, 1.2),
    reuse=2,
    source="Zhu et al. 2025, FlowRL; Ou et al. 2026, Diffusion alignment beyond KL, Eq. 47",
)
"""clip(ρ, 1−ε, 1+ε) (log Z(c) + log p_theta − log p_ref − r/beta)²: VMPO of whole trajectories with M = log Z(c).

Eq. 47 divides log p by the length: the same loss over T², at the temperature beta/T. ε = 0.2.
"""
