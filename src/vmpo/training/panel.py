"""Evaluations seen against the base model: rises of trained and held-out rewards on one scale, and their gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmpo.training.held_out import HeldOut, mean_and_error

TOTAL = "reward"
"""The name of the weighted total among the rewards of the record."""


@dataclass(frozen=True)
class Rises:
    """How much better the policy does than the base model from the same noises, by prompt.

    Unit: the standard deviation of that reward over the base model's pictures, so that rewards of any scale compare.

    Attributes:
        trained: the total that is trained on, on held-out prompts, (P,).
        held_out: rewards that are never trained on, {name: (P,)}.
        train_prompts: the total on prompts of the training set, (P',); None where these are not measured.
        scores: every single reward, {name: (P,)}.
        diversity: mean total variance as a share of the base model's, with its error; None where it is not measured.
    """

    trained: Tensor
    held_out: dict[str, Tensor]
    train_prompts: Tensor | None
    scores: dict[str, Tensor]
    diversity: tuple[float, float] | None = None

    @property
    def judged(self) -> Tensor:
        """What speaks for a checkpoint: the mean of the held-out rewards' rises, or the trained one's, (P,)."""
        return torch.stack(list(self.held_out.values())).nanmean(0) if self.held_out else self.trained

    def metrics(self) -> dict[str, float]:
        """Means over prompts with paired standard errors, under the names of the run record."""
        out: dict[str, float] = {}

        def put(name: str, values: Tensor) -> None:
            out[f"eval_{name}"], out[f"eval_{name}_se"] = mean_and_error(values)

        put("reward_rise", self.trained)
        for name, values in self.scores.items():
            put(f"{name}_rise", values)
        if self.held_out:
            put("gap_rewards", self.trained - self.judged)
        if self.train_prompts is not None:
            put("train_reward_rise", self.train_prompts)
            (seen, seen_se), (new, new_se) = mean_and_error(self.train_prompts), mean_and_error(self.trained)
            out["eval_gap_prompts"] = seen - new
            out["eval_gap_prompts_se"] = (seen_se**2 + new_se**2) ** 0.5  # other prompts, hence independent
        if self.diversity is not None:
            out["eval_diversity_ratio"], out["eval_diversity_ratio_se"] = self.diversity
        return out


class Panel:
    """Compares evaluations with the first one it is shown, that of the base model."""

    def __init__(self, held_out: list[str]) -> None:
        self.held_out = held_out
        self.base: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def compare(self, test: HeldOut, train: HeldOut | None) -> Rises:
        """The rises of an evaluation on held-out prompts and, where measured, on training prompts."""
        values = {**test.scores, TOTAL: test.reward}
        if not self.base:
            self.base = {name: _by_prompt(value) for name, value in values.items()}
            self.spread = {name: value[value.isfinite()].double().std() for name, value in values.items()}
            if train is not None:
                self.base["train prompts"] = _by_prompt(train.reward)
            if test.diversity is not None:
                self.base["diversity"] = test.diversity
        rise = {name: self._rise(name, name, value) for name, value in values.items()}
        total = rise.pop(TOTAL)
        seen = None if train is None else self._rise("train prompts", TOTAL, train.reward)
        kept = None if test.diversity is None else _ratio(test.diversity, self.base["diversity"])
        return Rises(total, {name: rise[name] for name in self.held_out}, seen, rise, kept)

    def _rise(self, base: str, scale: str, values: Tensor) -> Tensor:
        spread = self.spread[scale]
        unit = torch.where(spread > 0, spread, torch.nan)  # a reward that does not vary in the base has no scale
        return (_by_prompt(values) - self.base[base]) / unit

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"base": self.base, "spread": self.spread}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.base, self.spread = state["base"], state["spread"]


def _ratio(now: Tensor, base: Tensor) -> tuple[float, float]:
    """mean(now)/mean(base) over prompts, with its error to first order, paired by prompt."""
    ratio = (now.mean() / base.mean()).item()
    return ratio, mean_and_error((now - ratio * base) / base.mean())[1]


def _by_prompt(values: Tensor) -> Tensor:
    """Mean over the pictures of each prompt, (P, M) -> (P,) float64; failed scores are left out."""
    return values.double().nanmean(1)
