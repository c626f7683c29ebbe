"""`vmpo compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import app, begin, console


@app.command()
def compare(
    objectives: Annotated[
        list[str] | None,
        typer.Argument(help="Objectives, NAME[,part=value…]; those of interest in each world if none is named."),
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option("--on", help="Exact worlds or recipes, one a flag; all exact worlds by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; a comparison that was stopped goes on.")] = Path(
        "runs/comparison"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 … N−1.")] = 3,
    samples: Annotated[int | None, typer.Option(min=1, help="Trajectories each training may draw.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Seconds each training may take.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; the number of cores.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value for every training of a recipe.")
    ] = None,
) -> None:
    """Compare objectives in worlds whose answer is known, or by recipes, on equal budgets."""
    begin()
    from vmpo.comparison.compare import compare as run_comparison
    from vmpo.comparison.variant import family_of
    from vmpo.reports.comparison_page import read_results, write_comparison
    from vmpo.reports.comparison_table import print_table

    worlds, recipes_ = run_comparison(
        list(objectives or []),
        list(on or []),
        out,
        seeds=seeds,
        samples=samples,
        seconds=seconds,
        jobs=jobs,
        overrides=list(override or []),
        command=["vmpo", *sys.argv[1:]],
        console=console,
    )
    if worlds:
        results = read_results(out)
        print_table(console, results)
        families = {result["objective"]: family_of(result["objective"]) for result in results}
        console.print(f"page: {write_comparison(out, families).resolve()}", soft_wrap=True)
    for name in recipes_:
        console.print((out / f"{name}.md").read_text(), markup=False, soft_wrap=True)
