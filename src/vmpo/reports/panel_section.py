"""Whether the reward was earned: trained against held-out rewards, diversity and KL at every evaluation."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from vmpo.reports.curves_section import attempt
from vmpo.reports.panel_figure import Curve, PanelData, panel_figure
from vmpo.reports.run_record import RunRecord, finite, section
from vmpo.reports.wording import label, plus_minus

Row = dict[str, Any]


def _curve(rows: list[Row], key: str, text: str) -> Curve | None:
    known = [(finite(row.get("epoch")), finite(row.get(key)), finite(row.get(f"{key}_se"))) for row in rows]
    found = [(e, v, math.nan if s is None else s) for e, v, s in known if e is not None and v is not None]
    return Curve(text, *map(list, zip(*found, strict=True))) if found else None  # type: ignore[arg-type]


def panel_data(record: RunRecord) -> PanelData | None:
    """What the run measured, or None where it has no evaluation against its base model."""
    rows = record.metrics
    trained = _curve(rows, "eval_reward_rise", "trained reward, held-out prompts")
    if trained is None:
        return None
    names = section(record.config, "reward").get("held_out")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    held_out = [_curve(rows, f"eval_{name}_rise", f"held out: {label(name)}") for name in names]
    last = rows[-1]
    return PanelData(
        trained=trained,
        seen=_curve(rows, "eval_train_reward_rise", "trained reward, training prompts"),
        held_out=[curve for curve in held_out if curve is not None],
        diversity=_curve(rows, "eval_diversity_ratio", "diversity, share of the base model's"),
        kl=_curve(rows, "eval_kl_ref", "KL to the reference, nats a trajectory"),
        best=_best_epoch(record),
        stopped=finite(last.get("epoch")) if last.get("stopped") else None,
    )


def _best_epoch(record: RunRecord) -> float | None:
    best = record.front.get("best")
    number_of = best.removeprefix("epoch-") if isinstance(best, str) else ""
    return float(number_of) if number_of.isdigit() else None


def _said(record: RunRecord, data: PanelData) -> list[str]:
    """The state at the last evaluation, what was kept and why training ended, a sentence each."""
    row = next(row for row in reversed(record.metrics) if finite(row.get("eval_reward_rise")) is not None)

    def measured(key: str) -> str:
        return plus_minus({"mean": row.get(f"eval_{key}"), "se": row.get(f"eval_{key}_se")}, signed=True)

    said = [f"At the last evaluation the trained reward stands {measured('reward_rise')} base standard deviations up."]
    if data.held_out:
        said.append(f"Less the rise of the held-out rewards that is a gap of {measured('gap_rewards')}.")
    else:
        said.append("No held-out reward is measured (reward.held_out), so nothing else vouches for the rise.")
    if data.seen is not None:
        said.append(f"Its rise on training prompts less that on held-out ones is {measured('gap_prompts')}.")
    if data.diversity is not None:
        said.append(f"Diversity is {data.diversity.value[-1]:.0%} of the base model's.")
    if data.best is not None:
        rule = escape(str(record.front.get("rule", "")))
        said.append(f"Kept as best in pareto/: epoch {data.best:.0f}, by the rule: {rule}.")
    if data.stopped is not None:
        said.append(f"Stopped after epoch {data.stopped:.0f}: {escape(str(record.metrics[-1]['stopped']))}.")
    return said


def panel_section(record: RunRecord) -> str:
    """The panel with its sentences; nothing for a run without evaluations against its base model."""
    data = panel_data(record)
    if data is None:
        return ""
    picture = attempt(
        "Trained and held-out rewards, diversity and KL",
        "bands are one standard error over prompts; rewards and diversity are paired with the base model's",
        lambda: panel_figure(data),
        wide=True,
    )
    return f"<h2>Was the reward earned?</h2><p>{' '.join(_said(record, data))}</p>{picture}"
