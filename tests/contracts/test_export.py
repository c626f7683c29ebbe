"""What is exported, read back by whoever it is for, changes the model as the run's adapter does.

The adapter changes the denoiser's largest output by more than a twentieth of it, and a reader may differ by 1e-5 of it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import lora_readers, pipelines
from tests.trained_runs import ALPHA, RANK, Trained, absent, make_run, output
from vmpo.errors import UserError
from vmpo.export import FORMATS, export
from vmpo.export.adapter import Adapter, LoRAModule, read_adapter
from vmpo.export.mmdit_names import original_mmdit_modules
from vmpo.export.peft import save_peft
from vmpo.export.unet_names import original_unet_name

Vmpo = Callable[..., tuple[int, list[str], str]]
KINDS = ("sd1", "sdxl", "sd3")
WIDE = {
    "sd1": ["to_q", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"],
    "sd3": [
        "attn.to_q",
        "attn.to_v",
        "attn2.to_k",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.2",
        "attn.to_add_out",
        "norm1.linear",
    ],
}
WIDE["sd1"] += ["conv_in", "conv_out", "linear_1"]
WIDE["sdxl"] = WIDE["sd1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def saved(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        pipelines.BUILD[kind]().save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def runs(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    @functools.cache
    def made(kind: str, wide: bool = False) -> Trained:
        folder = tmp_path_factory.mktemp("runs") / "run"
        return make_run(folder, kind, models(kind), WIDE[kind] if wide else None)

    return made


def single_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


# --- each format, read back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers(runs, kind: str, tmp_path: Path) -> None:
    run = runs(kind)
    pipe = run.pipe()
    pipe.load_lora_weights(export(run.run, "diffusers", tmp_path / "out"))
    assert torch.equal(output(kind, getattr(pipe, run.name)), run.aligned)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft(runs, kind: str, wide: bool, tmp_path: Path) -> None:
    run = runs(kind, wide)
    loaded = PeftModel.from_pretrained(run.denoiser(), str(export(run.run, "peft", tmp_path / "out")))
    run.is_aligned(loaded)
    with loaded.disable_adapter():
        assert torch.equal(output(kind, loaded), run.base)
    assert loaded.peft_config["default"].base_model_name_or_path == str(run.model)


def test_peft_keeps_modules_of_another_rank_and_alpha(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranks, alphas = {"to_q": 2, "deep.to_q": 4, "to_k": 2}, {"to_q": 3, "deep.to_q": 3, "to_k": 5}
    model = nn.Module()
    model.to_q, model.to_k, model.deep = nn.Linear(3, 3), nn.Linear(3, 3), nn.Module()
    model.deep.to_q = nn.Linear(3, 3)
    modules = [LoRAModule(n, torch.randn(r, 3), torch.randn(3, r), alphas[n]) for n, r in ranks.items()]
    save_peft(Adapter(tmp_path, "unet", {}, modules), "base", tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).merge_and_unload()
    for module in modules:
        change = merged.get_submodule(module.name).weight - model.get_submodule(module.name).weight
        assert torch.allclose(change, module.alpha / module.rank * module.up @ module.down, atol=1e-5), module.name


@pytest.mark.parametrize("kind", [*KINDS, "sd3-t5", "sd1-v"])
def test_merged(runs, models, kind: str, tmp_path: Path) -> None:
    short = kind.partition("-")[0]
    run = runs(short) if kind == short else make_run(tmp_path / "run", short, models(kind))
    folder = export(run.run, "merged", tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(folder, **absent(folder))
    run.is_aligned(getattr(pipe, run.name))
    original = run.pipe()
    assert {n for n, c in pipe.components.items() if c is not None} == {
        n for n, c in original.components.items() if c is not None
    }
    assert dict(pipe.scheduler.config) == dict(original.scheduler.config)
    assert getattr(pipe, run.name).state_dict().keys() == getattr(original, run.name).state_dict().keys()


def test_merged_keeps_the_type_of_each_component(models, tmp_path: Path) -> None:
    """The denoiser in bf16, the autoencoder in fp32, as they were saved; merged in fp32 and then rounded, once."""
    pipe = DiffusionPipeline.from_pretrained(models("sd1"), **absent(models("sd1")))
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.float16)
    pipe.save_pretrained(tmp_path / "model")
    run = make_run(tmp_path / "run", "sd1", tmp_path / "model")
    folder = export(run.run, "merged", tmp_path / "out")
    types = {n: next(iter(load_file(next((folder / n).glob("*.safetensors"))).values())).dtype for n in ("unet", "vae")}
    assert types == {"unet": torch.bfloat16, "vae": torch.float32}
    assert next(iter(load_file(folder / "text_encoder" / "model.safetensors").values())).dtype == torch.float16
    merged = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    modules = read_adapter(run.run / "adapter" / "pytorch_lora_weights.safetensors").modules
    for module in modules:
        change = ALPHA / RANK * module.up @ module.down
        expected = (pipe.unet.get_submodule(module.name).weight.float() + change).to(torch.bfloat16)
        found = merged[f"{module.name}.weight"]
        assert (found.float() - expected.float()).abs().max() <= 2**-8 * expected.float().abs().max()
        assert (found != expected).float().mean() < 0.01  # sums in another order may round otherwise


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_kohya_as_diffusers_reads_it(runs, kind: str, tmp_path: Path) -> None:
    run = runs(kind)
    pipe = run.pipe()
    pipe.load_lora_weights(load_file(single_file(export(run.run, "kohya", tmp_path / "out"))))
    run.is_aligned(getattr(pipe, run.name))


def original_weights(kind: str, denoiser: nn.Module) -> dict[str, Tensor]:
    return (lora_readers.to_original_mmdit if kind == "sd3" else lora_readers.to_original_unet)(denoiser)


def from_original(kind: str, denoiser: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A denoiser of diffusers with weights of the original code, by diffusers' own converters."""
    if kind == "sd3":
        state = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    else:
        prefixed = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
        state = convert_ldm_unet_checkpoint(prefixed, dict(denoiser.config))
    denoiser.load_state_dict(state)
    return denoiser


