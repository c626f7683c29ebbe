"""Pictures of trajectories, their rewards, and the potentials these give."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.objectives import Objective
from vmpo.policies.policy import Policy
from vmpo.potentials import difference, return_to_go, terminal
from vmpo.rewards import Reward, score_images
from vmpo.training.prompts import PromptSet


def decode(policy: Policy, x_0: Tensor, batch: int) -> Tensor:
    """Pictures of clean states on the CPU, (N, 3, H, W), in batches."""
    return torch.cat([policy.decode(part.to(policy.device)).cpu() for part in x_0.split(batch)])


def score_states(
    policy: Policy, rewards: dict[str, Reward], x_0: Tensor, prompts: PromptSet, batch: int
) -> dict[str, Tensor]:
    """Each reward of the pictures of clean (or predicted clean) states, {name: (N,)}, NaN where it failed."""
    images = decode(policy, x_0, batch)
    return score_images(rewards, images, prompts.prompts, prompts.metadata)


def evaluated_steps(objective: Objective, num_stochastic: int, chosen: list[int] | None) -> list[int]:
    """The stochastic steps whose predicted clean state is scored: none unless the potential is the difference."""
    if objective.potential != "difference":
        return []
    return list(range(num_stochastic)) if chosen is None else sorted(set(chosen))


def potentials(objective: Objective, reward: Tensor, values: dict[int, Tensor], num_steps: int, beta: float) -> Tensor:
    """Δφ of each step in nats, (N, S).

    Args:
        reward: r(x_0), (N,).
        values: r(x̂_0(x_t)) before stochastic step s, {s: (N,)}, for the difference potential.
    """
    if objective.potential == "difference":
        table = torch.full((len(reward), num_steps + 1), torch.nan, dtype=torch.float64)
        for s, value in values.items():
            table[:, s] = value.double()
        table[:, num_steps] = reward.double()
        return difference(table, beta).float()
    if objective.potential == "terminal":
        return terminal(reward.double(), num_steps, beta).float()
    return return_to_go(reward.double(), num_steps, beta, per_step=objective.per_step).float()
