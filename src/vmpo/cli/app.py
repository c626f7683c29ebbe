"""The parts every command shares: the application, its console, and what happens before heavy imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vmpo.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align diffusion and flow models with a reward by minimising the variance of log importance weights.",
)
console = Console(highlight=False)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `vmpo train` makes.")]


def begin() -> None:
    """Quiets the heavy libraries; commands import them inside, so that `vmpo --help` is quick."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from vmpo.training.run import silence_libraries

    silence_libraries()


def main() -> None:
    """Runs the command line; a `UserError` prints one line and exits with code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        console_error = Console(stderr=True, highlight=False)
        console_error.print(f"vmpo: {error}", soft_wrap=True, markup=False, style="bold red")
        sys.exit(2)
