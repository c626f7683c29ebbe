"""`vmpo compare`: results, page, resuming after a kill, and one clear line for what cannot be compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmpo.comparison.grid import equal_seconds, plan
from vmpo.comparison.settings import OBJECTIVES_OF
from vmpo.comparison.world_run import run_cell
from vmpo.comparison.world_training import Budget
from vmpo.exact import WORLDS
from vmpo.objectives import OBJECTIVES

Run = Callable[..., tuple[int, list[str], str]]
NAMES = ("trajectory_log_variance", "vmpo_diff,intermediate=exact", "nabla_forward", "reinforce")
WORDS = [*NAMES, "--on", "masked", "--on", "gaussian-linear", "--seeds", "1", "--samples", "2560", "--jobs", "2"]


def results(folder: Path) -> dict[str, dict]:
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.glob("results/*/*.json"))}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "out"
    done = subprocess.run([sys.executable, "-m", "vmpo", "compare", *WORDS, "--out", str(folder)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_every_cell_has_a_result_and_the_page_shows_it(compared: Path) -> None:
    found = results(compared)
    assert len(found) == 8
    page = (compared / "comparison.html").read_text()
    for result in found.values():
        assert result["objective"].split(",")[0].replace("_", "_<wbr>") in page
        if result["note"]:
            continue
        assert result["curve"][0]["samples"] == 0
        assert result["curve"][-1]["samples"] == result["samples"] == 2560
        assert result["final"]["kl_target"] < result["curve"][0]["kl_target"]
        assert result["gradient_snr"] > 0
    stopped = [r["note"] for r in found.values() if r["note"]]
    assert stopped == [
        "stopped: objective 'nabla_forward' follows the gradient of the reward, and the states of world 'masked' are "
        "discrete, so it has none; use an objective of its values, such as detailed_balance"
    ]
    facts = json.loads((compared / "comparison.json").read_text())
    assert facts["command"].startswith("vmpo compare trajectory_log_variance")
    assert facts["equal_seconds"]["gaussian-linear"].keys() == set(NAMES)


def test_a_cell_is_a_function_of_its_seed(compared: Path) -> None:
    found = results(compared)["results/masked/trajectory_log_variance-0.json"]
    budget = Budget(**json.loads((compared / "settings.json").read_text())["budgets"]["masked"] | {"seconds": 1e9})
    again = run_cell("masked", "trajectory_log_variance", 0, budget)
    other = run_cell("masked", "trajectory_log_variance", 1, budget)
    assert again["final"] == found["final"]
    assert other["final"] != found["final"]


def test_what_is_done_is_not_done_again(compared: Path, vmpo: Run, tmp_path: Path) -> None:
    gone = compared / "results" / "masked" / "reinforce-0.json"
    before, text = {p: p.stat().st_mtime_ns for p in compared.glob("results/*/*.json") if p != gone}, gone.read_text()
    gone.unlink()
    assert vmpo("compare", *WORDS, "--out", compared)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert json.loads(gone.read_text())["final"] == json.loads(text)["final"]


def test_a_killed_comparison_goes_on(compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = [sys.executable, "-m", "vmpo", "compare", *WORDS, "--out", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 150
    while not results(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(words, capture_output=True).returncode == 0
    expected = results(compared)
    for name, result in results(folder).items():
        assert result["final"] == expected[name]["final"], name


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--on", "maskd"], "'maskd' is neither an exact world nor a recipe; did you mean 'masked'?"),
        (["grppo", "--on", "masked"], "no objective 'grppo'; did you mean 'grpo'?"),
        (["grpo,centr=zero", "--on", "masked"], "an objective has no part 'centr'; did you mean 'centre'?"),
        (["grpo,intermediate=true", "--on", "masked"], "intermediate='True' is not one of predicted, exact, none"),
        (["grpo,centre", "--on", "masked"], "'centre' in 'grpo,centre' is not of the form part=value"),
        (["grpo", "--on", "masked", "--set", "seed=1"], "--set seed=1 is an override of recipes"),
        (["grpo", "--on", "glyphs", "--samples", "1000"], "are for exact worlds"),
        (["grpo", "--on", "masked", "--samples", "10"], "less than one rollout of 256"),
        (["vmpo_diff,intermediate=exact", "--on", "glyphs"], "known in exact worlds only"),
        (["grpo", "--on", "glyphs", "--set", "objective.bta=1"], "did you mean 'beta'?"),
    ],
)
def test_what_cannot_be_compared_says_why(words: list[str], why: str, vmpo: Run, tmp_path: Path) -> None:
    code, errors, _ = vmpo("compare", *words, "--out", tmp_path / "out")
    assert code == 2
    assert len(errors) == 1
    assert why in errors[0]


def test_another_budget_needs_another_folder(compared: Path, vmpo: Run) -> None:
    code, errors, _ = vmpo("compare", "grpo", "--on", "masked", "--seeds", "1", "--samples", "512", "--out", compared)
    assert code == 2
    assert "holds results of another budget for masked" in errors[0]


def test_a_recipe_is_compared_by_overrides(vmpo: Run, settings: list[str], tmp_path: Path) -> None:
    own = [
        w
        for word in [*settings, "optimisation.epochs=1"]
        if not word.startswith("objective.name")
        for w in ("--set", word)
    ]
    words = ["grpo", "nabla_forward", "--on", "glyphs", "--seeds", "1", *own, "--out", tmp_path]
    code, errors, out = vmpo("compare", *words)
    assert (code, errors) == (0, [])
    table = (tmp_path / "glyphs.md").read_text()
    assert table.strip() in out
    assert "| `grpo` |" in table
    assert "- `nabla_forward`: objective 'nabla_forward' follows the gradient of the reward" in table
    run = json.loads((tmp_path / "glyphs.json").read_text())["runs"]["grpo"][0]
    evaluation = json.loads((tmp_path / "runs" / "glyphs" / "grpo-0" / "evaluation.json").read_text())
    assert run["kl"] == evaluation["aligned"]["kl_ref"]["mean"]
    assert f"{run['kl']:.3f}" in table


def test_every_objective_is_compared_somewhere() -> None:
    compared = {spec.split(",")[0] for specs in OBJECTIVES_OF.values() for spec in specs} | {"vmpo_diff_prompt"}
    assert compared >= OBJECTIVES.keys()
    cells = plan(list(WORLDS), [], range(3), None, None)
    assert len({(c.world, c.objective, c.seed) for c in cells}) == len(cells)


def test_equal_seconds_reads_the_curves_at_the_fastest_ones_end() -> None:
    def result(objective: str, seed: int, seconds: float, ess: float) -> dict:
        curve = [{"seconds": t, "ess": e, "kl_target": 1 - e, "reward": e} for t, e in ((0.0, 0.0), (seconds, ess))]
        return {"world": "w", "objective": objective, "seed": seed, "note": "", "curve": curve}

    table = equal_seconds([result("fast", 0, 2.0, 0.5), result("slow", 0, 8.0, 0.8), result("slow", 1, 4.0, 0.8)])["w"]
    assert table["fast"] == {"seconds": 2.0, "ess": [0.5, None], "kl_target": [0.5, None], "reward": [0.5, None]}
    assert table["slow"]["ess"] == [pytest.approx(0.3), pytest.approx(0.1)]  # 0.2 and 0.4
