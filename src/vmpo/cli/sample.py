"""`vmpo sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmpo.cli.app import app, begin, console


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a model (embedded name, folder or hub name).")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others follow.")] = 0,
    images: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the deterministic sampler.")] = 28,
    base: Annotated[bool, typer.Option(help="Leave the adapter out.")] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Which of the run's adapters: 'best' or 'pareto/epoch-NNNNNN'; else 'adapter'.")
    ] = None,
) -> None:
    """Draw pictures with the pipeline's own deterministic sampler."""
    begin()
    from vmpo.evaluation.sample import sample as draw

    for path in draw(source, prompt, out, seed=seed, images=images, steps=steps, base=base, adapter=adapter):
        console.print(str(path), soft_wrap=True)
