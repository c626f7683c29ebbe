"""Every objective on the embedded task: the same recipe, samples and seeds; writes benchmarks/objectives.{json,md}.

    python benchmarks/objectives.py [--seeds 0 1 2] [--jobs 2] [--runs runs/compare] [key.path=value …]

Runs that are already finished in the folder are read, not repeated; a killed comparison goes on where it was. With two
jobs at once each has half of the cores, which for a network this small gives more runs an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from vmpo.training.provenance import hardware

# one override each; the difference potential scores predicted clean states, so its rewards cost more a sample
METHODS = {
    "VMPO-Diff": ["objective.name=vmpo_diff"],
    "trajectory log-variance": ["objective.name=trajectory_log_variance"],
    "log-variance per step": ["objective.name=log_variance"],
    "VMPO-R2G": ["objective.name=vmpo_r2g"],
    "VMPO clipped": ["objective.name=vmpo_clipped"],
    "GRPO": ["objective.name=grpo"],
    "GRPO with std": ["objective.name=grpo_std"],
}
HERE = Path(__file__).parent


def run_one(folder: Path, seed: int, overrides: list[str], threads: int) -> None:
    """Trains and evaluates one run, unless its folder says that is done; its output goes to a file beside it."""
    if (folder / "evaluation.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    vmpo, environment = [sys.executable, "-m", "vmpo"], {**os.environ, "OMP_NUM_THREADS": str(threads)}
    train = ["train", "glyphs", f"seed={seed}", *overrides, "--run", str(folder), "--resume"]
    with folder.with_suffix(".log").open("a") as log:
        for command in (train, ["evaluate", str(folder)], ["report", str(folder)]):
            subprocess.run([*vmpo, *command], check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"{folder} done", flush=True)


def read_one(folder: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    found = json.loads((folder / "evaluation.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "ocr": found["aligned"]["ocr"]["mean"],
        "gain": found["difference"]["ocr"]["mean"],
        "gain_se": found["difference"]["ocr"]["se"],
        "exact_match": found["aligned"]["exact_match"]["mean"],
        "diversity": found["aligned"]["diversity"]["mean"],
        "style_entropy": found["aligned"]["style_entropy"]["mean"],
        "kl": found["aligned"]["kl_ref"]["mean"],
        "gap": found["truth"]["gap"]["gap"],
        "ess": found["aligned"]["ess"]["mean"],
        "seconds": last["seconds"],
        "base": {m: found["base"][m]["mean"] for m in ("ocr", "exact_match", "diversity", "style_entropy", "ess")},
        "truth": {m: found["truth"][m]["mean"] for m in ("reward", "kl", "diversity")},
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line a method, mean ± standard deviation over seeds."""
    columns = ("ocr", "gain", "exact_match", "diversity", "style_entropy", "kl", "gap", "ess", "seconds")
    heads = (
        "OCR",
        "gain over base",
        "exact",
        "diversity",
        "style entropy",
        "KL (nats)",
        "gap to frontier",
        "ESS",
        "training (s)",
    )
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method, runs in found.items():
        cells = [
            f"{statistics.fmean([r['seconds'] for r in runs]):.0f}" if c == "seconds" else spread([r[c] for r in runs])
            for c in columns
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    every = [r for runs in found.values() for r in runs]
    base = {m: statistics.fmean([r["base"][m] for r in every]) for m in every[0]["base"]}
    truth = {m: statistics.fmean([r["truth"][m] for r in every]) for m in every[0]["truth"]}
    lines.append(
        f"| base | {base['ocr']:.3f} | | {base['exact_match']:.3f} | {base['diversity']:.3f} | "
        f"{base['style_entropy']:.3f} | 0 | | {base['ess']:.3f} | |"
    )
    reward, diversity, kl = (f"{truth[m]:.3f}" for m in ("reward", "diversity", "kl"))
    lines.append(f"| tilted truth | {reward} | | | {diversity} | | {kl} | 0 | 1 | |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("overrides", nargs="*", help="key.path=value, for every run")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    folders = {
        (method, seed): arguments.runs / f"{method.replace(' ', '-')}-{seed}"
        for seed in arguments.seeds
        for method in arguments.methods
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = [
            pool.submit(run_one, folder, seed, METHODS[method] + arguments.overrides, threads)
            for (method, seed), folder in folders.items()
        ]
        for run in pending:
            run.result()
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, _), folder in folders.items():
        found.setdefault(method, []).append(read_one(folder))
    facts = {
        "date": date.today().isoformat(),
        "hardware": f"{hardware()}, {arguments.jobs} at once, threads each: {threads}",
        "runs": found,
    }
    (HERE / "objectives.json").write_text(json.dumps(facts, indent=1) + "\n")
    (HERE / "objectives.md").write_text(f"{facts['date']}, {facts['hardware']}\n\n{table(found)}\n")
    print(table(found))


if __name__ == "__main__":
    main()
