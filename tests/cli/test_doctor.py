"""`vmpo doctor` tells what is there from what is not, by caches and packages that are made up here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

from vmpo.cli.app import console
from vmpo.doctor import Finding, capacity, devices, disk, examine, packages
from vmpo.doctor.hub_cache import Need, has_weights
from vmpo.doctor.models import models
from vmpo.doctor.prompt_sets import prompt_sets
from vmpo.doctor.rewards import rewards
from vmpo.rewards import BUILT_IN
from vmpo.training.memory import GIB
from vmpo.training.recipes import recipe_names

Vmpo = Callable[..., tuple[int, list[str], str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of everything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("VMPO_CACHE", str(tmp_path / "vmpo"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(console, "_width", 80)
    return tmp_path / "hub"


def put(hub: Path, repo: str, *names: str, text: str = "x") -> Path:
    """Files of a repository, in the hub cache as huggingface_hub keeps it: a link to a blob each."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    for number, name in enumerate(names):
        blob = folder / "blobs" / f"{len(list((folder / 'blobs').iterdir()))}-{number}"
        blob.write_text(text)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_every_built_in_reward_is_judged_and_told_how_to_get() -> None:
    found = by_name(rewards())
    assert found.keys() == BUILT_IN.keys()
    assert {name for name, f in found.items() if f.state == "ok"} == {
        "ocr",
        "ocr_log_likelihood",
        "ocr_scene",
        "jpeg_compressibility",
        "jpeg_incompressibility",
    }
    assert all(f.remedies for f in found.values() if f.state != "ok")
    assert found["hpsv2"].remedies[0] == "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"
    assert found["clip_score"].remedies == ("hf download openai/clip-vit-large-patch14",), "its vocabulary comes along"
    assert found["remote"].text == "needs a server and its address"


def test_a_reward_can_run_once_all_its_files_are_cached(caches: Path) -> None:
    put(caches, "xswu/HPSv2", "HPS_v2_compressed.pt")
    put(caches, CLIP_H, "tokenizer.json")
    found = by_name(rewards())
    assert found["hpsv2"].text == "not there: xswu/HPSv2", "that is the other version's file"
    assert found["pick_score"].text == "not there: yuvalkirstain/PickScore_v1"
    put(caches, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    put(caches, "yuvalkirstain/PickScore_v1", "config.json", "model.safetensors")
    put(caches, "THUDM/ImageReward", "ImageReward.pt")
    put(caches, "google-bert/bert-base-uncased", "vocab.txt")
    put(caches, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    found = by_name(rewards())
    assert [found[name].text for name in ("hpsv2", "pick_score", "image_reward")] == ["can run"] * 3
    assert found["aesthetic"].text == "not there: openai/clip-vit-large-patch14"


def test_options_of_a_recipe_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "hps.pt"
    weights.write_text("x")
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "vocab.json").write_text("{}")
    sources = {
        "mine": ("hpsv2", {"version": "v2.0", "weights": str(weights), "tokenizer": str(tmp_path / "vocabulary")}),
        "far": ("remote", {"endpoints": ["http://127.0.0.1:1"], "key_env": "DOCTOR_TOKEN"}),
        "red": ("module:red", {}),
        "read": ("ocr_scene", {"engine": "paddleocr"}),
        "good": ("deqa", {"model": str(tmp_path / "deqa"), "trust_remote_code": True}),
    }
    found = by_name(rewards(sources))
    assert found["mine"].text == "can run"
    assert (found["far"].state, found["far"].text) == ("missing", "DOCTOR_TOKEN is not set")
    assert found["red"].state == "ok"
    assert found["read"].remedies == ("pip install paddleocr",)
    assert found["good"].state == "missing"
    assert found["good"].remedies == (f"put it at '{tmp_path / 'deqa'}', or name another path",)
    monkeypatch.setenv("DOCTOR_TOKEN", "secret")
    far = by_name(rewards(sources))["far"]
    assert far.state == "ok"
    assert "secret" not in far.text


# --- models and prompts -----------------------------------------------------------------------------------------------


def index_of(*networks: str) -> str:
    parts = {name: ["diffusers", "Network"] for name in networks}
    return json.dumps(
        {"_class_name": "P", **parts, "tokenizer": ["transformers", "T"], "scheduler": ["diffusers", "S"]}
        | {"safety_checker": ["stable_diffusion", "C"], "text_encoder_3": [None, None]}
    )


def test_a_model_is_absent_partial_or_whole(caches: Path, tmp_path: Path) -> None:
    repo = "someone/model"
    assert models([repo])[0].text == "not there"
    put(caches, repo, "model_index.json", text=index_of("unet", "vae"))
    snapshot = put(caches, repo, "unet/diffusion_pytorch_model.safetensors", "vae/config.json")
    (partial,) = models([repo])
    assert (partial.state, partial.text) == ("missing", "in part: no weights of vae")
    assert partial.remedies[0].startswith("hf download someone/model --include ")
    put(caches, repo, "vae/diffusion_pytorch_model.bin", text="y" * 50_000_000)
    assert models([repo])[0].text == "whole, 0.1 GB"
    assert models([str(snapshot), "glyphs", str(tmp_path)]) == [
        Finding(str(snapshot), "ok", "whole, 0.1 GB"),
        Finding("glyphs", "ok", "ships with vmpo"),
        Finding(str(tmp_path), "problem", "a folder without model_index.json"),
    ]


def test_weights_in_parts_count_when_all_are_there(tmp_path: Path) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / parts[0]).write_text("x")
    assert not has_weights(tmp_path)
    assert not has_weights(tmp_path / "absent")
    (tmp_path / parts[1]).symlink_to(tmp_path / "blob")
    assert not has_weights(tmp_path), "a link to a download that was broken off"
    (tmp_path / "blob").write_text("x")
    assert has_weights(tmp_path)


