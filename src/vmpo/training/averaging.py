"""An exponential moving average of the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """θ̄ ← d·θ̄ + (1−d)·θ after every update, with d = min(decay, (1+n)/(10+n)) at update n; decay 0 follows θ."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the live weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.decay > 0 else 0.0
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the live weights are the averaged ones."""
        live = [p.detach().clone() for p in self.parameters]
        set_values(self.parameters, self.values)
        try:
            yield
        finally:
            set_values(self.parameters, live)


@torch.no_grad()
def set_values(parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    """Copies values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
