"""One figure of what training buys and what it costs: rewards on one scale, diversity and KL over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vmpo.reports.figures import Picture, Theme, draw_figure

HELD_OUT = ("#b24f93", "#2f9163", "#c07a1d", "#7a68c9")
"""Colours of held-out rewards, legible on light and dark grounds; a fifth starts over, dotted."""


@dataclass(frozen=True)
class Curve:
    """A figure of the evaluations over epochs with its standard errors, NaN where not known."""

    label: str
    epoch: Sequence[float]
    value: Sequence[float]
    se: Sequence[float]


@dataclass(frozen=True)
class PanelData:
    """What the panel shows; parts that a run did not measure are None or empty.

    Attributes:
        trained: rise of the trained reward on held-out prompts, in standard deviations of the base model.
        seen: the same on training prompts.
        held_out: rises of the rewards that are never trained on.
        diversity: as shares of the base model's.
        kl: nats a trajectory.
        best: epoch of the Pareto-best adapter; stopped: epoch after which training stopped early.
    """

    trained: Curve
    seen: Curve | None
    held_out: Sequence[Curve]
    diversity: Curve | None
    kl: Curve | None
    best: float | None = None
    stopped: float | None = None


def panel_figure(data: PanelData) -> Picture:
    """Rewards above, diversity and KL below, over the same epochs; the best and the last epoch are marked."""
    below = [part for part in (data.diversity, data.kl) if part is not None]

    def draw(figure: Figure, theme: Theme) -> None:
        ratios = [2.6] + [1.0] * len(below)
        plots = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _draw_rewards(plots[0], theme, data)
        for axes, curve in zip(plots[1:], below, strict=True):
            _draw_curve(axes, curve, theme.ink)
            axes.set_title(curve.label, loc="left", fontsize=9, color=theme.faint, pad=3)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            if curve is data.diversity:
                axes.axhline(1.0, color=theme.base, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            else:
                axes.set_ylim(bottom=0)
        for axes in plots:
            _mark(axes, theme, data)
        plots[-1].set_xlabel("epoch")
        plots[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=1.8)

    return draw_figure(draw, (6.6, 3.2 + 1.25 * len(below)))


def _draw_rewards(axes: Axes, theme: Theme, data: PanelData) -> None:
    axes.axhline(0.0, color=theme.base, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    _draw_curve(axes, data.trained, theme.aligned)
    if data.seen is not None:
        axes.plot(
            data.seen.epoch, data.seen.value, color=theme.aligned, linewidth=1.3, linestyle=":", label=data.seen.label
        )
    for i, curve in enumerate(data.held_out):
        _draw_curve(axes, curve, HELD_OUT[i % len(HELD_OUT)], dotted=i >= len(HELD_OUT))
    if data.held_out and all(list(c.epoch) == list(data.trained.epoch) for c in data.held_out):
        mean = np.mean([c.value for c in data.held_out], axis=0)
        axes.fill_between(
            data.trained.epoch, mean, data.trained.value, color=theme.bad, alpha=0.09, linewidth=0, label="the gap"
        )
    title = "rise over the base model, in its standard deviations"
    axes.set_title(title, loc="left", fontsize=9, color=theme.faint, pad=3)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _draw_curve(axes: Axes, curve: Curve, colour: str, dotted: bool = False) -> None:
    x, y, se = (np.asarray(values, dtype=float) for values in (curve.epoch, curve.value, curve.se))
    style = (0, (1, 1.5)) if dotted else "solid"
    axes.plot(
        x, y, color=colour, linewidth=1.8, linestyle=style, marker="o", markersize=3.2, label=curve.label, zorder=4
    )
    if np.isfinite(se).any():
        se = np.nan_to_num(se)
        axes.fill_between(x, y - se, y + se, color=colour, alpha=0.16, linewidth=0, zorder=2)


def _mark(axes: Axes, theme: Theme, data: PanelData) -> None:
    for epoch, text, colour in ((data.best, "kept as best", theme.truth), (data.stopped, "stopped", theme.bad)):
        if epoch is not None:
            axes.axvline(epoch, color=colour, linewidth=1.4, zorder=3, label=f"{text}: epoch {epoch:.0f}")
