"""`vmpo evaluate` and `vmpo report`."""

from __future__ import annotations

import warnings
from typing import Any

from rich.table import Table

from vmpo.cli.app import RunFolder, app, begin, console


@app.command()
def evaluate(run: RunFolder) -> None:
    """Measure base and aligned on held-out prompts, with the truth beside them."""
    begin()
    from vmpo.evaluation.evaluate import evaluate as run_evaluation
    from vmpo.evaluation.truth import UntrustedTruth

    with console.status("loading") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedTruth)  # the table says it
        found = run_evaluation(run, lambda what, done, total: status.update(f"{what} {done}/{total}"))
    _print_evaluation(found)


@app.command()
def report(run: RunFolder) -> None:
    """Write the run's report, one HTML file."""
    from vmpo.reports.page import write_report

    console.print(f"report: {write_report(run).resolve()}", soft_wrap=True)


def _print_evaluation(found: dict[str, Any]) -> None:
    table = Table("", "base", "aligned", "tilted truth", box=None)
    truth = found["truth"]
    beside = {
        "reward": truth["reward"],
        "kl_ref": truth["kl"],
        "diversity": truth.get("diversity"),
        "log_z": truth["log_z"],
    }
    for metric, base in found["base"].items():
        aligned, true = found["aligned"][metric], beside.get(metric)
        cells = [f"{e['mean']:.3f} ± {e['se']:.3f}" if e is not None else "" for e in (base, aligned, true)]
        table.add_row(metric, *cells)
    console.print(table)
    if "note" in truth:
        console.print(f"note: {truth['note']}", soft_wrap=True)
    gap = truth.get("gap")
    if gap:
        console.print(
            f"at the aligned policy's KL of {gap['kl']:.2f} nats the best reward that base samples show is "
            f"{gap['frontier_reward']:.3f}; the policy has {gap['policy_reward']:.3f}, a gap of "
            f"{gap['gap']:.3f} ± {gap['se']:.3f}",
            soft_wrap=True,
        )
