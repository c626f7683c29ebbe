"""Objectives by name."""

from __future__ import annotations

import difflib

from vmpo.errors import UserError
from vmpo.objectives.centre import LearnedCentre
from vmpo.objectives.clipped import VMPO_CLIPPED
from vmpo.objectives.grpo import GRPO, GRPO_STD
from vmpo.objectives.log_variance import LOG_VARIANCE, TRAJECTORY_LOG_VARIANCE
from vmpo.objectives.objective import Objective, RowTerms
from vmpo.objectives.regulariser import kl_weight
from vmpo.objectives.vmpo import VMPO_DIFF, VMPO_R2G

OBJECTIVES = {
    objective.name: objective
    for objective in (VMPO_DIFF, VMPO_R2G, LOG_VARIANCE, TRAJECTORY_LOG_VARIANCE, VMPO_CLIPPED, GRPO, GRPO_STD)
}


def get_objective(name: str) -> Objective:
    """The named objective.

    Raises:
        UserError: if there is none of that name; it says which name is nearest.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    close = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)
    raise UserError(f"no objective '{name}'; did you mean '{close[0]}'? (there are {', '.join(OBJECTIVES)})")


__all__ = ["OBJECTIVES", "LearnedCentre", "Objective", "RowTerms", "get_objective", "kl_weight"]
