"""`vmpo serve-reward` as a process, and training runs whose reward server fails in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import scenarios
from tests.reward_servers import Server, redness
from vmpo.rewards import load_reward, scoring

Vmpo = Callable[..., tuple[int, list[str], str]]
IMAGES = torch.rand(4, 3, 12, 20, generator=torch.Generator().manual_seed(5))
DYING = "tests.cli.test_serve_reward:DiesInTheMiddle"


class DiesInTheMiddle:
    """Brightness; its process is killed, as by the system, once it is given more pictures in all than LIVES."""

    def __init__(self) -> None:
        self.lives = int(os.environ["LIVES"])

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.lives -= len(images)
        if self.lives < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return scenarios.brightness(images, prompts, metadata)


def rounded_some_nan(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """What a server of `some_nan` sees: pictures of 8 bits a channel."""
    return scenarios.some_nan((images * 255).round() / 255, prompts, metadata)


@pytest.fixture(autouse=True)
def _nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_logged", set())


@contextmanager
def served(*words: str, environment: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process of `vmpo serve-reward`, its address, and what it said at its start."""
    command = [sys.executable, "-m", "vmpo", "serve-reward", "--port", "0", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[\d.:]+\d", line)
        assert found, line + process.stdout.read()
        yield process, found[0], line
    finally:
        process.kill()
        process.communicate()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serves_until_told_to_stop(number: signal.Signals) -> None:
    with served("jpeg_incompressibility", "--option", "scale=2.5", "--batch", "3") as (process, url, line):
        health = httpx2.get(f"{url}/health").json()
        assert (health["reward"], health["options"]) == ("jpeg_incompressibility", {"scale": 2.5})
        assert url.startswith("http://127.0.0.1:"), "this machine only, unless asked otherwise"
        options = json.loads(re.search(r"'reward.options=(\{.*\})'", line)[1])["jpeg_incompressibility"]
        assert options.pop("use") == "remote"
        remote = load_reward("remote", options)
        own = load_reward("jpeg_incompressibility", {"scale": 2.5})
        given = IMAGES, [""] * 4, [{}] * 4
        assert torch.equal(remote(*given), own(*given))
        process.send_signal(number)
        out, _ = process.communicate(timeout=10)
        assert process.returncode == 0
        assert out.splitlines() == ["stopped; 4 pictures scored, 0 without a score"]


def test_a_request_under_way_is_finished(tmp_path: Path) -> None:
    (tmp_path / "patient.py").write_text(
        "import time\ndef patient(images, prompts, metadata):\n    time.sleep(1.0)\n    return images.mean((1, 2, 3))\n"
    )
    python_path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    with served("patient:patient", environment={"PYTHONPATH": python_path}) as (process, url, _):
        scores: list[Tensor] = []
        reward = load_reward("remote", {"endpoints": url, "retries": 0})
        client = threading.Thread(target=lambda: scores.append(reward(IMAGES, [""] * 4, [{}] * 4)))
        client.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        client.join(10)
        assert process.wait(10) == 0
    assert scores[0].isfinite().all()


def test_serves_with_a_token_where_diffusers_and_transformers_are_of_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vmpo: Vmpo
) -> None:
    """A reward may need an environment whose versions of them vmpo could not live with."""
    for package in ("diffusers", "transformers", "accelerate", "peft", "httpx2"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('of another time')\n")
    monkeypatch.setenv("SERVER_TOKEN", "let-me-in")
    python_path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    words = ("jpeg_compressibility", "--token-env", "SERVER_TOKEN")
    with served(*words, environment={"PYTHONPATH": python_path}) as (_, url, line):
        assert '"key_env": "SERVER_TOKEN"' in line
        assert "let-me-in" not in line
        assert httpx2.post(f"{url}/score", json={}).status_code == 401
        options = {"endpoints": url, "key_env": "SERVER_TOKEN"}
        assert load_reward("remote", options)(IMAGES, [""] * 4, [{}] * 4).isfinite().all()
    monkeypatch.delenv("SERVER_TOKEN")
    code, lines, _ = vmpo("serve-reward", *words)
    assert code == 2
    assert "'SERVER_TOKEN' (--token-env) is not set" in lines[0]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["jpeg_compresibility"], "did you mean 'jpeg_compressibility'"),
        (["jpeg_compressibility", "--option", "scal=2"], "its options are: scale"),
        (["jpeg_compressibility", "--option", "scale"], "is not of the form"),
        (["jpeg_compressibility", "--host", "203.0.113.7"], "cannot serve at 203.0.113.7:8765"),
    ],
)
def test_mistakes_are_one_line(vmpo: Vmpo, words: list[str], wanted: str) -> None:
    code, lines, _ = vmpo("serve-reward", *words)
    assert code == 2
    assert len(lines) == 1
    assert wanted in lines[0]


