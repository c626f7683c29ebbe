"""The embedded Stable Diffusion 1.x with its trained weights: guided DDIM is plain diffusers', and it spells."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from vmpo.kernels import Kernel
from vmpo.policies.loading import model_folder
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.prompts import load_prompts
from vmpo.rewards import load_reward
from vmpo.rollouts import draw_states, rollout
from vmpo.training.recipes import load_config
from vmpo.training.setup import load_kernel_of, load_policy_of

PROMPT, SEED, GUIDANCE, STEPS, ETA = 'a label that reads "OCEAN"', 11, 1.7, 6, 0.8


@pytest.fixture(scope="module")
def plain() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(model_folder("glyphs-ddim"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts_of(*overrides: str) -> tuple[PipelinePolicy, Kernel]:
    config = load_config("glyphs-ddim", list(overrides))
    policy = load_policy_of(config)
    return policy, load_kernel_of(config, policy)


@pytest.fixture(scope="module")
def guided() -> tuple[PipelinePolicy, Kernel]:
    """Settings that are not the recipe's, noise in every step."""
    words = [f"model.guidance={GUIDANCE}", f"sampler.steps={STEPS}", f"sampler.eta={ETA}", "sampler.window=null"]
    return parts_of(*words)


def test_a_guided_rollout_with_noise_is_plain_diffusers(
    plain: StableDiffusionPipeline, guided: tuple[PipelinePolicy, Kernel]
) -> None:
    policy, kernel = guided
    settings = {"height": 24, "width": 64, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "eta": ETA}
    latents = plain(PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="latent", **settings).images
    drawn = rollout(policy, kernel, policy.encode([PROMPT]), [SEED])
    torch.testing.assert_close(drawn.x_0, latents, rtol=0, atol=2e-4)
    pictures = plain(PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="pt", **settings).images
    torch.testing.assert_close(policy.decode(drawn.x_0), pictures, rtol=0, atol=1e-3)


@torch.no_grad()
def test_its_densities_are_those_of_the_schedulers_steps(
    plain: StableDiffusionPipeline, guided: tuple[PipelinePolicy, Kernel]
) -> None:
    """log N(x_{t-1}; mean, s²) with the mean of diffusers' own step and its variance, guidance written out."""
    policy, kernel = guided
    drawn = rollout(policy, kernel, policy.encode([PROMPT]), [SEED])
    text, empty = plain.encode_prompt(PROMPT, "cpu", 1, True)
    plain.scheduler.set_timesteps(STEPS)
    assert kernel.stochastic_steps.tolist() == list(range(STEPS))
    for k, t in enumerate(plain.scheduler.timesteps):
        x, after = drawn.x[:, k], drawn.x[:, k + 1]
        with_text, without = plain.unet(x, t, text).sample, plain.unet(x, t, empty).sample
        noise = without + GUIDANCE * (with_text - without)
        mean, above = (
            plain.scheduler.step(noise, t, x, eta=ETA, variance_noise=draw).prev_sample
            for draw in (torch.zeros_like(x), torch.ones_like(x))
        )
        expected = torch.distributions.Normal(mean.double(), (above - mean).double()).log_prob(after.double()).sum()
        assert drawn.log_p_old[0, k].item() == pytest.approx(expected.item(), abs=0.05, rel=1e-3)
    torch.testing.assert_close(drawn.log_p_ref, drawn.log_p_old, rtol=0, atol=0)


def test_it_spells_half_and_better_when_it_is_asked_for_print() -> None:
    """What alignment has to gain, with the recipe's own sampler (model card); 48 held-out words."""
    policy, kernel = parts_of()
    prompts, ocr = load_prompts("glyphs/test").prompts[::6], load_reward("ocr")
    scores = {}
    for source in ("a", "printed"):
        asked = [prompt.replace("a ", f"{source} ", 1) for prompt in prompts]
        states = draw_states(policy, kernel, policy.encode(asked), list(range(len(asked))))
        scores[source] = ocr(policy.decode(states), asked, [{}] * len(asked)).mean().item()
    assert len(prompts) == 48
    assert 0.35 < scores["a"] < 0.65
    assert scores["printed"] > scores["a"] + 0.1
