"""The evaluations of a run and what follows from each: its metrics, what is kept, and whether to stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from vmpo.policies.adapters import save_lora
from vmpo.prompts import PromptSet
from vmpo.training.averaging import Average
from vmpo.training.config import Config
from vmpo.training.held_out import HeldOut, mean_and_error, measure_held_out
from vmpo.training.panel import Panel
from vmpo.training.pareto import Front, Point
from vmpo.training.pictures import save_grid
from vmpo.training.setup import Parts
from vmpo.training.stopping import Stopping


@dataclass(frozen=True)
class Kept:
    """The adapter to leave: its epoch, the temperature it was trained at, its weights."""

    epoch: int
    beta: float
    weights: list[Tensor]


class Monitor:
    """Measures the averaged adapter; a function of the weights alone, the same in every process."""

    def __init__(self, config: Config, parts: Parts, folder: Path, accelerator: Accelerator) -> None:
        self.config, self.parts, self.folder, self.accelerator = config, parts, folder, accelerator
        self.panel = Panel(config.reward.held_out)
        self.stopping = Stopping(config)
        self.front = Front(folder / "pareto", config.evaluation.pareto)
        self.best: Kept | None = None

    def measure(self, epoch: int, beta: float, average: Average) -> dict[str, Any]:
        """The figures of an evaluation under the names of the run record; keeps what is worth it."""
        settings, main = self.config.evaluation, self.accelerator.is_main_process
        with average.applied():
            test = self._measure(self.parts.test, settings.prompts, settings.seed)
            train = None
            if settings.train_prompts:
                train = self._measure(self.parts.train, settings.train_prompts, settings.seed - 1)  # noises of its own
            rises = self.panel.compare(test, train)
            metrics = {**test.metrics(), **rises.metrics()}
            if train is not None:
                found = mean_and_error(train.reward.nanmean(1))
                metrics["eval_train_reward_mean"], metrics["eval_train_reward_se"] = found
            kl_ref = metrics["eval_kl_ref"]
            point = Point(epoch, rises.judged, kl_ref, metrics.get("eval_diversity"), beta)
            if self.front.add(point) and main:
                self.front.write(point, lambda folder: save_lora(self.parts.policy, folder))
        if self.stopping.see(epoch, metrics["eval_reward_mean"], kl_ref, rises):
            self.best = Kept(epoch, beta, [value.clone() for value in average.values])
        if main:
            save_grid(test.images, self.folder / "samples" / f"epoch-{epoch:06d}.png", columns=8)
        return metrics

    def _measure(self, prompts: PromptSet, count: int, seed: int) -> HeldOut:
        parts, config = self.parts, self.config
        return measure_held_out(
            parts.policy,
            parts.kernel,
            parts.rewards,
            config.reward.weights,
            prompts.take(list(range(min(count, len(prompts))))),
            self.accelerator,
            seed=seed,
            batch=config.optimisation.micro_batch,
            images=config.evaluation.images,
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        parts = {"panel": self.panel.state(), "stopping": self.stopping.state()}
        return {**parts, "front": self.front.points, "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.panel.load(state["panel"])
        self.stopping.load(state["stopping"])
        self.front.points, self.best = state["front"], state["best"]
