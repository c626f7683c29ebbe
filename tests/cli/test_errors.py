"""Whatever a user can get wrong ends in one line on standard error and exit code 2, and no run is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests import scenarios
from vmpo.errors import UserError
from vmpo.training import checkpoint
from vmpo.training.checkpoint import replace_folder

Vmpo = Callable[..., tuple[int, list[str], str]]


def one_line(result: tuple[int, list[str], str], *wanted: str) -> str:
    """The message, having checked that it is alone on standard error, and that the exit code is 2."""
    code, lines, out = result
    assert code == 2, (lines, out)
    assert len(lines) == 1, lines
    assert lines[0].startswith("vmpo: ")
    assert "Traceback" not in out
    for text in wanted:
        assert text in lines[0]
    return lines[0]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["glyph"], ["no recipe 'glyph'", "did you mean 'glyphs'"]),
        (["absent.yaml"], ["'absent.yaml' cannot be read", "No such file"]),
        (["glyphs", "optimisation.epoch=3"], ["unknown key 'optimisation.epoch'", "did you mean 'epochs'"]),
        (["glyphs", "optimization.epochs=3"], ["unknown key 'optimization'", "did you mean 'optimisation'"]),
        (["glyphs", "model.lora.rnk=3"], ["unknown key 'model.lora.rnk'", "did you mean 'rank'"]),
        (["glyphs", "optimisation.lr=fast"], ["optimisation.lr='fast'", "valid number"]),
        (["glyphs", "objective.name=grpo", "optimisation.group=1"], ["group=1 leaves objective 'grpo' nothing"]),
        (["glyphs", "sampler.kernel=euler"], ["sampler.kernel='euler'", "'cps'"]),
        (["glyphs", "sampler.eta=0"], ["eta=0 has no stochastic step", "sampler.eta above 0"]),
        (["glyphs", "sampler.kernel=ddim"], ["kernel=ddim does not go with model 'glyphs'", "flow_grpo, dance or cps"]),
        (["glyphs", "optimisation.epochs.x=3"], ["'epochs' is a value"]),
        (["glyphs", "epochs"], ["'epochs' is not of the form key.path=value"]),
        (["glyphs", "objective.name=vmpo_dif"], ["no objective 'vmpo_dif'", "did you mean 'vmpo_diff'"]),
        (["glyphs", "reward.weights={ocrr: 1.0}"], ["unknown reward 'ocrr'", "did you mean 'ocr'"]),
        (["glyphs", "reward.weights={}"], ["reward.weights={}"]),
    ],
)
def test_settings(vmpo: Vmpo, tmp_path: Path, words: list[str], wanted: list[str]) -> None:
    one_line(vmpo("train", *words, "--run", tmp_path / "run"), *wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tests.scenarios:brihtness", "did you mean 'brightness'"),
        ("tests.scenario:brightness", "no module 'tests.scenario'"),
        ("tests/scenarios.py:brightness", "module:function"),
    ],
)
def test_own_reward_that_is_not_there(vmpo: Vmpo, tmp_path: Path, name: str, wanted: str) -> None:
    weights = f"reward.weights={json.dumps({name: 1.0})}"
    one_line(vmpo("train", "glyphs", weights, "--run", tmp_path / "run"), name, wanted)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_file_is_missing(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    absent = tmp_path / "absent.txt"
    one_line(vmpo("train", "glyphs", *settings, f"prompts.train={absent}"), str(absent), "No such file", "glyphs/train")


def test_prompt_file_is_empty(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    one_line(vmpo("train", "glyphs", *settings, f"prompts.test={empty}"), str(empty), "is empty")


def test_prompt_file_is_no_text(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(b"\xff\xfe\x00\x89")
    one_line(vmpo("train", "glyphs", *settings, f"prompts.train={file}"), str(file), "UTF-8")


def test_prompt_file_has_a_bad_line(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    one_line(vmpo("train", "glyphs", *settings, f"prompts.train={file}"), str(file), "line 2", "'prompt'")


def test_prompt_without_quotes_for_ocr(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('a sign that says "ACTOR"\na sign that says AIR\n')
    words = [*settings, "reward.weights={ocr: 1.0}", f"prompts.train={file}"]
    one_line(vmpo("train", "glyphs", *words, "--run", tmp_path / "run"), "a sign that says AIR", "quot")


# --- rewards ----------------------------------------------------------------------------------------------------------


def train_with(vmpo: Vmpo, settings: list[str], reward: str, run: Path) -> tuple[int, list[str], str]:
    weights = f"reward.weights={json.dumps({f'tests.scenarios:{reward}': 1.0})}"
    return vmpo("train", "glyphs", *settings, weights, "--run", run)


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [
        ("wrong_shape", "returned the shape (12, 64); expected (12,)"),
        ("constant", "do not vary within any group (all are 0.5)"),
    ],
)
def test_reward_that_cannot_train(vmpo: Vmpo, settings: list[str], tmp_path: Path, reward: str, wanted: str) -> None:
    one_line(train_with(vmpo, settings, reward, tmp_path / "run"), wanted)


@pytest.mark.parametrize(("reward", "why"), [("raises", "the scorer is out of order"), ("all_nan", "non-finite score")])
def test_reward_that_fails_always(vmpo: Vmpo, settings: list[str], tmp_path: Path, reward: str, why: str) -> None:
    code, lines, out = train_with(vmpo, settings, reward, tmp_path / "run")
    assert code == 2
    assert "Traceback" not in out + "".join(lines)
    assert lines[-1].startswith("vmpo: every reward of the epoch failed")
    assert all(why in line for line in lines[:-1]), "what is said besides is the reason, and nothing else"


def test_rewards_may_stop_varying_once_a_run_has_begun(
    vmpo: Vmpo, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    working = scenarios.brightness
    monkeypatch.setattr(scenarios, "brightness", lambda *given: working(*given) * (next(calls) < 1))
    assert train_with(vmpo, settings, "brightness", tmp_path / "run")[0] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["zero_std_ratio"] for r in records] == [0, 1, 1]


def test_reward_that_fails_sometimes_goes_on_and_is_counted(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, lines, out = train_with(vmpo, settings, "some_nan", run)
    assert code == 0, lines
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert record["failed_rewards"] == pytest.approx(0.25)
        assert all(torch.isfinite(torch.tensor(record[key])) for key in ("reward_mean", "loss", "grad_norm", "ess"))
    assert "failed 25.0%" in out
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()


# --- run folders ------------------------------------------------------------------------------------------------------


def test_run_folder_cannot_be_made(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/vmpo/run")):
        one_line(vmpo("train", "glyphs", *settings, "--run", folder), str(folder), "cannot be made")


def test_run_folder_in_use(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "glyphs", *settings, "optimisation.epochs=1", "--run", run]
    assert vmpo(*words)[0] == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    one_line(vmpo(*words), str(run), "already in use", "--resume")
    one_line(vmpo(*words, "optimisation.lr=0.5", "--resume"), str(run), "other settings", "config.yaml")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, "a refused run touches nothing"


def test_run_folder_of_a_living_process(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "glyphs", *settings, "--run", run, "--resume"]
    with FileLock(run / ".lock"):
        one_line(vmpo(*words), str(run), "still running")
        assert [p.name for p in run.iterdir()] == [".lock"], "a refused run touches nothing"
    assert vmpo(*words)[0] == 0


def test_not_a_run_folder(vmpo: Vmpo, tmp_path: Path) -> None:
    one_line(vmpo("evaluate", tmp_path), str(tmp_path), "no run folder", "config.yaml")
    one_line(vmpo("evaluate", tmp_path / "absent"), "no run folder")
    one_line(vmpo("report", tmp_path / "absent"), "absent", "does not exist")
    one_line(vmpo("sample", tmp_path, "a cat"), str(tmp_path), "neither a run folder")


def test_run_without_adapter(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    import yaml

    from vmpo.training.recipes import load_config

    config = load_config("glyphs", settings).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one_line(vmpo("evaluate", tmp_path), "no adapter", "pytorch_lora_weights.safetensors")


# --- full disks -------------------------------------------------------------------------------------------------------


def no_space(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", ["metrics", "checkpoint", "adapter"])
def test_full_disk_loses_nothing(
    vmpo: Vmpo, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ["train", "glyphs", *settings, "optimisation.epochs=2", "--run"]
    with monkeypatch.context() as patch:
        calls = {"n": 0}
        name, target = {
            "metrics": ("fsync", checkpoint.os),
            "checkpoint": ("save", checkpoint.torch),
            "adapter": ("save_lora", sys.modules["vmpo.training.trainer"]),
        }[when]
        working = getattr(target, name)

        def fails_late(*arguments: Any, **keywords: Any) -> Any:
            calls["n"] += 1
            if calls["n"] >= (7 if when == "metrics" else 2):  # the seventh file synced is the metrics of epoch 2
                no_space()
            return working(*arguments, **keywords)

        patch.setattr(target, name, fails_late)
        one_line(vmpo(*words, run), "cannot write", str(run), "No space left on device")
    assert not list(run.rglob("*.tmp")), "what could not be finished makes room again"
    code, lines, out = vmpo(*words, run, "--resume")
    assert code == 0, lines
    assert "resumed after epoch" in out
    assert vmpo(*words, whole)[0] == 0
    mended, unbroken = (load_file(f / "adapter" / "pytorch_lora_weights.safetensors") for f in (run, whole))
    assert mended.keys() == unbroken.keys()
    assert all(torch.equal(mended[key], weight) for key, weight in unbroken.items())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "adapter"
    replace_folder(lambda folder: (folder / "a").write_text("old"), target)

    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise error

    with pytest.raises(UserError, match="cannot write"):
        replace_folder(fill, target)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk, as root on Linux")
def test_a_really_full_disk(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        words = ["train", "glyphs", *settings, "optimisation.epochs=1", "--run", disk / "run"]
        one_line(vmpo(*words), "cannot write", str(disk))
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert vmpo(*words, "--resume")[0] == 0
        assert (disk / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    finally:
        subprocess.run(["umount", disk], check=True)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/absent/model", "someone/absent-model"])
def test_model_is_missing(vmpo: Vmpo, settings: list[str], tmp_path: Path, path: str) -> None:
    words = [*settings, f"model.path={path}", "--run", tmp_path / "run"]
    one_line(vmpo("train", "glyphs", *words), path, "hf download", "model.path=")


def test_pipeline_class_is_unknown(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    model = tmp_path / "flux"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}')
    words = [*settings, f"model.path={model}", "--run", tmp_path / "run"]
    one_line(vmpo("train", "glyphs", *words), str(model), "FluxPipeline", "StableDiffusion3Pipeline")


def test_model_with_a_missing_part(vmpo: Vmpo, settings: list[str], tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "half"
    model.mkdir()
    for part in tiny_model.iterdir():
        if part.name != "transformer":
            (model / part.name).symlink_to(part)
    words = [*settings, f"model.path={model}", "--run", tmp_path / "run"]
    one_line(vmpo("train", "glyphs", *words), str(model), "could not be loaded")


def test_adapter_targets_that_do_not_exist(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "model.lora.targets=[to_nowhere]", "--run", tmp_path / "run"]
    one_line(vmpo("train", "glyphs", *words), "model.lora.targets", "to_nowhere")


def test_updates_too_small_to_change_anything(vmpo: Vmpo, settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "optimisation.lr=1e-30", "--run", tmp_path / "run"]
    one_line(vmpo("train", "glyphs", *words), "does not change the output")


# --- the process ------------------------------------------------------------------------------------------------------


def test_exit_code_and_message_of_the_real_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmpo", "train", "glyph", "--run", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["vmpo: no recipe 'glyph'; did you mean 'glyphs'? 'vmpo recipes' lists them"]
