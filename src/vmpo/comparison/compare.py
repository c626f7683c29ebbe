"""`vmpo compare`: objectives in exact worlds and by recipes, with progress, resumable, on all cores."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vmpo.comparison.grid import plan, run_grid
from vmpo.comparison.recipes import run_recipe
from vmpo.errors import UserError
from vmpo.exact import WORLDS
from vmpo.training.recipes import recipe_names


def compare(
    objectives: Sequence[str],
    on: Sequence[str],
    folder: Path,
    *,
    seeds: int,
    samples: int | None,
    seconds: float | None,
    jobs: int | None,
    overrides: Sequence[str],
    command: Sequence[str],
    console: Console,
) -> tuple[list[str], list[str]]:
    """Runs what is missing; returns the worlds and the recipes that were compared.

    Raises:
        UserError: for a name that is neither a world nor a recipe, options that do not fit, or a folder in use.
    """
    worlds, recipes = sort_names(on or list(WORLDS))
    if overrides and not recipes:
        raise UserError(f"--set {overrides[0]} is an override of recipes; exact worlds take --samples and --seconds")
    if recipes and (samples is not None or seconds is not None):
        raise UserError("--samples and --seconds are for exact worlds; a recipe takes --set optimisation.epochs=…")
    jobs = jobs if jobs is not None else os.cpu_count() or 1
    cells = plan(worlds, objectives, range(seeds), samples, seconds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0), _bar(console) as bar:
            task = bar.add_task("comparing", total=None)

            def progress(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=what or "comparing")

            if cells:
                run_grid(cells, folder, jobs, command, progress)
            for recipe in recipes:
                run_recipe(recipe, objectives, range(seeds), folder, jobs=jobs, overrides=overrides, progress=progress)
    except Timeout as error:
        raise UserError(f"folder '{folder}' is in use by a comparison that is still running") from error
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be written: {error.strerror}") from error
    return worlds, recipes


def sort_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Worlds and recipes among names (UserError for one that is neither, with the nearest)."""
    known = [*WORLDS, *recipe_names()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"'{name}' is neither an exact world nor a recipe; did you mean '{near}'?")
    return [n for n in names if n in WORLDS], [n for n in names if n not in WORLDS]


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, refresh_per_second=2)
