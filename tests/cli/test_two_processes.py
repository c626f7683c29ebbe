"""Two processes under torchrun train as one does: same groups, rewards and metrics, same gradient within rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(600)  # three processes start, on a busy machine at their leisure
LR = 3e-3
EPOCHS = 2
TIMES = ("seconds", "time_rollout", "time_rewards", "time_update")


def overrides(settings: list[str]) -> list[str]:
    """Three groups of four in two shares of six; the difference potential scores the predicted clean states too."""
    more = ["objective.name=vmpo_diff", f"optimisation.epochs={EPOCHS}", f"optimisation.lr={LR}"]
    return [*settings, *more, "evaluation.every=1", "evaluation.prompts=5"]


def torchrun(words: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vmpo"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def first_gradient(folder: Path) -> list[torch.Tensor]:
    """Adam's first moments, which are sums of the gradients themselves, before any normalisation."""
    state = torch.load(folder / "checkpoints" / f"epoch-{EPOCHS:06d}" / "state.pt", weights_only=False)
    return [entry["exp_avg"] for _, entry in sorted(state["optimizer"]["state"].items())]


def test_two_processes_are_one(
    vmpo: Callable[..., tuple[int, list[str], str]], settings: list[str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    code, lines, _ = vmpo("train", "glyphs", *overrides(settings), "--run", one)
    assert code == 0, lines
    torchrun(["train", "glyphs", *overrides(settings), "--folder", str(two)])
    facts = [json.loads((folder / "provenance.json").read_text())["processes"] for folder in (one, two)]
    assert facts == [1, 2]

    assert len(records(one)) == len(records(two)) == EPOCHS + 1
    for alone, shared in zip(records(one), records(two), strict=True):
        assert alone.keys() == shared.keys()
        for key, value in alone.items():
            # rewards are sums over pixels in float32; losses and weights come from log-densities of about 100 nats
            tight = ("reward" in key and "rise" not in key) or key in ("epoch", "samples", "zero_std_ratio")
            wanted = pytest.approx(value, rel=1e-5 if tight else 1e-3, abs=1e-6 if tight else 1e-4)
            assert shared[key] == wanted, key

    gradients = list(zip(first_gradient(one), first_gradient(two), strict=True))
    for alone_moment, shared_moment in gradients:
        scale = alone_moment.norm()
        assert (alone_moment - shared_moment).norm() <= 1e-3 * scale

    file = Path("adapter") / "pytorch_lora_weights.safetensors"
    adapters = [load_file(folder / file) for folder in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    moved = torch.cat([w.flatten() for k, w in adapters[0].items() if "lora_B" in k]).abs()
    assert moved.median() > 0.1 * LR, "the adapter moved by steps of the learning rate"
    gap = torch.cat([(adapters[1][k] - w).flatten().abs() for k, w in adapters[0].items()])
    # Adam divides by the gradient's size, so rounding shows most where an element's gradient is nearly 0
    assert gap.median() <= 1e-3 * LR
    assert gap.max() <= 0.1 * LR
