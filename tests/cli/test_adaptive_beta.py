"""A target KL: beta finds the temperature whose KL it is, enters everything alike, and resumes exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.cli.test_resume import assert_same_run
from vmpo.comparison.variant import parse_variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.exact import get_world
from vmpo.training.adaptive_beta import BetaController, retempered

Run = Callable[..., tuple[int, list[str], str]]
TARGET, GAIN, ROLLOUTS = 1.0, 0.1, 120


@pytest.mark.parametrize("target", [TARGET, None])
def test_on_a_world_the_kl_settles_at_the_target_and_beta_at_its_temperature(target: float | None) -> None:
    world = get_world("gaussian-linear")
    betas = torch.logspace(-1, 0, 2001, dtype=torch.float64)
    wanted = betas[(world.frontier(betas)[0].mean(1) - TARGET).abs().argmin()].item()
    start = world.beta
    assert abs(start / wanted - 1) > 0.2, "there is something to find"
    training = WorldTraining(world, parse_variant("trajectory_log_variance"), Budget(batch=256), seed=0)
    controller, kls, found = BetaController(target, GAIN, start / 100, start * 100), [], []
    for _ in range(ROLLOUTS):
        data = training.draw()
        training.updater.step(data, torch.arange(16), on_policy=True)
        kls.append(data.trajectory.kl_ref.sum(1).mean().item())
        found.append(world.beta)
        world.beta = controller.next(world.beta, kls[-1])
    kl, beta = (sum(values[-30:]) / 30 for values in (kls, found))
    if target is None:
        assert set(found) == {start}
        assert kl < 0.7 * TARGET
    else:
        assert kl == pytest.approx(target, rel=0.02)
        # the frontier tilts the noise too, which no policy can; in this world that hardly matters
        assert beta == pytest.approx(wanted, rel=0.02)


def test_the_step_is_the_published_one_within_bounds() -> None:
    controller = BetaController(2.0, 0.1, 0.05, 0.4)
    assert controller.next(0.2, 2.2) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert controller.next(0.2, 50.0) == pytest.approx(0.2 * 1.02)
    assert controller.next(0.2, 0.0) == pytest.approx(0.2 * 0.98)
    assert controller.next(0.399, 50.0) == 0.4
    assert controller.next(0.0501, 0.0) == 0.05
    assert controller.next(0.2, float("nan")) == 0.2


@pytest.mark.parametrize("name", ["vmpo_diff", "vmpo_r2g", "trajectory_log_variance", "nabla_forward"])
def test_a_rollout_at_another_beta_is_the_rollout_drawn_there(name: str, settings: list[str], tmp_path: Path) -> None:
    from vmpo.training.recipes import load_config
    from vmpo.training.setup import load_parts
    from vmpo.training.trainer import Trainer

    kept = [word for word in settings if not word.startswith(("objective.kl_old", "objective.name", "reward."))]
    words = [*kept, f"objective.name={name}", "objective.target_kl=1"]
    words.append('reward.weights={"tests.scenarios:Brightness": 1.0}')
    config = load_config("glyphs", words)
    trainer = Trainer(config, load_parts(config, "cpu"), tmp_path, Accelerator(cpu=True))
    drawn, weights = {}, {}
    for beta in (0.2, 0.07):
        trainer.beta = beta
        drawn[beta], metrics = trainer.draw(0)
        weights[beta] = metrics["var_log_w"]
    moved = retempered(drawn[0.2], 0.07 / 0.2)
    for part in ("delta_phi", "values", "value_gradient"):
        there, wanted = getattr(moved, part), getattr(drawn[0.07], part)
        if wanted is not None:
            torch.testing.assert_close(there, wanted, equal_nan=True, rtol=1e-5, atol=0)
            assert not torch.equal(wanted.nan_to_num(), getattr(drawn[0.2], part).nan_to_num())
    trainer.log, trainer.replayed = [{"epoch": 1, "kl_ref": 100.0}], [drawn[0.07]]
    trainer._move_beta()
    assert trainer.beta == pytest.approx(0.07 * 1.02)
    torch.testing.assert_close(trainer.replayed[0].delta_phi * 1.02, drawn[0.07].delta_phi, equal_nan=True)
    # the policy is still the reference, so that log w is r/beta and nothing else
    assert weights[0.07] == pytest.approx(weights[0.2] * (0.2 / 0.07) ** 2, rel=1e-4)


@pytest.fixture
def adaptive(settings: list[str]) -> list[str]:
    """Rollouts that are replayed must follow beta too; the target is far below what this step size reaches."""
    kept = [word for word in settings if not word.startswith(("objective.kl_old", "objective.name"))]
    more = ["objective.target_kl=0.05", "objective.kl_gain=0.9", "objective.name=log_variance_replay"]
    return [*kept, *more, "optimisation.lr=0.01", "optimisation.epochs=6", "evaluation.every=2"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_beta_follows_the_record_resumes_and_is_evaluated_at(vmpo: Run, adaptive: list[str], tmp_path: Path) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert vmpo("train", "glyphs", *adaptive, "--run", alone)[0] == 0
    lines = [line for line in records(alone) if line["epoch"] > 0]
    controller = BetaController(0.05, 0.9, 0.002, 20.0)
    assert lines[0]["beta"] == 0.2
    for before, after in pairwise(lines):
        assert after["beta"] == controller.next(before["beta"], before["kl_ref"])
    assert max(line["beta"] for line in lines) > 0.2 > min(line["beta"] for line in lines)
    last = lines[-1]["beta"]
    assert json.loads((alone / "adapter" / "point.json").read_text()) == {"epoch": 6, "beta": last}

    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "checkpoints" / "epoch-000006")
    assert vmpo("train", "glyphs", *adaptive, "--run", folder, "--resume")[0] == 0
    assert_same_run(folder, alone)

    assert vmpo("evaluate", alone)[0] == 0
    assert json.loads((alone / "evaluation.json").read_text())["truth"]["beta"] == last


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["objective.name=grpo"], "weighs the reward against no KL to the reference; set objective.kl_ref"),
        (["objective.name=grpo_std", "objective.kl_ref=0.1"], "set objective.standardise=none"),
        (["objective.beta_range=[2, 3]"], "objective.beta_range=[2, 3]"),
    ],
)
def test_what_no_beta_can_hold_is_refused(
    words: list[str], why: str, vmpo: Run, settings: list[str], tmp_path: Path
) -> None:
    code, errors, _ = vmpo("train", "glyphs", *settings, "objective.target_kl=1", *words, "--run", tmp_path / "run")
    assert code == 2
    assert len(errors) == 1
    assert why in errors[0]
