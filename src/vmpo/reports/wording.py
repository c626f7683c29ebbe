"""Names and numbers as the report prints them."""

from __future__ import annotations

from html import escape
from typing import Any

from vmpo.reports.run_record import finite, section

LABELS = {
    "ocr": "OCR score",
    "exact_match": "Exact match",
    "diversity": "Diversity (total variance)",
    "style_entropy": "Style entropy, nats",
    "kl_ref": "KL to the reference, nats",
    "reward": "Reward",
    "var_log_w": "Var(log w), nats²",
    "ess": "Effective sample size, share",
    "log_z": "log Z, nats",
    "ocr_log_likelihood": "OCR log-likelihood, nats",
    "jpeg_compressibility": "JPEG compressibility",
}


def label(metric: str) -> str:
    """The printed name of a metric."""
    return LABELS.get(metric, metric.replace("_", " ").capitalize())


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals below ten, fewer above; a dash where there is no number."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−")


def plus_minus(estimate: object, signed: bool = False) -> str:
    """'mean ± se' of an estimate {"mean", "se"}, of a plain number, or a dash; both to the digits of the error."""
    entry = section(estimate)
    mean = finite(entry.get("mean")) if entry else finite(estimate)
    se = finite(entry.get("se"))
    if mean is None or se is None:
        return number(mean, signed)
    digits = 3 if se < 0.1 else 2 if se < 1 else 1
    return f"{mean:{'+' if signed else ''},.{digits}f} ± {se:,.{digits}f}".replace("-", "−")


def estimate_cell(estimate: object, signed: bool = False) -> str:
    """A table cell: the mean, and its error smaller beside it; a difference of more than two errors is bold."""
    mean, _, se = plus_minus(estimate, signed).partition(" ± ")
    entry = section(estimate)
    value, error = finite(entry.get("mean")), finite(entry.get("se"))
    sure = signed and value is not None and error is not None and abs(value) > 2 * error
    strong = f'<span class="num{" gain" if sure else ""}">{mean}</span>'
    return f'{strong} <span class="se">± {se}</span>' if se else strong


def key(entries: dict[str, str]) -> str:
    """A legend in the page's own colours, from the colour's name to the text."""
    items = "".join(
        f'<li><i style="background:var(--{colour})"></i>{escape(text)}</li>' for colour, text in entries.items()
    )
    return f'<ul class="key">{items}</ul>'


def primary_metric(evaluation: dict[str, Any]) -> str | None:
    """The metric of the headline: the OCR score where measured, else the first one of the evaluation."""
    base, aligned = section(evaluation, "base"), section(evaluation, "aligned")
    both = [metric for metric in base if metric in aligned] or [*base, *aligned]
    return "ocr" if "ocr" in both else next(iter(both), None)
