"""`vmpo train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import app, begin, console


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="[RECIPE] [key.path=value …]; the embedded recipe if none is named.")
    ] = None,
    run: Annotated[
        Path | None,
        # torchrun reads every option that could be its own and stops at --run, so there is a second name
        typer.Option("--run", "--folder", help="Run folder; runs/RECIPE if not given. Under torchrun: --folder."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, exactly where it was.")] = False,
) -> None:
    """Train an adapter by a recipe."""
    begin()
    from vmpo.training.recipes import load_config
    from vmpo.training.run import train as run_training

    words = list(arguments or [])
    recipe = words.pop(0) if words and "=" not in words[0] else "glyphs"
    config = load_config(recipe, words)
    folder = run if run is not None else Path("runs") / config.name
    run_training(config, folder, resume=resume, console=console)
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(f"adapter: {folder / 'adapter' / 'pytorch_lora_weights.safetensors'}")