READERS = {"kohya": lora_readers.sd_scripts_names, "comfyui": lora_readers.comfyui_names}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", READERS)
def test_single_files_in_models_of_the_original_code(runs, to: str, kind: str, wide: bool, tmp_path: Path) -> None:
    run = runs(kind, wide)
    denoiser = run.denoiser()
    weights = original_weights(kind, denoiser)
    assert torch.equal(output(kind, from_original(kind, run.denoiser(), weights)), run.base)
    file = load_file(single_file(export(run.run, to, tmp_path / "out")))
    changed = lora_readers.apply_file(file, READERS[to](kind, denoiser), weights)
    assert changed == sum(key.endswith(".alpha") for key in file) > 3
    run.is_aligned(from_original(kind, denoiser, weights))


def test_metadata_of_a_kohya_file(runs, tmp_path: Path) -> None:
    wanted = {"sd1": ("networks.lora", "sd_v1"), "sdxl": ("networks.lora", "sdxl_base_v1-0")}
    wanted["sd3"] = ("networks.lora_sd3", None)
    for kind, (network, version) in wanted.items():
        file = single_file(export(runs(kind).run, "kohya", tmp_path / kind))
        assert file.name == f"{kind}-run.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["ss_network_module"] == network
        assert metadata.get("ss_base_model_version") == version
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), "6.0")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_names_of_a_unet_as_deep_as_the_real_ones() -> None:
    """Three levels, two layers, attention where SDXL and (in the last block) SD 1.x have it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        transformer_layers_per_block=(1, 2, 3, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    expected = lora_readers.unet_modules(unet)
    assert len(expected) > 200
    config = dict(unet.config)
    named = {name for name in expected if not name.endswith(("norm1", "norm2")) or "transformer_blocks" in name}
    for name in named - {"conv_norm_out"}:
        assert original_unet_name(name, config) == expected[name]
    with pytest.raises(UserError, match=r"'class_embedding\.linear_1' has no name"):
        original_unet_name("class_embedding.linear_1", config)


def test_fused_matrices_with_different_scales_and_a_missing_third() -> None:
    torch.manual_seed(0)
    q = LoRAModule("transformer_blocks.3.attn.to_q", torch.randn(2, 5), torch.randn(4, 2), 3.0)
    v = LoRAModule("transformer_blocks.3.attn.to_v", torch.randn(4, 5), torch.randn(4, 4), 1.0)
    (fused,) = original_mmdit_modules([v, q], 6)
    assert fused.name == "joint_blocks.3.x_block.attn.qkv"
    change = fused.alpha / fused.rank * fused.up @ fused.down
    parts = [m.alpha / m.rank * m.up @ m.down for m in (q, v)]
    assert torch.allclose(change, torch.cat([parts[0], torch.zeros(4, 5), parts[1]]), atol=1e-6)


@pytest.mark.parametrize(
    ("facts", "alphas"),
    [
        ({"r": 4, "lora_alpha": 6}, [6.0, 6.0]),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, [12.0, 12.0]),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 9}}, [6.0, 9.0]),
        ({}, [4.0, 4.0]),
    ],
)
def test_scales(tmp_path: Path, facts: dict[str, Any], alphas: list[float]) -> None:
    weights = {}
    for name in ("to_q", "to_k"):
        weights[f"unet.mid.{name}.lora_A.weight"] = torch.zeros(4, 3)
        weights[f"unet.mid.{name}.lora_B.weight"] = torch.zeros(5, 4)
    metadata = json.dumps({f"unet.{k}": v for k, v in facts.items()})
    save_file(weights, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata} if facts else None)
    found = read_adapter(tmp_path / "a.safetensors")
    assert [(m.name, m.alpha) for m in found.modules] == list(zip(["mid.to_k", "mid.to_q"], alphas, strict=True))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_default_folder_and_formats(vmpo: Vmpo, runs, tmp_path: Path) -> None:
    run = runs("sd1")
    for to in FORMATS:
        code, errors, text = vmpo("export", run.run, "--to", to)
        assert (code, errors) == (0, []), to
        assert str(run.run / "export" / to) in text.replace("\n", "")
        assert (run.run / "export" / to / "README.md").is_file() == (to == "diffusers")
        written = [path for path in (run.run / "export" / to).rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in written} == {0o644}, "others may serve it"
    code, errors, _ = vmpo("export", run.run, "--to", "peft")
    assert code == 2
    assert "exists; name another with --out" in errors[0]
    assert not list((run.run / "export").glob(".*"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--to", "kohja"], "did you mean 'kohya'?"),
        (["--to", "onnx"], "there are diffusers, peft, kohya, comfyui, merged"),
        (["--adapter", "best"], "no adapter at"),
        (["--push", "my-lora"], "is named OWNER/NAME"),
        (["--push", "me/my-lora"], "HF_HUB_OFFLINE forbids uploads"),
    ],
)
def test_words(vmpo: Vmpo, runs, tmp_path: Path, words: list[str], wanted: str) -> None:
    code, errors, _ = vmpo("export", runs("sd1").run, "--out", tmp_path / "out", *words)
    assert code == 2
    assert len(errors) == 1
    assert wanted in errors[0]
    assert list(tmp_path.iterdir()) == []


def broken(run: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a run whose adapter was changed."""
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    change(weights)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    save_file(weights, tmp_path / "run" / "adapter" / file.name)
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    return tmp_path / "run"


