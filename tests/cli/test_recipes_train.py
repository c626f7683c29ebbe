"""Every recipe trains two epochs on small checkpoints of its real classes, rewards included, in two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.golden.scorer_checkpoints import SCORERS, write_checkpoint
from tests.pipelines import BUILD, HEIGHT, WIDTH
from vmpo.training.recipes import load_config, recipe_names

RECIPES = [name for name in recipe_names() if not name.startswith("glyphs")]
MODELS = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1", "stabilityai/stable-diffusion-3.5-medium": "sd3-t5"}


def job(recipe: str, models: Path, scorers: dict[str, object], run: Path) -> list[str]:
    """The recipe cut down in size and number; what it is made of stays."""
    config = load_config(recipe, [])
    rewards = [*config.reward.weights, *config.reward.held_out]
    options = {name: scorers[name] for name in rewards if name in scorers}
    if "ocr_scene" in rewards:  # no untrained model draws a word
        options["ocr_scene"] = {"use": "tests.scenarios:brightness"}
    group = min(config.optimisation.group, 2)
    return [
        recipe,
        f"model.path={models / MODELS[config.model.path]}",
        f"model.height={HEIGHT}",
        f"model.width={WIDTH}",
        "sampler.steps=3",
        "prompts.train=glyphs/train",
        "prompts.test=glyphs/test",
        f"reward.options={json.dumps(options)}",
        "optimisation.epochs=2",
        f"optimisation.prompts={2 * config.optimisation.updates}",
        f"optimisation.group={group}",
        "optimisation.micro_batch=4",
        "evaluation.every=2",
        "evaluation.prompts=2",
        "trackers=[]",
        "--folder",
        str(run),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder for each recipe, all trained by one torchrun."""
    root = tmp_path_factory.mktemp("recipes")
    for name in set(MODELS.values()):
        BUILD[name]().save_pretrained(root / "models" / name)
    scorers: dict[str, object] = {name: write_checkpoint(name, root / "scorers" / name) for name in SCORERS}
    jobs = [job(recipe, root / "models", scorers, root / recipe) for recipe in RECIPES]
    (root / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [*launcher, "tests.train_in_turn", str(root / "jobs.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return root


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_to_its_end(runs: Path, recipe: str) -> None:
    run, config = runs / recipe, load_config(recipe, [])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2
    for record in records[1:]:
        assert all(math.isfinite(record[key]) for key in ("reward_mean", "kl_ref", "loss", "grad_norm"))
        assert record["failed_rewards"] == 0
        assert record["grad_norm"] > 0
    for name in (*config.reward.weights, *config.reward.held_out):
        assert math.isfinite(records[-1][f"eval_{name}_mean"])
    adapter = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    changed = [bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name]
    assert sum(changed) > 0.9 * len(changed), "B starts at zero, and the last block's text side gets no gradient"
    rank = {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name}
    assert rank == {config.model.lora.rank}
