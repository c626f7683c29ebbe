"""The distribution of a step of a discrete chain: one categorical variable an element."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Categorical:
    """p(x) = Π_d softmax(logits_d)[x_d], one distribution a row.

    Densities are in nats and are sums over the elements of a row. An outcome with logit −inf is impossible: it is never
    sampled, adds 0 to entropy and KL (0 · log 0 = 0), and gradients stay finite.

    Attributes:
        logits: (B, *event, V), not normalised; gradients flow through it. A value x is (B, *event): indices, any dtype.

    Raises:
        ValueError: logits without a batch and an outcome dimension, or a NaN or +inf among them, or no finite one.
    """

    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.dim() < 2:
            raise ValueError(f"logits have shape {tuple(self.logits.shape)}: (B, *event, V) is right")
        highest = self.logits.detach().amax(-1)
        if not bool(highest.isfinite().all()):  # amax hands a NaN on
            raise ValueError("logits have a NaN, a +inf, or nothing above −inf: each element needs an outcome")

    @cached_property
    def log_probs(self) -> Tensor:
        """log p of each outcome, (B, *event, V), in float32 or better."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)).log_softmax(-1)

    @property
    def mean(self) -> Tensor:
        """The probabilities (B, *event, V), mean parameter of the exponential family."""
        return self.log_probs.exp()

    def with_mean(self, probabilities: Tensor) -> Categorical:
        """The distribution of this family with the given probabilities (B, *event, V)."""
        possible = probabilities > 0
        # the inner where keeps the gradient of log off 0, where it would be inf · 0
        log_p = torch.where(possible, probabilities, 1.0).log()
        return Categorical(torch.where(possible, log_p, -torch.inf))

    def sample(self, noise: Tensor) -> Tensor:
        """The outcome at Φ(noise) of each element's cumulative distribution, (B, *event), in the noise's dtype.

        Args:
            noise: standard normal, (B, *event): one uniform Φ(noise) an element; a sample is a function of it.
        """
        self._check_shape(noise)
        cumulative = self.log_probs.detach().to(torch.float64).exp().cumsum(-1)
        total = cumulative[..., -1]
        u = torch.special.ndtr(noise.to(torch.float64)) * total
        # below the total, so that u = 1 finds the outcome that completes it; right: u = 0 skips impossible ones
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        outcome = torch.searchsorted(cumulative, u[..., None], right=True)[..., 0]
        return outcome.to(torch.promote_types(noise.dtype, torch.float32))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = Σ_d log p_d(x_d), (B,), nats; x (B, *event) is detached, −inf where it is impossible."""
        self._check_shape(x)
        return _row_sum(self.log_probs.gather(-1, x.detach().long()[..., None])[..., 0])

    def log_ratio(self, other: Categorical, x: Tensor) -> Tensor:
        """log p(x) − log q(x) for q = other, (B,), nats; x is detached."""
        return self.log_prob(x) - other.log_prob(x)

    def kl(self, other: Categorical) -> Tensor:
        """KL(p ‖ q) = Σ_d Σ_v p_d(v) (log p_d(v) − log q_d(v)) for q = other, (B,), nats; inf where q has p's at 0."""
        if other.logits.shape != self.logits.shape:
            raise ValueError(f"logits {tuple(self.logits.shape)} and {tuple(other.logits.shape)}: one shape is right")
        gap = self._where_possible(self.log_probs) - self._where_possible(other.log_probs)
        return _row_sum((self.mean * gap).sum(-1))

    def entropy(self) -> Tensor:
        """H = −Σ_d Σ_v p_d(v) log p_d(v), (B,), nats."""
        return -_row_sum((self.mean * self._where_possible(self.log_probs)).sum(-1))

    def _where_possible(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.mean.detach() == 0, 0.0)

    def _check_shape(self, x: Tensor) -> None:
        if x.shape != self.logits.shape[:-1]:
            raise ValueError(f"got shape {tuple(x.shape)}, the distribution has {tuple(self.logits.shape[:-1])}")


def _row_sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)
