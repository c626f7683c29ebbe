"""When training stops before its last epoch, and which evaluation's adapter it leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmpo.errors import UserError
from vmpo.training.config import Config
from vmpo.training.held_out import mean_and_error
from vmpo.training.panel import Rises


@dataclass(frozen=True)
class Peak:
    """Where a held-out reward stood highest: its rises then, and those of the trained reward, by prompt, (P,)."""

    epoch: int
    held_out: Tensor
    trained: Tensor


def check_stopping(config: Config) -> None:
    """What is to stop the run must be measured.

    Raises:
        UserError: otherwise, with the setting that is missing.
    """
    evaluation = config.evaluation
    if evaluation.stop_on == "held_out":
        if not config.reward.held_out:
            raise UserError("evaluation.stop_on=held_out needs a held-out reward; set reward.held_out=[NAME]")
        if not evaluation.patience:
            raise UserError("evaluation.stop_on=held_out needs evaluation.patience, the evaluations to wait; set it")
    if not evaluation.every and (evaluation.patience or evaluation.max_kl):
        wanted = "patience" if evaluation.patience else "max_kl"
        raise UserError(f"evaluation.{wanted} needs evaluations during training; set evaluation.every above 0")


class Stopping:
    """Watches the evaluations of a run.

    patience, stop_on=reward: as many evaluations without a higher trained reward on held-out prompts.
    patience, stop_on=held_out: as many in a row at which a held-out reward lies more than `stop_errors` standard
        errors below its highest, while the trained reward lies higher than it did then.
    max_kl: the first evaluation above.

    Differences are paired by prompt and start from the same noises; errors are between prompts.
    """

    def __init__(self, config: Config) -> None:
        self.settings = config.evaluation
        self.best: tuple[float, int] | None = None
        self.peaks: dict[str, Peak] = {}
        self.fallen: dict[str, int] = {}
        self.verdict: str | None = None

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter that is left is one of the evaluations' rather than the last."""
        return bool(self.settings.patience or self.settings.max_kl)

    def see(self, epoch: int, reward: float, kl_ref: float, rises: Rises) -> bool:
        """Takes in an evaluation; returns whether its adapter is the best so far.

        The best is the one with the highest reward that patience watches, of those within the budget of KL; without
        patience, the latest within it.
        """
        self.verdict = self._over_budget(kl_ref)
        if self.settings.stop_on == "held_out":
            self._watch(epoch, rises)
        if not self.keeps_best or (self.settings.max_kl and kl_ref > self.settings.max_kl):
            return False
        value = mean_and_error(rises.judged)[0] if self.settings.stop_on == "held_out" else reward
        value = value if self.settings.patience else float(epoch)
        if math.isnan(value) or (self.best is not None and value <= self.best[0]):
            return False
        self.best = (value, epoch)
        return True

    def reason(self, epoch: int) -> str | None:
        """Why the run stops after this epoch, in one line, or None."""
        settings, best = self.settings, self.best
        if self.verdict is not None or settings.stop_on == "held_out" or not settings.patience or best is None:
            return self.verdict
        if epoch - best[1] < settings.patience * settings.every:
            return None
        return f"{_evaluations(settings.patience)} without a reward above {best[0]:.4g}, that of epoch {best[1]}"

    def _over_budget(self, kl_ref: float) -> str | None:
        budget = self.settings.max_kl
        over = budget is not None and kl_ref > budget
        return f"a KL of {kl_ref:.2f} nats a trajectory is above evaluation.max_kl={budget:g}" if over else None

    def _watch(self, epoch: int, rises: Rises) -> None:
        for name, now in rises.held_out.items():
            peak = self.peaks.get(name)
            if peak is None or mean_and_error(now)[0] > mean_and_error(peak.held_out)[0]:
                self.peaks[name], self.fallen[name] = Peak(epoch, now, rises.trained), 0
                continue
            change, error = mean_and_error(now - peak.held_out)
            trained = mean_and_error(rises.trained - peak.trained)[0]
            hacked = change < -self.settings.stop_errors * error and trained > 0
            self.fallen[name] = self.fallen[name] + 1 if hacked else 0
            if self.fallen[name] >= self.settings.patience and self.verdict is None:
                self.verdict = (
                    f"held-out reward '{name}' has fallen by {-change:.2f} ± {error:.2f} standard deviations of "
                    f"the base model since epoch {peak.epoch} while the trained reward rose by {trained:.2f}, seen at "
                    f"{_evaluations(self.settings.patience)} in a row"
                )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "peaks": self.peaks, "fallen": self.fallen, "verdict": self.verdict}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.best, self.peaks = state["best"], state["peaks"]
        self.fallen, self.verdict = state["fallen"], state["verdict"]


def _evaluations(count: int) -> str:
    return f"{count} evaluations" if count > 1 else "1 evaluation"
