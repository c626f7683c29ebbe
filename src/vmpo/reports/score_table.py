"""Tables of sources by metrics, as Markdown and as LaTeX (booktabs), in the form of the paper's Tables 1 to 3."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vmpo.disk import write_text
from vmpo.evaluation.score_table import ScoreTable
from vmpo.evaluation.statistics import Estimate

Estimates = Mapping[str, Mapping[str, Estimate]]

TITLES = {
    "ocr": "OCR Acc.",
    "hps": "HPSv2",
    "hpsv2": "HPSv2",
    "hpsv2.0": "HPSv2.0",
    "hpsv2.1": "HPSv2.1",
    "pickscore": "PickScore",
    "pick_score": "PickScore",
    "clipscore": "CLIPScore",
    "clip_score": "CLIPScore",
    "imagereward": "ImageReward",
    "image_reward": "ImageReward",
    "aesthetic": "Aesthetic",
    "deqa": "DeQA",
    "unifiedreward": "UnifiedReward",
    "unified_reward": "UnifiedReward",
    "dreamsim": "DreamSim",
    "lpips": "LPIPS",
    "clip": "CLIP distance",
    "jpeg_compressibility": "JPEG compressibility",
    "jpeg_incompressibility": "JPEG incompressibility",
}
_TEX = str.maketrans(
    {"_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
)


def title(metric: str) -> str:
    """A column's printed name; of one's own 'module:name' it is the name."""
    if metric.startswith("vendi_"):
        return f"Vendi ({title(metric.removeprefix('vendi_'))})"
    return TITLES.get(metric, metric.partition(":")[2] or metric)


def write_tables(table: ScoreTable, folder: Path, digits: int) -> None:
    """Writes `table.json`, `table.md`, and for LaTeX with booktabs `table.tex` and `differences.tex`."""
    write_text(folder / "table.json", json.dumps(table.as_dict(), indent=1, allow_nan=False))
    write_text(folder / "table.md", markdown(table, digits))
    write_text(folder / "table.tex", latex(table, table.means, digits))
    if table.differences:
        write_text(folder / "differences.tex", latex(table, table.differences, digits))


def markdown(table: ScoreTable, digits: int) -> str:
    """The means, and below them the differences to the first source; the best of each column is bold."""
    arrows = [f"{title(m)} {'↓' if m in table.lower else '↑'}".replace("|", r"\|") for m in table.metrics]

    def rows(estimates: Estimates, signed: bool) -> list[str]:
        head = [f"| {' | '.join(['Source', *arrows])} |", f"|---|{'---:|' * len(arrows)}"]
        body = [
            f"| {' | '.join([source, *(_markdown_cell(table, source, m, row[m], digits, signed) for m in row)])} |"
            for source, row in estimates.items()
        ]
        return [*head, *body]

    parts = [*rows(table.means, signed=False), "", *notes(table)]
    if table.differences:
        first = next(iter(table.means))
        parts += ["", f"Differences to {first}, paired by prompt:", "", *rows(table.differences, signed=True)]
    return "\n".join(parts) + "\n"


def latex(table: ScoreTable, estimates: Estimates, digits: int) -> str:
    """The means of a table or its differences as a `tabular` of booktabs."""
    signed = estimates is table.differences
    arrows = [
        title(m).translate(_TEX) + (r" ($\downarrow$)" if m in table.lower else r" ($\uparrow$)") for m in table.metrics
    ]
    body = [
        " & ".join([s.translate(_TEX), *(_latex_cell(table, s, m, row[m], digits, signed) for m in row)]) + r" \\"
        for s, row in estimates.items()
    ]
    said = [f"Differences to {next(iter(table.means))}, paired by prompt."] if signed else []
    lines = [
        *(f"% {line}" for line in [*notes(table), *said]),
        rf"\begin{{tabular}}{{l{'c' * len(arrows)}}}",
        r"\toprule",
        " & ".join(["Method", *arrows]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def notes(table: ScoreTable) -> list[str]:
    """What the figures are of, and which pictures have no score."""
    prompts = "1 prompt" if table.prompts == 1 else f"{table.prompts} prompts"
    pictures = "1 picture" if table.images == 1 else f"{table.images} pictures"
    lines = [f"{prompts}, {pictures} each; mean ± standard error over prompts."]
    for source, failed in table.failed.items():
        counts = ", ".join(f"{title(m)} {count}" for m, count in failed.items())
        lines.append(f"Without a score, and left out, of {source}: {counts}.")
    return lines


def figures(estimate: Estimate, digits: int, signed: bool = False) -> tuple[str, str] | None:
    """Mean and error as text, None where nothing was measured; the error is '' where one prompt gives none."""
    if not estimate.n:
        return None
    mean = f"{estimate.mean:{'+' if signed else ''}.{digits}f}"
    return mean, "" if estimate.se != estimate.se else f"{estimate.se:.{digits}f}"


def _markdown_cell(table: ScoreTable, source: str, metric: str, estimate: Estimate, digits: int, signed: bool) -> str:
    shown = figures(estimate, digits, signed)
    if shown is None:
        return "–"
    mean, se = (text.replace("-", "−") for text in shown)
    bold = not signed and len(table.means) > 1 and source in table.best(metric)
    return (f"**{mean}**" if bold else mean) + (f" ± {se}" if se else "")


def _latex_cell(table: ScoreTable, source: str, metric: str, estimate: Estimate, digits: int, signed: bool) -> str:
    shown = figures(estimate, digits, signed)
    if shown is None:
        return "--"
    mean, se = shown
    bold = not signed and len(table.means) > 1 and source in table.best(metric)
    printed, error = rf"\mathbf{{{mean}}}" if bold else mean, rf" \pm {se}" if se else ""
    return f"${printed}{error}$"
