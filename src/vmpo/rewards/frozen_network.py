"""What the rewards of a pretrained network share: how it is loaded, where it runs, how many pictures at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from vmpo.errors import UserError
from vmpo.features.weights import network_dtype


@dataclass(frozen=True, kw_only=True)
class FrozenNetworkReward:
    """A reward of a frozen network, loaded when the reward is made, so that missing weights are found before a run.

    Attributes:
        dtype: of the network, 'fp32', 'bf16' or 'fp16'; scores are float32.
        device: where it runs; None: where the pictures are.
        batch: pictures a forward pass.
    """

    dtype: str = "fp32"
    device: str | None = None
    batch: int = 32
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        network_dtype(self.dtype)
        if self.batch < 1:
            raise UserError(f"batch of {type(self).__name__} is {self.batch}; it counts pictures and must be above 0")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise UserError(
                f"device of {type(self).__name__} is '{self.device}'; use e.g. 'cpu' or 'cuda:0'"
            ) from error
        _ = self.network

    @cached_property
    def network(self) -> Any:
        """The network, frozen and in evaluation mode."""
        raise NotImplementedError
