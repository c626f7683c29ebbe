"""What a rollout hands on: the states of a batch of denoising trajectories and their densities."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """N denoising trajectories of T steps, S of them stochastic; states in sampling order, noise first.

    Attributes:
        x: states x_T … x_0, (N, T+1, *shape), in the precision the densities were evaluated at.
        log_p_old: log p_old(x_{t-1} | x_t) of the policy of the rollout, nats, (N, S); also where p_ref drew.
        log_p_ref: the same under the reference, nats, (N, S).
        mean_old: means of the policy's kernel (of a categorical: its probabilities), (N, S, *event).
        mean_ref: the same of the reference's kernel at the same states, (N, S, *event).
        kl_ref: KL(p_old ‖ p_ref) of each stochastic step, exact, nats, (N, S).
        x0_hat: predicted clean states at chosen stochastic steps, {s: (N, *shape)}.
    """

    x: Tensor
    log_p_old: Tensor
    log_p_ref: Tensor
    mean_old: Tensor
    mean_ref: Tensor
    kl_ref: Tensor
    x0_hat: dict[int, Tensor]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def x_0(self) -> Tensor:
        """The clean states, (N, *shape)."""
        return self.x[:, -1]

    @staticmethod
    def cat(parts: list[Trajectory]) -> Trajectory:
        """Joins trajectories along N."""
        tensors = {
            f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Trajectory) if f.name != "x0_hat"
        }
        steps = parts[0].x0_hat
        return Trajectory(**tensors, x0_hat={s: torch.cat([p.x0_hat[s] for p in parts]) for s in steps})
