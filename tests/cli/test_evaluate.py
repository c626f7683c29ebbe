"""`vmpo evaluate` and `vmpo report` on a trained run: the figures of base and aligned, and the page."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REWARD = "tests.scenarios:brightness"
Vmpo = Callable[..., tuple[int, list[str], str]]


def evaluated(vmpo: Vmpo, run: Path) -> tuple[dict[str, Any], str]:
    code, lines, out = vmpo("evaluate", run)
    assert code == 0, lines
    return json.loads((run / "evaluation.json").read_text()), out


def test_evaluate_and_report(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, lines, _ = vmpo("train", "glyphs", *settings, "optimisation.lr=0.05", "--run", run)
    assert code == 0, lines
    found, out = evaluated(vmpo, run)

    assert {"base", "aligned", "difference", "truth", "gallery", "settings"} <= found.keys()
    for name in ("base", "aligned"):
        metrics = found[name]
        assert {REWARD, "reward", "diversity", "kl_ref", "ess", "log_z", "var_log_w"} <= metrics.keys()
        for metric, entry in metrics.items():
            assert entry.keys() == {"mean", "se", "n"}, metric
            assert math.isfinite(entry["mean"]), metric
            assert entry["se"] >= 0, metric
        assert metrics["reward"]["n"] == 4
        assert metrics["diversity"]["n"] == 2
        assert metrics["diversity"]["mean"] > 0
        assert 0 < metrics["ess"]["mean"] <= 1
        assert metrics["reward"]["mean"] == metrics[REWARD]["mean"], "one reward of weight 1 is the total"

    base, aligned = found["base"], found["aligned"]
    assert base["kl_ref"] == {"mean": 0.0, "se": 0.0, "n": 4}, "the base model is the reference, to the last bit"
    assert aligned["kl_ref"]["mean"] > 1e-3
    assert aligned["reward"]["mean"] != base["reward"]["mean"]
    gain = aligned["reward"]["mean"] - base["reward"]["mean"]
    assert found["difference"]["reward"]["mean"] == pytest.approx(gain, rel=1e-6, abs=1e-9)
    assert {"reward", "kl", "log_z"} <= found["truth"].keys()
    assert found["truth"]["reward"]["mean"] > base["reward"]["mean"], "tilting towards a reward raises it"
    assert found["settings"]["words"] == 4

    assert len(found["gallery"]) == 4
    for entry in found["gallery"]:
        files = [run / entry[name]["file"] for name in ("base", "aligned")]
        assert all(file.is_file() for file in files)
        assert files[0].read_bytes() != files[1].read_bytes()
        assert f'"{entry["word"]}"' in entry["prompt"]
    for metric in ("reward", "kl_ref", "diversity", "base", "aligned"):
        assert metric in out

    code, lines, out = vmpo("report", run)
    assert code == 0, lines
    page = run / "report.html"
    assert page.is_file()
    assert str(page) in out
    assert len(page.read_text()) > 5000

    again = tmp_path / "again"
    shutil.copytree(run, again)
    assert evaluated(vmpo, again)[0] == found, "an evaluation is a function of the run"


@pytest.mark.parametrize(("window", "said"), [("[1, 1]", True), ("null", False)])
def test_steps_that_no_density_covers_are_said(
    vmpo: Vmpo, settings: list[str], tmp_path: Path, window: str, said: bool
) -> None:
    run = tmp_path / "run"
    words = [*settings, "optimisation.epochs=1", f"sampler.window={window}"]
    assert vmpo("train", "glyphs", *words, "--run", run)[0] == 0
    note = evaluated(vmpo, run)[0]["truth"].get("note", "")
    assert ("3 of the sampler's 4 steps add no noise" in note) == said


def test_a_mean_over_dimensions_is_measured_at_the_temperature_it_means(
    vmpo: Vmpo, settings: list[str], tmp_path: Path
) -> None:
    dimension, beta = 4 * 6 * 16, 0.2
    words = [*settings, "optimisation.epochs=1", "optimisation.updates=1"]
    first, truths = [], []
    for log_prob, nominal in (("sum", beta), ("mean", beta * dimension)):
        run = tmp_path / log_prob
        own = [f"objective.log_prob={log_prob}", f"objective.beta={nominal}"]
        assert vmpo("train", "glyphs", *words, *own, "--run", run)[0] == 0
        first.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
        truths.append(evaluated(vmpo, run)[0]["truth"])
    for metric in ("var_log_w", "ess", "log_z"):
        assert first[0][metric] == pytest.approx(first[1][metric], rel=1e-6), metric
    assert first[0]["var_log_w"] > 1e-3
    assert [t["beta"] for t in truths] == pytest.approx([beta, beta])
    assert truths[0]["reward"]["mean"] == pytest.approx(truths[1]["reward"]["mean"], rel=1e-6)
