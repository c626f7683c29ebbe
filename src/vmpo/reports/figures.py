"""The figures of the report as SVG in data URIs, each in the colours of light and of dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vmpo.reports.run_record import finite

Role = Literal["base", "aligned", "truth", "bad", "soft"]
ROLES: tuple[Role, ...] = ("base", "truth", "aligned")


@dataclass(frozen=True)
class Theme:
    """Colours of one page scheme; those of the roles are the same as in the page's style sheet."""

    ink: str
    faint: str
    grid: str
    ground: str
    base: str
    aligned: str
    truth: str
    bad: str
    soft: str

    def of(self, role: Role) -> str:
        """The colour of a role."""
        colour: str = getattr(self, role)
        return colour


LIGHT = Theme("#24282e", "#676d76", "#e4e4df", "#ffffff", "#878d97", "#2465a8", "#b3741a", "#b83a2c", "#8fb3d9")
DARK = Theme("#e4e4e0", "#9aa0a8", "#33373d", "#1b1e22", "#8d949e", "#6fb0f0", "#e0a64c", "#ee7a6c", "#3f6a97")


@dataclass(frozen=True)
class Picture:
    """One figure as data URIs, for light and for dark pages."""

    light: str
    dark: str


@dataclass(frozen=True)
class Series:
    """Points of one curve; `se` draws error bars, `kind` 'thin' is a faint line, 'points' markers with a line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    role: Role = "aligned"
    se: Sequence[float | None] | None = None
    kind: Literal["line", "thin", "points"] = "line"


def data_uri(content: bytes, kind: str) -> str:
    """The bytes as a data URI of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.faint,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "text.color": theme.ink,
        "legend.frameon": True,
        "legend.framealpha": 0.8,
        "legend.facecolor": theme.ground,
        "legend.edgecolor": "none",
        "legend.borderpad": 0.2,
        "legend.fontsize": 9,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "path",
        "svg.hashsalt": "vmpo",  # the same run gives the same bytes
    }


def draw_themed(draw: Callable[[Axes, Theme], None], size: tuple[float, float]) -> Picture:
    """A figure of one plot, `size` in inches."""
    return draw_figure(lambda figure, theme: draw(figure.add_subplot(), theme), size)


def draw_figure(draw: Callable[[Figure, Theme], None], size: tuple[float, float]) -> Picture:
    """A figure of any number of plots, `size` in inches."""
    with matplotlib.rc_context(_style(LIGHT)):  # type: ignore[arg-type,unused-ignore]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, LIGHT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = buffer.getvalue().decode("utf-8")
    dark = light
    for name, colour in asdict(LIGHT).items():  # no colour of one theme is used by the other, so the order is free
        dark = dark.replace(colour, getattr(DARK, name))
    return Picture(data_uri(light.encode(), "image/svg+xml"), data_uri(dark.encode(), "image/svg+xml"))


def _plot(axes: Axes, theme: Theme, series: Series) -> None:
    colour = theme.of(series.role)
    if series.kind == "thin":
        axes.plot(series.x, series.y, color=theme.soft, linewidth=1.0, label=series.label)
        return
    if series.kind == "points":
        axes.plot(series.x, series.y, color=colour, linewidth=1.6, marker="o", markersize=4, label=series.label)
    else:
        axes.plot(series.x, series.y, color=colour, linewidth=1.8, label=series.label)
    if len(series.x) == 1 and series.kind == "line":
        axes.plot(series.x, series.y, color=colour, marker="o", markersize=4)
    if series.se is not None:
        se = [0.0 if e is None else e for e in series.se]
        axes.errorbar(series.x, series.y, yerr=se, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2, alpha=0.8)


def curves(
    series: Sequence[Series],
    x_label: str,
    levels: Mapping[str, tuple[float, Role]] | None = None,
    log_y: bool = False,
    floor: float | None = None,
) -> Picture:
    """Curves over epochs or samples.

    Arguments:
        levels: Horizontal lines by name, as (value, role).
        log_y: Logarithmic ordinate.
        floor: Lowest end of the ordinate, where the values allow it.
    """

    def draw(axes: Axes, theme: Theme) -> None:
        for one in series:
            _plot(axes, theme, one)
        for name, (value, role) in (levels or {}).items():
            axes.axhline(value, color=theme.of(role), linewidth=1.1, linestyle=(0, (4, 3)), label=name)
        axes.set_xlabel(x_label)
        if log_y:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            low, high = axes.get_ylim()
            if high - low < 1e-9 * max(abs(high), 1.0):
                axes.set_ylim(low - 0.5, high + 0.5)
            if floor is not None and floor <= axes.get_ylim()[0] + 0.5 * (axes.get_ylim()[1] - axes.get_ylim()[0]):
                axes.set_ylim(bottom=floor)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(series) + len(levels or {}) > 1:
            axes.legend(loc="best", handlelength=1.6, labelspacing=0.3)

    return draw_themed(draw, (4.6, 2.9))


