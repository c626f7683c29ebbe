"""The evaluations no other beats in reward, KL and diversity at once, and their adapters on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vmpo.disk import write_text
from vmpo.training.checkpoint import replace_folder
from vmpo.training.held_out import mean_and_error

RULE = "the least KL among those whose reward is within one standard error, paired by prompt, of the highest"


@dataclass(frozen=True, eq=False)
class Point:
    """An evaluation as the front sees it.

    Attributes:
        epoch: its name; 0 is the base model.
        judged: `Rises.judged`, by prompt, in standard deviations of the base model, (P,).
        kl_ref: nats a trajectory.
        diversity: mean total variance; None where it is not measured.
        beta: the temperature that was trained at.
    """

    epoch: int
    judged: Tensor
    kl_ref: float
    diversity: float | None
    beta: float

    @property
    def reward(self) -> float:
        """Mean of `judged` over prompts."""
        return mean_and_error(self.judged)[0]

    def axes(self) -> tuple[float, ...]:
        """What is to be as high as possible."""
        return (self.reward, -self.kl_ref, *(() if self.diversity is None else (self.diversity,)))

    def facts(self) -> dict[str, Any]:
        """For people and programs, as JSON."""
        reward, error = mean_and_error(self.judged)
        measured = {"reward_rise": reward, "reward_rise_se": error, "kl_ref": self.kl_ref, "diversity": self.diversity}
        return {"epoch": self.epoch, "beta": self.beta, **measured}


def dominates(a: Point, b: Point) -> bool:
    """Whether a is at least as good as b on every axis, and better on one."""
    pairs = list(zip(a.axes(), b.axes(), strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def best_of(points: list[Point]) -> Point | None:
    """By `RULE`: what looks best is the luckiest of several, so the simplest of its equals is taken.

    Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone 1984, "Classification and regression
    trees", Section 3.4.3.
    """
    if not points:
        return None
    top = max(points, key=lambda p: p.reward)
    behind = {p.epoch: mean_and_error(top.judged - p.judged) for p in points}
    near = [p for p in points if p is top or behind[p.epoch][0] <= behind[p.epoch][1]]
    return min(near, key=lambda p: p.kl_ref)


class Front:
    """The points no other dominates, at most `most` beside the base model, whose adapters lie under `folder`.

    Where there are too many, the one with the lowest reward goes. An adapter is written when its point joins, and
    deleted after the checkpoint in which the point is gone, so that a run resumed from any checkpoint finds all it had.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.points: list[Point] = []

    @property
    def trained(self) -> list[Point]:
        """The points that have an adapter."""
        return [point for point in self.points if point.epoch > 0]

    def add(self, point: Point) -> bool:
        """Takes the point in unless another is better or the same; returns whether it is to be kept on disk."""
        if not self.most or point.reward != point.reward:  # NaN: every score failed
            return False
        others = [p for p in self.points if p.epoch != point.epoch]
        if any(dominates(p, point) or p.axes() == point.axes() for p in others):
            return False
        self.points = [*(p for p in others if not dominates(point, p)), point]
        if len(self.trained) > self.most:
            chosen = best_of(self.trained)
            last = min((p for p in self.trained if p is not chosen), key=lambda p: p.reward)
            self.points = [p for p in self.points if p is not last]
        return point.epoch > 0 and any(p is point for p in self.points)

    def write(self, point: Point, save: Callable[[Path], None]) -> None:
        """Writes a point's adapter with `save(folder)`, and its figures beside it."""

        def fill(folder: Path) -> None:
            save(folder)
            (folder / "point.json").write_text(json.dumps(point.facts(), indent=1) + "\n")

        replace_folder(fill, self.folder / _name(point))

    def tidy(self) -> None:
        """Deletes what no longer belongs to the front and writes front.json, which names the best."""
        if not self.folder.exists():
            return
        kept = {_name(point) for point in self.points}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in kept:
                gone = folder.with_name(f".{folder.name}.old")  # renamed first: what has its name is whole
                shutil.rmtree(gone, ignore_errors=True)
                shutil.rmtree(folder.rename(gone), ignore_errors=True)
        best = best_of(self.trained)
        points = [point.facts() for point in self.points]
        facts = {"best": None if best is None else _name(best), "rule": RULE, "points": points}
        write_text(self.folder / "front.json", json.dumps(facts, indent=1) + "\n")


def _name(point: Point) -> str:
    return f"epoch-{point.epoch:06d}"
