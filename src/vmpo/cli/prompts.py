"""`vmpo prompts`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vmpo.cli.app import app, console
from vmpo.errors import UserError

if TYPE_CHECKING:
    from vmpo.prompts import PromptSet

SHOWN = 5


@app.command()
def prompts(
    names: Annotated[
        list[str] | None, typer.Argument(help="Sets to fetch and show, or files, or unions 'a+b'; lists all if none.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Fetch every published set into the cache.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the prompts of one set to a file: .jsonl with metadata, else text.")
    ] = None,
) -> None:
    """List the prompt sets, or fetch some into the cache."""
    from vmpo.prompts.published import PUBLISHED

    if out is not None and (every or len(names or []) != 1):
        raise UserError("--out takes the prompts of one set; name one (or a union 'a+b')")
    if every:
        _fetch_every()
    elif names:
        for name in names:
            _show(name, out)
    else:
        _list()
        missing = sum(not published.file.is_file() for published in PUBLISHED.values())
        console.print(
            f"{missing} of {len(PUBLISHED)} not in the cache; 'vmpo prompts NAME' fetches one, --all the rest"
        )


def _list() -> None:
    from vmpo.prompts.embedded import EMBEDDED, embedded_prompts
    from vmpo.prompts.published import PUBLISHED

    table = Table("name", "prompts", "cached", "what it is; licence; home", box=None)
    table.columns[0].no_wrap = True
    table.columns[1].justify = "right"
    for name in EMBEDDED:
        count = len(embedded_prompts(name.removeprefix("glyphs/")))
        table.add_row(name, f"{count:,}", "ships", "sentences with a word in double quotes; Apache-2.0; vmpo")
    for name, published in PUBLISHED.items():
        entry = published.entry
        count_text = f"{entry.count:,}" if entry.counted else f"~{entry.count:,}"
        cached = "yes" if published.file.is_file() else "no"
        table.add_row(name, count_text, cached, f"{entry.what}\n[dim]{entry.licence}; {entry.home}[/dim]")
    console.print(table)


def _show(name: str, out: Path | None) -> None:
    found = _load(name)
    if out is not None:
        from vmpo.disk import write_text
        from vmpo.prompts.files import format_prompts

        write_text(out, format_prompts(found, out.suffix))
        console.print(f"{name}: {len(found):,} prompts written to {out}", soft_wrap=True, markup=False)
        return
    console.print(f"{name}: {len(found):,} prompts", soft_wrap=True, markup=False)
    for prompt in found.prompts[:SHOWN]:
        console.print(f"  {prompt}", soft_wrap=True, markup=False)


def _load(name: str) -> PromptSet:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from vmpo.prompts import load_prompts

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None, visible=False)
        return load_prompts(name, lambda done, total: bar.update(task, completed=done, total=total, visible=True))


def _fetch_every() -> None:
    """Fetches all sets; one that fails does not keep the others from coming."""
    from vmpo.prompts.published import PUBLISHED

    failed = []
    for name in PUBLISHED:
        try:
            console.print(f"{name}: {len(_load(name)):,} prompts", soft_wrap=True, markup=False)
        except UserError as error:
            failed.append(name)
            console.print(f"{name}: {error}", soft_wrap=True, markup=False)
    if failed:
        raise UserError(f"{len(failed)} of {len(PUBLISHED)} sets could not be fetched: {', '.join(failed)}")
