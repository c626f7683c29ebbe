"""∇-GFlowNet: the gradient of the log-weight is driven to zero, which makes the weight constant."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

NABLA_FORWARD = Objective(
    name="nabla_forward",
    level="step",
    centre="zero",
    loss="gradient",
    potential="difference",
    direction="forward",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 51 and 52",
)
"""Mean over rows of ‖∇_{x_{t-1}} (r(x_{t-1})/beta + log p_ref − log p_theta)‖².

A Fisher divergence to the locally tilted kernel; Eq. 52 has the sum over steps, S times as much.
"""

NABLA_BACKWARD = replace(
    NABLA_FORWARD,
    name="nabla_backward",
    direction="backward",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 51 and 53",
)
"""Mean over rows of ‖∇_{x_t} (log p_ref − log p_theta − r(x_t)/beta)‖²."""

NABLA_GFLOWNET = replace(
    NABLA_FORWARD,
    name="nabla_gflownet",
    direction="both",
    potential="learned",
    source="Liu et al. 2024, ∇-GFlowNet; Ou et al. 2026, Diffusion alignment beyond KL, Eq. 54 and 55",
)
"""Both directions, with ∇(r(x̂_0)/beta + F(x_t)), F(x_0) = 0, learned with the policy.

Eq. 55 prints + ∇F(x_t) in its second line; the potential is taken off at x_t, so the sign is minus.
"""
