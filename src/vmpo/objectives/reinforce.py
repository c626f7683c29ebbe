"""REINFORCE: the score function times the reward, alone or with the KL to the reference."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

REINFORCE = Objective(
    name="reinforce",
    centre="group",
    bessel=True,
    loss="surrogate",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 16 to 18; Williams 1992",
)
"""−Σ_t A log p_theta, A = r(x_0)/beta − group mean, over K−1. No KL: it rests nowhere short of the highest reward."""

REINFORCE_KL = replace(
    REINFORCE,
    name="reinforce_kl",
    kl_ref=1.0,
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 18 and 22",
)
"""REINFORCE plus Σ_t KL(p_theta‖p_ref) at the visited states, in nats beside r/beta: Eq. 22 divided by beta.

The states are held fixed, so a step is not charged for the KL of the steps that its choice leads to; the sum's
gradient is that of the KL of paths only where the later KLs do not depend on the state.
"""

REINFORCE_IMPLICIT_KL = replace(
    REINFORCE,
    name="reinforce_implicit_kl",
    level="to_go",
    potential="terminal",
    anchor="ref",
    source="Ou et al. 2026, Diffusion alignment beyond KL, Eq. 18 and 23",
)
"""−Σ_t A_t log p_theta, A_t = r(x_0)/beta + Σ_{s from t on} log p_ref/p_theta − group mean: the KL is in the return.

On-policy the gradient of KL(p_theta‖p_tilt) over paths. Only the log-ratio of the step itself, the letter of Eq. 23, is
`log_variance`.
"""
