"""Pictures of trajectories, their rewards, and the potentials these give."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels import Kernel
from vmpo.objectives import Objective
from vmpo.objectives.soundness import Predictor
from vmpo.policies.policy import Conditioning, Policy
from vmpo.potentials import difference, return_to_go, terminal
from vmpo.prompts import PromptSet
from vmpo.rewards import Reward, score_images
from vmpo.trajectory import Trajectory


@torch.no_grad()
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
    """The stochastic steps whose predicted clean state is scored: none unless the potential asks for states' rewards.

    A loss of gradients reads the gradients of rewards in place of their values.
    """
    if not objective.needs_values or objective.loss == "gradient":
        return []
    return list(range(num_stochastic)) if chosen is None else sorted(set(chosen))


def intermediate_values(reward: Tensor, values: dict[int, Tensor], num_steps: int) -> Tensor:
    """Rewards of the states before each stochastic step (NaN where not evaluated) and of x_0, (N, S+1) float64.

    Args:
        reward: r(x_0), (N,).
        values: r(x̂_0(x_t)) before stochastic step s, {s: (N,)}.
    """
    table = torch.full((len(reward), num_steps + 1), torch.nan, dtype=torch.float64)
    for s, value in values.items():
        table[:, s] = value.double()
    table[:, num_steps] = reward.double()
    return table


def potentials(objective: Objective, values: Tensor, beta: float) -> Tensor:
    """Δφ of each step in nats, (N, S); values as `intermediate_values` gives them, (N, S+1)."""
    if objective.needs_values:
        return difference(values, beta)
    reward, num_steps = values[:, -1], values.shape[1] - 1
    if objective.potential == "terminal":
        return terminal(reward, num_steps, beta)
    return return_to_go(reward, num_steps, beta, per_step=objective.per_step)


def value_gradients(
    policy: Policy,
    kernel: Kernel,
    rewards: dict[str, Reward],
    weights: dict[str, float],
    trajectory: Trajectory,
    conditioning: Conditioning,
    prompts: PromptSet,
    batch: int,
    predictor: Predictor = "policy",
) -> Tensor:
    """∇_x Σ_k w_k r_k(x̂_0(x)) at the states before each stochastic step and after the last, (n, S+1, *shape).

    Rewards are differentiated through the decoder and the current network's prediction (Eq. 54, first term).

    Raises:
        UserError: if a reward that calls itself differentiable returns a value without a gradient.
    """
    positions = [*kernel.stochastic_steps.tolist(), int(kernel.stochastic_steps[-1]) + 1]
    parts = []
    for rows in torch.arange(len(trajectory)).split(batch):
        local = prompts.take(rows.tolist())
        columns = []
        for k in positions:
            x = trajectory.x[rows, k].detach().to(policy.device).requires_grad_()
            with policy.reference() if predictor == "reference" else nullcontext():
                x_0 = _clean(policy, kernel, x, k, conditioning[rows].to(policy.device))
            images = policy.decode(x_0)
            total = torch.zeros((), device=images.device)
            for name, weight in weights.items():
                total = total + weight * rewards[name](images, local.prompts, local.metadata).sum()
            if not total.requires_grad:
                raise UserError(f"rewards {', '.join(weights)}: the value has no gradient although they promise one")
            columns.append(torch.autograd.grad(total, x)[0])
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts)


def _clean(policy: Policy, kernel: Kernel, x: Tensor, k: int, conditioning: Conditioning) -> Tensor:
    if k == kernel.num_steps:
        return x
    step = torch.full((len(x),), k, device=x.device)
    output = policy.predict(x, kernel.times.to(x.device)[step], conditioning)
    return kernel.predict_x0(x, output, step)
