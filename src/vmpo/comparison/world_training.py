"""Trains a policy on an exact world with the updater that trains diffusion models."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.comparison.variant import Variant
from vmpo.errors import UserError
from vmpo.exact import World
from vmpo.rollouts import reference_rows, rollout_from_noise
from vmpo.training.learned_terms import LearnedTerms
from vmpo.training.rollout import Rollout, log_anchor
from vmpo.training.scoring import intermediate_values, potentials
from vmpo.training.update import Penalties, Updater
from vmpo.trajectory import Trajectory


@dataclass(frozen=True)
class Budget:
    """What every objective is given.

    Attributes:
        samples: trajectories drawn in all.
        batch: trajectories a rollout; `batch / group` groups, each of one prompt.
        group: K.
        lr, lr_learned: peak learning rates of the policy and of what is learned beside it; both fall to 0.
        grad_clip: largest norm of a gradient.
        seconds: the run stops after the rollout that passes this time.
    """

    samples: int = 102_400
    batch: int = 256
    group: int = 16
    lr: float = 0.05
    lr_learned: float = 0.1
    grad_clip: float = 1e3
    seconds: float = math.inf

    @property
    def rollouts(self) -> int:
        """Rollouts of a run."""
        return self.samples // self.batch


class WorldTraining:
    """A policy on a world, its objective and its optimiser."""

    def __init__(self, world: World, variant: Variant, budget: Budget, seed: int) -> None:
        check_sound(world, variant)
        self.world, self.variant, self.budget, self.seed = world, variant, budget, seed
        self.objective, self.kernel = variant.objective, world.kernel
        self.policy = world.policy(seed)
        steps, prompts = world.kernel.stochastic_steps, len(world.prompts)
        self.terms = LearnedTerms.build(self.objective, steps, prompts, lambda: world.state_function(seed))
        self.group = torch.arange(budget.batch) // budget.group
        self.prompt = self.group % len(world.prompts)
        self.conditioning = self.policy.encode([world.prompts[c] for c in self.prompt.tolist()])
        groups = [{"params": list(self.policy.denoiser.parameters()), "lr": budget.lr, "peak": budget.lr}]
        if self.terms:
            groups.append({"params": self.terms.parameters, "lr": budget.lr_learned, "peak": budget.lr_learned})
        self.updater = Updater(
            self.policy,
            self.kernel,
            self.objective,
            self.terms,
            Penalties(self.objective.kl_old, self.objective.kl_ref),
            torch.optim.Adam(groups, betas=(0.9, 0.99)),
            Accelerator(cpu=True),
            micro_batch=budget.batch * self.kernel.num_steps,
            grad_clip=budget.grad_clip,
            density_scale=1 / math.prod(world.state_shape) if self.objective.log_prob == "mean" else 1.0,
        )
        self.generator = torch.Generator().manual_seed(7919 * seed + 17)
        self.replayed: list[Rollout] = []

    # --- a rollout ------------------------------------------------------------------------------------------------

    def draw(self) -> Rollout:
        """A fresh rollout of the current policy with its potentials."""
        shape = (self.budget.batch, self.kernel.num_steps + 1, *self.world.state_shape)
        noise = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        share, rows = self.objective.reference_share, torch.arange(self.budget.batch)
        predicted = self.objective.needs_values and self.variant.intermediate == "predicted" and self.world.continuous
        drawn = rollout_from_noise(
            self.policy,
            self.kernel,
            self.conditioning,
            noise,
            x0_hat_at=range(self.kernel.num_steps) if predicted else (),
            x0_hat_of=self.objective.predictor,
            dtype=torch.float64,
            from_reference=reference_rows(share, self.budget.group, rows),
        )
        return self._rollout(drawn)

    def _rollout(self, drawn: Trajectory) -> Rollout:
        objective, beta, scale = self.objective, self.world.beta, self.updater.density_scale
        num_steps, reward = self.kernel.num_steps, self.world.reward(drawn.x_0, self.prompt)
        values = intermediate_values(reward, {}, num_steps)
        if objective.needs_values and objective.loss != "gradient":
            values = self._values(drawn, reward)
        gradient = self._value_gradients(drawn) / beta if objective.loss == "gradient" else None
        anchor = log_anchor(objective, self.kernel, drawn, drawn.log_p_old, drawn.log_p_ref)
        return Rollout(
            trajectory=drawn,
            conditioning=self.conditioning,
            rows=list(range(len(drawn))),
            group=self.group,
            log_p_old=scale * drawn.log_p_old,
            log_anchor=scale * anchor,
            delta_phi=potentials(objective, values, beta),
            prompt=self.prompt,
            values=(values / beta).nan_to_num(),
            value_gradient=gradient,
        )

    @torch.no_grad()
    def _values(self, drawn: Trajectory, reward: Tensor) -> Tensor:
        """Intermediate rewards of all states, (N, T+1)."""
        columns = [self._value(k, drawn.x[:, k], drawn.x0_hat.get(k)) for k in range(self.kernel.num_steps)]
        return torch.stack([*columns, reward], 1)

    def _value(self, k: int, x: Tensor, x0_hat: Tensor | None) -> Tensor:
        if self.variant.intermediate == "exact":
            return self.world.soft_value(k, x, self.prompt)
        if self.variant.intermediate == "none":
            return torch.full((len(x),), torch.nan, dtype=torch.float64)
        mean = self.world.mean_reward(k, x, self.prompt)
        if mean is not None:
            return mean
        if x0_hat is None:
            step = torch.full((len(x),), k)
            with self.policy.reference() if self.objective.predictor == "reference" else nullcontext():
                output = self.policy.predict(x, self.kernel.times[step], self.conditioning)
            x0_hat = self.kernel.predict_x0(x, output, step)
        return self.world.reward(x0_hat, self.prompt)

    def _value_gradients(self, drawn: Trajectory) -> Tensor:
        """∇_x of the intermediate rewards of all states, (N, T+1, *shape)."""
        columns = []
        for k in range(self.kernel.num_steps + 1):
            x = drawn.x[:, k].detach().requires_grad_()
            last = k == self.kernel.num_steps
            value = self.world.reward(x, self.prompt) if last else self._value(k, x, None)
            columns.append(torch.autograd.grad(value.sum(), x)[0])
        return torch.stack(columns, 1)

    # --- training -------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[tuple[int, float]]:
        """Trains to the end of the budget; yields (samples, seconds of training) before each rollout and at the end."""
        seconds = 0.0
        everything = torch.arange(int(self.group[-1]) + 1)
        for index in range(self.budget.rollouts):
            yield index * self.budget.batch, seconds
            if seconds > self.budget.seconds:
                return
            began = time.perf_counter()
            data = self.draw()
            self.start_centre(data)
            for group in self.updater.optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - index / self.budget.rollouts)
            for reuse in range(self.objective.reuse):
                self.updater.step(data, everything, on_policy=reuse == 0)
            for old in self.replayed:
                self.updater.step(old, everything, on_policy=False)
            self.replayed = [data, *self.replayed][: self.objective.replay]
            seconds += time.perf_counter() - began
        yield self.budget.rollouts * self.budget.batch, seconds

    def start_centre(self, data: Rollout) -> None:
        """Starts M at the mean of what it is to follow, once."""
        if self.terms.centre is not None:
            start = self.objective.centre_start(data.log_p_old, data.log_anchor, data.delta_phi)
            self.terms.centre.initialise(start, data.prompt)

    def gradient_snr(self, batches: int = 24) -> float:
        """‖E g‖² / tr Cov(g) of the policy's gradient from one rollout, by independent rollouts; unbiased above."""
        everything, found = torch.arange(int(self.group[-1]) + 1), []
        parameters = list(self.policy.denoiser.parameters())
        for _ in range(batches):
            data = self.draw()
            self.start_centre(data)
            self.updater.accumulate(data, everything, on_policy=True)
            found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            self.updater.optimizer.zero_grad()
        gradients = torch.stack(found)
        noise = gradients.var(0).sum()
        signal = gradients.mean(0).square().sum() - noise / batches
        return (signal / noise).item()


def check_sound(world: World, variant: Variant) -> None:
    """Refuses what a world cannot give an objective.

    Raises:
        UserError: with the reason.
    """
    objective = variant.objective
    if objective.loss == "gradient" and not world.continuous:
        raise UserError(
            f"objective '{objective.name}' follows the gradient of the reward, and the states of world '{world.name}' "
            "are discrete, so it has none; use an objective of its values, such as detailed_balance"
        )
