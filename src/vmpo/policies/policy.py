"""A pretrained model seen as a policy: what rollouts, training and evaluation ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: tensors with the batch first, and their unconditional twins where guidance needs them."""

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] | None = None

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        take = {k: v[rows] for k, v in self.positive.items()}
        return Conditioning(take, {k: v[rows] for k, v in self.negative.items()} if self.negative else None)

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """The rows of several, all with or all without unconditional twins."""
        positive = {k: torch.cat([part.positive[k] for part in parts]) for k in parts[0].positive}
        if parts[0].negative is None:
            return Conditioning(positive)
        return Conditioning(positive, {k: torch.cat([(part.negative or {})[k] for part in parts]) for k in positive})

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def to(self, device: torch.device) -> Conditioning:
        move = {k: v.to(device) for k, v in self.positive.items()}
        return Conditioning(move, {k: v.to(device) for k, v in self.negative.items()} if self.negative else None)


class Policy(Protocol):
    """p_theta as a network: it predicts, a kernel turns the prediction into p(x_{t-1} | x_t)."""

    denoiser: nn.Module
    state_shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encodes N prompts; each distinct prompt is encoded once."""
        ...

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output at x_t (N, *shape) and time (N,), guidance applied, float32."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures in [0, 1], (N, 3, H, W), float32."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the policy is p_ref: the same network with its adapter off."""
        ...


class StateFunction(Protocol):
    """A learned function of states, F(x_t, t, c), in nats: a value baseline or the learned part of a potential."""

    def __call__(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x[:, k] (R, *shape) at their positions k in 0 … T, noise first (R,); returns (R,)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser steps."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters by name."""
        ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> object:
        """Takes up parameters by name."""
        ...
