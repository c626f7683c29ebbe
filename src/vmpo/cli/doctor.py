"""`vmpo doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vmpo.cli.app import app, begin, console

if TYPE_CHECKING:
    from vmpo.doctor import Section
    from vmpo.doctor.capacity import Capacity
    from vmpo.training.memory import MemoryEstimate

MARKS = {"ok": "[green]ok[/green]", "missing": "[yellow]--[/yellow]", "problem": "[red]!![/red]"}


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Look at what this recipe needs only.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not work out what fits the device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if there is a problem, or a recipe's needs are not met.")
    ] = False,
) -> None:
    """Say what is installed and cached, which rewards can run, and what fits this device."""
    begin()
    from vmpo.doctor import examine

    sections = []
    for section in examine(recipe):
        sections.append(section)
        if not as_json:
            _print_section(section)
    fits = [] if quick else _fits(recipe, silent=as_json)
    if as_json:
        found = {"sections": [asdict(section) for section in sections], "fits": [_as_dict(c) for c in fits]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print_fits(fits)
        _print_remedies(sections)
    if strict and not _sound(sections, recipe):
        raise typer.Exit(1)


def _sound(sections: list[Section], recipe: str | None) -> bool:
    # without a GPU or a token a recipe may still run
    needed = ("rewards", "models", "prompt sets") if recipe else ()
    bad = {s.title: {"problem", "missing"} if s.title in needed else {"problem"} for s in sections}
    return not any(finding.state in bad[s.title] for s in sections for finding in s.findings)


def _fits(recipe: str | None, *, silent: bool) -> list[Capacity]:
    with console.status("what fits") as status:
        if silent:
            status.stop()
        try:
            from vmpo.doctor.capacity import capacities, jobs
            from vmpo.training.recipes import load_config
        except Exception:  # the sections have said why
            return []
        chosen = {recipe: load_config(recipe, [])} if recipe else jobs()
        return capacities(chosen, status.update)


def _print_section(section: Section) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in section.findings:
        table.add_row(MARKS[finding.state], escape(finding.name), escape(finding.text))
    console.print(f"[bold]{section.title}[/bold]")
    console.print(table)


def _print_fits(fits: list[Capacity]) -> None:
    if not fits:
        return
    from vmpo.training.memory import readable

    # a row of an update, or a picture that is decoded, whichever is larger
    table = Table("", "held throughout", "micro-batch at most", "with checkpointing", box=None, padding=(0, 1))
    for c in fits:
        table.add_row(f"   {c.job}", readable(c.plain.fixed), _rows(c.plain, c.available), _rows(c.saving, c.available))
    console.print(f"[bold]what fits[/bold] {readable(fits[0].available)}, reward models not counted")
    console.print(table)


def _rows(estimate: MemoryEstimate, available: int) -> str:
    from vmpo.training.memory import readable

    return f"{estimate.largest(available)} rows of {readable(max(estimate.row, estimate.picture))}"


def _as_dict(capacity: Capacity) -> dict[str, object]:
    return {
        "job": capacity.job,
        "available_bytes": capacity.available,
        "fixed_bytes": capacity.plain.fixed,
        "row_bytes": capacity.plain.row,
        "micro_batch": capacity.plain.largest(capacity.available),
        "row_bytes_with_checkpointing": capacity.saving.row,
        "micro_batch_with_checkpointing": capacity.saving.largest(capacity.available),
    }


def _print_remedies(sections: list[Section]) -> None:
    remedies = {r: f.state for s in sections for f in s.findings for r in f.remedies}
    if not remedies:
        return
    console.print("[bold]what to do[/bold] (weights and prompts are also fetched at their first use)")
    for remedy, state in sorted(remedies.items(), key=lambda item: item[1] != "problem"):
        console.print(f" {MARKS[state]} {escape(remedy)}", soft_wrap=True)
