"""From scores to the numbers of a table: means over prompts with their errors, and differences paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmpo.evaluation.statistics import Estimate, clustered_mean, paired_difference

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class ScoreTable:
    """What `table.json`, `table.md` and `table.tex` show.

    Attributes:
        metrics: the columns, in order; lower: those of which less is better.
        means: {source: {metric: mean and standard error over prompts}}, sources in order.
        differences: {source: {metric: source − first source, paired by prompt}}, without the first source.
        failed: {source: {metric: pictures without a score}}, where there are any.
        prompts, images: how many, and pictures of each.
    """

    metrics: tuple[str, ...]
    lower: frozenset[str]
    means: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    failed: dict[str, dict[str, int]]
    prompts: int
    images: int

    def best(self, metric: str) -> set[str]:
        """The sources whose mean is the best, several where they are equal."""
        means = {source: row[metric].mean for source, row in self.means.items() if row[metric].n}
        if not means:
            return set()
        top = min(means.values()) if metric in self.lower else max(means.values())
        return {source for source, mean in means.items() if mean == top}

    def as_dict(self) -> dict[str, Any]:
        """The content of `table.json`; an estimate is {"mean", "se", "n"}, null where nothing was measured."""

        def plain(rows: dict[str, dict[str, Estimate]]) -> dict[str, Any]:
            return {s: {m: _without_nan(e) for m, e in row.items()} for s, row in rows.items()}

        return {
            "metrics": list(self.metrics),
            "lower_is_better": sorted(self.lower),
            "prompts": self.prompts,
            "images_per_prompt": self.images,
            "means": plain(self.means),
            "differences_to": next(iter(self.means)),
            "differences": plain(self.differences),
            "failed": self.failed,
        }


def _without_nan(estimate: Estimate) -> dict[str, float | int | None]:
    return {key: None if value != value else value for key, value in estimate.as_dict().items()}


def build_table(
    scores: Mapping[str, Scores], metrics: Sequence[str], lower: Sequence[str], prompts: int, images: int
) -> ScoreTable:
    """The table of sources (first: what differences are taken to) by metrics.

    The standard error is that of the paper's Tables 1 and 2, after Domingo-Enrich et al. (2024, arXiv:2409.08861): the
    standard deviation (ddof 1) of the means of prompts over the square root of their number.

    Arguments:
        scores: {source: {metric: (P, M) or (P,)}}, NaN where a score failed; such are left out and counted.
    """
    first = next(iter(scores))
    return ScoreTable(
        tuple(metrics),
        frozenset(lower),
        {source: {m: clustered_mean(found[m]) for m in metrics} for source, found in scores.items()},
        {s: {m: paired_difference(scores[first][m], scores[s][m]) for m in metrics} for s in scores if s != first},
        {s: failed for s, found in scores.items() if (failed := _failures(found, metrics))},
        prompts,
        images,
    )


def _failures(found: Scores, metrics: Sequence[str]) -> dict[str, int]:
    counts = {m: int(found[m].isnan().sum()) for m in metrics}
    return {m: count for m, count in counts.items() if count}
