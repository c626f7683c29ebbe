"""The table of a comparison: one function computes its rows, for the page, for Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import markup
from rich.console import Console
from rich.table import Table

from vmpo.reports.run_record import finite, section

Result = Mapping[str, Any]
Estimate = tuple[float | None, float | None]
Cells = Sequence[tuple[str, str]]
COLUMNS = {
    "kl_target": ("KL to target", "nats", "Distance of the policy from the tilted target; 0 is exact. Rows follow it."),
    "ess": ("ESS", "share", "Share of the policy's samples that count as samples of the target; 1 is exact."),
    "var_log_w": (
        "Var(log\u00a0w)",
        "nats²",
        "Spread of the log importance weights, what training minimises; 0 is exact.",
    ),
    "log_z_error": ("|log\u00a0Z error|", "nats", "How far the estimated log Z is from the true one; 0 is exact."),
    "reward_gap": ("E[r] − truth", "", "Expected reward less the target's. 0 is right: above it, the KL is overspent."),
    "distance": ("Distance", "", "Between the policy's final samples (or exact law) and the target's; 0 is the same."),
    "gradient_snr": ("Gradient SNR", "", "Mean over spread of the first gradients; larger learns from fewer samples."),
    "seconds": ("Seconds", "", "Wall-clock time of one training; less is better."),
}
SIGNED = ("reward_gap",)
TRUTHS = {"log Z": "log_z", "E[r]": "reward", "KL": "kl", "E[r] of the reference": "reward_ref"}
SHORT = ("kl_target", "ess", "reward_gap")
UNTRAINED = "untrained policy"
CLOSE = 0.01
"""Share of the truth's gain in reward within which a policy counts as having reached it, however small its error."""


@dataclass(frozen=True)
class Row:
    """An objective in a world: (mean, standard error over seeds) by column, None where there is no number."""

    objective: str
    values: dict[str, Estimate]
    reached: bool = False
    seeds: int = 0
    diverged: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()


def result_value(result: Result, column: str) -> float | None:
    final, truth = section(result, "final"), section(result, "truth")
    if column == "reward_gap":
        reward, true = finite(final.get("reward")), finite(truth.get("reward"))
        return None if reward is None or true is None else reward - true
    value = finite((result if column in ("gradient_snr", "seconds") else final).get(column))
    return abs(value) if column == "log_z_error" and value is not None else value


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean and standard error std(ddof=1)/√n of what is known; no error from one seed."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    return mean, float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None


def _reached(values: Mapping[str, Estimate], results: Sequence[Result]) -> bool:
    """|E[r] − truth| within two standard errors, of seeds and samples combined, or 1% of the gain; and ESS ≥ 0.98."""
    (gap, se), (ess, _) = values["reward_gap"], values["ess"]
    if gap is None or ess is None:
        return False
    within = [finite(section(result, "final").get("reward_se")) or 0.0 for result in results]
    combined = math.hypot(se or 0.0, float(np.mean(within)) / math.sqrt(len(within)))
    true, base = (finite(section(results[0], "truth").get(name)) for name in ("reward", "reward_ref"))
    close = 0.0 if true is None or base is None else CLOSE * abs(true - base)
    return abs(gap) <= max(2 * combined, close) and ess >= 0.98


def is_diverged(result: Result) -> bool:
    return result_value(result, "kl_target") is None and (
        result_value(result, "reward_gap") is None or result_value(result, "ess") is None
    )


def by_objective(results: Sequence[Result], world: str) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: finite(r.get("seed")) or 0):
        if result.get("world") == world:
            groups.setdefault(str(result.get("objective")), []).append(result)
    return groups


def _row(objective: str, group: Sequence[Result]) -> Row:
    kept = [result for result in group if not is_diverged(result)]
    values = {column: over_seeds([result_value(result, column) for result in kept or group]) for column in COLUMNS}
    if not kept:
        values |= {c: (None, None) for c in COLUMNS if c not in ("gradient_snr", "seconds")}
    lost = len(group) - len(kept)
    notes = dict.fromkeys(str(result["note"]) for result in group if result.get("note"))
    if 0 < lost < len(group):
        notes = {f"{lost} of {len(group)} seeds diverged": None, **notes}
    reached = lost == 0 and _reached(values, kept)
    return Row(objective, values, reached, len(group), lost, str(group[0].get("source") or ""), tuple(notes))


