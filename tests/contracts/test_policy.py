"""What rollouts, training and evaluation may ask of a policy, on a real Stable Diffusion 3 pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmpo.policies.adapters import add_lora, lora_parameters
from vmpo.policies.loading import load_policy
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.policy import Conditioning
from vmpo.rollouts import noise_for

PROMPTS = ['a sign that says "ACTOR"', 'a label that reads "AIR"', 'a sign that says "ACTOR"']


def load(folder: Path, guidance: float = 1.0) -> PipelinePolicy:
    return load_policy(str(folder), Call(24, 64, guidance, max_sequence_length=0))


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    x_t = torch.randn((3, 4, 6, 16), generator=torch.Generator().manual_seed(seed))
    return x_t, torch.tensor([937.5, 400.0, 62.5])


@torch.no_grad()
def perturb(policy: PipelinePolicy, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in lora_parameters(policy):
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PipelinePolicy:
    """Without adapter and without guidance; no test changes it."""
    return load(tiny_model)


@pytest.fixture
def adapted(tiny_model: Path) -> PipelinePolicy:
    policy = load(tiny_model)
    add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
    return policy


@torch.no_grad()
def test_shapes_and_precision(policy: PipelinePolicy) -> None:
    assert policy.state_shape == (4, 6, 16)
    conditioning = policy.encode(PROMPTS)
    assert len(conditioning) == 3
    assert conditioning.negative is None
    x_t, time = inputs()
    output = policy.predict(x_t, time, conditioning)
    assert output.shape == x_t.shape
    assert output.dtype == torch.float32
    assert policy.predict(x_t.bfloat16(), time, conditioning).dtype == torch.float32
    images = policy.decode(x_t)
    assert images.shape == (3, 3, 24, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


@torch.no_grad()
def test_decode_is_that_of_the_pipeline(policy: PipelinePolicy) -> None:
    pipe, x_0 = policy.pipe, inputs()[0]
    latents = x_0 / 0.7 + 0.1  # as the tiny model's autoencoder is configured
    expected = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    torch.testing.assert_close(policy.decode(x_0), expected, rtol=0, atol=1e-6)


def test_encode_gives_equal_prompts_equal_rows_and_others_other_rows(policy: PipelinePolicy) -> None:
    encoded = policy.encode(PROMPTS)
    for tensor in encoded.positive.values():
        assert torch.equal(tensor[0], tensor[2])
        assert not torch.allclose(tensor[0], tensor[1], atol=1e-3)
    alone = policy.encode(PROMPTS[1:2])
    for name, tensor in encoded.positive.items():
        torch.testing.assert_close(tensor[1:2], alone.positive[name], rtol=0, atol=1e-5)


def test_conditioning_is_indexed_row_by_row(tiny_model: Path) -> None:
    encoded = load(tiny_model, guidance=3.0).encode(PROMPTS)
    taken = encoded[torch.tensor([1, 1, 0, 2])]
    assert len(taken) == 4
    assert taken.negative is not None
    assert encoded.negative is not None
    for name in encoded.positive:
        assert torch.equal(taken.positive[name][2], encoded.positive[name][0])
        assert torch.equal(taken.negative[name][0], encoded.negative[name][1])


@torch.no_grad()
def test_guidance_is_the_hand_formula(policy: PipelinePolicy, tiny_model: Path) -> None:
    """v = v(empty prompt) + w (v(prompt) − v(empty prompt)), Ho & Salimans 2022, arXiv 2207.12598."""
    guided = load(tiny_model, guidance=2.5)
    x_t, time = inputs()
    conditioning = guided.encode(PROMPTS)
    conditional = policy.predict(x_t, time, policy.encode(PROMPTS))
    unconditional = policy.predict(x_t, time, policy.encode([""] * 3))
    assert (conditional - unconditional).abs().max() > 1e-3
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guided.predict(x_t, time, conditioning), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_row_has_its_own_time(policy: PipelinePolicy) -> None:
    x_t, time = inputs()
    conditioning = policy.encode(PROMPTS)
    together = policy.predict(x_t, time, conditioning)
    for i in range(3):
        one = policy.predict(x_t[i : i + 1], time[i : i + 1], conditioning[slice(i, i + 1)])
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-5, atol=1e-5)
    assert (together - policy.predict(x_t, time.flip(0), conditioning))[[0, 2]].abs().max() > 1e-3


@torch.no_grad()
def test_an_adapter_starts_at_zero(policy: PipelinePolicy, adapted: PipelinePolicy) -> None:
    x_t, time = inputs()
    conditioning = policy.encode(PROMPTS)
    assert torch.equal(adapted.predict(x_t, time, conditioning), policy.predict(x_t, time, conditioning))
    parameters = lora_parameters(adapted)
    assert parameters
    assert all(p.dtype == torch.float32 for p in parameters)
    assert sum(bool(p.any()) for p in parameters) == len(parameters) // 2  # A is drawn, B is zero


def test_the_adapters_start_is_a_function_of_the_seed(tiny_model: Path, adapted: PipelinePolicy) -> None:
    again, other = load(tiny_model), load(tiny_model)
    add_lora(again, rank=4, alpha=6, targets=None, seed=5)
    add_lora(other, rank=4, alpha=6, targets=None, seed=6)
    pairs = zip(lora_parameters(adapted), lora_parameters(again), lora_parameters(other), strict=True)
    different = 0
    for one, same, another in pairs:
        assert torch.equal(one, same)
        different += not torch.equal(one, another)
    assert different > 0


@torch.no_grad()
def test_reference_is_the_base_model_and_nests(policy: PipelinePolicy, adapted: PipelinePolicy) -> None:
    perturb(adapted)
    x_t, time = inputs()
    conditioning = policy.encode(PROMPTS)

    def output() -> Tensor:
        return adapted.predict(x_t, time, conditioning)

    base, aligned = policy.predict(x_t, time, conditioning), output()
    assert (aligned - base).abs().max() > 1e-3
    with adapted.reference():
        assert torch.equal(output(), base)
        with adapted.reference():
            assert torch.equal(output(), base)
        assert torch.equal(output(), base), "the outer context ended with the inner one"
    assert torch.equal(output(), aligned)


@torch.no_grad()
def test_reference_ends_with_an_exception(adapted: PipelinePolicy) -> None:
    perturb(adapted)
    x_t, time = inputs()
    conditioning = adapted.encode(PROMPTS)
    aligned = adapted.predict(x_t, time, conditioning)
    with pytest.raises(KeyError), adapted.reference():
        raise KeyError
    assert torch.equal(adapted.predict(x_t, time, conditioning), aligned)


def test_only_the_adapter_gets_a_gradient(adapted: PipelinePolicy) -> None:
    perturb(adapted)
    x_t, time = inputs()
    adapted.predict(x_t, time, adapted.encode(PROMPTS)).square().mean().backward()
    trained = {id(p) for p in lora_parameters(adapted)}
    for module in (adapted.denoiser, adapted.pipe.vae, adapted.pipe.text_encoder, adapted.pipe.text_encoder_2):
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_first_noise_is_the_pipelines_latents(policy: PipelinePolicy) -> None:
    noise = noise_for([11, 12], 3, policy.state_shape, torch.device("cpu"))
    assert noise.shape == (2, 4, 4, 6, 16)
    for row, seed in zip(noise, [11, 12], strict=True):
        generator = torch.Generator().manual_seed(seed)
        latents = policy.pipe.prepare_latents(1, 4, 24, 64, torch.float32, torch.device("cpu"), generator)
        assert torch.equal(row[:1], latents)
    assert torch.equal(noise[1:], noise_for([12], 3, policy.state_shape, torch.device("cpu")))
    assert len({draw.sum().item() for draw in noise.flatten(0, 1)}) == 8, "a draw is repeated"


def test_conditioning_moves_whole() -> None:
    conditioning = Conditioning({"c": torch.ones(2, 3)}, {"c": torch.zeros(2, 3)})
    moved = conditioning.to(torch.device("meta"))
    assert moved.negative is not None
    assert moved.positive["c"].device.type == moved.negative["c"].device.type == "meta"
