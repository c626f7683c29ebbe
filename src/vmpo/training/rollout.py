"""What an optimiser step works on: the trajectories of a rollout with their rewards turned into log-potentials."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmpo.kernels import Kernel
from vmpo.objectives import Objective
from vmpo.policies.policy import Conditioning
from vmpo.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """An epoch's data: this process's trajectories, and the (N, S) matrices of all processes' samples.

    Attributes:
        rows: global sample index of each local trajectory.
        group: global group index, (N,).
        log_p_old: log density of the policy of the rollout, nats, (N, S).
        log_anchor: what p_theta is weighed against (`Objective.anchor`), nats, (N, S).
        delta_phi: nats, (N, S).
        prompt: index of the prompt of each sample, for centres M(t, c), (N,).
        values: intermediate rewards over beta, column S that of x_0, nats, (N, S+1); for learned products.
        value_gradient: ∇_x of the same at this process's states, (n, S+1, *shape); for gradient losses.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    rows: list[int]
    group: Tensor
    log_p_old: Tensor
    log_anchor: Tensor
    delta_phi: Tensor
    prompt: Tensor | None = None
    values: Tensor | None = None
    value_gradient: Tensor | None = None


def log_anchor(
    objective: Objective, kernel: Kernel, trajectory: Trajectory, log_p_old: Tensor, log_p_ref: Tensor
) -> Tensor:
    """Log density of the objective's anchor at the trajectories' steps, nats, (n, S)."""
    if objective.anchor == "old":
        return log_p_old
    if objective.anchor == "noising":
        return log_noising(kernel, trajectory.x)
    return log_p_ref


def log_noising(kernel: Kernel, x: Tensor) -> Tensor:
    """log q(x_t | x_{t-1}) of the stochastic steps of trajectories (n, T+1, *shape), nats, (n, S)."""
    steps = kernel.stochastic_steps
    columns = [kernel.noising(x[:, k + 1], steps.new_full((len(x),), k)).log_prob(x[:, k]) for k in steps.tolist()]
    return torch.stack(columns, 1)
