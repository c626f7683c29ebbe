"""`vmpo recipes` and `vmpo objectives`: what ships with the library."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vmpo.cli.app import app, console
from vmpo.errors import UserError


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show the settings of one, with the source of each.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the settings it leaves at their defaults.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List the recipes that ship with vmpo, or the settings of one."""
    if name is not None:
        _settings(name, every, markdown)
    elif every or markdown:
        raise UserError("--all and --markdown are for the settings of one recipe; name it: vmpo recipes NAME")
    else:
        _list()


def _settings(name: str, every: bool, markdown: bool) -> None:
    from vmpo.training.recipe_sources import markdown_table, recipe_settings

    settings = recipe_settings(name, defaults=every)
    if markdown:
        console.print(markdown_table(settings), soft_wrap=True, markup=False, end="")
        return
    table = Table("setting", "value", "source", box=None)
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"  # a shortened path is of no use
    for setting in settings:
        table.add_row(setting.key, escape(setting.text), escape(setting.source))
    console.print(table)


def _list() -> None:
    from vmpo.training.recipes import load_config, recipe_names

    table = Table("recipe", "model", "objective", "reward", box=None)
    table.columns[0].no_wrap = True
    for name in recipe_names():
        config = load_config(name, [])
        table.add_row(
            name,
            config.model.path.rpartition("/")[2],
            f"{config.objective.name}, β {config.objective.beta:g}",
            ", ".join(config.reward.weights),
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
