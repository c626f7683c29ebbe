"""Which compositions make no method, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vmpo.objectives.levels import Level

if TYPE_CHECKING:
    from vmpo.objectives.objective import Objective

Centre = Literal["group", "batch", "learned", "prompt", "value", "zero"]
Loss = Literal["squared", "surrogate", "ratio", "clipped", "clamped", "gradient"]
Potential = Literal["return_to_go", "difference", "terminal", "learned", "learned_product"]
Anchor = Literal["ref", "old", "noising", "none"]
Standardise = Literal["none", "group", "batch"]
Importance = Literal["none", "step", "trajectory"]
Direction = Literal["forward", "backward", "both"]
LogProb = Literal["sum", "mean"]
Predictor = Literal["policy", "reference"]
CHOICES = {
    "level": Level,
    "centre": Centre,
    "loss": Loss,
    "potential": Potential,
    "anchor": Anchor,
    "standardise": Standardise,
    "importance": Importance,
    "direction": Direction,
    "log_prob": LogProb,
    "predictor": Predictor,
}


def unsound(objective: Objective) -> str | None:
    """Why the parts of an objective do not make a sound method, with what would, or None if they do."""
    return _loss(objective) or _reward(objective) or _spread(objective) or _sampling(objective)


def _loss(o: Objective) -> str | None:
    grouped, squared = o.centre in ("group", "batch"), o.loss == "squared"
    if o.loss == "gradient":
        if o.potential not in ("difference", "learned"):
            return (
                f"loss='gradient' differentiates the reward of every state, which potential='{o.potential}' has none "
                "of; use 'difference' (Eq. 52) or 'learned' (Eq. 55)"
            )
        if o.anchor != "ref":
            return f"loss='gradient' matches ∇log p_ref, not anchor='{o.anchor}'; set anchor='ref'"
        if o.log_prob == "mean":
            return "loss='gradient' has no log-density to divide by the dimension; set log_prob='sum'"
        if o.centre != "zero" or o.level != "step":
            return "loss='gradient' has nothing to centre or sum: a constant has no gradient; use centre='zero'"
        return None
    if squared and grouped:
        return "the squared loss around a group mean has the surrogate's gradient (Eq. 26); use loss='surrogate'"
    if squared and o.level == "to_go":
        return "level='to_go' is a policy gradient, of no squared loss; use level='subtrajectory'"
    if squared and o.anchor == "none":
        return "loss='squared' without log p_ref − log p_theta does not depend on the policy; set anchor='ref'"
    if o.is_learned and not squared and o.level not in ("step", "to_go"):
        return (
            f"a learned centre is fitted row by row, which level='{o.level}' with loss='{o.loss}' has no target for; "
            "use loss='squared', level='to_go' or centre='group'"
        )
    if o.centre == "value" and squared:
        return (
            "centre='value' under loss='squared' lets V(x_t) take up what the policy should; use a policy-gradient "
            "loss, or potential='learned', whose F(x_t) is given back at the next step"
        )
    return None


def _reward(o: Objective) -> str | None:
    squared, step = o.loss == "squared", o.level == "step"
    if squared and o.centre == "zero" and not (o.needs_values and o.level in ("step", "subtrajectory")):
        return (
            "centre='zero' with loss='squared' demands log w = 0, but the log-weights of this potential are at best "
            "constant, at log Z; use centre='learned', or potential='difference' with level='step' (Eq. 49)"
        )
    if o.potential in ("learned", "learned_product") and o.loss not in ("squared", "gradient"):
        return f"loss='{o.loss}' gives the learned potential no gradient; use loss='squared'"
    if step and o.potential == "terminal":
        return (
            "potential='terminal' leaves all steps but the last without reward at level='step'; use 'return_to_go' or "
            "'difference', or level='trajectory'"
        )
    if o.level == "subtrajectory" and not o.needs_values:
        return (
            f"potential='{o.potential}' says nothing of the states where a stretch ends, so stretches of "
            "level='subtrajectory' have no target; use potential='difference' or 'learned'"
        )
    if not step and o.potential == "return_to_go" and not o.per_step:
        return f"return_to_go with per_step=False counts the reward S times at level='{o.level}'; set per_step=True"
    if o.level == "to_go" and o.potential == "return_to_go":
        return "return_to_go loses part of the reward at level='to_go'; use potential='terminal'"
    if o.anchor == "noising" and o.potential not in ("learned", "learned_product"):
        return (
            "anchor='noising' weighs p_theta against q(x_t|x_{t-1}), whose states need a learned log-density; "
            "use potential='learned'"
        )
    return None


def _spread(o: Objective) -> str | None:
    grouped = o.centre in ("group", "batch")
    if o.standardise != "none" and not grouped:
        return f"standardise='{o.standardise}' divides by the spread around a mean; it needs centre='group' or 'batch'"
    if o.standardise == "group" and o.centre == "batch":
        return "centre='batch' has one group, the batch; set standardise='batch' or centre='group'"
    if o.bessel and not grouped:
        return "bessel=True corrects for a mean of the same samples; it needs centre='group' or 'batch'"
    if o.loss in ("clipped", "clamped") and not 0 < o.clip_range < 1:
        return f"clip_range={o.clip_range} must lie between 0 and 1"
    if o.advantage_clip is not None and not o.advantage_clip > 0:
        return f"advantage_clip={o.advantage_clip} must be above 0"
    if not 0 < o.decay <= 1:
        return f"decay={o.decay} must be above 0 and at most 1"
    return None


def _sampling(o: Objective) -> str | None:
    if o.reuse < 1 or o.replay < 0 or not 0 <= o.reference_share < 1:
        return (
            f"reuse={o.reuse}, replay={o.replay}, reference_share={o.reference_share}: a rollout is used once "
            "or more, replay is a number of rollouts, and the share drawn from p_ref is below 1"
        )
    if o.reference_share > 0 and (o.is_ratio or o.importance != "none"):
        return (
            "reference_share draws trajectories that p_old did not, for which the ratio p_theta/p_old is no importance "
            "weight; use loss='surrogate' or 'squared' without importance (Eq. 4 holds under any h)"
        )
    if o.importance != "none" and o.is_ratio:
        return f"loss='{o.loss}' has the ratio in it already; set importance='none'"
    if o.importance != "none" and o.loss == "gradient":
        return "loss='gradient' vanishes at the optimum under any sampling; set importance='none'"
    if o.importance_range is not None and not 0 <= o.importance_range[0] < o.importance_range[1]:
        return f"importance_range={o.importance_range} must be (low, high) with 0 <= low < high"
    if o.replay > 0 and o.importance == "none" and not (o.is_ratio or o.loss == "squared" or o.anchor != "none"):
        return (
            "replay without importance weights follows the gradient of policies long gone; set importance='trajectory'"
        )
    return None
