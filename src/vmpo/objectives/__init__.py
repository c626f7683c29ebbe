"""Objectives by name."""

from __future__ import annotations

import difflib

from vmpo.errors import UserError
from vmpo.objectives.centre import LearnedCentre
from vmpo.objectives.clipped import VMPO_CLIPPED
from vmpo.objectives.ddpo import DDPO_IS, DDPO_SF
from vmpo.objectives.dpok import DPOK
from vmpo.objectives.flowrl import FLOWRL
from vmpo.objectives.gflownet import (
    DETAILED_BALANCE,
    DETAILED_BALANCE_LEARNED,
    DETAILED_BALANCE_NOISING,
    DETAILED_BALANCE_PRODUCT,
)
from vmpo.objectives.grpo import FLOW_GRPO, GRPO, GRPO_IMPLICIT_KL, GRPO_KL, GRPO_STD
from vmpo.objectives.gvpo import GVPO
from vmpo.objectives.kl_objective import KL_OBJECTIVE
from vmpo.objectives.log_variance import (
    LOG_VARIANCE,
    LOG_VARIANCE_DIFF,
    LOG_VARIANCE_MIXTURE,
    LOG_VARIANCE_OLD,
    LOG_VARIANCE_REPLAY,
    SUBTRAJECTORY_LOG_VARIANCE,
    TRAJECTORY_LOG_VARIANCE,
)
from vmpo.objectives.nabla_gflownet import NABLA_BACKWARD, NABLA_FORWARD, NABLA_GFLOWNET
from vmpo.objectives.objective import Objective, RowTerms
from vmpo.objectives.ppo import PPO, PPO_IMPLICIT_KL, PPO_KL
from vmpo.objectives.regulariser import kl_weight
from vmpo.objectives.reinforce import REINFORCE, REINFORCE_IMPLICIT_KL, REINFORCE_KL
from vmpo.objectives.vmpo import (
    VMPO_DIFF,
    VMPO_DIFF_PROMPT,
    VMPO_LEARNED,
    VMPO_R2G,
    VMPO_R2G_PER_STEP,
    VMPO_R2G_PROMPT,
)

FAMILIES: dict[str, tuple[Objective, ...]] = {
    "VMPO": (VMPO_DIFF, VMPO_DIFF_PROMPT, VMPO_R2G, VMPO_R2G_PROMPT, VMPO_R2G_PER_STEP, VMPO_LEARNED, VMPO_CLIPPED),
    "log-variance": (LOG_VARIANCE, LOG_VARIANCE_DIFF, TRAJECTORY_LOG_VARIANCE, SUBTRAJECTORY_LOG_VARIANCE),
    "log-variance off-policy": (LOG_VARIANCE_OLD, LOG_VARIANCE_MIXTURE, LOG_VARIANCE_REPLAY),
    "REINFORCE and PPO": (KL_OBJECTIVE, REINFORCE, REINFORCE_KL, REINFORCE_IMPLICIT_KL, PPO, PPO_KL, PPO_IMPLICIT_KL),
    "GRPO": (GRPO, GRPO_KL, GRPO_IMPLICIT_KL, GRPO_STD, FLOW_GRPO, GVPO),
    "GFlowNet": (
        FLOWRL,
        DETAILED_BALANCE,
        DETAILED_BALANCE_LEARNED,
        DETAILED_BALANCE_PRODUCT,
        DETAILED_BALANCE_NOISING,
        NABLA_FORWARD,
        NABLA_BACKWARD,
        NABLA_GFLOWNET,
    ),
    "DDPO and DPOK": (DDPO_SF, DDPO_IS, DPOK),
}
OBJECTIVES = {objective.name: objective for family in FAMILIES.values() for objective in family}


def get_objective(name: str) -> Objective:
    """The named objective.

    Raises:
        UserError: if there is none of that name; it says which name is nearest.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    close = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)
    raise UserError(f"no objective '{name}'; did you mean '{close[0]}'? 'vmpo objectives' lists them")


__all__ = ["FAMILIES", "OBJECTIVES", "LearnedCentre", "Objective", "RowTerms", "get_objective", "kl_weight"]
