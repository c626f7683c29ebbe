"""One optimiser step: the objective's gradient, streamed over micro-batches of (sample, step) rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.kernels import Gaussian, Kernel
from vmpo.objectives import LearnedCentre, Objective, RowTerms, kl_weight
from vmpo.policies.policy import Conditioning, Policy
from vmpo.training.processes import gather_rows, sum_gradients
from vmpo.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """An epoch's data: this process's trajectories, and the (N, S) matrices of all processes' samples.

    Attributes:
        rows: global sample index of each local trajectory.
        group: global group index, (N,).
        log_p_old, log_p_ref, delta_phi: nats, (N, S).
    """

    trajectory: Trajectory
    conditioning: Conditioning
    rows: list[int]
    group: Tensor
    log_p_old: Tensor
    log_p_ref: Tensor
    delta_phi: Tensor


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
        centre: LearnedCentre | None,
        penalties: Penalties,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        micro_batch: int,
        grad_clip: float,
        density_scale: float = 1.0,
    ) -> None:
        self.policy, self.kernel, self.objective, self.centre = policy, kernel, objective, centre
        self.penalties, self.optimizer, self.accelerator = penalties, optimizer, accelerator
        self.micro_batch, self.grad_clip, self.density_scale = micro_batch, grad_clip, density_scale
        self.steps = kernel.stochastic_steps

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser steps: the adapter, and M(t) where the centre is learned."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def transition(self, rollout: Rollout, local: Tensor, s: Tensor) -> tuple[Gaussian, Tensor]:
        """The policy's kernel at rows (local sample, stochastic step), and log p_theta of the stored next state."""
        trajectory = rollout.trajectory
        device = self.policy.device
        k = self.steps[s]
        x_t = trajectory.x[local, k].to(device)
        x_next = trajectory.x[local, k + 1].to(device)
        time = self.kernel.times[k].to(device)
        output = self.policy.predict(x_t, time, rollout.conditioning[local].to(device))
        p = self.kernel.transition(x_t, output, k.to(device))
        return p, self.density_scale * p.log_prob(x_next)

    @torch.no_grad()
    def log_p(self, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Current log p_theta of the chosen local samples' steps, in the global matrix, (N, S)."""
        local_log_p = self.density_scale * rollout.trajectory.log_p_old.clone()
        for s in range(len(self.steps)):
            for rows in chosen.split(self.micro_batch):
                local_log_p[rows, s] = self.transition(rollout, rows, torch.full_like(rows, s))[1]
        return gather_rows(local_log_p, rollout.rows, len(rollout.group), self.accelerator)

    def step(self, rollout: Rollout, groups: Tensor, *, on_policy: bool) -> dict[str, float]:
        """One optimiser step on whole groups.

        The coefficients of an off-policy step are those of the current policy: log p_theta is evaluated again,
        without gradient, before the rows are streamed.
        """
        member = torch.isin(rollout.group, groups)
        local = torch.tensor([i for i, row in enumerate(rollout.rows) if member[row]], dtype=torch.long)
        stale = not on_policy and self.objective.needs_log_p
        log_p = self.log_p(rollout, local) if stale else rollout.log_p_old
        delta_phi = torch.where(member[:, None], rollout.delta_phi, torch.nan)  # other groups sit this step out
        centre_value = self.centre() if self.centre is not None else None
        terms = self.objective.rows(
            log_p, rollout.log_p_ref, delta_phi, rollout.group, None if centre_value is None else centre_value.detach()
        )
        totals = self._accumulate(rollout, local, terms)
        sum_gradients(self.parameters, self.accelerator)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(totals)
        loss, kl_old, ratio, clipped, count = totals.tolist()
        count = max(count, 1.0)
        return {
            "loss": loss,
            "kl_old": kl_old / count * len(self.steps),
            "ratio_mean": ratio / count,
            "clip_fraction": clipped / count,
            "grad_norm": float(grad_norm),
        }

    def _accumulate(self, rollout: Rollout, local: Tensor, terms: RowTerms) -> Tensor:
        """Backward over all local rows; returns sums of loss, KL to p_old, ratio, clipped rows and rows."""
        totals = torch.zeros(5, dtype=torch.float64)
        sample = local.repeat(len(self.steps))
        s = torch.arange(len(self.steps)).repeat_interleave(len(local))
        index = torch.tensor(rollout.rows, dtype=torch.long)
        keep = terms.mask[index[sample], s]
        sample, s = sample[keep], s[keep]
        for rows in torch.arange(len(sample)).split(self.micro_batch):
            totals += self._backward(rollout, terms, sample[rows], s[rows], index[sample[rows]])
        return totals

    def _backward(self, rollout: Rollout, terms: RowTerms, local: Tensor, s: Tensor, row: Tensor) -> Tensor:
        p, log_p = self.transition(rollout, local, s)
        trajectory, device = rollout.trajectory, log_p.device
        log_p_old = rollout.log_p_old[row, s].to(device)
        weight = terms.weight[row, s].to(device)
        penalty_weight = kl_weight(self.objective, terms.mask)[row, s].to(device)
        centre_value = self.centre()[s] if self.centre is not None else None
        row_loss = self.objective.row_loss(log_p, log_p_old, terms.advantage[row, s].to(device), centre_value)
        kl_old = self.density_scale * p.kl(Gaussian(trajectory.mean_old[local, s].to(device), p.std))
        loss = (weight * row_loss).sum() + self.penalties.kl_old * (penalty_weight * kl_old).sum()
        if self.penalties.kl_ref > 0:
            kl_ref = self.density_scale * p.kl(Gaussian(trajectory.mean_ref[local, s].to(device), p.std))
            loss = loss + self.penalties.kl_ref * (penalty_weight * kl_ref).sum()
        loss.backward()
        seen = self.objective.metrics(log_p, log_p_old, terms.advantage[row, s].to(device))
        n = len(row)
        sums = [loss.item(), kl_old.sum().item(), n * seen["ratio_mean"], n * seen["clip_fraction"], n]
        return torch.tensor(sums, dtype=torch.float64)
