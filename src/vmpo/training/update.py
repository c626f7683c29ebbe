"""One optimiser step: the objective's gradient, streamed over micro-batches of (sample, step) rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.kernels import Gaussian, Kernel
from vmpo.objectives import Objective, RowTerms, kl_weight
from vmpo.policies.policy import Conditioning, Policy
from vmpo.training.learned_terms import LearnedTerms
from vmpo.training.matching import matching_loss
from vmpo.training.processes import gather_rows, sum_gradients
from vmpo.training.rollout import Rollout


@dataclass(frozen=True)
class Penalties:
    """Weights of the exact KLs added to every row's loss (Eq. 22; Fan et al. 2023 for p_old)."""

    kl_old: float
    kl_ref: float


class Updater:
    """Accumulates the objective's gradient over rows and steps the optimiser."""

    def __init__(
        self,
        policy: Policy,
        kernel: Kernel,
        objective: Objective,
        terms: LearnedTerms,
        penalties: Penalties,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        micro_batch: int,
        grad_clip: float,
        density_scale: float = 1.0,
    ) -> None:
        self.policy, self.kernel, self.objective, self.terms = policy, kernel, objective, terms
        self.penalties, self.optimizer, self.accelerator = penalties, optimizer, accelerator
        self.micro_batch, self.grad_clip, self.density_scale = micro_batch, grad_clip, density_scale
        self.steps = kernel.stochastic_steps

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser steps: the adapter, and what is learned beside it."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def distribution(self, x_t: Tensor, k: Tensor, conditioning: Conditioning) -> Gaussian:
        """The policy's kernel at states of steps k, (R, *shape) and (R,)."""
        device = self.policy.device
        time = self.kernel.times[k].to(device)
        output = self.policy.predict(x_t.to(device), time, conditioning.to(device))
        return self.kernel.transition(x_t.to(device), output, k.to(device))

    def transition(self, rollout: Rollout, local: Tensor, s: Tensor) -> tuple[Gaussian, Tensor]:
        """The policy's kernel at rows (local sample, stochastic step), and log p_theta of the stored next state."""
        x, k = rollout.trajectory.x, self.steps[s]
        p = self.distribution(x[local, k], k, rollout.conditioning[local])
        return p, self.density_scale * p.log_prob(x[local, k + 1].to(self.policy.device))

    @torch.no_grad()
    def log_p(self, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Current log p_theta of the chosen local samples' steps, in the global matrix, (N, S)."""
        local_log_p = self.density_scale * rollout.trajectory.log_p_old.clone()
        for s in range(len(self.steps)):
            for rows in chosen.split(self.micro_batch):
                local_log_p[rows, s] = self.transition(rollout, rows, torch.full_like(rows, s))[1]
        return gather_rows(local_log_p, rollout.rows, len(rollout.group), self.accelerator)

    def step(self, rollout: Rollout, groups: Tensor, *, on_policy: bool) -> dict[str, float]:
        """One optimiser step on whole groups: the gradient of `accumulate`, clipped and taken."""
        loss, kl_old, ratio, clipped, count = self.accumulate(rollout, groups, on_policy=on_policy).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        if count:  # a share whose rewards all failed takes no step, not even the optimiser's momentum
            self.optimizer.step()
        self.optimizer.zero_grad()
        ratio, count = (ratio, count) if count else (1.0, 1.0)
        return {
            "loss": loss,
            "kl_old": kl_old / count * len(self.steps),
            "ratio_mean": ratio / count,
            "clip_fraction": clipped / count,
            "grad_norm": float(grad_norm),
        }

    def accumulate(self, rollout: Rollout, groups: Tensor, *, on_policy: bool) -> Tensor:
        """Adds the gradient on whole groups; returns sums of loss, KL to p_old, ratio, clipped rows and rows, (5,).

        The coefficients of an off-policy step are those of the current policy: log p_theta is evaluated again,
        without gradient, before the rows are streamed.
        """
        member = torch.isin(rollout.group, groups)
        local = torch.tensor([i for i, row in enumerate(rollout.rows) if member[row]], dtype=torch.long)
        stale = not on_policy and self.objective.needs_log_p
        log_p = self.log_p(rollout, local) if stale else rollout.log_p_old
        centre_value = self.terms.matrix(rollout) if self.objective.needs_centre_value else None
        if centre_value is not None:
            centre_value = gather_rows(centre_value.cpu(), rollout.rows, len(rollout.group), self.accelerator)
        terms = self.objective.rows(
            log_p, rollout.log_anchor, rollout.delta_phi, rollout.group, centre_value, rollout.log_p_old, member
        )
        totals = self._stream(rollout, local, terms)
        sum_gradients(self.parameters, self.accelerator)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(totals)
        return totals

    def _stream(self, rollout: Rollout, local: Tensor, terms: RowTerms) -> Tensor:
        totals = torch.zeros(5, dtype=torch.float64)
        sample = local.repeat(len(self.steps))
        s = torch.arange(len(self.steps)).repeat_interleave(len(local))
        index = torch.tensor(rollout.rows, dtype=torch.long)
        keep = terms.mask[index[sample], s]
        sample, s = sample[keep], s[keep]
        for first in range(0, len(sample), self.micro_batch):  # Tensor.split would give one empty part of no rows
            rows = slice(first, first + self.micro_batch)
            totals += self._backward(rollout, terms, sample[rows], s[rows], index[sample[rows]])
        return totals

    def _backward(self, rollout: Rollout, terms: RowTerms, local: Tensor, s: Tensor, row: Tensor) -> Tensor:
        device = self.policy.device
        weight, advantage = terms.weight[row, s].to(device), terms.advantage[row, s].to(device)
        log_p_old, learned = rollout.log_p_old[row, s].to(device), None
        if self.objective.loss == "gradient":
            p, log_p, row_loss = matching_loss(self, rollout, local, s)
        else:
            p, log_p = self.transition(rollout, local, s)
            learned = self.terms.rows(rollout, local, s)
            row_loss = self.objective.row_loss(log_p, log_p_old, advantage, learned)
        penalty_weight = kl_weight(self.objective, terms.mask)[row, s].to(device)
        kl_old = self._kl(p, rollout.trajectory.mean_old[local, s])
        loss = (weight * row_loss).sum()
        if self.penalties.kl_old > 0:
            loss = loss + self.penalties.kl_old * (penalty_weight * kl_old).sum()
        if self.penalties.kl_ref > 0:
            kl_ref = self._kl(p, rollout.trajectory.mean_ref[local, s])
            loss = loss + self.penalties.kl_ref * (penalty_weight * kl_ref).sum()
        loss.backward()
        centred = advantage if learned is None else advantage - learned.detach()
        seen = self.objective.metrics(log_p, log_p_old, centred)
        n = len(row)
        sums = [loss.item(), kl_old.sum().item(), n * seen["ratio_mean"], n * seen["clip_fraction"], n]
        return torch.tensor(sums, dtype=torch.float64)

    def _kl(self, p: Gaussian, mean: Tensor) -> Tensor:
        return self.density_scale * p.kl(p.with_mean(mean.to(p.mean)))
