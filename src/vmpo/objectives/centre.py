"""The learned centre M(t) or M(t, c) of the log-weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.objectives.levels import Level


class LearnedCentre(nn.Module):
    """A float32 estimate of E[log w], one number a stochastic step or one a trajectory, in nats.

        M* = argmin_M E[(log w − M)²] = E[log w]        (Eq. 7)

    With `num_prompts` there is one M for each prompt c: log Z(c) differs between prompts, so one M(t) for all of them
    cannot make the log-weights constant.

    Args:
        num_steps: number S of stochastic steps.
        level: 'trajectory' for one M, of which every step carries the share M/S; else M(t).
        num_prompts: number C of prompts, for M(t, c); None for M(t).

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 7 and 8; float32 whatever the policy's precision (D.1).
    """

    value: nn.Parameter
    seen: Tensor

    def __init__(self, num_steps: int, level: Level = "step", num_prompts: int | None = None) -> None:
        super().__init__()
        self.num_steps, self.level, self.num_prompts = num_steps, level, num_prompts
        width = 1 if level == "trajectory" else num_steps
        shape = (width,) if num_prompts is None else (num_prompts, width)
        self.value = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(num_prompts or 1, dtype=torch.bool))

    def forward(self, prompt: Tensor | None = None) -> Tensor:
        """The centre of each step's log w, with gradient: (S,), or (N, S) for the prompts (N,) of trajectories.

        At trajectory level a trajectory's shares sum to M.
        """
        value = self.value if self.num_prompts is None or prompt is None else self.value[prompt]
        if self.level == "trajectory":
            value = (value / self.num_steps).expand(*value.shape[:-1], self.num_steps)
        return value

    @torch.no_grad()
    def initialise(self, log_w: Tensor, prompt: Tensor | None = None) -> None:
        """Sets M to the mean of finite rows, its optimum; a learning rate of 3e-4 would not reach 30 nats.

        What was set before stays: M(t, c) is set when a prompt is first seen.

        Args:
            log_w: log-weights of a rollout, nats, (N, S).
            prompt: of each row, (N,); for M(t, c).

        Raises:
            ValueError: if no row is finite and nothing was set before.
        """
        finite = log_w.isfinite().all(1)
        rows = log_w.to(torch.promote_types(log_w.dtype, torch.float32))
        if self.level == "trajectory":
            rows = rows.sum(1, keepdim=True)
        index = torch.zeros(len(rows), dtype=torch.long) if self.num_prompts is None or prompt is None else prompt
        table = self.value.view(-1, self.value.shape[-1])
        for label in index.unique().tolist():
            chosen = finite & (index == label)
            if not self.seen[label] and chosen.any():
                table[label] = rows[chosen].mean(0).to(table)
                self.seen[label] = True
        if not self.seen.any():
            raise ValueError("the learned centre cannot start: no trajectory has finite log-weights")
