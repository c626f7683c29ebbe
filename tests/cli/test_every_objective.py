"""Every objective trains a diffusers pipeline by one override, resumes exactly, or says why it cannot run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.test_resume import assert_same_run
from vmpo.objectives import OBJECTIVES

Run = Callable[..., tuple[int, list[str], str]]
LEARNED = ["vmpo_diff_prompt", "ppo", "detailed_balance_learned", "log_variance_replay", "log_variance_mixture"]
GRADIENT = [name for name, objective in OBJECTIVES.items() if objective.loss == "gradient"]


@pytest.fixture
def own_settings(settings: list[str]) -> list[str]:
    """The tiny training with the objective's own settings and a reward that has a gradient."""
    kept = [word for word in settings if not word.startswith(("objective.kl_old", "objective.name", "reward."))]
    return [*kept, 'reward.weights={"tests.scenarios:Brightness": 1.0}', "optimisation.epochs=2"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, vmpo: Run, own_settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, errors, _ = vmpo("train", "glyphs", *own_settings, f"objective.name={name}", "--run", folder)
    assert (code, errors) == (0, [])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["grad_norm"] > 0
        assert all(torch.tensor(line[key]).isfinite() for key in ("loss", "grad_norm", "kl_ref", "reward_mean"))
    assert lines[1]["kl_ref"] > 0, "the policy has moved"


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_beside_the_policy_resumes(
    name: str, vmpo: Run, own_settings: list[str], tmp_path: Path
) -> None:
    words = [*own_settings, f"objective.name={name}", "optimisation.epochs=6", "evaluation.every=2"]
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert vmpo("train", "glyphs", *words, "--run", alone)[0] == 0
    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "checkpoints" / "epoch-000006")
    assert vmpo("train", "glyphs", *words, "--run", folder, "--resume")[0] == 0
    assert_same_run(folder, alone)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_gradient_objective_stops_at_a_reward_without_gradient(
    name: str, vmpo: Run, settings: list[str], tmp_path: Path
) -> None:
    code, errors, _ = vmpo("train", "glyphs", *settings, f"objective.name={name}", "--run", tmp_path / "run")
    assert code == 2
    assert len(errors) == 1
    assert f"objective '{name}' follows the gradient of the reward" in errors[0]
    assert "tests.scenarios:brightness" in errors[0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["objective.name=grpo", "sampler.kernel=flow_grpo", "sampler.eta=0"], "no stochastic step"),
        (["objective.name=vmpo_diff", "objective.anchor=none"], "does not depend on the policy"),
        (["objective.name=vmpo_diff", "objective.potential=learned", "objective.level=to_go"], "level='subtrajectory'"),
        (["objective.name=grpo", "objective.reference_share=0.2"], "no importance weight"),
        (["objective.name=grpo", "objective.centre=prmpt"], "objective.centre='prmpt'"),
    ],
)
def test_an_unsound_combination_stops_with_the_reason(
    words: list[str], why: str, vmpo: Run, own_settings: list[str], tmp_path: Path
) -> None:
    code, errors, _ = vmpo("train", "glyphs", *own_settings, *words, "--run", tmp_path / "run")
    assert code == 2
    assert len(errors) == 1
    assert why in errors[0]
