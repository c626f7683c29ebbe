"""The distribution a sampler step returns: an isotropic Gaussian with one standard deviation a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class DeterministicStep(ValueError):  # noqa: N818 (named for what it is: a fact about the step)
    """A density was asked of a step that adds no noise, so it has none."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """p(x) = N(x; mean, std² I), one distribution a row.

    Everything is computed in float32, or in float64 where an operand is float64; densities are in nats and are sums
    over the D elements of a row, never means. A row with std 0 is a point: it can be sampled, and has no density.

    Attributes:
        mean: (B, *shape); gradients flow through it.
        std: (B,), not negative.

    Raises:
        ValueError: std is not one number a row.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.std.shape != self.mean.shape[:1]:
            raise ValueError(f"std has shape {tuple(self.std.shape)}, mean {tuple(self.mean.shape)}: one std a row")

    def sample(self, noise: Tensor) -> Tensor:
        """x = mean + std · noise, (B, *shape), in float32 or better.

        Cast the result to the dtype it is stored in *before* asking for its log_prob: the density belongs to the value
        that is kept.
        """
        self._same_shape(noise)
        dtype = _working_dtype(self.mean, self.std, noise)
        return self.mean.to(dtype) + self._row(self.std, dtype) * noise.to(dtype)

    def with_mean(self, mean: Tensor) -> Gaussian:
        """The distribution of the same step around another mean, (B, *shape)."""
        return Gaussian(mean, self.std)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = -Σ_d (x_d - mean_d)² / (2 std²) - D (log std + ½ log 2π), (B,), in nats.

        x is detached: the gradient reaches the network through the mean only.

        Raises:
            DeterministicStep: a row has std 0.
        """
        self._same_shape(x)
        self._require_noise("log_prob")
        dtype = _working_dtype(self.mean, self.std, x)
        z = (x.detach().to(dtype) - self.mean.to(dtype)) / self._row(self.std, dtype)
        total = _row_sum(z.square())
        log_std = self.std.to(total.dtype).log()
        return (-0.5 * total - self._dims * (log_std + HALF_LOG_TWO_PI)).to(dtype)

    def log_ratio(self, other: Gaussian, x: Tensor) -> Tensor:
        """log p(x) - log q(x) for q = other, (B,), in nats; x is detached.

        Equal to the difference of two log_prob. Where the standard deviations agree it is the factored
        Σ_d (p - q)_d (2x - p - q)_d / (2 std²), p and q the means: two log-densities of 65,536 elements are each of
        the order of 1e5, where float32 has a grain of 0.008 nats; this form has none.

        Raises:
            DeterministicStep: a row of either has std 0.
        """
        self._same_shape(x)
        self._same_shape(other.mean)
        self._require_noise("log_ratio")
        other._require_noise("log_ratio")
        dtype = _working_dtype(self.mean, self.std, other.mean, other.std, x)
        p, q, at = self.mean.to(dtype), other.mean.to(dtype), x.detach().to(dtype)
        s_p, s_q = self._row(self.std, dtype), self._row(other.std, dtype)
        # z_q² - z_p² = (z_q - z_p)(z_q + z_p), and z_q - z_p needs no cancelling where the two std agree
        gap = (p - q) / s_q + (at - p) * ((s_p - s_q) / (s_p * s_q))
        total = _row_sum(gap * ((at - q) / s_q + (at - p) / s_p))
        log_std_ratio = other.std.to(total.dtype).log() - self.std.to(total.dtype).log()
        return (0.5 * total + self._dims * log_std_ratio).to(dtype)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(p ‖ q) = D (log(s_q/s_p) + s_p²/(2 s_q²) - ½) + ‖mean_p - mean_q‖² / (2 s_q²) for q = other, (B,), nats.

        Raises:
            DeterministicStep: a row of either has std 0.
        """
        self._same_shape(other.mean)
        self._require_noise("kl")
        other._require_noise("kl")
        dtype = _working_dtype(self.mean, self.std, other.mean, other.std)
        total = _row_sum(((self.mean.to(dtype) - other.mean.to(dtype)) / self._row(other.std, dtype)).square())
        log_ratio = self.std.to(total.dtype).log() - other.std.to(total.dtype).log()
        spread = 0.5 * torch.expm1(2.0 * log_ratio) - log_ratio  # expm1: exactly 0 for equal std
        return (0.5 * total + self._dims * spread).to(dtype)

    def entropy(self) -> Tensor:
        """H = D (log std + ½ log 2πe), (B,), in nats.

        Raises:
            DeterministicStep: a row has std 0.
        """
        self._require_noise("entropy")
        dtype = _working_dtype(self.mean, self.std)
        return self._dims * (self.std.to(dtype).log() + HALF_LOG_TWO_PI + 0.5)

    @property
    def _dims(self) -> int:
        return math.prod(self.mean.shape[1:])

    def _row(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).view(-1, *[1] * (self.mean.dim() - 1))

    def _same_shape(self, x: Tensor) -> None:
        if x.shape != self.mean.shape:
            raise ValueError(f"got shape {tuple(x.shape)}, the distribution has {tuple(self.mean.shape)}")

    def _require_noise(self, what: str) -> None:
        silent = self.std == 0
        if bool(silent.any()):
            rows = silent.nonzero().flatten().tolist()
            raise DeterministicStep(f"{what} at a step without noise (rows {rows[:8]}): leave it out of the weights")


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _row_sum(values: Tensor) -> Tensor:
    """Σ over all but the first dimension, accumulated in float64 where the device has it."""
    dtype = values.dtype if values.device.type == "mps" else torch.float64
    return values.flatten(1).sum(dim=1, dtype=dtype)
