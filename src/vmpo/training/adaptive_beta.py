"""A reward temperature that holds the KL to the reference at a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vmpo.errors import UserError
from vmpo.objectives import Objective
from vmpo.training.rollout import Rollout

CLIP = 0.2


@dataclass(frozen=True)
class BetaController:
    """Proportional control of log beta on the measured KL, within bounds.

        e = clip((KL − target)/target, −0.2, 0.2),    beta ← beta·(1 + gain·e)

    Here beta is the temperature of the target p_ref·exp(r/beta) and thereby the weight of the KL in E[r] − beta·KL, as
    it is there; the KL is that of whole trajectories, in nats. There gain = 0.1 (K_beta) and there are no bounds.

    Attributes:
        target: nats a trajectory; None: beta stays what it is.
        gain: beta changes by at most a fifth of it at a step.
        low, high: bounds of beta.

    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", arXiv 1909.08593, Section 2.2.
    """

    target: float | None
    gain: float
    low: float
    high: float

    def next(self, beta: float, kl: float) -> float:
        """beta after a rollout with this mean KL; unchanged where there is no target or the KL is not finite."""
        if self.target is None or not math.isfinite(kl):
            return beta
        error = min(max((kl - self.target) / self.target, -CLIP), CLIP)
        return min(max(beta * (1 + self.gain * error), self.low), self.high)


def check_target_kl(objective: Objective) -> None:
    """A target KL asks for an objective in which beta weighs the reward against a KL to the reference.

    Raises:
        UserError: otherwise, with what would be right.
    """
    weighed = objective.anchor in ("ref", "noising")
    if not weighed and objective.kl_ref == 0:
        raise UserError(
            f"objective.target_kl moves beta, which in objective '{objective.name}' (anchor={objective.anchor}) weighs "
            f"the reward against no KL to the reference; set objective.kl_ref above 0, or use vmpo_diff or grpo_kl"
        )
    if objective.anchor == "none" and objective.standardise != "none":
        raise UserError(
            f"objective.target_kl moves beta, which objective '{objective.name}' divides out again with its standard "
            f"deviation (standardise={objective.standardise}); set objective.standardise=none"
        )


def retempered(rollout: Rollout, factor: float) -> Rollout:
    """The rollout with its rewards at `factor` times the beta: all that was divided by beta is scaled."""
    if factor == 1:
        return rollout
    scaled = {name: getattr(rollout, name) for name in ("delta_phi", "values", "value_gradient")}
    return replace(rollout, **{name: value / factor for name, value in scaled.items() if value is not None})
