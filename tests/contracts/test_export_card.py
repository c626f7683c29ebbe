"""The model card says what was trained, shows what was measured, gives nothing private away, and its code runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import pipelines
from tests.trained_runs import Trained, make_run
from vmpo.export import export
from vmpo.export.card_settings import public_text
from vmpo.training.config import validate_config

Vmpo = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    folder = tmp_path_factory.mktemp("trained")

    def made(kind: str) -> Trained:
        pipelines.BUILD[kind]().save_pretrained(folder / kind)
        return make_run(folder / f"{kind}-run", kind, folder / kind)

    found = {kind: made(kind) for kind in ("sd1", "sd3")}
    return found.__getitem__


# --- the model card ---------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def full_run(trained, tmp_path: Path) -> Path:
    """A run of a hub model with everything a card can show."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    source = trained("sd3").run / "adapter" / "pytorch_lora_weights.safetensors"
    (run / "adapter" / source.name).write_bytes(source.read_bytes())
    settings: dict[str, Any] = {
        "name": "sd35-ocr",
        "model": {"path": "stabilityai/stable-diffusion-3.5-medium", "weights": "bf16"},
        "prompts": {"train": "/home/me/secret/prompts.txt", "test": "ocr/test"},
        "reward": {
            "weights": {"ocr": 1.0, "judge": 0.5},
            "options": {"judge": {"use": "vlm_judge", "url": "http://10.1.2.3:8000/v1", "api_key": "sk-123"}},
        },
        "objective": {"name": "vmpo_r2g", "beta": 0.05},
        "optimisation": {"prompts": 16, "group": 8},
    }
    validate_config(settings, where="test")
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (run / "metrics.jsonl").write_text('{"epoch": 3, "samples": 12345, "seconds": 5400}\n')
    (run / "provenance.json").write_text(
        json.dumps({"vmpo": "0.1.0", "versions": {"torch": "2.13.0"}, "processes": 4, "hardware": "4 x NVIDIA H100"})
    )
    estimate = {"mean": 0.5, "se": 0.01, "n": 8}
    evaluation = {
        "base": {"reward": estimate, "ess": {"mean": float("nan"), "se": None}},
        "aligned": {"reward": estimate | {"mean": 0.91234}, "ess": {"mean": 0.25, "se": None}},
        "difference": {"reward": estimate | {"mean": 0.41234}},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "samples").mkdir()
    for epoch in (0, 1, 3):
        (run / "samples" / f"epoch-{epoch:06d}.png").write_bytes(b"picture %d" % epoch)
    return run


def test_card(full_run: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "table.md").write_text("| Source | OCR Acc. ↑ |\n|---|---:|\n| mine | 0.93 |\n")
    (tables / "gallery.png").write_bytes(b"gallery")
    folder = export(full_run, "diffusers", tmp_path / "out", tables=tables)
    front, text = card_of(folder)
    assert front["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert front["base_model_relation"] == "adapter"
    assert {"text-to-image", "lora", "vmpo", "vmpo_r2g"} <= set(front["tags"])
    assert "license" not in front, "a licence is for the user to state"
    assert "# license: to be stated" in (folder / "README.md").read_text()
    for wanted in (
        "rank 4",
        "1 · ocr + 0.5 · judge",
        "on the prompts `prompts.txt`",
        "`vmpo_r2g` at the temperature beta = 0.05",
        "| reward | 0.5000 ± 0.0100 | 0.9123 ± 0.0100 | 0.4123 ± 0.0100 |",
        "| ess | – | 0.2500 | – |",
        "| mine | 0.93 |",
        "| training time | 1.50 hours × 4 processes |",
        "| pictures drawn | 12,345 |",
        "| prompts × pictures an epoch | 16 × 8 |",
        "4 x NVIDIA H100",
        "vmpo 0.1.0, torch 2.13.0",
        "torch_dtype=torch.bfloat16",
        'pipe.load_lora_weights("THIS_FOLDER")',
    ):
        assert wanted in text, wanted
    for private in ("/home/me", "10.1.2.3", "sk-123", str(tmp_path)):
        assert private not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert validate_config(recipe, where="card").optimisation.group == 8
    shown = {line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")}
    assert shown == {"samples/epoch-000000.png", "samples/epoch-000003.png", "samples/gallery.png"}
    assert (folder / "samples" / "epoch-000003.png").read_bytes() == b"picture 3"
    assert len(list((folder / "samples").iterdir())) == 3


@pytest.mark.parametrize("to", ["diffusers", "peft", "merged"])
def test_the_code_of_a_card_runs(trained, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("sd1")
    folder = export(run.run, to, tmp_path / "out", card=True)
    front, text = card_of(folder)
    assert "base_model" not in front, "a local folder is no model of the hub"
    assert front["library_name"] == ("peft" if to == "peft" else "diffusers")
    assert "Not evaluated." in text
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("BASE_MODEL", str(run.model)).replace("THIS_FOLDER", str(folder)).replace('"cuda"', '"cpu"')
    code = code.replace('pipe("PROMPT")', 'pipe("a cat", height=16, width=32, num_inference_steps=2)')
    scope: dict[str, Any] = {}
    exec(code, scope)
    run.is_aligned(scope["pipe"].unet)
    assert scope["image"].size == (32, 16)


# --- the hub ----------------------------------------------------------------------------------------------------------


class FakeApi:
    """Records what would be sent."""

    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        FakeApi.calls.append(("create", {"repo": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        if FakeApi.failure is not None:
            raise FakeApi.failure
        names = sorted(str(p.relative_to(options["folder_path"])) for p in Path(options["folder_path"]).rglob("*.*"))
        FakeApi.calls.append(("upload", options | {"files": names}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls, FakeApi.failure = [], None
    return FakeApi


def test_push(vmpo: Vmpo, full_run: Path, hub: type[FakeApi], tmp_path: Path) -> None:
    words = ["export", full_run, "--to", "peft", "--out", tmp_path / "out", "--push", "me/my-lora", "--private"]
    code, errors, text = vmpo(*words)
    assert (code, errors) == (0, [])
    assert "pushed: https://huggingface.co/me/my-lora" in text
    (_, made), (_, sent) = hub.calls
    assert made == {"repo": "me/my-lora", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/my-lora"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(sent["files"])
    assert 'from_pretrained(pipe.transformer, "me/my-lora")' in card_of(tmp_path / "out")[1]


def test_a_push_that_fails_leaves_the_folder(vmpo: Vmpo, full_run: Path, hub: type[FakeApi], tmp_path: Path) -> None:
    hub.failure = OSError("401 Client Error\nRepository not found")
    code, errors, _ = vmpo("export", full_run, "--out", tmp_path / "out", "--push", "me/my-lora")
    assert code == 2
    assert len(errors) == 1
    for wanted in ("401 Client Error", "hf auth login", f"hf upload me/my-lora {tmp_path / 'out'}"):
        assert wanted in errors[0]
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("setting", "public"),
    [
        ("hpdv2/photo+/home/me/own.txt", "hpdv2/photo+own.txt"),
        ("~/models/sd15", "sd15"),
        ("../sd15", "sd15"),
        (r"C:\Users\me\sd15", "sd15"),
        ("https://me:pass@host/v1", "(an address, left out)"),
        ("owner/name", "owner/name"),
        ("my_rewards:contrast", "my_rewards:contrast"),
    ],
)
def test_what_of_a_setting_is_published(setting: str, public: str) -> None:
    assert public_text(setting) == public
