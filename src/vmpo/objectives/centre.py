"""The learned centre M(t) of the log-weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.objectives.objective import Level


class LearnedCentre(nn.Module):
    """A float32 estimate of E[log w], one number a stochastic step or one a trajectory, in nats.

        M* = argmin_M E[(log w − M)²] = E[log w]        (Eq. 7)

    Args:
        num_steps: number S of stochastic steps.
        level: 'step' for M(t); 'trajectory' for one M, of which every step carries the share M/S.

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 7 and 8; float32 whatever the policy's precision (D.1).
    """

    value: nn.Parameter

    def __init__(self, num_steps: int, level: Level = "step") -> None:
        super().__init__()
        self.num_steps, self.level = num_steps, level
        self.value = nn.Parameter(torch.zeros(num_steps if level == "step" else 1, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The centre of each step's log w, with gradient, (S,); at trajectory level they sum to M."""
        return self.value if self.level == "step" else (self.value / self.num_steps).expand(self.num_steps)

    @torch.no_grad()
    def initialise(self, log_w: Tensor) -> None:
        """Sets M to the mean of finite rows, its optimum; a learning rate of 3e-4 would not reach 30 nats.

        Args:
            log_w: log-weights of the first rollout, nats, (N, S).

        Raises:
            ValueError: if no row is finite.
        """
        rows = log_w[log_w.isfinite().all(1)].to(torch.promote_types(log_w.dtype, torch.float32))
        if not len(rows):
            raise ValueError("the learned centre cannot start: no trajectory has finite log-weights")
        self.value.copy_(rows.mean(0) if self.level == "step" else rows.sum(1).mean(0, keepdim=True))