def times(x: Sequence[float], parts: Mapping[str, Sequence[float]]) -> Picture:
    """Seconds of each epoch, stacked by what they were spent on."""

    def draw(axes: Axes, theme: Theme) -> None:
        colours = [theme.aligned, theme.truth, theme.base, theme.soft]
        if len(x) == 1:
            bottom = 0.0
            for colour, (name, values) in zip(colours, parts.items(), strict=False):
                axes.bar([x[0]], [values[0]], bottom=bottom, color=colour, width=0.4, label=name)
                bottom += values[0]
        else:
            axes.stackplot(x, *parts.values(), labels=list(parts), colors=colours, alpha=0.75, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.legend(loc="lower right", handlelength=1.0, labelspacing=0.3)

    return draw_themed(draw, (4.6, 2.9))


@dataclass(frozen=True)
class Mark:
    """A point of the reward-KL plane with its standard errors (None where unknown)."""

    kl: float
    reward: float
    kl_se: float | None = None
    reward_se: float | None = None


def _scale_kl(axes: Axes, widest: float, frontier_end: float) -> None:
    """Linear where the run stays near the frontier's range, else a scale that keeps the frontier visible."""
    ratio = widest / max(frontier_end, 1e-9)
    if ratio <= 3:
        axes.set_xlim(left=-0.03 * widest)
    elif ratio <= 60:
        axes.set_xscale("function", functions=(lambda v: np.sqrt(np.clip(v, 0, None)), np.square))
        axes.set_xlim(0, 1.08 * widest)
        steps = np.array([0.0, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160])
        ticks = [0.0]
        for step in steps[1:]:
            if step <= 1.08 * widest and np.sqrt(step) - np.sqrt(ticks[-1]) > 0.09 * np.sqrt(widest):
                ticks.append(float(step))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        axes.set_xscale("symlog", linthresh=max(frontier_end, 1e-3))
        axes.set_xlim(0, 1.5 * widest)


def frontier(
    points: Sequence[Mapping[str, Any]],
    path: Sequence[tuple[float, float]],
    base: Mark | None = None,
    aligned: Mark | None = None,
    tilted: Mark | None = None,
) -> Picture:
    """The optimal reward-KL frontier with its error band (dashed where its weights are thin), and the run against it.

    Arguments:
        points: Of the frontier: kl, reward, and where known kl_se, reward_se, trusted.
        path: (KL in nats, reward) of the run in order of time.
        base, aligned, tilted: Marks with error bars.
    """
    rows = [
        (finite(p.get("kl")), finite(p.get("reward")), finite(p.get("reward_se")) or 0.0, bool(p.get("trusted", True)))
        for p in points
    ]
    known = sorted(
        (kl, reward, se, trusted) for kl, reward, se, trusted in rows if kl is not None and reward is not None
    )
    end = max((row[0] for row in known), default=0.0)
    marks = [mark for mark in (base, aligned, tilted) if mark is not None]
    widest = max([end, *(kl for kl, _ in path), *(m.kl + (m.kl_se or 0) for m in marks), 1e-6])

    def draw(axes: Axes, theme: Theme) -> None:
        if known:
            _draw_optimum(axes, theme, known, widest)
        if path:
            x, y = zip(*path, strict=True)
            axes.plot(x, y, color=theme.soft, linewidth=1.2, zorder=2)
            axes.scatter(x, y, color=theme.aligned, s=12, alpha=0.55, linewidth=0, zorder=3, label="in training")
        _draw_mark(axes, theme, base, "base", "s", "base")
        _draw_mark(axes, theme, tilted, "truth", "D", "tilted truth")
        _draw_mark(axes, theme, aligned, "aligned", "o", "aligned")
        if known:
            _scale_kl(axes, widest, end)
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylabel("expected reward")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, columnspacing=1.4, handlelength=1.8)

    return draw_themed(draw, (5.2, 4.0))


def _draw_optimum(axes: Axes, theme: Theme, known: list[tuple[float, float, float, bool]], widest: float) -> None:
    """The frontier (KL, reward, error, trusted), sorted, with its band; dashed from the first thin point on."""
    kl, reward, se = (np.array([row[i] for row in known]) for i in range(3))
    solid = np.array([row[3] for row in known])
    axes.fill_between(kl, reward - se, reward + se, color=theme.truth, alpha=0.18, linewidth=0)
    cut = int(np.argmin(solid)) if not solid.all() else len(kl)
    axes.plot(kl[:cut], reward[:cut], color=theme.truth, linewidth=2, label="optimal frontier")
    if cut < len(kl):
        start = max(cut - 1, 0)
        dashes = (0, (3, 2))
        axes.plot(
            kl[start:],
            reward[start:],
            color=theme.truth,
            linewidth=1.6,
            linestyle=dashes,
            label="… thinly sampled",
        )
    if widest > 1.05 * kl[-1]:  # nothing lies above the largest reward, at whatever KL
        axes.plot([kl[-1], widest * 1.08], [reward[-1]] * 2, color=theme.truth, linewidth=1.1, linestyle=":")


def _draw_mark(axes: Axes, theme: Theme, mark: Mark | None, role: Role, shape: str, label: str) -> None:
    if mark is None:
        return
    axes.errorbar(
        [mark.kl],
        [mark.reward],
        xerr=None if mark.kl_se is None else [mark.kl_se],
        yerr=None if mark.reward_se is None else [mark.reward_se],
        fmt=shape,
        color=theme.of(role),
        markersize=7,
        markeredgecolor=theme.ground,
        capsize=3,
        elinewidth=1.4,
        zorder=5,
        label=label,
    )


def bars(shares: Mapping[str, Mapping[str, float]]) -> Picture:
    """Shares by category, side by side for base, tilted truth and aligned.

    Arguments:
        shares: From 'base', 'truth' or 'aligned' to the share of each category.
    """
    order: list[Role] = [role for role in ROLES if role in shares]
    names = list(dict.fromkeys(name for role in order for name in shares[role]))

    def draw(axes: Axes, theme: Theme) -> None:
        width = 0.8 / max(len(order), 1)
        for i, role in enumerate(order):
            place = np.arange(len(names)) + (i - (len(order) - 1) / 2) * width
            axes.bar(place, [shares[role].get(name, 0.0) for name in names], 0.9 * width, color=theme.of(role))
        axes.set_xticks(range(len(names)), names)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")

    return draw_themed(draw, (3.9, 2.1))
