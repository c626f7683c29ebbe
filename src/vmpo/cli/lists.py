"""`vmpo recipes` and `vmpo objectives`: what ships with the library."""

from __future__ import annotations

from rich.table import Table

from vmpo.cli.app import app, console


@app.command()
def recipes() -> None:
    """List the recipes that ship with vmpo."""
    from vmpo.training.config import read_recipe, recipe_names, validate_config

    table = Table("recipe", "model", "objective", "reward", "sampler", box=None)

    for name in recipe_names():
        config = validate_config(read_recipe(name), where=name)
        table.add_row(
            name,
            config.model.path,
            f"{config.objective.name}, beta {config.objective.beta:g}",
            ", ".join(config.reward.weights),
            f"{config.sampler.kernel}, {config.sampler.steps} steps",
        )
    console.print(table)


@app.command()
def objectives() -> None:
    """List the objectives and what they are made of."""
    from vmpo.objectives import FAMILIES

    table = Table("objective", "level", "centre", "loss", "potential", "anchor", "source", box=None)
    for family in FAMILIES.values():
        for o in family:
            table.add_row(o.name, o.level, o.centre, o.loss, o.potential, o.anchor, o.source)
        table.add_section()
    console.print(table)
