"""DDPO: policy gradients on the reward standardised over the batch, by score function or importance sampling."""

from __future__ import annotations

from dataclasses import replace

from vmpo.objectives.objective import Objective

DDPO_SF = Objective(
    name="ddpo_sf",
    centre="batch",
    loss="surrogate",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    standardise="batch",
    advantage_clip=5.0,
    log_prob="mean",
    source="Black et al. 2023, arXiv 2305.13301, and its code; Ou et al. 2026, Eq. 16 to 18",
)
"""−A mean_D log p_theta, A = (r − mean)/(std + 1e-4) over the batch, within ±5; no KL.

The floor is in the units of r/beta: beta = 1 gives that of the published code.
"""

DDPO_IS = replace(
    DDPO_SF,
    name="ddpo_is",
    loss="clipped",
    clip_range=1e-4,
    reuse=2,
    source="Black et al. 2023, arXiv 2305.13301, and its code: clip 1e-4 of the mean log-density",
)
"""DDPO with the clipped ratio, for more than one update a rollout."""