# --- options in a recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (['reward.options={"orc": {alphabet: AB}}'], ["reward.options: 'orc'", "did you mean 'ocr'"]),
        (["reward.options.ocr.use=ocrr"], ["unknown reward 'ocrr'", "did you mean 'ocr'"]),
        (["reward.options.ocr.use=3"], ["reward.options.ocr.use=3", "must name a reward"]),
        (["reward.options.ocr.alphabets=AB"], ["'alphabets'", "its options are: alphabet"]),
        (["reward.options.ocr=3"], ["reward.options.ocr=3", "dictionary"]),
        (["reward.held_out=[far]", "reward.options.far.use=remote"], ["'endpoints'", "its options are: endpoints"]),
    ],
)
def test_mistakes_in_options_are_one_line(vmpo: Vmpo, tmp_path: Path, words: list[str], wanted: list[str]) -> None:
    code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "run")
    assert code == 2
    assert len(lines) == 1
    assert all(text in lines[0] for text in wanted), lines[0]


def test_one_class_may_be_used_twice_under_free_names(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    options = {
        "small": {"use": "jpeg_compressibility", "scale": 0.5},
        "large": {"use": "jpeg_incompressibility", "scale": 4},
        "held": {"use": "jpeg_incompressibility"},
    }
    more = ["reward.weights={small: 1.0, large: 2.0}", "reward.held_out=[held]", "optimisation.epochs=1"]
    words = [*settings, *more, f"reward.options={json.dumps(options)}", "evaluation.every=1"]
    code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "run")
    assert code == 0, lines
    record = records(tmp_path / "run")[-1]
    kilobytes = record["eval_held_mean"]
    assert record["eval_small_mean"] == pytest.approx(-kilobytes / 0.5, rel=1e-5)
    assert record["eval_large_mean"] == pytest.approx(kilobytes / 4, rel=1e-5)
    assert record["eval_reward_mean"] == pytest.approx(-kilobytes / 0.5 + 2 * kilobytes / 4, rel=1e-5)


# --- runs whose server fails ------------------------------------------------------------------------------------------


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def remote_settings(settings: list[str], endpoints: str | list[str], **options: Any) -> list[str]:
    """Three epochs of twelve pictures, in requests of four, one at a time."""
    quick = {"batch": 4, "concurrency": 1, "timeout": 0.5, "deadline": 5, "retries": 0, "backoff": 0.01}
    given = {"far": {"use": "remote", "endpoints": endpoints, **quick, **options}}
    return [*settings, "reward.weights={far: 1.0}", f"reward.options={json.dumps(given)}"]


def test_failed_scores_are_masked_in_the_loss_as_local_ones_are(
    vmpo: Vmpo, settings: list[str], tmp_path: Path
) -> None:
    """Weights to the last bit: a null of the server is the NaN of a reward that runs here."""
    name = "tests.cli.test_serve_reward:rounded_some_nan"
    weights = f"reward.weights={json.dumps({name: 1.0})}"
    code, lines, _ = vmpo("train", "glyphs", *settings, weights, "--run", tmp_path / "local")
    assert code == 0, lines
    with served("tests.scenarios:some_nan") as (_, url, _line):
        words = remote_settings(settings, url, batch=12, timeout=30, deadline=60)
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "remote")
        assert code == 0, lines
    adapters = [load_file(tmp_path / run / "adapter/pytorch_lora_weights.safetensors") for run in ("local", "remote")]
    assert all(torch.equal(weight, adapters[1][key]) for key, weight in adapters[0].items())
    assert any(weight.abs().max() > 0 for key, weight in adapters[0].items() if "lora_B" in key)
    for ours, theirs in zip(records(tmp_path / "local"), records(tmp_path / "remote"), strict=True):
        assert theirs["failed_rewards"] == ours["failed_rewards"] == pytest.approx(0.25)
        assert theirs["failures_far"] == ours[f"failures_{name}"] == 3
        assert theirs["reward_mean"] == ours["reward_mean"]