def test_folders_that_are_no_runs(vmpo: Vmpo, runs, tmp_path: Path) -> None:
    assert "is no run folder" in vmpo("export", tmp_path, "--to", "peft")[1][0]
    run = runs("sd1").run
    damaged = broken(run, tmp_path / "a", lambda weights: None)
    file = damaged / "adapter" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cannot be read" in vmpo("export", damaged)[1][0]
    more = broken(run, tmp_path / "b", lambda weights: weights.update({"unet.x.bias": torch.zeros(1)}))
    assert "'unet.x.bias' is no plain LoRA weight of the unet" in vmpo("export", more)[1][0]
    first = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight"
    half = broken(run, tmp_path / "c", lambda weights: weights.pop(first))
    assert "has no partner" in vmpo("export", half)[1][0]
    text = broken(run, tmp_path / "d", lambda weights: (weights.clear(), weights.update({"x.y": torch.zeros(1)})))
    assert "no weights of a unet or transformer" in vmpo("export", text)[1][0]


def test_models_that_do_not_fit(vmpo: Vmpo, runs, models, tmp_path: Path) -> None:
    run = broken(runs("sd1").run, tmp_path, lambda weights: None)
    config = run / "config.yaml"

    def message(model: object, to: str) -> str:
        config.write_text(yaml.safe_dump({"model": {"path": str(model)}}))
        code, errors, _ = vmpo("export", run, "--to", to)
        assert code == 2
        assert len(errors) == 1
        return errors[0]

    assert "the adapter is of a unet" in message(models("sd3"), "kohya")
    assert "does not fit" in message(models("sdxl"), "merged")
    assert "hf download someone/absent" in message("someone/absent", "comfyui")
    assert not (run / "export").exists()


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_every_layer_of_stable_diffusion_3_as_comfyui_reads_it(models, to: str, tmp_path: Path) -> None:
    """Modulations, whose last are turned round in the original, and the layers outside the blocks, too."""
    named = {n for n, m in pipelines.sd3().transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    run = make_run(tmp_path / "run", "sd3", models("sd3"), sorted(named))
    denoiser = run.denoiser()
    weights = original_weights("sd3", denoiser)
    file = load_file(single_file(export(run.run, to)))
    changed = lora_readers.apply_file(file, lora_readers.comfyui_names("sd3", denoiser), weights)
    assert changed == len(named) - (2 * 5 if to == "kohya" else 0), "five fused matrices of three"
    run.is_aligned(from_original("sd3", denoiser, weights))


def test_a_layer_that_the_original_code_does_not_have() -> None:
    module = LoRAModule("transformer_blocks.0.attn.norm_q", torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    with pytest.raises(UserError, match=r"'transformer_blocks\.0\.attn\.norm_q' has no name in the original code"):
        original_mmdit_modules([module], 2)