def test_a_network_needs_its_weights_and_not_only_their_index(caches: Path) -> None:
    need = Need.network("someone/clip")
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    put(caches, "someone/clip", "model.safetensors.index.json", text=index)
    assert not need.met
    put(caches, "someone/clip", "model-00001-of-00001.safetensors")
    assert need.met


def test_prompt_sets_of_a_recipe_and_all(tmp_path: Path) -> None:
    file = tmp_path / "vmpo/prompts/hpdv2/photo.json"
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    found = by_name(prompt_sets(["hpdv2/photo+hpdv2/painting", "glyphs/test", "absent.txt"]))
    assert {name: f.state for name, f in found.items()} == {
        "hpdv2/photo": "ok",
        "hpdv2/painting": "missing",
        "glyphs/test": "ok",
        "absent.txt": "problem",
    }
    assert found["hpdv2/painting"].remedies == ("vmpo prompts hpdv2/painting",)
    every = by_name(prompt_sets())
    assert every["cached"].text == "hpdv2/photo"
    assert "hpdv2/painting" in every["not cached"].text


# --- packages and devices ---------------------------------------------------------------------------------------------


def test_what_is_installed_here_meets_what_vmpo_requires() -> None:
    found = by_name(packages.required_packages())
    assert {"python", "torch", "diffusers", "transformers", "peft", "accelerate"} <= found.keys()
    assert all(f.state == "ok" for f in found.values())
    assert found["torch"].text == f"{torch.__version__} (>=2.9)"


