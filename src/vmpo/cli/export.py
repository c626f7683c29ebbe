"""`vmpo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import RunFolder, app, begin, console


@app.command()
def export(
    run: RunFolder,
    to: Annotated[str, typer.Option(help="diffusers, peft, kohya, comfyui or merged.")] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="New folder; RUN/export/FORMAT if not given.")] = None,
    adapter: Annotated[str, typer.Option(help="Which of the run's adapters, a folder within it.")] = "adapter",
    card: Annotated[bool, typer.Option(help="Write a model card for any format; diffusers always has one.")] = False,
    tables: Annotated[
        Path | None, typer.Option(help="Folder of `vmpo evaluate --out`, whose table and gallery the card shows too.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--push", help="Upload to OWNER/NAME on the Hugging Face hub, with the card.")
    ] = None,
    private: Annotated[bool, typer.Option(help="A repository that --push makes is private.")] = False,
) -> None:
    """Write a run's adapter for other programs."""
    begin()
    from vmpo.export import export as run_export
    from vmpo.export.push import check_repo, push

    if repo is not None:
        check_repo(repo)
    folder = run_export(run, to, out, adapter=adapter, card=card or repo is not None, repo=repo, tables=tables)
    console.print(f"{to}: {folder}", soft_wrap=True, markup=False)
    if repo is not None:
        console.print(f"pushed: {push(folder, repo, private=private)}", soft_wrap=True, markup=False)