@pytest.mark.parametrize("name", ["closed", "slow", "nan", "too few", "not json", "500"])
def test_a_server_that_fails_in_the_middle_is_masked_and_counted(
    vmpo: Vmpo, settings: list[str], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def second_epoch_fails(request: dict[str, Any], number: int) -> Any:
        return name if number in (3, 4) else {"scores": [redness(text) for text in request["images"]]}

    began = time.monotonic()
    with Server(second_epoch_fails) as server:
        words = remote_settings(settings, server.url)
        code, lines, out = vmpo("train", "glyphs", *words, "--run", tmp_path / "run")
    assert code == 0, lines
    assert time.monotonic() - began < 60
    found = records(tmp_path / "run")
    assert [record["failures_far"] for record in found] == [0, 8, 0]
    assert [record["failed_rewards"] for record in found] == [0, pytest.approx(2 / 3), 0]
    assert all(record["grad_norm"] > 0 for record in found)
    assert "failed 66.7%" in out
    said = [entry.getMessage() for entry in caplog.records if server.url in entry.getMessage()]
    assert len(said) == 1, "said once, however often it happens"


@pytest.mark.parametrize(
    "name",
    ["slow", "nan", "500", *(pytest.param(f, marks=pytest.mark.slow) for f in ("closed", "too few", "not json"))],
)
def test_a_server_that_fails_in_the_middle_stops_the_run_where_that_is_asked_for(
    vmpo: Vmpo, settings: list[str], tmp_path: Path, name: str
) -> None:
    def second_epoch_fails(request: dict[str, Any], number: int) -> Any:
        return name if number == 4 else {"scores": [redness(text) for text in request["images"]]}

    with Server(second_epoch_fails) as server:
        words = remote_settings(settings, server.url, on_failure="stop")
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "run")
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"vmpo: {server.url}: ")
        assert "pictures without a score: 4 (on_failure is 'stop')" in lines[0]
        assert len(records(tmp_path / "run")) == 1
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "run", "--resume")
    assert code == 0, lines
    assert [record["epoch"] for record in records(tmp_path / "run")] == [1, 2, 3]


def test_a_killed_server_stops_a_run_that_has_no_other_and_it_can_be_resumed(
    vmpo: Vmpo, settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with served(DYING, environment={"LIVES": "12"}) as (process, url, _):
        words = remote_settings(settings, url, timeout=30, deadline=30)
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", run)
        assert process.wait(5) == -signal.SIGKILL
    assert code == 2
    assert lines[-1].startswith(
        "vmpo: every reward of the epoch failed; see the messages above, the run can be resumed"
    )
    assert [record["failures_far"] for record in records(run)] == [0]
    with served("tests.scenarios:brightness", "--port", url.rpartition(":")[2]):  # the last --port counts
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", run, "--resume")
    assert code == 0, lines
    assert [record["failures_far"] for record in records(run)] == [0, 0, 0]


def test_failures_at_an_evaluation_are_counted(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    """Four held-out prompts before and after an epoch of twelve pictures: the last of these five requests fails."""

    def last_fails(request: dict[str, Any], number: int) -> Any:
        return "500" if number == 4 else {"scores": [redness(text) for text in request["images"]]}

    with Server(last_fails) as server:
        words = [*remote_settings(settings, server.url, batch=4), "optimisation.epochs=1", "evaluation.every=1"]
        code, lines, _ = vmpo("train", "glyphs", *words, "evaluation.prompts=4", "--run", tmp_path / "run")
    assert code == 0, lines
    first, last = records(tmp_path / "run")
    assert "eval_far_failed" not in first
    assert first["eval_far_mean"] == first["eval_far_mean"]
    assert last["failures_far"] == 0
    assert last["eval_far_failed"] == 1


@pytest.mark.slow
def test_a_killed_server_beside_a_living_one_loses_nothing(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    short, long = {"LIVES": "12"}, {"LIVES": "1000"}
    with served(DYING, environment=short) as (dying, one, _), served(DYING, environment=long) as (_p, two, _l):
        words = remote_settings(settings, [one, two], timeout=30, deadline=30, retries=1)
        code, lines, _ = vmpo("train", "glyphs", *words, "--run", tmp_path / "run")
        assert code == 0, lines
        assert dying.wait(5) == -signal.SIGKILL
    assert [record["failures_far"] for record in records(tmp_path / "run")] == [0, 0, 0]


@pytest.mark.slow
def test_one_process_that_stops_stops_the_other(settings: list[str], tmp_path: Path) -> None:
    """Under torchrun: the one that lost its scores says so, the one that waits for it is ended."""

    def fifth_fails(request: dict[str, Any], number: int) -> Any:
        return "500" if number == 4 else {"scores": [redness(text) for text in request["images"]]}

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vmpo"]
    with Server(fifth_fails) as server:
        words = remote_settings(settings, server.url, batch=6, on_failure="stop")
        command = [*launcher, "train", "glyphs", *words, "--folder", str(tmp_path / "run")]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("vmpo: ")]
    assert len(said) == 1, done.stderr
    assert "(on_failure is 'stop')" in said[0]
    assert len(records(tmp_path / "run")) == 2
