"""The published architectures without their weights: sizes, LoRA targets, schedules, and what memory they need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.pipelines import HEIGHT, WIDTH, sd1, sd3
from vmpo.errors import UserError
from vmpo.kernels import build_kernel
from vmpo.policies.adapters import add_lora, lora_config, lora_parameters
from vmpo.policies.loading import POLICIES
from vmpo.policies.memory import LiveBytes, decode_bytes, update_bytes, weight_bytes
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.published import build_published, published, published_names
from vmpo.training.memory import GIB, MemoryEstimate, readable
from vmpo.training.recipes import load_config, recipe_names

MILLIONS = {  # of parameters, as published
    "sd15": {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1},
    "sdxl": {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7},
    "sd35-medium": {
        "transformer": 2243.2,
        "vae": 83.8,
        "text_encoder": 123.7,
        "text_encoder_2": 694.7,
        "text_encoder_3": 4762.3,
    },
}
# blocks x attentions x projections; the last block of SD3 has no way back to the text stream
ADAPTED = {"sd15": 16 * 2 * 4, "sdxl": 70 * 2 * 4, "sd35-medium": 24 * 8 - 1}


def policy_of(name: str, **call: float) -> PipelinePolicy:
    pipe = build_published(name)
    return POLICIES[type(pipe).__name__](pipe, Call(512, 512, **call))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", published_names())
def test_every_part_has_its_published_size(name: str) -> None:
    pipe = build_published(name)
    found = {k: sum(p.numel() for p in m.parameters()) for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    assert {k: round(n / 1e6, 1) for k, n in found.items()} == MILLIONS[name]
    assert all(p.device.type == "meta" for p in pipe.vae.parameters())


@pytest.mark.parametrize("recipe", [r for r in recipe_names() if not r.startswith("glyphs")])
def test_a_recipe_finds_its_model_and_every_target(recipe: str) -> None:
    config = load_config(recipe, [])
    name = next(n for n in published_names() if published(n)["hub"] == config.model.path)
    policy, lora = policy_of(name), config.model.lora
    targets = lora_config(type(policy), lora.rank, lora.alpha, lora.targets).target_modules
    policy.denoiser.add_adapter(lora_config(type(policy), lora.rank, lora.alpha, lora.targets))
    adapted = [n.split(".lora_A")[0] for n, _ in policy.denoiser.named_parameters() if "lora_A" in n]
    assert len(adapted) == ADAPTED[name]
    assert all(any(a.endswith(t) for a in adapted) for t in targets), "a target is in no module"
    if name == "sd15" and lora.rank == 4:  # the size diffusers' documentation states for rank 4
        assert sum(p.numel() for n, p in policy.denoiser.named_parameters() if "lora_" in n) == 797_184
    kernel = build_kernel(
        config.sampler.kernel,
        config.sampler.steps,
        eta=config.sampler.eta,
        shift=config.sampler.shift,
        schedule=config.sampler.schedule,
        window=config.sampler.window,
        **policy.schedule,
    )
    assert len(kernel.stochastic_steps) == config.sampler.steps - (config.sampler.kernel == "flow_grpo")


def test_the_schedule_is_the_models() -> None:
    schedule = policy_of("sd15").schedule
    assert schedule["prediction"] == "epsilon"
    assert (schedule["spacing"], schedule["steps_offset"]) == ("leading", 1)
    assert schedule["final_alpha_bar"] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert schedule["alphas_cumprod"][-1].item() == pytest.approx(0.004660, abs=1e-5)
    assert policy_of("sd35-medium").schedule == {}


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="sd15, sd35-medium, sdxl"):
        build_published("sd16")


def test_live_bytes_counts_what_is_alive_at_once() -> None:
    with LiveBytes() as live:
        one = torch.empty(1000, device="meta")
        two = one + 1
        view = two[:10]
        del one, two
        three = view.new_empty(500)
    assert live.peak == 8_000
    assert live.live == 4_000 + 2_000
    del three


@pytest.mark.parametrize("build", [sd1, sd3])
def test_a_row_of_an_update_costs_what_the_estimate_says(build) -> None:
    """Against the real pass on the CPU, whose attention keeps more than the fused kernels that are assumed."""
    pipe = build()
    policy = POLICIES[type(pipe).__name__](pipe, Call(HEIGHT, WIDTH, guidance=3.0, max_sequence_length=20))
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    estimate = update_bytes(policy, 4, None)
    add_lora(policy, rank=4, alpha=4, targets=None, seed=0)
    prompts, peaks = ["a sign"] * 6, []
    for count in (2, 6):
        conditioning = policy.encode(prompts[:count])
        with LiveBytes() as live:
            x_t, time = torch.randn(count, *policy.state_shape), torch.full((count,), 401)
            policy.predict(x_t, time, conditioning).square().sum().backward()
        for parameter in lora_parameters(policy):
            parameter.grad = None
        peaks.append(live.peak)
    measured = (peaks[1] - peaks[0]) / 4
    assert 0.7 * measured < estimate < 1.1 * measured


def test_checkpointing_guidance_and_size_show_in_the_estimate() -> None:
    plain = policy_of("sd15")
    guided = policy_of("sd15", guidance=5.0)
    row = update_bytes(plain, 4, None)
    assert update_bytes(guided, 4, None) == pytest.approx(2 * row, rel=0.02)
    plain.denoiser.enable_gradient_checkpointing()
    assert update_bytes(plain, 4, None) < 0.5 * row
    assert row < GIB * 2
    picture = decode_bytes(plain)
    assert picture > 3 * 512 * 512 * 4
    assert weight_bytes(plain.denoiser) == pytest.approx(4 * 859.5e6, rel=1e-3)


def test_the_estimate_adds_up_and_finds_the_largest_micro_batch() -> None:
    estimate = MemoryEstimate(weights=1000, encoders=500, adapter=100, states=50, row=70, picture=90)
    assert estimate.fixed == 1150
    assert estimate.total(2) == 1150 + 500, "encoding needs more than two rows"
    assert estimate.total(10) == 1150 + 900
    assert estimate.largest(2000) == (1800 - 1150) // 90
    assert estimate.largest(1000) == 0
    assert readable(3 * GIB // 2) == "1.5 GiB"
    assert readable(5 << 20) == "5 MiB"
