"""`vmpo pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import app, begin, console
from vmpo.errors import UserError


@app.command()
def pretrain(
    model: Annotated[str, typer.Argument(help="The embedded pipeline to train from nothing: 'glyphs'.")],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline.")] = Path("pretrained/glyphs"),
    scale: Annotated[float, typer.Option(min=0.0001, help="Share of the steps to run; for trials.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the network; needs g++.")] = True,
) -> None:
    """Train an embedded pipeline from nothing, or go on with one that was begun in the folder."""
    if model != "glyphs":
        raise UserError(f"no embedded pipeline '{model}'; there is 'glyphs'")
    begin()
    from vmpo.pretraining.glyphs import pretrain_glyphs

    pretrain_glyphs(out, scale=scale, compiled=compiled, log=lambda line: console.print(line))
    console.print(f"pipeline: {out}", soft_wrap=True)
