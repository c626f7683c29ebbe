"""Objectives compared in worlds whose answer is known: a table and figures for each world, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vmpo.disk import write_text
from vmpo.errors import UserError
from vmpo.reports.comparison_figures import course_section, samples_section
from vmpo.reports.comparison_table import (
    COLUMNS,
    SIGNED,
    Cells,
    Estimate,
    Result,
    Row,
    amount,
    by_objective,
    is_diverged,
    markdown_page,
    printed_cells,
    rows,
    titles,
    worlds_of,
)
from vmpo.reports.run_record import finite, section
from vmpo.reports.style import CSS

EXTRA_CSS = """
main { max-width: 1120px; }
a { color: var(--aligned); }
dl + p { margin-top: 12px; }
.tile span { overflow-wrap: anywhere; }
.results th, .results td { padding: 7px 8px; white-space: nowrap; }
.results th:first-child {
  position: sticky; left: 0; background: var(--paper); padding-right: 14px; white-space: normal; min-width: 8.5em;
}
.results td .se { display: block; }
.results.inline td .se { display: inline; margin-left: .4em; }
.results thead th { white-space: normal; }
.results thead span, .results .under { display: block; font-weight: 400; font-size: .76rem; color: var(--faint); }
.results .untrained * { color: var(--faint); font-style: italic; }
.results .under.bad { color: var(--bad); }
.reached { color: var(--good); font-size: .72rem; font-weight: 650; white-space: nowrap; }
[title] { text-decoration: underline dotted var(--faint) 1px; text-underline-offset: 3px; cursor: help; }
.key.lines i { width: 22px; height: 0; border-radius: 0; vertical-align: 4px; background: none; }
.small { grid-template-columns: repeat(auto-fill, minmax(min(46%, 190px), 1fr)); gap: 10px; }
.small .panel { padding: 8px 10px; }
.small .panel figcaption { font-size: .78rem; overflow-wrap: anywhere; }
.small .panel figcaption span { font-size: .74rem; }
.small .panel { display: flex; flex-direction: column; justify-content: space-between; }
.small .gone { aspect-ratio: 2.5 / 2.2; }
""".strip()


def _cell_html(mean: str, se: str) -> str:
    return f'<td><span class="num">{mean}</span>{f"""<span class="se">± {se}</span>""" if se else ""}</td>'


def _breaking(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _name_html(row: Row) -> str:
    tip = f' title="{escape(row.source)}"' if row.source else ""
    mark = ' <span class="reached">reached</span>' if row.reached else ""
    bad = " bad" if row.diverged else ""
    return f"<span{tip}>{_breaking(row.objective)}</span>{mark}" + "".join(
        f'<span class="under{bad}">{escape(note)}</span>' for note in row.notes
    )


def _table_html(heads: Sequence[tuple[str, str]], body: Sequence[tuple[str, str, Cells]], style: str = "") -> str:
    """A table of (title, unit) and of (class, name in HTML, cells)."""
    top = "".join(f'<th scope="col">{escape(t)}{f"<span>{escape(u)}</span>" if u else ""}</th>' for t, u in heads)
    lines = "".join(
        f'<tr class="{kind}"><th scope="row">{name}</th>{"".join(_cell_html(*cell) for cell in cells)}</tr>'
        for kind, name, cells in body
    )
    return (
        f'<div class="scroll"><table class="results {style}"><thead><tr><th scope="col">Objective</th>'
        f"{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _world_table(results: Sequence[Result], world: str) -> str:
    body = [("" if row.seeds else "untrained", _name_html(row), printed_cells(row)) for row in rows(results, world)]
    return _table_html(titles(results, world), body)


def _truth_line(truth: Mapping[str, Any]) -> str:
    words = {"log_z": "log Z {} nats", "reward": "E[r] {}", "kl": "KL to the reference {} nats"}
    known = [text.format(amount(finite(truth.get(name)), None)[0]) for name, text in words.items() if name in truth]
    base = finite(truth.get("reward_ref"))
    return f"The target: {', '.join(known)}." + (
        "" if base is None else f" The reference: E[r] {amount(base, None)[0]}."
    )


def _pair(value: object) -> Estimate:
    """[mean, standard error], or a plain number."""
    pair = value if isinstance(value, list) else [value]
    return finite(pair[0] if pair else None), finite(pair[1]) if len(pair) > 1 else None


def _equal_seconds(results: Sequence[Result], world: str, equal: Mapping[str, Any], truth: Mapping[str, Any]) -> str:
    """Where every objective stood after equal time, by KL to the target."""
    true, heads = finite(truth.get("reward")), dict(zip(COLUMNS, titles(results, world), strict=True))
    nothing: Estimate = (None, None)
    entries: dict[str, dict[str, Estimate]] = {}
    for objective in equal:
        entry = {name: _pair(value) for name, value in section(equal, objective).items()}
        reward, se = entry.get("reward", nothing)
        entry["reward_gap"] = (None if reward is None or true is None else reward - true), se
        entries[objective] = entry
    names = [name for name in COLUMNS if any(entry.get(name, nothing)[0] is not None for entry in entries.values())]
    times = {entry.get("seconds", nothing)[0] for entry in entries.values()}
    said = ""
    if len(times) == 1 and None not in times:
        said = f" Each stands here as it did after {amount(times.pop(), None)[0]} seconds of training."
        names.remove("seconds")

    def place(objective: str) -> tuple[bool, float, str]:
        kl = entries[objective].get("kl_target", nothing)[0]
        return kl is None, kl or 0.0, objective

    body = [
        ("", _breaking(one), [amount(*entries[one].get(name, nothing), name in SIGNED) for name in names])
        for one in sorted(entries, key=place)
    ]
    table = _table_html([heads[name] for name in names], body, "inline")
    return f"<h3>After equal time</h3><p>A sample costs some objectives more time than others.{said}</p>{table}"


def _world(
    results: Sequence[Result], world: str, comparison: Mapping[str, Any], families: Mapping[str, str] | None
) -> str:
    groups, table = by_objective(results, world), rows(results, world)
    order = [row.objective for row in table if row.seeds]
    runs = {name: [r for r in groups[name] if not is_diverged(r)] or groups[name] for name in order}
    described = section(comparison, "worlds", world)
    truth = section(groups[order[0]][0], "truth")
    notes = {
        row.objective: "diverged" if row.diverged == row.seeds else f"KL {amount(*row.values['kl_target'])[0]}"
        for row in table
        if row.seeds
    }
    under = (
        "bars: exact law of the policy on the wide bars of the target"
        if described.get("target_probabilities")
        else "blue: samples of the policy; brown: the target; the frame is the same in all"
    )
    equal = section(comparison, "equal_seconds", world)
    return (
        f'<h2 id="{escape(world)}">{escape(world)}</h2><p>{escape(str(described.get("kind") or ""))}</p>'
        f'<p class="quiet">{_truth_line(truth)}</p>{_world_table(results, world)}'
        "<h3>Course of training</h3><p>A row for each family, all others in grey behind; bands are one standard error. "
        "Brown is the truth: the zero line, the optimal frontier and, as a diamond, the target. "
        "A cross ends a run that diverged.</p>"
        f"{course_section(runs, described, families)}"
        f"<h3>What the policies draw</h3><p>First seed of each, in the order of the table; {under}.</p>"
        f"{samples_section(runs, described, notes)}"
        f"{_equal_seconds(results, world, equal, truth) if equal else ''}"
    )


def _summary(results: Sequence[Result], comparison: Mapping[str, Any]) -> str:
    worlds = worlds_of(results, comparison)
    objectives = dict.fromkeys(str(r.get("objective")) for r in results)
    seeds = sorted({r["seed"] for r in results if finite(r.get("seed")) is not None})
    tiles = []
    for world in worlds:
        table = [row for row in rows(results, world) if row.seeds]
        reached = sum(row.reached for row in table)
        best = table[0].values["kl_target"][0]
        nearest = "" if best is None else f"; lowest KL: {table[0].objective}, {amount(best, None)[0]} nats"
        tiles.append((f"{reached} of {len(table)}", f"reached the target in {world}{nearest}"))
    many = f"{len(objectives)} objective{'s' if len(objectives) != 1 else ''}"
    where = f"{len(worlds)} world{'s' if len(worlds) != 1 else ''}"
    samples, limit = finite(comparison.get("samples")), finite(comparison.get("seconds_limit"))
    budget = [f"{samples:,.0f} samples" if samples else "", f"at most {limit:g} seconds" if limit else ""]
    budget_text = ", ".join(b for b in budget if b)
    facts = {
        "Compared": f"{many} in {where}: {', '.join(worlds)}",
        "Budget": f"{budget_text} for each training" if budget_text else "",
        "Seeds": ", ".join(f"{s:g}" for s in seeds) + ("" if len(seeds) > 1 else " (so there are no standard errors)"),
        "Hardware": comparison.get("hardware"),
        "Date": comparison.get("date"),
    }
    known = "".join(f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items() if text)
    command = comparison.get("command")
    again = f"<p>To have this page again:</p><pre>{escape(str(command))}</pre>" if command else ""
    links = " · ".join(f'<a href="#{escape(world)}">{escape(world)}</a>' for world in worlds)
    return (
        f'<p class="over">vmpo · compare</p><h1>{many} where the answer is known</h1>'
        f'<p class="lead">In {"these worlds" if len(worlds) != 1 else "this world"} the reward-tilted target is known '
        "exactly, so each objective is measured against it, not only against the others.</p>"
        + '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in tiles)
        + f"</div><h2>What was done</h2><dl>{known}</dl>{again}"
        + (f'<p class="jump">{links}</p>' if len(worlds) > 1 else "")
    )


GUIDE_END = (
    "Numbers are means ± one standard error over seeds. <span class='reached'>reached</span>: E[r] is within two "
    "standard errors (of seeds and samples together) or 1% of the gain of the target's, and ESS is at least 0.98."
)


def _guide() -> str:
    words = "".join(f"<dt>{escape(title)}</dt><dd>{escape(guide)}</dd>" for title, _, guide in COLUMNS.values())
    return f"<h3>How to read the columns</h3><dl>{words}</dl><p class='quiet after'>{GUIDE_END}</p>"


def _sources(results: Sequence[Result]) -> str:
    known = {str(r.get("objective")): str(r["source"]) for r in results if r.get("source")}
    words = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in sorted(known.items()))
    return f"<h2>Sources of the objectives</h2><dl>{words}</dl>" if known else ""


def render_comparison(
    results: Sequence[Result],
    comparison: Mapping[str, Any],
    families: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The whole page as HTML."""
    missing = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    parts = [_summary(results, comparison), missing, _guide()]
    parts += [_world(results, world, comparison, families) for world in worlds_of(results, comparison)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vmpo compare</title><style>{CSS}\n{EXTRA_CSS}</style></head>"
        f"<body><main>{''.join(parts)}{_sources(results)}</main></body></html>\n"
    )


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        notes.append(f"{path.parent.name}/{path.name} cannot be read; it is left out.")
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read_results(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The results of a comparison, one for each world, objective and seed; `notes` gathers what cannot be read.

    Raises:
        UserError: if there is none.
    """
    found = [_read(path, [] if notes is None else notes) for path in sorted(Path(folder).glob("results/*/*.json"))]
    found = [result for result in found if result.get("world") and result.get("objective")]
    if not found:
        raise UserError(
            f"'{folder}' holds no results (results/<world>/<objective>-<seed>.json); run vmpo compare first"
        )
    return found


def write_comparison(folder: Path, families: Mapping[str, str] | None = None) -> Path:
    """Writes comparison.html and the tables, comparison.md, into the folder of a comparison, each whole or not at all.

    Arguments:
        families: From an objective to the family it is drawn with; by default its name's first word.

    Returns:
        The page's path. It needs no network and no other file.

    Raises:
        UserError: if there are no results or the folder cannot be written.
    """
    notes: list[str] = []
    results = read_results(folder, notes)
    comparison = _read(Path(folder) / "comparison.json", notes)
    path = Path(folder) / "comparison.html"
    write_text(path, render_comparison(results, comparison, families, notes))
    write_text(path.with_suffix(".md"), markdown_page(results, comparison))
    return path