def rows(results: Sequence[Result], world: str) -> list[Row]:
    """The rows of a world by KL to the target, the untrained policy among them; what diverged comes last."""
    groups = by_objective(results, world)
    table = [_row(objective, group) for objective, group in groups.items()]
    starts = [(r, section(r["curve"][0])) for group in groups.values() for r in group if r.get("curve")]
    starts = [(result, point) for result, point in starts if point.get("samples") == 0]
    if starts:
        before = [{"truth": result.get("truth"), "final": point} for result, point in starts]
        table.append(Row(UNTRAINED, {c: (over_seeds([result_value(r, c) for r in before])[0], None) for c in COLUMNS}))

    def place(row: Row) -> tuple[int, float, str]:
        kl = row.values["kl_target"][0]
        lost = 0 if not row.diverged else 1 if row.diverged < row.seeds else 3
        return max(lost, 2 if kl is None else 0), math.inf if kl is None else kl, row.objective

    return sorted(table, key=place)


def amount(mean: float | None, se: float | None, signed: bool = False) -> tuple[str, str]:
    """A mean and its error as printed: to two digits of the error, but no more than four digits of the mean."""
    if mean is None:
        return "–", ""
    size = max(abs(mean), se or 0.0)
    se = 0.0 if se is not None and se < 1e-9 * size else se  # equal but for rounding
    first = math.floor(math.log10(size)) if size > 0 else 0
    digits = min(3 - first, 1 - math.floor(math.log10(se)) if se else 2 - first)
    form = f",.{min(max(digits, 0), 6)}f" if 1e-6 < size < 1e5 or size == 0 else ".1e"
    text = format(mean, ("+" if signed else "") + form)
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    error = "" if se is None else format(se, form) if se else "0"
    return text.replace("-", "−"), error


def printed_cells(row: Row) -> list[tuple[str, str]]:
    """(mean, error) of each column as printed; a diverged row says so in place of its KL."""
    cells = [amount(*row.values[column], column in SIGNED) for column in COLUMNS]
    if row.seeds and row.diverged == row.seeds:
        cells[list(COLUMNS).index("kl_target")] = "diverged", ""
    return cells


def titles(results: Sequence[Result], world: str) -> list[tuple[str, str]]:
    """(title, unit) of each column; the distance has the name of what was measured in this world."""
    kinds = [section(r, "final").get("distance_kind") for r in results if r.get("world") == world]
    kind = str(next((k for k in kinds if isinstance(k, str) and k), "distance")).capitalize()
    return [(kind if column == "distance" else title, unit) for column, (title, unit, _) in COLUMNS.items()]


def worlds_of(results: Sequence[Result], comparison: Mapping[str, Any]) -> list[str]:
    """The worlds that have results, in the order of the comparison."""
    present = dict.fromkeys(str(result.get("world")) for result in results)
    return [*(w for w in section(comparison, "worlds") if w in present)] + [
        w for w in present if w not in section(comparison, "worlds")
    ]


def markdown_table(results: Sequence[Result], world: str) -> str:
    """The table of a world in Markdown: mean ± standard error over seeds."""
    heads = ["objective", *(f"{title}, {unit}" if unit else title for title, unit in titles(results, world))]
    heads = [head.replace("|", "\\|") for head in heads]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows(results, world):
        name = row.objective if row.objective == UNTRAINED else f"`{row.objective}`"
        cells = [f"{mean} ± {se}" if se else mean for mean, se in printed_cells(row)]
        lines.append(f"| {name}{' (reached)' if row.reached else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def markdown_page(results: Sequence[Result], comparison: Mapping[str, Any]) -> str:
    """All worlds' tables with what they are, the truth, and the command and hardware they come from."""
    parts = [f"{comparison.get('date')}, {comparison.get('hardware')}: `{comparison.get('command')}`\n"]
    for world in worlds_of(results, comparison):
        truth = next(section(r, "truth") for r in results if r.get("world") == world)
        facts = ", ".join(f"{name} {truth[key]:.4f}" for name, key in TRUTHS.items())
        kind = section(comparison, "worlds", world).get("kind")
        parts += [f"## {world}\n", f"{kind}. Truth: {facts}.\n", markdown_table(results, world)]
    return "\n".join(parts)


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Prints the short table of every world: mean ± standard error over seeds; the page has all columns."""
    for world in worlds_of(results, {}):
        table = Table(title=world, title_justify="left", caption="green: reached the target", box=None)
        table.add_column("objective", overflow="fold")
        heads = dict(zip(COLUMNS, titles(results, world), strict=True))
        for column in SHORT:
            title, unit = heads[column]
            table.add_column(markup.escape(f"{title}\n{unit}" if unit else title), justify="right", no_wrap=True)
        for row in rows(results, world):
            style = "green" if row.reached else "red" if row.diverged else "dim" if not row.seeds else ""
            cells = dict(zip(COLUMNS, printed_cells(row), strict=True))
            found = [f"{m} ±{se}" if se else m for m, se in (cells[column] for column in SHORT)]
            table.add_row(row.objective, *found, style=style)
        console.print(table)
