"""`vmpo pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import app, begin, console
from vmpo.errors import UserError


@app.command()
def pretrain(
    model: Annotated[str, typer.Argument(help="The embedded pipeline to train from nothing: glyphs, glyphs-ddim.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pipeline; pretrained/MODEL if not given.")] = None,
    scale: Annotated[float, typer.Option(min=0.0001, help="Share of the steps to run; for trials.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the network; needs g++.")] = True,
) -> None:
    """Train an embedded pipeline from nothing, or go on with one that was begun in the folder."""
    if model not in ("glyphs", "glyphs-ddim"):
        raise UserError(f"no embedded pipeline '{model}'; there are glyphs and glyphs-ddim")
    begin()
    from vmpo.pretraining.glyphs import pretrain_glyphs
    from vmpo.pretraining.glyphs_ddim import pretrain_glyphs_ddim

    run = pretrain_glyphs if model == "glyphs" else pretrain_glyphs_ddim
    folder = out or Path("pretrained") / model
    run(folder, scale=scale, compiled=compiled, log=lambda line: console.print(line))
    console.print(f"pipeline: {folder}", soft_wrap=True)
