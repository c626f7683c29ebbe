"""What is learned beside the policy and taken off the log-weights: M, V(x_t) and the potentials F(x_t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmpo.objectives import LearnedCentre, Objective
from vmpo.policies.policy import StateFunction
from vmpo.training.rollout import Rollout


@dataclass
class LearnedTerms:
    """c of a row: everything learned that log w is centred by, nats.

        c_s = M(t_s, c) + V(x_s) − [φ(x_{s+1}) − φ(x_s)]

        learned            φ(x) = F(x)                       beside r(x̂_0)/beta    (Eq. 54)
        learned_product    φ(x) = F(x) · r(x̂_0)/beta         beside r(x̂_0)/beta    (Eq. 45 with 1 + F for F)

    φ(x_0) = 0, the terminal constraint, holds by construction: whatever F is, the potentials of a trajectory multiply
    to exp(r(x_0)/beta) up to a function of x_T (Eq. 36).

    Attributes:
        steps: the stochastic steps, (S,) long.
        centre, value, potential: the parts that the objective has.
    """

    objective: Objective
    steps: Tensor
    centre: LearnedCentre | None = None
    value: StateFunction | None = None
    potential: StateFunction | None = None

    @staticmethod
    def build(
        objective: Objective, steps: Tensor, num_prompts: int, state_function: Callable[[], StateFunction]
    ) -> LearnedTerms:
        """The parts that the objective has, untrained; V and F are fresh state functions."""
        centre = None
        if objective.is_learned:
            centre = LearnedCentre(len(steps), objective.level, num_prompts if objective.centre == "prompt" else None)
        value = state_function() if objective.centre == "value" else None
        learned = objective.potential in ("learned", "learned_product")
        return LearnedTerms(objective, steps, centre, value, state_function() if learned else None)

    def __bool__(self) -> bool:
        return self.centre is not None or self.potential is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser steps, M first."""
        return [p for part in (self.centre, self.value, self.potential) if part is not None for p in part.parameters()]

    def state(self) -> list[dict[str, Tensor] | None]:
        """The parts' parameters, for a checkpoint."""
        parts = (self.centre, self.value, self.potential)
        return [None if part is None else part.state_dict() for part in parts]

    def load(self, state: list[dict[str, Tensor] | None]) -> None:
        """Takes up what `state` gave."""
        for part, values in zip((self.centre, self.value, self.potential), state, strict=True):
            if part is not None and values is not None:
                part.load_state_dict(values)

    def rows(self, rollout: Rollout, local: Tensor, s: Tensor) -> Tensor | None:
        """c at rows (local trajectory, stochastic step), with its graph, (R,); None if nothing is learned."""
        total: Tensor | None = None
        row = torch.tensor(rollout.rows)[local]
        if self.centre is not None:
            by_prompt = self.centre.num_prompts is not None and rollout.prompt is not None
            total = self.centre(rollout.prompt[row])[torch.arange(len(s)), s] if by_prompt else self.centre()[s]  # type: ignore[index]
        if self.value is not None:
            total = _add(total, self._at(self.value, rollout, local, s))
        if self.potential is not None:
            total = _add(total, self._phi(rollout, local, row, s) - self._phi(rollout, local, row, s + 1))
        return total

    @torch.no_grad()
    def matrix(self, rollout: Rollout) -> Tensor | None:
        """c of all local trajectories, (n, S)."""
        count, num_steps = len(rollout.rows), len(self.steps)
        local = torch.arange(count).repeat_interleave(num_steps)
        found = self.rows(rollout, local, torch.arange(num_steps).repeat(count))
        return None if found is None else found.view(count, num_steps)

    def gradient(self, rollout: Rollout, local: Tensor, s: Tensor) -> Tensor | None:
        """∇_x F at the states before stochastic step s (S: at x_0, where it is 0), with its graph, (R, *shape)."""
        if self.potential is None:
            return None
        at = s.clamp(max=len(self.steps) - 1)
        x = rollout.trajectory.x[local, self.steps[at]].detach().requires_grad_()
        value = self.potential(x, self.steps[at], rollout.conditioning[local])
        gradient = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        inside = (s < len(self.steps)).view(-1, *[1] * (x.ndim - 1))
        return torch.where(inside, gradient, torch.zeros_like(gradient))

    def _at(self, function: StateFunction, rollout: Rollout, local: Tensor, s: Tensor) -> Tensor:
        position = self.steps[s]
        device = rollout.trajectory.x.device
        return function(rollout.trajectory.x[local, position], position.to(device), rollout.conditioning[local])

    def _phi(self, rollout: Rollout, local: Tensor, row: Tensor, s: Tensor) -> Tensor:
        assert self.potential is not None
        inside = s < len(self.steps)
        phi = self._at(self.potential, rollout, local, s.clamp(max=len(self.steps) - 1))
        if self.objective.potential == "learned_product":
            assert rollout.values is not None
            phi = phi * rollout.values[row, s].to(phi)
        return torch.where(inside, phi, torch.zeros_like(phi))


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