def test_old_and_absent_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = packages.version

    def version(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return {"diffusers": "0.30.0", "numpy": "1.26.4"}.get(name) or installed(name)

    monkeypatch.setattr(packages, "version", version)
    found = by_name(packages.required_packages())
    assert {name for name, f in found.items() if f.state == "problem"} == {"peft", "diffusers", "numpy"}
    assert found["diffusers"].text == "0.30.0, but >=0.42 is required"
    assert found["diffusers"].remedies == ("pip install 'diffusers>=0.42'",)
    assert found["peft"].text == "not installed, but >=0.18 is required"
    assert "others" not in found


def test_a_torchvision_that_cannot_be_imported_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    broken = by_name(packages.required_packages())["torchvision"]
    assert broken.state == "problem"
    assert "operator torchvision::nms does not exist" in broken.text
    assert broken.remedies[0].startswith("pip uninstall torchvision")
    (package / "__init__.py").write_text("__version__ = '0.28.0'\n\n")
    assert by_name(packages.required_packages())["torchvision"].state == "ok"
    monkeypatch.delitem(sys.modules, "torchvision")


@pytest.mark.parametrize(("major", "bf16"), [(9, True), (7, False)])
def test_a_gpu_with_its_memory(monkeypatch: pytest.MonkeyPatch, major: int, bf16: bool) -> None:
    card = SimpleNamespace(name="Card", major=major, minor=5 if major == 7 else 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))
    gpu = by_name(devices.devices())["GPU 0"]
    assert gpu.text == f"Card, 24.0 GiB, 20.0 GiB free, {'bf16' if bf16 else 'no bf16'}"
    assert bool(gpu.remedies) is not bf16


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    put(caches, "someone/model", "file", text="y" * (3 << 20))
    found = by_name(disk.disk())
    assert found["hub"].text.startswith(f"{caches}: 3 MiB used, ")
    assert all(f.state == "ok" for name, f in found.items() if name != "hub token")
    monkeypatch.setattr(disk, "LEAST", 1 << 60)
    assert {f.state for name, f in by_name(disk.disk()).items() if name != "hub token"} == {"problem"}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    assert by_name(disk.disk())["hub token"] == Finding("hub token", "ok", "set")


def test_what_cannot_be_examined_does_not_end_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise ImportError("cannot import name 'CLIPModel'\nfrom transformers")

    monkeypatch.setattr("vmpo.doctor.rewards.rewards", lambda sources: broken())
    sections = {section.title: section for section in examine()}
    (finding,) = sections["rewards"].findings
    assert finding.state == "problem"
    assert finding.text == "could not be examined: ImportError: cannot import name 'CLIPModel' from transformers"
    assert sections["disk"].findings[0].state == "ok"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns_and_names_what_to_do(vmpo: Vmpo) -> None:
    code, errors, out = vmpo("doctor", "--quick")
    assert (code, errors) == (0, [])
    shown, _, remedies = out.partition("what to do")
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "what fits" not in out
    for title in ("versions", "devices", "rewards", "models", "prompt sets", "optional packages", "disk"):
        assert f"\n{title}\n" in f"\n{shown}"
    for model in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-3.5-medium"):
        assert f" -- hf download {model} " in remedies


def test_strict_is_about_what_a_recipe_needs(vmpo: Vmpo, tmp_path: Path) -> None:
    assert vmpo("doctor", "--quick", "--strict")[0] == 0, "nothing here is broken"
    code, _, out = vmpo("doctor", "sd15-hpsv2", "--quick", "--strict")
    assert code == 1
    assert "hpdv2/photo" in out
    assert "pick_score" not in out
    assert vmpo("doctor", "sd15-hpsv2", "--quick")[0] == 0
    assert vmpo("doctor", "glyphs", "--quick", "--strict")[0] == 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"extends": "glyphs", "prompts": {"train": "absent.txt"}}))
    assert vmpo("doctor", recipe, "--quick", "--strict")[0] == 1
    code, errors, _ = vmpo("doctor", "sd16")
    assert code == 2
    assert "no recipe 'sd16'" in errors[0]


def test_json_says_what_fits(vmpo: Vmpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_memory", lambda device: 24 * GIB)
    code, _, out = vmpo("doctor", "sd15-hpsv2", "--json")
    assert code == 0
    found = json.loads(out)
    assert [section["title"] for section in found["sections"]][:2] == ["versions", "devices"]
    (fits,) = found["fits"]
    assert fits["job"] == "sd15-hpsv2"
    assert fits["available_bytes"] == 24 * GIB
    assert fits["micro_batch"] >= 8, "the paper's batch of a GPU"
    assert fits["micro_batch_with_checkpointing"] > 2 * fits["micro_batch"]
    assert fits["row_bytes_with_checkpointing"] < 0.5 * fits["row_bytes"]


def test_every_published_architecture_has_a_job() -> None:
    jobs = capacity.jobs()
    assert list(jobs) == ["sd15-hpsv2", "sd35-ocr", "sdxl"]
    assert all(job == "sdxl" or job in recipe_names() for job in jobs)
    assert capacity.capacities({"glyphs": capacity.load_config("glyphs", [])}, print) == []
