"""One self-contained page a run: what was gained, how, how near to the optimum, and where it came from."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from vmpo.disk import write_file
from vmpo.reports import curves_section, frontier_section, panel_section
from vmpo.reports.gallery import gallery, letters
from vmpo.reports.run_record import RunRecord, finite, read_run, section
from vmpo.reports.style import CSS
from vmpo.reports.wording import estimate_cell, label, number, plus_minus, primary_metric

ORDER = ("ocr", "exact_match", "reward", "diversity", "style_entropy", "kl_ref", "ess", "log_z", "var_log_w")
TRUTH_OF = {"reward": "reward", "diversity": "diversity", "kl_ref": "kl", "log_z": "log_z"}
"""Which entry of the truth belongs in the row of a metric."""


def _headline(record: RunRecord) -> tuple[str, str]:
    """Title and sub-title: the measured change of the main metric, worded by its error."""
    metric = primary_metric(record.evaluation)
    if metric is None:
        if not record.metrics:
            return "A run that has not started", "No epoch and no evaluation are recorded in this folder yet."
        first, last = record.metrics[0], record.metrics[-1]
        rewards = finite(first.get("reward_mean")), finite(last.get("reward_mean"))
        title = "Training, not evaluated yet"
        if None in rewards:
            return title, f"{len(record.metrics)} epochs so far."
        return title, (
            f"After {len(record.metrics)} epochs the mean reward of the training samples is {number(rewards[1])}, "
            f"from {number(rewards[0])} in the first. Held-out figures follow with the evaluation."
        )
    base, aligned = (finite(section(record.evaluation, who, metric).get("mean")) for who in ("base", "aligned"))
    difference = section(record.evaluation, "difference", metric)
    gain, se, n = finite(difference.get("mean")), finite(difference.get("se")), finite(difference.get("n"))
    if gain is None and base is not None and aligned is not None:
        gain = aligned - base
    if gain is None:
        return f"{label(metric)} of one side only", "Base and aligned are not both evaluated, so no gain can be stated."
    sure = se is not None and abs(gain) > 2 * se
    verb = ("rose" if gain > 0 else "fell") if sure or se is None else "did not measurably change"
    amount = f" from {number(base)} to {number(aligned)}" if base is not None and aligned is not None else ""
    title = f"{label(metric)} {verb}{amount if sure or se is None else ''}"
    error = "" if se is None else f" ± {number(se)} (one standard error)"
    over = "" if n is None else f" over {n:.0f} held-out prompts"
    return title, f"Aligned minus base: {gain:+.3f}{error}{over}, same prompts, same seeds, same sampler."


def _tiles(record: RunRecord) -> str:
    tiles: list[tuple[str, str]] = []
    exact = [section(record.evaluation, who, "exact_match") for who in ("base", "aligned")]
    if all(finite(e.get("mean")) is not None for e in exact):
        tiles.append((f"{exact[0]['mean']:.0%} → {exact[1]['mean']:.0%}", "spelt exactly right, base → aligned"))
    kl = section(record.evaluation, "aligned", "kl_ref")
    if finite(kl.get("mean")) is not None:
        tiles.append((_with_error(kl), "nats of KL from the reference, a trajectory"))
    gap = section(record.evaluation, "truth", "gap")
    if finite(gap.get("gap")) is not None:
        tiles.append(
            (_with_error({"mean": gap["gap"], "se": gap.get("se")}), "below the best reward in base samples at that KL")
        )
    spread = [section(record.evaluation, who, "diversity") for who in ("base", "aligned")]
    means = [finite(s.get("mean")) for s in spread]
    if means[0] and means[1] is not None:
        tiles.append((f"{means[1] / means[0]:.0%}", "of the base's diversity kept"))
    hours = _hours(record)
    if hours is not None:
        samples = finite(record.metrics[-1].get("samples")) if record.metrics else None
        text = f"{hours * 60:.1f} min" if hours < 1.5 else f"{hours:.1f} h"
        tiles.append((text, "of training" + ("" if samples is None else f", {samples:,.0f} samples")))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in tiles)
        + "</div>"
        if tiles
        else ""
    )


def _with_error(estimate: dict[str, Any]) -> str:
    mean, _, se = plus_minus(estimate).partition(" ± ")
    return f"{mean} <small>± {se}</small>" if se else mean


def _hours(record: RunRecord) -> float | None:
    hours = finite(record.provenance.get("hours"))
    if hours is None and record.metrics:
        seconds = finite(record.metrics[-1].get("seconds"))
        hours = None if seconds is None else seconds / 3600
    return hours


def _table(record: RunRecord) -> str:
    title = "<h2>Evaluation</h2>"
    base, aligned = section(record.evaluation, "base"), section(record.evaluation, "aligned")
    metrics = [m for m in ORDER if m in base or m in aligned]
    metrics += [m for m in dict.fromkeys([*base, *aligned]) if m not in ORDER]
    if not metrics:
        return title + '<p class="note">No evaluation yet: <code>vmpo evaluate</code> writes it.</p>'
    truth, difference = section(record.evaluation, "truth"), section(record.evaluation, "difference")
    beta = finite(truth.get("beta"))
    # where the OCR score is the whole reward, one row tells both
    same = "reward" not in base or _means(base, aligned, "ocr") == _means(base, aligned, "reward")
    truth_of = TRUTH_OF | ({"ocr": "reward"} if same else {})
    rows = []
    for metric in metrics:
        if metric == "reward" and same and "ocr" in metrics:
            continue
        cells = [estimate_cell(side.get(metric)) for side in (base, aligned)]
        cells.append(estimate_cell(difference.get(metric), signed=True))
        cells.append(estimate_cell(truth.get(truth_of.get(metric, ""))))
        rows.append(f'<tr><th scope="row">{escape(label(metric))}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    sentence = escape(", ".join(_said(section(record.evaluation, "settings"))))
    tilted = "Tilted truth" + ("" if beta is None else f", β = {beta:g}")
    return (
        f"{title}<p>{sentence}{'.' if sentence else ''} Mean ± one standard error over prompts. "
        "The last column is the distribution that training aims at, worked out from base samples.</p>"
        '<div class="scroll"><table><thead><tr><th></th><th>Base</th><th>Aligned</th><th>Difference</th>'
        f"<th>{escape(tilted)}</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _means(base: dict[str, Any], aligned: dict[str, Any], metric: str) -> list[float | None]:
    return [finite(section(side, metric).get("mean")) for side in (base, aligned)]


def _said(settings: dict[str, Any]) -> list[str]:
    """The settings of the evaluation in words; what is not known here is named as it is."""
    words = {
        "words": "{} held-out words",
        "images_per_prompt": "{} pictures each",
        "deep_prompts": "for what lies within a prompt {} of them",
        "deep_images_per_prompt": "with {} pictures each",
        "sampler": "sampler {}",
        "seed": "seed {}",
    }
    known = [text.format(settings[name]) for name, text in words.items() if name in settings]
    return known + [f"{name} {value}".replace("_", " ") for name, value in settings.items() if name not in words]


def _definitions(mapping: dict[str, Any]) -> str:
    rows = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, float):
            text = f"{value:.4g}"
        else:
            text = str(value)
        rows.append(f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _origin(record: RunRecord) -> str:
    parts = ["<h2>Configuration and provenance</h2>"]
    order = ("date", "command", "vmpo", "seed", "hours", "hardware", "versions")
    known = {key: record.provenance[key] for key in order if key in record.provenance}
    known |= {key: value for key, value in record.provenance.items() if key not in order}
    parts.append(_definitions(known) if known else '<p class="note">No provenance is recorded.</p>')
    if record.config:
        text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>Resolved configuration</summary><pre>{escape(text)}</pre></details>")
    else:
        parts.append('<p class="note">No configuration is recorded.</p>')
    return "".join(parts)


def render_page(record: RunRecord) -> str:
    """The whole page as HTML, from what there is of a run."""
    title, lead = _headline(record)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in record.notes)
    body = "".join(
        [
            f'<p class="over">vmpo · {escape(_name(record))}</p><h1>{escape(title)}</h1>',
            f'<p class="lead">{escape(lead)}</p>{notes}{_tiles(record)}',
            gallery(record),
            _table(record),
            frontier_section.frontier_section(record),
            panel_section.panel_section(record),
            curves_section.training_section(record),
            frontier_section.marginals_section(record),
            _origin(record),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def _name(record: RunRecord) -> str:
    recipe = record.config.get("recipe") or record.config.get("name")
    folder = record.folder.resolve().name
    return f"{recipe} · {folder}" if isinstance(recipe, str) and letters(recipe) else folder


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder, whole or not at all, from whatever the run has left so far.

    Returns:
        Its path. It needs no network and no other file.

    Raises:
        UserError: if the folder does not exist or cannot be written.
    """
    page = render_page(read_run(Path(run_dir)))
    path = Path(run_dir) / "report.html"
    write_file(path, page.encode("utf-8"), "free some space or mend the rights")
    return path
