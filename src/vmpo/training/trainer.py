"""The loop: rollout, rewards, potentials, updates, held-out measurements, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor

from vmpo.disk import write_text
from vmpo.log_weights import LogWeights
from vmpo.policies.adapters import lora_parameters, save_lora
from vmpo.policies.policy import Conditioning
from vmpo.potentials import terminal
from vmpo.prompts import PromptSet
from vmpo.rewards import combine
from vmpo.rollouts import reference_rows, rollout
from vmpo.training.adaptive_beta import BetaController, check_target_kl, retempered
from vmpo.training.averaging import Average, set_values
from vmpo.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_states,
    replace_folder,
    save_checkpoint,
    set_random_states,
)
from vmpo.training.checks import check_adapter, check_ratio, check_rewards_vary, check_some_reward
from vmpo.training.config import Config
from vmpo.training.epoch_prompts import epoch_prompts
from vmpo.training.monitor import Monitor
from vmpo.training.processes import gather_rows, share, slowest
from vmpo.training.rollout import Rollout, log_anchor
from vmpo.training.run_folder import open_run_folder
from vmpo.training.scoring import evaluated_steps, intermediate_values, potentials, score_states, value_gradients
from vmpo.training.setup import Parts, density_scale, learned_terms
from vmpo.training.update import Penalties, Updater
from vmpo.trajectory import Trajectory

Metrics = dict[str, Any]


class Trainer:
    """A run: its parts, its state, and how both go to disk and come back."""

    def __init__(self, config: Config, parts: Parts, folder: Path, accelerator: Accelerator) -> None:
        self.config, self.parts, self.folder, self.accelerator = config, parts, folder, accelerator
        self.epoch, self.seconds, self.log = 0, 0.0, list[Metrics]()
        self.lock = FileLock(folder / ".lock", timeout=0)
        self.beta, self.controller = config.objective.beta, self._build_controller()
        self.monitor = Monitor(config, parts, folder, accelerator)
        self.failures = Counter[str]()  # scores an epoch that a reward did not give, of x_0 and of predicted states
        adapter = lora_parameters(parts.policy)
        self.average = Average(adapter, config.optimisation.ema)
        self.terms = learned_terms(parts, config.seed)
        self.replayed = list[Rollout]()
        self.updater = self._build_updater(adapter)

    def _build_controller(self) -> BetaController:
        settings = self.config.objective
        if settings.target_kl is not None:
            check_target_kl(self.parts.objective)
        low, high = (settings.beta * factor for factor in settings.beta_range)
        return BetaController(settings.target_kl, settings.kl_gain, low, high)

    def _build_updater(self, adapter: list[torch.nn.Parameter]) -> Updater:
        settings, objective = self.config.optimisation, self.parts.objective
        groups: list[dict[str, Any]] = [{"params": adapter, "peak": settings.lr}]
        if self.terms:
            peak = settings.lr if settings.lr_centre is None else settings.lr_centre
            groups.append({"params": self.terms.parameters, "peak": peak, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        return Updater(
            self.parts.policy,
            self.parts.kernel,
            self.parts.objective,
            self.terms,
            Penalties(objective.kl_old, objective.kl_ref),
            optimizer,
            self.accelerator,
            micro_batch=settings.micro_batch,
            grad_clip=settings.grad_clip,
            density_scale=density_scale(objective, self.parts.policy),
        )

    # --- an epoch -------------------------------------------------------------------------------------------------

    def draw(self, epoch: int, progress: Callable[[int], None] | None = None) -> tuple[Rollout, Metrics]:
        """Rollout, rewards and potentials of an epoch; a function of the weights, the seed and the epoch alone."""
        config, parts, settings = self.config, self.parts, self.config.optimisation
        total = settings.prompts * settings.group
        mine, group = share(total, self.accelerator), torch.arange(total) // settings.group
        # one picture a prompt leaves the batch to compare with
        compared = group if settings.group > 1 else torch.zeros_like(group)
        chosen = epoch_prompts(len(parts.train), settings.prompts, epoch, config.seed)
        prompt = torch.tensor([chosen[g] for g in group.tolist()])
        local = parts.train.take(prompt[mine].tolist())
        conditioning = parts.policy.encode(local.prompts)
        steps = len(parts.kernel.stochastic_steps)
        began = time.perf_counter()
        drawn = rollout(
            parts.policy,
            parts.kernel,
            conditioning,
            [((config.seed + 1) * 1_000_003 + epoch) * 100_003 + i for i in mine],
            batch=settings.micro_batch,
            x0_hat_at=evaluated_steps(parts.objective, steps, config.objective.intermediate),
            x0_hat_of=parts.objective.predictor,
            from_reference=reference_rows(parts.objective.reference_share, settings.group, torch.tensor(mine)),
            progress=progress,
        )
        rolled = time.perf_counter()
        self.failures.clear()
        reward = self._total_reward(drawn.x_0, local, mine, group)
        check_some_reward(reward)
        if epoch == 0:
            check_rewards_vary(reward, compared)
        values = {s: self._total_reward(state, local, mine, group) for s, state in drawn.x0_hat.items()}
        data = self._rollout(drawn, conditioning, local, mine, group, prompt, reward, values)
        times = {"time_rollout": rolled - began, "time_rewards": time.perf_counter() - rolled}
        failures = {f"failures_{name}": self.failures[name] for name in config.reward.weights}
        weights = self._weight_metrics(drawn, mine, compared, reward)
        return data, {**reward_metrics(reward, compared), **failures, **weights, **times}

    def _rollout(
        self,
        drawn: Trajectory,
        conditioning: Conditioning,
        local: PromptSet,
        mine: list[int],
        group: Tensor,
        prompt: Tensor,
        reward: Tensor,
        values: dict[int, Tensor],
    ) -> Rollout:
        objective, kernel = self.parts.objective, self.parts.kernel
        scale, beta, steps = self.updater.density_scale, self.beta, len(kernel.stochastic_steps)
        anchor = log_anchor(objective, kernel, drawn, drawn.log_p_old, drawn.log_p_ref)
        log_p_old, log_p_anchor = (
            scale * gather_rows(rows.cpu(), mine, len(group), self.accelerator) for rows in (drawn.log_p_old, anchor)
        )
        table, gradient = intermediate_values(reward, values, steps), None
        if objective.loss == "gradient":
            weights, batch = self.config.reward.weights, self.config.optimisation.micro_batch
            policy, rewards = self.parts.policy, self.parts.rewards
            gradient = value_gradients(
                policy, kernel, rewards, weights, drawn, conditioning, local, batch, objective.predictor
            )
            gradient = gradient / beta
        return Rollout(
            trajectory=drawn,
            conditioning=conditioning,
            rows=mine,
            group=group,
            log_p_old=log_p_old,
            log_anchor=log_p_anchor,
            delta_phi=potentials(objective, table, beta).float(),
            prompt=prompt,
            values=(table / beta).nan_to_num().float(),
            value_gradient=gradient,
        )

    def _weight_metrics(self, drawn: Trajectory, mine: list[int], group: Tensor, reward: Tensor) -> Metrics:
        """Spread of the trajectories' weights as samples of the tilted target, whatever the potential that trains."""
        log_ratio, kl_ref = (
            gather_rows(rows.cpu(), mine, len(group), self.accelerator)
            for rows in (drawn.log_p_ref.double() - drawn.log_p_old.double(), drawn.kl_ref)
        )
        tilt = terminal(reward.double(), log_ratio.shape[1], self.updater.density_scale * self.beta)
        return {**LogWeights(log_ratio + tilt, group).summary(), "kl_ref": kl_ref.sum(1).mean().item()}

    def _total_reward(self, states: Tensor, local: PromptSet, mine: list[int], group: Tensor) -> Tensor:
        """The weighted reward of all processes' clean states, (N,)."""
        settings = self.config.reward
        trained = {name: self.parts.rewards[name] for name in settings.weights}
        scores = score_states(self.parts.policy, trained, states, local, self.config.optimisation.micro_batch)
        gathered = {n: gather_rows(v, mine, len(group), self.accelerator) for n, v in scores.items()}
        for name, score in gathered.items():
            self.failures[name] += int(score.isnan().sum())
        return combine(gathered, settings.weights, group, settings.combine)

    def run_epoch(self, progress: Callable[[int], None] | None = None) -> Metrics:
        """One rollout and its updates; moves the state on by an epoch."""
        began = time.perf_counter()
        settings = self.config.optimisation
        self._move_beta()
        data, metrics = self.draw(self.epoch, progress)
        if self.epoch == 0:
            metrics["step0_log_ratio"] = check_ratio(self.updater, data)
        if self.terms.centre is not None and (self.epoch == 0 or self.terms.centre.num_prompts is not None):
            start = self.parts.objective.centre_start(data.log_p_old, data.log_anchor, data.delta_phi)
            self.terms.centre.initialise(start, data.prompt)
        updating = time.perf_counter()
        taken = self._update(data)
        if self.epoch == 0:
            check_adapter(self.parts.policy, self.updater, data, max(t["grad_norm"] for t in taken))
        metrics |= {key: sum(t[key] for t in taken) / len(taken) for key in taken[0]}
        metrics["time_update"] = time.perf_counter() - updating
        self.epoch += 1
        self.seconds += slowest(time.perf_counter() - began, self.accelerator)
        counts = {"epoch": self.epoch, "samples": self.epoch * settings.prompts * settings.group}
        return {**counts, "seconds": self.seconds, "beta": self.beta, **metrics}

    def _move_beta(self) -> None:
        """Sets beta by the last rollout's KL; what is kept of earlier rollouts follows."""
        before = self.beta
        self.beta = self.controller.next(before, self.log[-1].get("kl_ref", math.nan) if self.log else math.nan)
        self.replayed = [retempered(data, self.beta / before) for data in self.replayed]

    def _update(self, data: Rollout) -> list[dict[str, float]]:
        """The epoch's optimiser steps: on shares of the rollout, as often as it is reused, then on earlier ones."""
        settings, objective = self.config.optimisation, self.parts.objective
        everything = torch.arange(settings.prompts)
        shares = everything.tensor_split(min(settings.updates, settings.prompts)) * objective.reuse
        jobs = [(data, groups) for groups in shares] + [(old, everything) for old in self.replayed]
        most = len(shares) + objective.replay
        taken: list[dict[str, float]] = []
        for index, (batch, groups) in enumerate(jobs):
            self._set_learning_rate(self.epoch * most + index, settings.epochs * most)
            taken.append(self.updater.step(batch, groups, on_policy=index == 0))
            self.average.update()
        self.replayed = [data, *self.replayed][: objective.replay]
        return taken

    def _set_learning_rate(self, update: int, total: int) -> None:
        settings = self.config.optimisation
        rise = min(1.0, (update + 1) / settings.warmup) if settings.warmup else 1.0
        fall = 1 - update / total if settings.decay else 1.0
        for group in self.updater.optimizer.param_groups:
            group["lr"] = group["peak"] * rise * fall

    # --- measurements ---------------------------------------------------------------------------------------------

    def measure(self) -> Metrics:
        """Figures of the averaged adapter on held-out prompts; what is best of it is kept."""
        return self.monitor.measure(self.epoch, self.beta, self.average)

    def stop_reason(self) -> str | None:
        """Why the run ends before its last epoch, or None."""
        limit = self.config.max_minutes
        if limit is not None and self.seconds >= 60 * limit:
            return f"max_minutes={limit:g} are over"
        return self.monitor.stopping.reason(self.epoch)

    def finished(self) -> bool:
        """Whether the run has reached its last epoch, or a reason to stop."""
        return self.epoch >= self.config.optimisation.epochs or self.stop_reason() is not None

    # --- disk -----------------------------------------------------------------------------------------------------

    def open_folder(self, resume: bool) -> bool:
        """Makes the run folder, or takes up the run in it; returns whether there was something to take up.

        Raises:
            UserError: if the folder holds another run, or cannot be written.
        """
        return open_run_folder(self.folder, self.lock, self.config, self.accelerator, resume) and self.restore()

    def record(self, metrics: Metrics) -> None:
        """Appends an epoch to the run record."""
        self.log.append(metrics)
        if self.accelerator.is_main_process:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))

    def save_adapter(self) -> None:
        """Writes the adapter to deploy: the best where the run may stop early, else the averaged one."""
        if not self.accelerator.is_main_process:
            return
        best = self.monitor.best
        facts = {"epoch": best.epoch, "beta": best.beta} if best else {"epoch": self.epoch, "beta": self.beta}

        def fill(folder: Path) -> None:
            save_lora(self.parts.policy, folder)
            (folder / "point.json").write_text(json.dumps(facts) + "\n")

        with self.average.applied():
            if best is not None:
                set_values(self.average.parameters, best.weights)
            replace_folder(fill, self.folder / "adapter")

    def save(self) -> None:
        """Writes a checkpoint."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "adapter": [p.detach().clone() for p in self.average.parameters],
            "average": self.average.values,
            "average_updates": self.average.updates,
            "terms": self.terms.state(),
            "replayed": self.replayed,
            "optimizer": self.updater.optimizer.state_dict(),
            "beta": self.beta,
            "monitor": self.monitor.state(),
            "rng": random_states(),
        }
        save_checkpoint(self.folder / "checkpoints", self.epoch, state, self.log)
        self.monitor.front.tidy()  # not before: an earlier checkpoint may still need what goes

    def restore(self) -> bool:
        """Takes up the newest checkpoint, if there is one."""
        found = load_checkpoint(self.folder / "checkpoints")
        if found is None:
            return False
        state, self.log = found
        self.epoch, self.seconds, self.beta = state["epoch"], state["seconds"], state["beta"]
        self.monitor.load(state["monitor"])
        set_values(self.average.parameters, state["adapter"])
        set_values(self.average.values, state["average"])  # type: ignore[arg-type]
        self.average.updates = state["average_updates"]
        self.terms.load(state["terms"])
        self.replayed = state["replayed"]
        self.updater.optimizer.load_state_dict(state["optimizer"])
        set_random_states(state["rng"])
        if self.accelerator.is_main_process:
            self.monitor.front.tidy()
        return True

    def checkpointed(self) -> bool:
        """Whether the newest checkpoint is of the present epoch."""
        found = checkpoints(self.folder / "checkpoints")
        return bool(found) and found[-1].name == f"epoch-{self.epoch:06d}"


def reward_metrics(reward: Tensor, group: Tensor) -> Metrics:
    """Mean, spread and failures of an epoch's rewards, and the share of groups that teach nothing: all equal."""
    finite = torch.isfinite(reward)
    groups = [reward[(group == g) & finite] for g in group.unique()]
    return {
        "reward_mean": reward[finite].mean().item(),
        "reward_std": reward[finite].std().item(),
        "zero_std_ratio": sum(len(r.unique()) < 2 for r in groups) / len(groups),
        "failed_rewards": 1 - finite.float().mean().item(),
    }
