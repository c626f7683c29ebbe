"""What is compared by default: each world's objectives and the budget they are all given there."""

from __future__ import annotations

from vmpo.comparison.world_training import Budget
from vmpo.objectives import OBJECTIVES

BUDGETS = {
    "gaussian-linear": Budget(samples=128_000, lr=0.02),
    "gaussian-quadratic": Budget(samples=76_800),
    "gaussian-prompts": Budget(samples=76_800),
    "mixture": Budget(samples=64_000, lr=0.2),
    "masked": Budget(samples=81_920, lr=0.1),
}
"""Trajectories and learning rates by world; the rest is `Budget`'s."""

EXACT = (
    "vmpo_diff,intermediate=exact",
    "log_variance_diff,intermediate=exact",
    "subtrajectory_log_variance,intermediate=exact",
    "detailed_balance,intermediate=exact",
)
"""The difference potential of the soft value, which it approximates everywhere else."""
REFERENCE = ("vmpo_diff,predictor=reference", "detailed_balance_learned,predictor=reference")
"""Intermediate rewards r(x̂_0) of the reference, which stand still."""
MATCHING = ("nabla_forward", "nabla_backward", "nabla_gflownet")
MATCHING_REFERENCE = tuple(f"{name},predictor=reference" for name in MATCHING)
REGULARISED = (
    "grpo_std,kl_ref=1",
    "flow_grpo,kl_ref=1",
    "ddpo_sf,kl_ref=1",
    "dpok,kl_ref=1",
    "dpok,kl_ref=1,reuse=1",
    "gvpo,anchor=ref",
)
"""Methods without a KL, or with a small one, at the weight that makes r/beta and the KL one sum."""
ONE_PROMPT = tuple(name for name in OBJECTIVES if not name.endswith("_prompt"))
"""M(t, c) is M(t) where there is one prompt."""

OBJECTIVES_OF: dict[str, tuple[str, ...]] = {
    "gaussian-linear": (*ONE_PROMPT, *EXACT, *REFERENCE, *MATCHING_REFERENCE, *REGULARISED),
    "gaussian-quadratic": (
        "vmpo_r2g",
        "vmpo_r2g_per_step",
        "log_variance",
        "trajectory_log_variance",
        "log_variance_old",
        "log_variance_mixture",
        "log_variance_replay",
        "reinforce_kl",
        "reinforce_implicit_kl",
        "grpo_kl",
        "flowrl",
        "detailed_balance_noising,predictor=reference",
        *EXACT,
        *REFERENCE,
        *MATCHING_REFERENCE,
    ),
    "gaussian-prompts": (
        "vmpo_r2g",
        "vmpo_r2g_prompt",
        "log_variance",
        "log_variance,centre=batch",
        "trajectory_log_variance",
        "trajectory_log_variance,centre=batch",
        "log_variance_old",
        "log_variance_old,centre=batch",
        "flowrl",
        "flowrl,centre=learned",
        "vmpo_diff,predictor=reference",
        "vmpo_diff_prompt,predictor=reference",
        "vmpo_diff,intermediate=exact",
    ),
    "mixture": (
        "vmpo_r2g_per_step",
        "log_variance",
        "trajectory_log_variance",
        "reinforce_implicit_kl",
        "reinforce_kl",
        "grpo_kl",
        "detailed_balance_learned,predictor=reference",
        "detailed_balance_learned,intermediate=none",
        "nabla_gflownet,predictor=reference",
        "vmpo_diff",
        "vmpo_diff,predictor=reference",
        "vmpo_diff,intermediate=exact",
    ),
    "masked": (
        *(name for name in ONE_PROMPT if name not in MATCHING),
        *EXACT,
        "detailed_balance_learned,intermediate=none",
        *REGULARISED,
    ),
}
