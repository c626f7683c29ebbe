"""Every pipeline class as a policy: the same pictures as diffusers, its adapters, and what is kept in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.pipelines import BUILD, HEIGHT, WIDTH, with_ddim
from vmpo.errors import UserError
from vmpo.evaluation.sample import deterministic_kernel
from vmpo.policies.adapters import add_lora, load_lora, lora_parameters, save_lora
from vmpo.policies.loading import Loading, load_policy
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.text_cache import TextCache
from vmpo.rollouts import rollout

PROMPTS = ['a sign that says "ACTOR"', 'a label that reads "AIR"']
CALL = Call(HEIGHT, WIDTH, guidance=3.5, max_sequence_length=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in BUILD.items():
        build().save_pretrained(root / name)
    return {name: root / name for name in BUILD}


def load(folder: Path, call: Call = CALL, **loading: object) -> PipelinePolicy:
    return load_policy(str(folder), call, Loading(**loading))  # type: ignore[arg-type]


@torch.no_grad()
def perturb(policy: PipelinePolicy) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in lora_parameters(policy):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def plain_pictures(pipe: DiffusionPipeline, name: str, steps: int) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    more = {"max_sequence_length": 20} if name.startswith("sd3") else {}
    drawn = [
        pipe(
            prompt,
            height=HEIGHT,
            width=WIDTH,
            guidance_scale=3.5,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **more,
        ).images
        for seed, prompt in enumerate(PROMPTS)
    ]
    return torch.cat(drawn)


def pictures(policy: PipelinePolicy, steps: int) -> Tensor:
    kernel = deterministic_kernel(policy, steps)
    return policy.decode(rollout(policy, kernel, policy.encode(PROMPTS), [0, 1]).x_0)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILD)
def test_the_pictures_are_those_of_plain_diffusers(folders: dict[str, Path], name: str) -> None:
    """Encoding, guidance, schedule, time, prediction type, decoding: any of them wrong would show."""
    policy = load(folders[name])
    expected = plain_pictures(with_ddim(BUILD[name]()) if not policy.flow else BUILD[name](), name, 4)
    assert expected.std() > 0.01
    torch.testing.assert_close(pictures(policy, 4), expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILD)
def test_an_adapter_loads_in_plain_diffusers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    policy = load(folders[name])
    add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
    perturb(policy)
    aligned = pictures(policy, 3)
    save_lora(policy, tmp_path)
    plain = BUILD[name]() if policy.flow else with_ddim(BUILD[name]())
    plain.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(plain_pictures(plain, name, 3), aligned, rtol=0, atol=2e-5)
    again = load(folders[name])
    base = pictures(again, 3)
    assert (base - aligned).abs().max() > 1e-3
    load_lora(again, tmp_path)
    torch.testing.assert_close(pictures(again, 3), aligned, rtol=0, atol=1e-6)
    with again.reference():
        torch.testing.assert_close(pictures(again, 3), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BUILD)
def test_the_default_targets_are_in_every_attention(folders: dict[str, Path], name: str) -> None:
    policy = load(folders[name])
    attentions = {n for n, m in policy.denoiser.named_modules() if type(m).__name__ == "Attention"}
    add_lora(policy, rank=2, alpha=2, targets=None, seed=0)
    adapted = {n.split(".to_")[0].split(".add_")[0] for n, _ in policy.denoiser.named_parameters() if "lora_A" in n}
    adapted = {n.removesuffix(".to_add_out") for n in adapted}
    dual = {n for n in attentions if n.endswith("attn2")} if policy.flow else set()  # as in Flow-GRPO's list
    assert adapted == attentions - dual


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3-t5"])
@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_half_precision_weights_keep_the_adapter_and_the_outputs_in_fp32(
    folders: dict[str, Path], name: str, weights: str
) -> None:
    policy, full = load(folders[name], weights=weights), load(folders[name])
    add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
    assert policy.denoiser.dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in lora_parameters(policy)} == {torch.float32}
    x_t, time = torch.randn(2, *policy.state_shape), torch.tensor([801, 401])
    output = policy.predict(x_t, time, policy.encode(PROMPTS))
    assert output.dtype == torch.float32
    expected = full.predict(x_t, time, full.encode(PROMPTS))
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(policy))
    images = policy.decode(x_t)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_the_autoencoder_of_xl_stays_in_fp32_where_half_precision_would_overflow(folders: dict[str, Path]) -> None:
    assert load(folders["sdxl"], weights="fp16").pipe.vae.dtype == torch.float32
    assert load(folders["sdxl"], weights="bf16").pipe.vae.dtype == torch.bfloat16
    assert load(folders["sd1"], weights="fp16").pipe.vae.dtype == torch.float16
    assert load(folders["sd3"], weights="bf16", vae_weights="fp32").pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_checkpointing_changes_memory_and_not_the_gradient(folders: dict[str, Path], name: str) -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        policy = load(folders[name], checkpointing=checkpointing)
        add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
        perturb(policy)
        x_t = torch.randn(2, *policy.state_shape, generator=torch.Generator().manual_seed(1))
        kept: list[int] = []
        count = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t)
        with count:
            loss = policy.predict(x_t, torch.tensor([801, 401]), policy.encode(PROMPTS)).square().mean()
        loss.backward()
        gradients.append([p.grad for p in lora_parameters(policy)])
        saved.append(sum(kept))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert saved[1] < 0.5 * saved[0]


@torch.no_grad()
def test_slicing_and_attention_kernels_change_no_picture(folders: dict[str, Path]) -> None:
    expected = pictures(load(folders["sd1"]), 2)
    try:
        for options in ({"vae_slicing": True}, {"attention": "math"}):
            torch.testing.assert_close(pictures(load(folders["sd1"], **options), 2), expected, rtol=0, atol=1e-5)
        load(folders["sd1"], attention="flash")
        assert not torch.backends.cuda.math_sdp_enabled()
    finally:
        load(folders["sd1"])
    assert torch.backends.cuda.math_sdp_enabled()


def test_a_prompt_is_encoded_once_and_the_same_in_any_company(folders: dict[str, Path]) -> None:
    policy, calls = load(folders["sd3-t5"]), list[str]()
    encode = policy._encode
    policy.prompts_from(lambda prompt, guided: calls.append(prompt) or encode(prompt, guided))
    together = policy.encode([*PROMPTS, PROMPTS[0]])
    policy.encode(PROMPTS)
    assert calls == PROMPTS
    alone = load(folders["sd3-t5"]).encode(PROMPTS[1:])
    for name, tensor in together.positive.items():
        assert torch.equal(tensor[1], alone.positive[name][0])
        assert torch.equal(tensor[2], tensor[0])


def test_a_full_text_cache_drops_the_oldest() -> None:
    from vmpo.policies.policy import Conditioning

    cache = TextCache(lambda prompt, guided: Conditioning({"c": torch.full((1, 4), float(prompt))}), limit=48)
    cache.add(["1", "2", "3"], False)  # 16 bytes each
    assert cache.missing(["1", "2", "3"]) == []
    cache.add(["4"], False)
    assert cache.missing(["1", "2", "3", "4"]) == ["1"]
    assert cache.rows(["4", "2", "4"], torch.device("cpu")).positive["c"][:, 0].tolist() == [4, 2, 4]
    cache.add(["5", "6", "7", "8"], False)
    assert cache.missing(["5", "6", "7", "8"]) == [], "what an epoch needs stays, even beyond the limit"


def test_offloaded_encoders_come_and_go(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(folders["sd3-t5"], Call(HEIGHT, WIDTH, 3.5, max_sequence_length=20, offload_encoders=True))
    moves = list[str]()
    monkeypatch.setattr(policy, "_move_encoders", lambda device: moves.append(str(device)))
    policy.encode(PROMPTS)
    policy.encode(PROMPTS)
    assert len(moves) == 2, "to the device and back, once"
    assert len(policy.encoders) == 3


def test_without_t5_its_weights_are_not_loaded(folders: dict[str, Path]) -> None:
    policy = load(folders["sd3-t5"], t5=False)
    assert policy.pipe.text_encoder_3 is None
    assert len(policy.encoders) == 2
    assert policy.encode(PROMPTS).positive["encoder_hidden_states"].shape[0] == 2


def test_the_size_is_the_models_own_unless_asked(folders: dict[str, Path]) -> None:
    assert load(folders["sd1"], Call()).state_shape == (4, 16, 16)
    assert load(folders["sd1"], Call(HEIGHT, WIDTH)).state_shape == (4, HEIGHT // 2, WIDTH // 2)


def test_an_unknown_pipeline_names_the_file_to_write(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(UserError, match=r"is a FluxPipeline.*src/vmpo/policies/<model>.py"):
        load(tmp_path)


@pytest.mark.parametrize(("bits", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_quantisation_without_its_package_says_what_to_install(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, bits: str, package: str
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a))
    with pytest.raises(UserError, match=f"pip install {package}"):
        load(folders["sd1"], quantise=bits)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3-t5"])
def test_a_quantised_base_trains_its_adapter(folders: dict[str, Path], name: str) -> None:
    pytest.importorskip("torchao")
    policy, full = load(folders[name], weights="bf16", quantise="int8"), load(folders[name])
    kinds = {type(m.weight).__name__ for m in policy.denoiser.modules() if isinstance(m, torch.nn.Linear)}
    assert "Int8Tensor" in kinds
    add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
    x_t, time = torch.randn(2, *policy.state_shape), torch.tensor([801, 401])
    expected = full.predict(x_t, time, full.encode(PROMPTS))
    output = policy.predict(x_t, time, policy.encode(PROMPTS))
    assert (output - expected).abs().max() < 0.15 * expected.abs().max()
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(policy))
    perturb(policy)
    with policy.reference():
        torch.testing.assert_close(policy.predict(x_t, time, policy.encode(PROMPTS)), output, rtol=0, atol=0)
