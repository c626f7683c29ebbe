"""A comparison on exact worlds: every objective in every world with every seed, on all cores, resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from vmpo.comparison.settings import BUDGETS, OBJECTIVES_OF
from vmpo.comparison.variant import parse_variant
from vmpo.comparison.world_run import run_cell, world_facts
from vmpo.comparison.world_training import Budget
from vmpo.disk import write_text
from vmpo.errors import UserError
from vmpo.exact import WORLDS, get_world
from vmpo.training.provenance import hardware

EQUAL_SECONDS = ("ess", "kl_target", "reward")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Cell:
    """One training: a world, an objective as typed, a seed and what it may cost."""

    world: str
    objective: str
    seed: int
    budget: Budget

    def path(self, folder: Path) -> Path:
        """Where its result is."""
        return folder / "results" / self.world / f"{self.objective.replace(',', '+')}-{self.seed}.json"


def plan(
    worlds: Sequence[str], objectives: Sequence[str], seeds: Sequence[int], samples: int | None, seconds: float | None
) -> list[Cell]:
    """The cells of a comparison, longest worlds first; no objectives: those that are of interest in each world.

    Raises:
        UserError: for a world or an objective that does not exist.
    """
    own = {key: value for key, value in (("samples", samples), ("seconds", seconds)) if value is not None}
    cells, work = [], {}
    for name in worlds:
        num_steps = get_world(name).kernel.num_steps
        budget = replace(BUDGETS[name], **own)  # type: ignore[arg-type]
        work[name] = budget.samples * num_steps
        if budget.rollouts < 1:
            raise UserError(f"--samples {samples} is less than one rollout of {budget.batch} trajectories")
        chosen = objectives or OBJECTIVES_OF[name]
        for spec in chosen:
            parse_variant(spec)
        cells += [Cell(name, spec, seed, budget) for seed in seeds for spec in chosen]
    return sorted(cells, key=lambda cell: -work[cell.world])


def run_grid(cells: Sequence[Cell], folder: Path, jobs: int, command: Sequence[str], progress: Progress) -> None:
    """Runs what has no result yet, `jobs` at a time with one thread each, and writes the comparison's facts.

    Raises:
        UserError: if the folder holds results of another budget.
    """
    budgets = {cell.world: cell.budget for cell in cells}
    settings = {"budgets": {name: _plain(asdict(budget)) for name, budget in budgets.items()}}
    _check_folder(folder, settings)
    pending = [cell for cell in cells if not cell.path(folder).is_file()]
    done = len(cells) - len(pending)
    progress(done, len(cells), "")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        running = {pool.submit(_run_and_write, cell, str(folder)): cell for cell in pending}
        for future in as_completed(running):
            future.result()
            done += 1
            cell = running[future]
            progress(done, len(cells), f"{cell.world} {cell.objective} seed {cell.seed}")
    samples = {budget.samples for budget in budgets.values()}
    facts = {
        "date": date.today().isoformat(),
        "hardware": f"{hardware()}, {jobs} runs at a time, one thread each",
        "command": shlex.join(command),
        "seeds": sorted({cell.seed for cell in cells}),
        "samples": samples.pop() if len(samples) == 1 else None,  # else each world says its own
        "seconds_limit": _plain({"s": max(cell.budget.seconds for cell in cells)})["s"],
        "worlds": {name: world_facts(name, budgets[name]) for name in WORLDS if name in budgets},
        "equal_seconds": equal_seconds(read_results(cells, folder)),
    }
    write_text(folder / "comparison.json", json.dumps(facts))


def read_results(cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """The results of cells that have one."""
    return [json.loads(path.read_text()) for cell in cells if (path := cell.path(folder)).is_file()]


def equal_seconds(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each objective had reached when the fastest of its world was done, by interpolation of its curves.

    Returns:
        {world: {objective: {"seconds": s, metric: [mean, standard error over seeds or None]}}}.
    """
    table: dict[str, dict[str, Any]] = {}
    for world in dict.fromkeys(r["world"] for r in results):
        curves: dict[str, list[list[dict[str, Any]]]] = {}
        for result in results:
            if result["world"] == world and len(result["curve"]) > 1 and not result["note"]:
                curves.setdefault(result["objective"], []).append(result["curve"])
        if not curves:
            continue
        limit = min(statistics.fmean(c[-1]["seconds"] for c in group) for group in curves.values())
        table[world] = {
            objective: {"seconds": limit} | {metric: _at(group, metric, limit) for metric in EQUAL_SECONDS}
            for objective, group in curves.items()
        }
    return table


def _at(curves: list[list[dict[str, Any]]], metric: str, seconds: float) -> list[float | None]:
    values = []
    for curve in curves:
        known = [point for point in curve if point[metric] is not None]
        values.append(float(np.interp(seconds, [p["seconds"] for p in known], [p[metric] for p in known])))
    return [statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None]


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        common = before["budgets"].keys() & settings["budgets"].keys()
        changed = [name for name in common if before["budgets"][name] != settings["budgets"][name]]
        if changed:
            raise UserError(
                f"folder '{folder}' holds results of another budget for {', '.join(sorted(changed))}; "
                "name another --out"
            )
        settings = {"budgets": before["budgets"] | settings["budgets"]}
    write_text(path, json.dumps(settings, indent=1))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value == float("inf") else value for key, value in values.items()}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _run_and_write(cell: Cell, folder: str) -> None:
    result = run_cell(cell.world, cell.objective, cell.seed, cell.budget)
    path = cell.path(Path(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result))
