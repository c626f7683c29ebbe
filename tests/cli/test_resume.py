"""A run killed with SIGKILL at random moments and resumed ends as the run left alone: the adapter to the last bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytestmark = pytest.mark.timeout(900)  # eight processes, of which a busy machine starts one a minute

EPOCHS = 6
TIMES = ("seconds", "time_rollout", "time_rewards", "time_update")
PATIENCE = 200.0  # seconds for a process to get going on a busy machine


def command(settings: list[str], folder: Path, *more: str) -> list[str]:
    words = [*settings, f"optimisation.epochs={EPOCHS}", "optimisation.ema=0.8", "evaluation.every=2", *more]
    return [sys.executable, "-m", "vmpo", "train", "glyphs", *words, "--run", str(folder), "--resume"]


def epochs_done(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])["epoch"]


def kill_after(words: list[str], folder: Path, epoch: int, delay: float) -> bool:
    """Starts the run, kills it `delay` seconds after it recorded `epoch`; whether it was alive until then."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + PATIENCE
    ready = folder / "checkpoints" if epoch < 0 else None
    while process.poll() is None and time.monotonic() < end:
        if ready.exists() if ready else epochs_done(folder) >= epoch:
            break
        time.sleep(0.003)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode == -signal.SIGKILL


def finish(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def read_adapter(file: Path) -> dict[str, Any]:
    """Weights as bytes, and metadata, whose order in the file is arbitrary (safetensors keeps it in a hash map)."""
    with safe_open(file, "pt") as opened:
        weights = {key: opened.get_tensor(key).numpy().tobytes() for key in opened.keys()}  # noqa: SIM118 (no mapping)
        facts = json.loads(opened.metadata()["lora_adapter_metadata"])
    targets = "transformer.target_modules"
    return {**weights, **facts, targets: sorted(facts[targets])}


def assert_same_run(folder: Path, alone: Path) -> None:
    adapters = [read_adapter(f / "adapter" / "pytorch_lora_weights.safetensors") for f in (folder, alone)]
    assert adapters[0] == adapters[1]
    assert records(folder) == records(alone)
    name = f"checkpoints/epoch-{EPOCHS:06d}/state.pt"
    states = [torch.load(f / name, weights_only=False) for f in (folder, alone)]
    for state in states:
        del state["seconds"]
    torch.testing.assert_close(*[_comparable(s) for s in states], rtol=0, atol=0)
    grids = Path("samples") / f"epoch-{EPOCHS:06d}.png"
    assert (folder / grids).read_bytes() == (alone / grids).read_bytes()


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors only: the optimiser's moments, live and averaged weights, what is learned beside them, replays."""
    moments = [v for _, entry in sorted(state["optimizer"]["state"].items()) for v in entry.values()]
    terms = [list(part.values()) for part in state["terms"] if part is not None]
    replayed = [[rollout.log_p_old, rollout.delta_phi, rollout.trajectory.x] for rollout in state["replayed"]]
    kept = {"terms": terms, "replayed": replayed}
    return {"moments": moments, "adapter": state["adapter"], "average": state["average"], **kept}


def killed_and_resumed(settings: list[str], folder: Path, seed: int, kills: int, every: int) -> int:
    """Kills at random moments, first while nothing is saved, then anywhere; returns how many resumptions there were."""
    rng = random.Random(seed)
    words = command(settings, folder, f"checkpoint_every={every}")
    resumed = 0
    for number in range(kills):
        epoch = -1 if number == 0 else min(max(epochs_done(folder), 0) + rng.randint(1, 2), EPOCHS)
        if number and number == kills - 1:
            epoch = max(epoch, every + 1)  # by then there is a checkpoint to resume from
        alive = kill_after(words, folder, epoch, rng.uniform(0, 0.25))
        if not alive:
            break
    output = finish(words)
    resumed += "resumed after epoch" in output
    return resumed


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nobody killed."""
    from tests.conftest import tiny_settings

    folder = tmp_path_factory.mktemp("alone") / "run"
    assert "resumed" not in finish(command(tiny_settings(tiny_model), folder, "checkpoint_every=1"))
    assert epochs_done(folder) == EPOCHS
    return folder


@pytest.mark.parametrize(("every", "kills"), [(1, 3), (2, 2)])
def test_killed_run_ends_as_the_run_left_alone(
    alone: Path, settings: list[str], tmp_path: Path, every: int, kills: int
) -> None:
    folder = tmp_path / "run"
    assert killed_and_resumed(settings, folder, seed=10 + every, kills=kills, every=every) == 1
    assert_same_run(folder, alone)
    for leftover in ("adapter", "checkpoints"):
        assert not list(folder.glob(f".{leftover}*")), "what a kill left half written must not stay"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_kills(alone: Path, settings: list[str], tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "run"
    killed_and_resumed(settings, folder, seed, kills=5, every=1 + seed % 3)
    assert_same_run(folder, alone)


def test_the_comparison_notices(alone: Path, settings: list[str], tmp_path: Path) -> None:
    """Another learning rate in the last epoch only, by an adapter's single bit, would be seen."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(alone, copy)
    assert_same_run(copy, alone)
    file = copy / "adapter" / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(AssertionError):
        assert_same_run(copy, alone)
