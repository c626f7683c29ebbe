"""DPOK: a clamped ratio around a value function, with an explicit KL."""

from __future__ import annotations

from vmpo.objectives.objective import Objective

DPOK = Objective(
    name="dpok",
    centre="value",
    loss="clamped",
    potential="return_to_go",
    per_step=False,
    anchor="none",
    clip_range=1e-4,
    log_prob="mean",
    kl_ref=0.01,
    reuse=2,
    source="Fan et al. 2023, arXiv 2305.16381, and its code: no max around the clip, clip 1e-4 of the mean log-density",
)
"""−(r/beta − M(t) − V(x_t)) clip(ρ, 1−ε, 1+ε) + 0.01 KL: no gradient outside the clip, whatever A's sign.

Its code penalises the squared distance of the noise predictions and weighs the reward by 10 to 1000; here the KL is
exact and beta is the weight.
"""
