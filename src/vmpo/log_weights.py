"""The log importance weight of denoising transitions, and its statistics within groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogWeights:
    """log w of N trajectories of S stochastic steps, in nats.

        log w_{i,s} = log p_ref(x_{s+1}|x_s) − log p_theta(x_{s+1}|x_s) + Δφ_{i,s}        (Eq. 34, 37)

    A row with any non-finite entry (a failed reward) is masked: it counts in no statistic of its group. Statistics of
    a group with too few valid members are NaN. Everything is computed in float32 or better.

    Attributes:
        log_w: (N, S), nats.
        group: which group (prompt) a trajectory belongs to, any integers, (N,).

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Section 3 and Appendix C.1.
    """

    log_w: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        if self.log_w.ndim != 2 or self.group.shape != self.log_w.shape[:1]:
            shapes = f"log_w {tuple(self.log_w.shape)} and group {tuple(self.group.shape)}"
            raise ValueError(f"log-weights need log_w (N, S) and group (N,), not {shapes}")
        precision = torch.promote_types(self.log_w.dtype, torch.float32)
        object.__setattr__(self, "log_w", self.log_w.to(precision))
        object.__setattr__(self, "group", self.group.to(self.log_w.device))

    # --- groups ---------------------------------------------------------------------------------------------------

    @cached_property
    def mask(self) -> Tensor:
        """Which rows are valid, (N,) bool."""
        return self.log_w.isfinite().all(1)

    @cached_property
    def _labels(self) -> tuple[Tensor, Tensor]:
        labels, index = torch.unique(self.group, return_inverse=True)
        return labels, index

    @property
    def groups(self) -> Tensor:
        """The G distinct group labels, in the order of every per-group statistic, (G,)."""
        return self._labels[0]

    @property
    def index(self) -> Tensor:
        """Position of each row's group in `groups`, (N,)."""
        return self._labels[1]

    @cached_property
    def count(self) -> Tensor:
        """Valid members K of each group, (G,)."""
        return self.group_sum(torch.ones_like(self.log_w[:, 0]))

    def group_sum(self, rows: Tensor) -> Tensor:
        """Sums valid rows within groups, (N, …) -> (G, …)."""
        valid = self.mask.view(-1, *[1] * (rows.ndim - 1))
        zeros = rows.new_zeros(len(self.groups), *rows.shape[1:])
        return zeros.index_add(0, self.index, torch.where(valid, rows, torch.zeros_like(rows)))

    def _mean(self, rows: Tensor) -> Tensor:
        return self.group_sum(rows) / self.count.view(-1, *[1] * (rows.ndim - 1))

    def _variance(self, rows: Tensor) -> Tensor:
        count = self.count.view(-1, *[1] * (rows.ndim - 1))
        squares = self.group_sum((rows - self._mean(rows)[self.index]) ** 2)
        return torch.where(count > 1, squares / (count - 1), torch.nan)

    # --- steps ----------------------------------------------------------------------------------------------------

    @cached_property
    def step_mean(self) -> Tensor:
        """Group mean of each step's log w, (G, S)."""
        return self._mean(self.log_w)

    @cached_property
    def step_variance(self) -> Tensor:
        """Group variance (divisor K−1) of each step's log w, (G, S)."""
        return self._variance(self.log_w)

    # --- trajectories ---------------------------------------------------------------------------------------------

    @cached_property
    def _total(self) -> Tensor:
        return self.log_w.sum(1).masked_fill(~self.mask, torch.nan)

    def trajectory(self) -> Tensor:
        """log w of whole trajectories, Σ_s log w_{i,s}, nats, (N,); NaN where masked."""
        return self._total

    @cached_property
    def group_mean(self) -> Tensor:
        """Mean of the trajectories' log w in each group, nats, (G,)."""
        return self._mean(self._total)

    @cached_property
    def group_variance(self) -> Tensor:
        """Variance (divisor K−1) of the trajectories' log w in each group, nats², (G,)."""
        return self._variance(self._total)

    def _log_sum_exp(self, rows: Tensor) -> Tensor:
        """log Σ_i exp of valid rows within groups, (N,) -> (G,); NaN for a group without any."""
        lowest = rows.new_full((len(self.groups),), -torch.inf)
        filled = rows.masked_fill(~self.mask, -torch.inf)
        peak = lowest.scatter_reduce(0, self.index, filled, "amax")
        return peak + self.group_sum((rows - peak[self.index]).exp()).log()

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size of the trajectory weights, (Σw)²/(K·Σw²), a share of K in (0, 1], (G,)."""
        log_sum, log_sum_squares = self._log_sum_exp(self._total), self._log_sum_exp(2 * self._total)
        return (2 * log_sum - log_sum_squares).exp() / self.count

    @cached_property
    def log_z(self) -> Tensor:
        """log of the mean trajectory weight, log (1/K) Σ_i w_i, nats, (G,)."""
        return self._log_sum_exp(self._total) - self.count.log()

    def summary(self) -> dict[str, float]:
        """Means over groups of the trajectory weights' variance, effective sample size and log Z.

        A group whose statistic is undefined (no valid member; for the variance, one) is left out of that mean. The
        numbers mean what they say if Σ_s Δφ_s = r(x_0)/beta (Eq. 36), which `return_to_go(per_step=False)` is not.
        """
        statistics = {"var_log_w": self.group_variance, "ess": self.ess, "log_z": self.log_z}
        return {name: statistic.nanmean().item() for name, statistic in statistics.items()}
