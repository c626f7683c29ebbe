"""The run against the optimal reward-KL frontier, and what it kept of the reference's styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import Any

from vmpo.reports.curves_section import attempt
from vmpo.reports.figures import Mark, bars, frontier
from vmpo.reports.run_record import RunRecord, finite, section
from vmpo.reports.wording import key, number, plus_minus, primary_metric

CAPTIONS = {"x": "Position across", "y": "Position up and down"}
ENDS = {"x": ("left", "right"), "y": ("top", "bottom")}


def run_path(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(KL, reward) by epoch: of the held-out evaluations where there are two or more, else of the training samples."""

    def of(kl: str, reward: str) -> list[tuple[float, float]]:
        pairs = [(finite(row.get(kl)), finite(row.get(reward))) for row in metrics]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    held_out = of("eval_kl_ref", "eval_reward_mean")
    return held_out if len(held_out) > 1 else of("kl_ref", "reward_mean")


def _mark(kl: object, reward: object) -> Mark | None:
    values = [
        finite(section(entry).get("mean")) if isinstance(entry, Mapping) else finite(entry) for entry in (kl, reward)
    ]
    if values[0] is None or values[1] is None:
        return None
    return Mark(values[0], values[1], finite(section(kl).get("se")), finite(section(reward).get("se")))


def _policy_mark(truth: dict[str, Any], table: Mark | None) -> Mark | None:
    """The policy on the very prompts of the frontier; its vertical error is that of the gap, paired by prompt."""
    gap = section(truth, "gap")
    mark = _mark(gap.get("kl"), {"mean": gap.get("policy_reward"), "se": gap.get("se")})
    return mark if mark is None or table is None else replace(mark, kl_se=table.kl_se)


def _gap_sentence(truth: dict[str, Any]) -> str:
    gap = section(truth, "gap")
    kl, best, policy = (finite(gap.get(name)) for name in ("kl", "frontier_reward", "policy_reward"))
    if kl is None or best is None or policy is None:
        return ""
    amount = plus_minus({"mean": gap.get("gap"), "se": gap.get("se")})
    return (
        f"At the measured {number(kl)} nats the best expected reward in these samples is {number(best)}; the aligned "
        f"policy has {number(policy)}: a gap of <b>{amount}</b>. "
    )


def frontier_section(record: RunRecord) -> str:
    """The frontier with its band, the run's path, base, aligned and the tilted distribution at this β."""
    title = "<h2>Against the optimum</h2>"
    truth = section(record.evaluation, "truth")
    points = truth.get("frontier")
    points = [p for p in points if isinstance(p, Mapping)] if isinstance(points, list) else []
    path = run_path(record.metrics)
    metric = primary_metric(record.evaluation)
    base, aligned = (section(record.evaluation, who) for who in ("base", "aligned"))
    metric = "reward" if "reward" in aligned else metric
    here = _mark(aligned.get("kl_ref"), aligned.get(metric)) if metric else None
    here = _policy_mark(truth, here) or here
    if not points and not path and here is None:
        return title + '<p class="note">Neither the frontier nor the run\'s path is known yet.</p>'
    start = _mark(0.0, base.get(metric)) if metric else None
    flat = max(points, key=lambda p: finite(p.get("beta")) or 0.0, default=None)
    if flat is not None:  # base on the very samples of the frontier, which may be fewer prompts than the table's
        start = _mark({"mean": 0.0}, {"mean": flat.get("reward"), "se": flat.get("reward_se")}) or start
    picture = attempt(
        "Expected reward against KL",
        "the curve is the best that any distribution over pictures can have at that KL",
        lambda: frontier(points, path, start, here, _mark(truth.get("kl"), truth.get("reward"))),
        wide=True,
    )
    said = _gap_sentence(truth) + (
        "The frontier follows from the rewards of base samples alone, by reweighting with exp(r/β); its slope is β. "
        "Dotted, the largest reward these samples hold."
        if points
        else "The frontier is not worked out yet; it comes with the evaluation."
    )
    ess = finite(truth.get("ess"))
    if ess is not None:
        said += f" Effective base samples a prompt at this β: {number(ess)} (median)."
    note = f'<p class="note">{escape(str(truth["note"]))}</p>' if truth.get("note") else ""
    return f"{title}<p>{said}</p>{note}{picture}"


def _shares(values: object, ends: tuple[str, str]) -> dict[str, float]:
    """Category to share; a histogram becomes places, of which the two ends are named."""
    if isinstance(values, Mapping):
        return {str(k).removeprefix("DejaVu").removesuffix("-Bold"): finite(v) or 0.0 for k, v in values.items()}
    if isinstance(values, list):
        inner = [" " * i for i in range(1, len(values) - 1)]  # different, and not to be seen
        return dict(zip([ends[0], *inner, ends[1]], (finite(v) or 0.0 for v in values), strict=False))
    return {}


def marginals_section(record: RunRecord) -> str:
    """Shares of font, colours and position: base, tilted truth and aligned side by side."""
    title = "<h2>Style the prompts leave open</h2>"
    marginals = section(record.evaluation, "marginals")
    who = [name for name in ("base", "truth", "aligned") if section(marginals, name)]
    if not who:
        return title + '<p class="note">No style marginals: they come with the evaluation of the embedded task.</p>'
    names = dict.fromkeys(name for one in who for name in section(marginals, one))
    figures = []
    for name in names:
        shares = {one: _shares(section(marginals, one).get(name), ENDS.get(name, ("first", "last"))) for one in who}
        if any(shares.values()):
            figures.append(
                attempt(CAPTIONS.get(name, name.capitalize()), "", lambda s=shares: bars(s))  # type: ignore[misc]
            )
    texts = {"base": "base", "truth": "tilted truth", "aligned": "aligned"}
    return (
        f"{title}<p>The prompts name neither font nor colour nor place. A policy that improves spelling and nothing "
        "else keeps the shares of the tilted distribution; one that collapses picks a favourite.</p>"
        f'{key({one: texts[one] for one in who})}<div class="panels">{"".join(figures)}</div>'
    )
