"""A comparison by a recipe: each objective is one override of the same training, run and measured as any run is."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

from vmpo.comparison.variant import parse_variant
from vmpo.disk import write_text
from vmpo.errors import UserError
from vmpo.objectives import OBJECTIVES
from vmpo.training.provenance import hardware
from vmpo.training.recipes import load_config

COLUMNS = {
    "reward": "reward",
    "gain": "gain over base",
    "gap": "gap to frontier",
    "kl": "KL (nats)",
    "diversity": "diversity",
    "ess": "ESS",
    "var_log_w": "Var(log w)",
    "seconds": "training (s)",
}


def run_recipe(
    recipe: str,
    objectives: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    jobs: int,
    overrides: Sequence[str],
    progress: Callable[[int, int, str], None],
) -> Path:
    """Trains and evaluates every objective with every seed and writes `RECIPE.json` and `RECIPE.md`.

    An objective that the recipe's reward or sampler cannot serve is listed with the reason.

    Raises:
        UserError: for a recipe, an override or an objective that does not exist.
    """
    load_config(recipe, list(overrides))
    chosen = list(objectives) or list(OBJECTIVES)
    settings = {spec: objective_overrides(spec) for spec in chosen}
    cells = [(spec, seed) for seed in seeds for spec in chosen]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done = 0
    progress(done, len(cells), "")
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(
                _run, recipe, run_folder(folder, recipe, spec, seed), seed, [*overrides, *settings[spec]], threads
            ): (
                spec,
                seed,
            )
            for spec, seed in cells
        }
        for future in as_completed(running):
            future.result()
            done += 1
            progress(done, len(cells), "{} {} seed {}".format(recipe, *running[future]))
    found = {spec: [read_run(run_folder(folder, recipe, spec, seed)) for seed in seeds] for spec in chosen}
    facts = {
        "date": date.today().isoformat(),
        "hardware": f"{hardware()}, {jobs} runs at a time, threads each: {threads}",
        "overrides": list(overrides),
        "seeds": list(seeds),
        "runs": found,
    }
    write_text(folder / f"{recipe}.json", json.dumps(facts, indent=1) + "\n")
    write_text(folder / f"{recipe}.md", recipe_table(facts) + "\n")
    return folder / f"{recipe}.md"


def objective_overrides(spec: str) -> list[str]:
    """`vmpo_diff,centre=group` as overrides of a recipe.

    Raises:
        UserError: if the objective does not exist, or asks for exact values, which a trained model does not have.
    """
    variant = parse_variant(spec)
    if variant.intermediate == "exact":
        raise UserError(f"'{spec}': the exact soft value is known in exact worlds only; leave intermediate=exact out")
    name, *changes = [part.strip() for part in spec.split(",")]
    changes = ["intermediate=[]" if change == "intermediate=none" else change for change in changes]
    return [f"objective.name={name}", *(f"objective.{change}" for change in changes)]


def run_folder(folder: Path, recipe: str, spec: str, seed: int) -> Path:
    """Where a training is."""
    return folder / "runs" / recipe / f"{spec.replace(',', '+')}-{seed}"


def beside(folder: Path, ending: str) -> Path:
    """A file beside a run's folder; `with_suffix` would cut a name such as kl_ref=0.1-0."""
    return folder.with_name(f"{folder.name}.{ending}")


def _run(recipe: str, folder: Path, seed: int, overrides: list[str], threads: int) -> None:
    """Trains and evaluates, unless that is done; output goes to a file beside the folder.

    A run that stops with a line for its user leaves that line as its reason.
    """
    if (folder / "evaluation.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    reason, log = beside(folder, "stopped"), beside(folder, "log")
    reason.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    train = ["train", recipe, f"seed={seed}", *overrides, "--run", str(folder), "--resume"]
    for words in (train, ["evaluate", str(folder)]):
        ended = subprocess.run(
            [sys.executable, "-m", "vmpo", *words], env=environment, capture_output=True, text=True, check=False
        )
        with log.open("a") as file:
            file.write(ended.stdout + ended.stderr)
        if ended.returncode == 2:
            lines = [line for line in ended.stderr.splitlines() if line.startswith("vmpo:")]
            write_text(reason, (lines[-1] if lines else ended.stderr[-300:]).removeprefix("vmpo: ") + "\n")
            return
        if ended.returncode != 0:
            raise UserError(f"'vmpo {' '.join(words)}' ended with code {ended.returncode}; see {log}")


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of a finished run, or {"stopped": reason}."""
    if not (folder / "evaluation.json").is_file():
        return {"stopped": beside(folder, "stopped").read_text().strip()}
    found = json.loads((folder / "evaluation.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    aligned, truth = found["aligned"], found["truth"]
    return {
        "reward": aligned["reward"]["mean"],
        "gain": found["difference"]["reward"]["mean"],
        "gain_se": found["difference"]["reward"]["se"],
        "gap": truth["gap"]["gap"] if truth.get("gap") else None,
        "kl": aligned["kl_ref"]["mean"],
        "diversity": aligned["diversity"]["mean"],
        "ess": aligned["ess"]["mean"],
        "var_log_w": aligned["var_log_w"]["mean"],
        "seconds": last["seconds"],
        "metrics": {name: entry["mean"] for name, entry in aligned.items()},
        "base": {name: entry["mean"] for name, entry in found["base"].items()},
        "truth": {name: truth[name]["mean"] for name in ("reward", "kl", "diversity") if name in truth},
    }


def recipe_table(facts: dict[str, Any]) -> str:
    """Markdown: a line an objective, mean ± standard error over seeds; refused objectives with the reason."""
    lines = [f"{facts['date']}, {facts['hardware']}, seeds {facts['seeds']}", ""]
    lines += ["| objective | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    finished = [run for runs in facts["runs"].values() for run in runs if "stopped" not in run]
    stopped: dict[str, str] = {}
    for spec, runs in facts["runs"].items():
        kept = [run for run in runs if "stopped" not in run]
        if not kept:
            stopped[spec] = runs[0]["stopped"]
            continue
        cells = [_spread([run[column] for run in kept], column) for column in COLUMNS]
        lines.append(f"| `{spec}` | " + " | ".join(cells) + " |")
    if finished:
        lines.append(_landmark("base model", finished, "base"))
        lines.append(_landmark("tilted truth", finished, "truth"))
    if stopped:
        lines += ["", "Refused:", "", *(f"- `{spec}`: {reason}" for spec, reason in stopped.items())]
    return "\n".join(lines)


def _spread(values: list[float | None], column: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 0 if column == "seconds" else 3
    mean = statistics.fmean(known)
    if len(known) < 2 or column == "seconds":
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(known) / len(known) ** 0.5:.{digits}f}"


def _landmark(label: str, runs: list[dict[str, Any]], key: str) -> str:
    names = {"kl": "kl_ref"} if key == "base" else {}
    cells = []
    for column in COLUMNS:
        values = [run[key].get(names.get(column, column)) for run in runs]
        known = [value for value in values if value is not None]
        cells.append(f"{statistics.fmean(known):.3f}" if known else "")
    return f"| {label} | " + " | ".join(cells) + " |"
