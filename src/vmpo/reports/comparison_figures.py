"""The figures of a comparison: the course of training by family of objectives, and samples against the true density."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vmpo.reports.curves_section import attempt
from vmpo.reports.figures import Picture, Theme, data_uri, draw_themed
from vmpo.reports.run_record import finite, section

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""From an objective to its results, one a seed, in the order of the table; those that diverged only if all did."""

COLOURS = ("#3b7dc4", "#b24f93", "#2f9163", "ink")  # legible on light and dark grounds, and none like the truth's brown
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)))
LARGEST_FAMILY = len(COLOURS) * len(DASHES)
TALLEST = 1.6
"""Where the frame of a law ends, in units of the target's largest probability."""
DOTS = 400
"""Most points drawn of one policy: more cannot be told apart at this size."""


@dataclass(frozen=True)
class Line:
    """Means over seeds at each point, with their standard errors where there are two seeds or more."""

    x: np.ndarray
    y: np.ndarray
    se: np.ndarray
    diverged: bool = False


def _compact(uri: str) -> str:
    """The same SVG at a third of the size: a page of a hundred figures has to be light."""
    text = base64.b64decode(uri.partition(",")[2]).decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!DOCTYPE.*?>", "", text, flags=re.DOTALL)
    text = re.sub(r' d="[^"]*"', lambda path: _compact_path(path[0]), text)
    text = re.sub(r"\s*\n\s*", " ", text)
    return data_uri(text.encode(), "image/svg+xml")


def _compact_path(path: str) -> str:
    """Coordinates to a tenth of a point, and a point for a line of no length."""
    path = re.sub(r"(\d\.\d)\d+", r"\1", path)
    path = re.sub(r"M (\S+ \S+)\s+L \1\s+", r"M\1h0", path)
    return re.sub(r"\s*([MLQC])\s*", r"\1", path)


def _figure(draw: Callable[[Axes, Theme], None], size: tuple[float, float]) -> Picture:
    picture = draw_themed(draw, size)
    return Picture(_compact(picture.light), _compact(picture.dark))


