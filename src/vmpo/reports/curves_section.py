"""The curves and diagnostics of training."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from vmpo.reports.figures import Picture, Role, Series, curves, times
from vmpo.reports.run_record import RunRecord, finite, section
from vmpo.reports.wording import primary_metric

Row = dict[str, Any]

DIAGNOSTICS: tuple[tuple[str, str, str, float | None], ...] = (
    ("var_log_w", "Var(log w), nats²", "zero where the policy is the tilted distribution", 0.0),
    ("ess", "Effective sample size", "of the policy as a proposal for the tilted distribution", 0.0),
    ("log_z", "log Z, nats", "as the policy estimates it", None),
    ("grad_norm", "Gradient norm", "before clipping", 0.0),
    ("ratio_mean", "Mean ratio to the rollout policy", "one where the policy has not moved", None),
    ("clip_fraction", "Share of clipped ratios", "", 0.0),
    ("failed_rewards", "Share of failed rewards", "left out of their groups, never counted as zero", 0.0),
    ("zero_std_ratio", "Share of groups whose rewards are all equal", "these teach nothing", 0.0),
    ("kl_old", "KL to the rollout policy, nats", "", 0.0),
    ("loss", "Loss", "", None),
)


def panel(title: str, note: str, picture: Picture, wide: bool = False) -> str:
    """A figure with its caption, drawn for light and for dark pages."""
    below = f"<span>{escape(note)}</span>" if note else ""
    return (
        f'<figure class="panel{" wide" if wide else ""}"><figcaption>{escape(title)}{below}</figcaption><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{picture.dark}">'
        f'<img src="{picture.light}" alt="{escape(title)}"></picture></figure>'
    )


def attempt(title: str, note: str, make: Callable[[], Picture], wide: bool = False) -> str:
    """The panel, or a note in its place where odd values make the figure impossible: a report must come out."""
    try:
        return panel(title, note, make(), wide)
    except Exception as error:
        return f'<p class="note">{escape(title)}: cannot be drawn ({escape(type(error).__name__)}).</p>'


def points(rows: list[Row], y: str, x: str = "epoch") -> tuple[list[float], list[float]]:
    """The finite (x, y) of the epochs that have both."""
    pairs = [(finite(row.get(x)), finite(row.get(y))) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in known], [b for _, b in known]


def running_mean(values: list[float], width: int = 5) -> list[float]:
    """Mean of the `width` epochs around each, fewer at the ends."""
    half = width // 2
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _reward_series(rows: list[Row], x: str) -> list[Series]:
    series = []
    at, reward = points(rows, "reward_mean", x)
    if len(at) >= 10:
        series.append(Series("training samples", at, reward, kind="thin"))
        series.append(Series("mean of 5 epochs", at, running_mean(reward)))
    elif at:
        series.append(Series("training samples", at, reward))
    evaluated = [row for row in rows if finite(row.get("eval_reward_mean")) is not None]
    at, reward = points(evaluated, "eval_reward_mean", x)
    if at:
        se = [finite(row.get("eval_reward_se")) for row in evaluated if finite(row.get(x)) is not None]
        series.append(Series("held out ± se", at, reward, role="truth", se=se, kind="points"))
    return series


def _reward_panels(record: RunRecord) -> list[str]:
    metric = primary_metric(record.evaluation)
    base = finite(section(record.evaluation, "base", metric).get("mean")) if metric else None
    levels: dict[str, tuple[float, Role]] = {} if base is None else {"base, held out": (base, "base")}
    panels = []
    for x, note in (("epoch", "over epochs"), ("samples", "over samples drawn")):
        series = _reward_series(record.metrics, x)
        if series:
            label = "samples" if x == "samples" else "epoch"
            panels.append(attempt("Reward", note, lambda s=series, t=label: curves(s, t, levels)))  # type: ignore[misc]
    return panels


def _kl_panel(rows: list[Row]) -> str:
    series = []
    at, kl = points(rows, "kl_ref")
    if at:
        series.append(Series("training samples", at, kl))
    at, kl = points(rows, "eval_kl_ref")
    if at:
        series.append(Series("held out", at, kl, role="truth", kind="points"))
    if not series:
        return ""
    return attempt("KL to the reference, nats", "of whole trajectories", lambda: curves(series, "epoch", floor=0.0))


def _time_panel(rows: list[Row]) -> str:
    names = {"time_rollout": "rollout", "time_rewards": "rewards", "time_update": "update"}
    known = [row for row in rows if all(finite(row.get(key)) is not None for key in (*names, "epoch"))]
    if not known:
        return ""
    parts = {name: [float(row[key]) for row in known] for key, name in names.items()}
    return attempt(
        "Time of an epoch, seconds", "by what it was spent on", lambda: times([float(r["epoch"]) for r in known], parts)
    )


def _diagnostic_panel(rows: list[Row], key: str, title: str, note: str, floor: float | None) -> str:
    at, values = points(rows, key)
    if not at:
        return ""
    log_y = key in ("grad_norm", "var_log_w") and min(values) > 0 and max(values) > 100 * min(values)
    levels: dict[str, tuple[float, Role]] | None = {"unchanged policy": (1.0, "base")} if key == "ratio_mean" else None
    series = [Series("mean of all updates" if levels else title, at, values)]
    return attempt(title, note, lambda: curves(series, "epoch", levels, log_y, None if log_y else floor))


def training_section(record: RunRecord) -> str:
    """Reward and KL, then the diagnostics; what a run does not record is named, not drawn."""
    rows = record.metrics
    title = "<h2>Training</h2>"
    if not rows:
        return title + '<p class="note">No epoch is recorded yet; the curves appear with the first one.</p>'
    shown = [*_reward_panels(record), _kl_panel(rows)]
    diagnostics, flat, missing = [], [], []
    for key, name, note, floor in DIAGNOSTICS:
        values = points(rows, key)[1]
        if not values:
            missing.append(name)
        elif not any(values) and key in ("failed_rewards", "clip_fraction", "zero_std_ratio"):
            flat.append(name)
        else:
            diagnostics.append(_diagnostic_panel(rows, key, name, note, floor))
    diagnostics.append(_time_panel(rows))
    said = f"<p class='quiet'>Zero in every epoch: {escape(', '.join(flat).lower())}.</p>" if flat else ""
    said += f"<p class='quiet'>Not recorded: {escape(', '.join(missing))}.</p>" if missing else ""
    return (
        f'{title}<div class="panels">{"".join(shown)}</div>'
        f'<h3>Diagnostics</h3>{said}<div class="panels">{"".join(diagnostics)}</div>'
    )