def families_of(names: Sequence[str], families: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Objectives by family, named or guessed from the first word; lone ones are 'other', and large ones are split."""
    names = sorted(names)  # the same colours in every world
    guess = {name: (families or {}).get(name) or name.split("_")[0] for name in names}
    alone = {name for name in names if name not in (families or {}) and list(guess.values()).count(guess[name]) == 1}
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault("other" if name in alone else guess[name], []).append(name)
    if "other" in grouped:
        grouped["other"] = grouped.pop("other")  # last
    parts: dict[str, list[str]] = {}
    for family, members in grouped.items():
        count = -(-len(members) // LARGEST_FAMILY)
        size = -(-len(members) // count)
        for part in range(count):
            title = family if count == 1 else f"{family}, {part + 1} of {count}"
            parts[title] = members[part * size : (part + 1) * size]
    return parts


def course(results: Sequence[Mapping[str, Any]], metric: str) -> dict[float, tuple[float, float]]:
    """From the samples drawn to (mean, standard error) of a metric over seeds, where every seed still has one."""
    at: dict[float, list[float]] = {}
    for result in results:
        for point in result.get("curve") or []:
            x, y = finite(section(point).get("samples")), finite(section(point).get(metric))
            if x is not None and y is not None:
                at.setdefault(x, []).append(y)
    most = max(map(len, at.values()), default=0)
    return {
        x: (float(np.mean(at[x])), float(np.std(at[x], ddof=1) / np.sqrt(most)) if most > 1 else 0.0)
        for x in sorted(at)
        if len(at[x]) == most
    }


def _lines(runs: Runs, y: str, x: str | None = None) -> dict[str, Line]:
    """A line for each objective: a metric over samples, or over another metric."""
    lines = {}
    for name, results in runs.items():
        ys, xs = course(results, y), course(results, x) if x else None
        shared = [at for at in ys if xs is None or at in xs]
        if shared:
            along = np.array([xs[at][0] if xs else at for at in shared])
            means, errors = (np.array([ys[at][i] for at in shared]) for i in (0, 1))
            diverged = any(finite(section(r, "final").get("kl_target")) is None for r in results)
            lines[name] = Line(along, means, errors, diverged)
    return lines


def _draw_family(axes: Axes, theme: Theme, lines: Mapping[str, Line], family: Sequence[str], bands: bool) -> None:
    for name, line in lines.items():
        if name not in family:
            axes.plot(line.x, line.y, color=theme.base, alpha=0.3, linewidth=0.8, zorder=2)
    for i, name in reversed(list(enumerate(family))):
        if name not in lines:
            continue
        line, dash = lines[name], DASHES[i // len(COLOURS) % len(DASHES)]
        colour = COLOURS[i % len(COLOURS)].replace("ink", theme.ink)
        axes.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.7, zorder=4)
        if bands and line.se.any():
            axes.fill_between(line.x, line.y - line.se, line.y + line.se, color=colour, alpha=0.16, linewidth=0)
        if line.diverged:
            axes.plot(line.x[-1:], line.y[-1:], color=colour, marker="x", markersize=7, markeredgewidth=2, zorder=5)
        elif not bands:
            axes.plot(line.x[-1:], line.y[-1:], color=colour, marker="o", markersize=4.5, zorder=5)


def _label_samples(axes: Axes) -> None:
    axes.set_xlabel("samples")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}k" if abs(n) >= 1000 else f"{n:g}")


def kl_curves(lines: Mapping[str, Line], family: Sequence[str]) -> Picture:
    """KL to the target (nats, logarithmic) over samples; far above the untrained policy the frame ends."""
    values = np.concatenate([line.y for line in lines.values()])
    start = max((line.y[0] for line in lines.values()), default=1.0)
    low = max(values[values > 0].min(initial=start) / 1.5, 1e-6)
    high = max(min(values.max() * 1.5, start * 30), low * 10)

    def draw(axes: Axes, theme: Theme) -> None:
        axes.set_yscale("log", nonpositive="clip")
        _draw_family(axes, theme, lines, family, bands=True)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        _label_samples(axes)

    return _figure(draw, (4.2, 3.0))


def reward_curves(lines: Mapping[str, Line], family: Sequence[str], truth: float | None) -> Picture:
    """Expected reward less the truth's (as it is where the truth is unknown) over samples."""
    moved = {n: Line(line.x, line.y - (truth or 0.0), line.se, line.diverged) for n, line in lines.items()}
    values = np.concatenate([line.y for line in moved.values()])
    reach = 1.6 * max(max(abs(line.y[0]) for line in moved.values()), 1e-6)
    pad = 0.06 * max(np.ptp(np.clip(values, -reach, reach)), 1e-6)

    def draw(axes: Axes, theme: Theme) -> None:
        _draw_family(axes, theme, moved, family, bands=True)
        if truth is not None:
            axes.axhline(0.0, color=theme.truth, linewidth=1.4, zorder=3)
            axes.set_ylim(max(min(values.min(), 0), -reach) - pad, min(max(values.max(), 0), reach) + pad)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _label_samples(axes)

    return _figure(draw, (4.2, 3.0))


def plane(lines: Mapping[str, Line], family: Sequence[str], truth: Mapping[str, Any], frontier: object) -> Picture:
    """The way through the reward-KL plane (nats) against the optimal frontier; a diamond is the target."""
    kls, rewards = (section(frontier).get(name) or [] for name in ("kl", "reward"))
    pairs = [(finite(kl), finite(reward)) for kl, reward in zip(kls, rewards, strict=False)]
    known = sorted((kl, reward) for kl, reward in pairs if kl is not None and reward is not None)
    kl, reward, base = (finite(truth.get(name)) for name in ("kl", "reward", "reward_ref"))
    widest = max((float(line.x.max()) for line in lines.values()), default=1.0)
    end = min(1.08 * widest, 3 * kl) if kl else widest
    values = [r for k, r in known if k <= end] + [v for v in (reward, base) if v is not None]
    floor, roof = (min(values), max(values)) if values else (0.0, 1.0)

    def draw(axes: Axes, theme: Theme) -> None:
        if known:
            axes.plot(*zip(*known, strict=True), color=theme.truth, linewidth=1.8, zorder=3)
        _draw_family(axes, theme, lines, family, bands=False)
        if kl is not None and reward is not None:
            axes.plot([kl], [reward], "D", color=theme.truth, markersize=7, markeredgecolor=theme.ground, zorder=6)
        end_shown = max(end, 1.25 * (kl or 0.0), 1e-3)
        axes.set_xlim(-0.03 * end_shown, end_shown)
        if values:
            axes.set_ylim(floor - 0.15 * (roof - floor) - 1e-3, roof + 0.12 * (roof - floor) + 1e-3)
        axes.set_xlabel("KL to the reference, nats")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _figure(draw, (4.2, 3.0))


def _named(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _family_key(family: Sequence[str]) -> str:
    items = []
    for i, name in enumerate(family):
        style = "solid" if i < len(COLOURS) else "dashed"
        colour = COLOURS[i % len(COLOURS)].replace("ink", "var(--ink)")
        items.append(f'<li><i style="border-top:3px {style} {colour}"></i>{_named(name)}</li>')
    return f'<ul class="key lines">{"".join(items)}</ul>'


def course_section(runs: Runs, world: Mapping[str, Any], families: Mapping[str, str] | None = None) -> str:
    """KL and reward over samples and the way through the reward-KL plane, a row of three for each family."""
    truth = next((section(r, "truth") for results in runs.values() for r in results), {})
    kl, reward, path = _lines(runs, "kl_target"), _lines(runs, "reward"), _lines(runs, "reward", "kl_ref")
    level = finite(truth.get("reward"))
    parts = []
    for family, members in families_of(list(runs), families).items():
        figures: tuple[tuple[str, str, Mapping[str, Line], Callable[..., Picture], tuple[Any, ...]], ...] = (
            ("KL to the target, nats", "falls towards zero", kl, kl_curves, ()),
            ("E[r] − truth", "ends on the zero line, not above it", reward, reward_curves, (level,)),
            ("E[r] against KL spent", "along the curve to the diamond", path, plane, (truth, world.get("frontier"))),
        )
        shown = [
            attempt(title, note, lambda d=draw, v=lines, m=members, r=rest: d(v, m, *r))  # type: ignore[misc]
            for title, note, lines, draw, rest in figures
            if any(name in lines for name in members)
        ]
        body = f'<div class="panels">{"".join(shown)}</div>' if shown else '<p class="quiet">No curve is recorded.</p>'
        parts.append(f"<h3>{escape(family)}</h3>{_family_key(members)}{body}")
    return "".join(parts)


def _planar(points: object) -> np.ndarray:
    """The finite points of a plane, (n, 2); none where they are of another kind."""
    rows = [[finite(v) for v in p[:2]] for p in points if isinstance(p, list)] if isinstance(points, list) else []
    return np.array([row for row in rows if len(row) == 2 and None not in row], dtype=float).reshape(-1, 2)


def _dots(axes: Axes, points: np.ndarray, colour: str, size: float, alpha: float) -> None:
    """All points as one outline of round caps: a tenth of the size of a marker each."""
    outline = Outline(np.repeat(points, 2, axis=0), [Outline.MOVETO, Outline.LINETO] * len(points))
    outline.should_simplify = False
    axes.add_patch(
        PathPatch(outline, fill=False, edgecolor=colour, linewidth=size, capstyle="round", alpha=alpha, zorder=3)
    )


def _levels(density: np.ndarray) -> np.ndarray:
    """The density's heights whose regions hold 95, 80, 50 and 20 per cent of the mass."""
    ordered = np.sort(density.ravel())[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return np.unique(ordered[np.minimum(np.searchsorted(mass, [0.95, 0.8, 0.5, 0.2]), len(ordered) - 1)])


@dataclass(frozen=True)
class Ground:
    """What lies under the samples: the target's density p[y][x] on a grid, its samples, and the frame they ask for."""

    points: np.ndarray
    grid: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    low: np.ndarray
    high: np.ndarray


def ground_of(world: Mapping[str, Any], policies: Sequence[np.ndarray]) -> Ground:
    """The target's density or samples; where neither is known, the frame holds the policies' samples."""
    target, density, grid = _planar(world.get("target_points")), section(world, "density"), None
    if density:
        x, y, p = (np.array(density.get(name), dtype=float) for name in ("x", "y", "p"))
        p = np.nan_to_num(p.T if p.shape == (len(x), len(y)) and len(x) != len(y) else p)
        if p.shape == (len(y), len(x)) and p.sum() > 0:
            grid = (x, y, p)
    framed = target if len(target) else np.concatenate([*policies, np.zeros((0, 2))])
    if grid and not len(target):
        inside = np.argwhere(grid[2] >= _levels(grid[2])[0])
        framed = np.stack([grid[0][inside[:, 1]], grid[1][inside[:, 0]]], axis=1)
    low, high = (np.quantile(framed, q, axis=0) for q in (0.005, 0.995)) if len(framed) else (-np.ones(2), np.ones(2))
    pad = 0.15 * np.maximum(high - low, 1e-3)
    return Ground(target, grid, low - pad, high + pad)


def samples_over(ground: Ground, points: np.ndarray) -> Picture:
    """A policy's samples over contours of the true density, or over faint samples of it."""

    def draw(axes: Axes, theme: Theme) -> None:
        if ground.grid:
            levels = _levels(ground.grid[2])
            axes.contourf(*ground.grid, levels=[levels[0], np.inf], colors=[theme.truth], alpha=0.1)
            axes.contour(*ground.grid, levels=levels, colors=[theme.truth], linewidths=0.9, alpha=0.8)
        elif len(ground.points):
            _dots(axes, ground.points[: 2 * DOTS], theme.truth, 3.4, 0.4)
        _dots(axes, points[:DOTS], theme.aligned, 2.6, 0.75)
        axes.set_xlim(ground.low[0], ground.high[0])
        axes.set_ylim(ground.low[1], ground.high[1])
        axes.set_xticks([])
        axes.set_yticks([])

    return _figure(draw, (2.5, 2.2))


def law(target: Sequence[float], policy: Sequence[float], labels: Sequence[str]) -> Picture:
    """A policy's exact probabilities as narrow bars on the target's wide ones, the target's most likely first."""
    order = np.argsort(-np.array(target, dtype=float), kind="stable")
    tallest = TALLEST * max(target)

    def draw(axes: Axes, theme: Theme) -> None:
        place = np.arange(len(order))
        axes.bar(place, np.array(target)[order], 0.9, color=theme.truth, alpha=0.35)
        axes.bar(place, np.array(policy)[order], 0.42, color=theme.aligned)
        axes.set_xlim(-0.8, len(order) - 0.2)
        axes.set_ylim(0, tallest)
        shown = len(labels) == len(order) and len(order) <= 40
        axes.set_xticks(place if shown else [], [labels[i] for i in order] if shown else [], rotation=90, fontsize=7.5)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")

    return _figure(draw, (4.2, 2.1))


def _pictured(name: str, note: str, make: Callable[[], Picture] | None) -> str:
    if make is None:
        caption = f"{escape(name)}<span>{escape(note)}</span>"
        return f'<figure class="panel"><figcaption>{caption}</figcaption><div class="gone">no samples</div></figure>'
    return attempt(name.replace("_", "_\u200b"), note, make)  # long names break there


def samples_section(runs: Runs, world: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """A small picture of each objective's samples (or exact law) against the target's, all in the same frame.

    Arguments:
        notes: What stands under the name of each objective.
    """
    first = {name: next(iter(results), {}) for name, results in runs.items()}
    if isinstance(target := world.get("target_probabilities"), list):
        target = [finite(v) or 0.0 for v in target]
        tallest = TALLEST * max(target, default=0.0)
        laws = {name: [finite(v) or 0.0 for v in result.get("probabilities") or []] for name, result in first.items()}
        labels = world.get("labels") or []
        panels = []
        for name, p in laws.items():
            whole = len(p) == len(target)
            note = notes.get(name, "") + (f" · largest: {max(p):.0%}" if whole and max(p) > tallest else "")
            panels.append(_pictured(name, note, (lambda p=p: law(target, p, labels)) if whole else None))  # type: ignore[misc]
        return f'<div class="panels">{"".join(panels)}</div>'
    clouds = {name: _planar(result.get("points")) for name, result in first.items()}
    ground = ground_of(world, list(clouds.values()))
    panels = []
    for name, cloud in clouds.items():
        outside = np.mean(((cloud < ground.low) | (cloud > ground.high)).any(1)) if len(cloud) else 0.0
        note = notes.get(name, "") + (f" · {outside:.0%} outside" if outside >= 0.03 else "")
        panels.append(_pictured(name, note, (lambda c=cloud: samples_over(ground, c)) if len(cloud) else None))  # type: ignore[misc]
    return f'<div class="panels small">{"".join(panels)}</div>'
