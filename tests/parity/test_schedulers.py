"""Step by step against the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vmpo.kernels import LinearKernel, build_kernel, ddim_schedule, scaled_linear_alpha_bar, sd3_sigmas

SHAPE = (2, 3, 4, 5)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def ddim_scheduler(num_steps: int, **config: object) -> Any:
    settings: dict[str, object] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    scheduler: Any = DDIMScheduler(**{**settings, **config})
    scheduler.set_timesteps(num_steps)
    return scheduler


def outputs(num_steps: int) -> torch.Tensor:
    return torch.randn(num_steps, *SHAPE, generator=torch.Generator().manual_seed(num_steps))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [7, 50])
def test_ddim(num_steps: int, prediction: str, eta: float) -> None:
    scheduler = ddim_scheduler(num_steps, prediction_type=PREDICTIONS[prediction])
    kernel = build_kernel(
        "ddim", num_steps, eta=eta, alphas_cumprod=scheduler.alphas_cumprod, prediction=PREDICTIONS[prediction]
    )
    assert kernel.times.tolist() == scheduler.timesteps.tolist()
    x = outputs(1)[0]
    noises = outputs(num_steps + 1)
    for k, output in enumerate(outputs(num_steps)):
        theirs = scheduler.step(output, scheduler.timesteps[k], x, eta=eta, variance_noise=noises[k])
        at = torch.full((SHAPE[0],), k)
        gaussian = kernel.transition(x, output, at)
        torch.testing.assert_close(gaussian.sample(noises[k]), theirs.prev_sample, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(kernel.predict_x0(x, output, at), theirs.pred_original_sample, rtol=2e-5, atol=2e-5)
        x = theirs.prev_sample / theirs.prev_sample.std()  # random outputs: keep the state of unit size


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_ddim_tables(num_steps: int, alpha_one: bool, spacing: str) -> None:
    scheduler = ddim_scheduler(num_steps, timestep_spacing=spacing, set_alpha_to_one=alpha_one)
    final = 1.0 if alpha_one else None
    schedule = ddim_schedule(scheduler.alphas_cumprod, num_steps, spacing=spacing, final_alpha_bar=final)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    assert schedule.alpha_bar.float().equal(scheduler.alphas_cumprod[scheduler.timesteps])
    previous = scheduler.timesteps - 1000 // num_steps
    theirs = [scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod for t in previous]
    assert schedule.alpha_bar_prev.float().equal(torch.stack(theirs))


def test_trailing_chain_hangs_together_where_steps_do_not_divide() -> None:
    """diffusers' t - ⌊N/T⌋ would leave gaps here."""
    scheduler = ddim_scheduler(7, timestep_spacing="trailing")
    schedule = ddim_schedule(scheduler.alphas_cumprod, 7, spacing="trailing")
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    assert schedule.alpha_bar_prev[:-1].equal(schedule.alpha_bar[1:])


def test_stable_diffusion_betas() -> None:
    torch.testing.assert_close(
        scaled_linear_alpha_bar().float(), ddim_scheduler(1).alphas_cumprod, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 10, 28, 40])
def test_sd3_table(num_steps: int, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sd3_sigmas(num_steps, shift).float(), scheduler.sigmas, rtol=3e-7, atol=0)
    kernel = build_kernel("cps", num_steps, schedule="sd3", shift=shift)
    torch.testing.assert_close(kernel.times, scheduler.timesteps, rtol=3e-7, atol=0)


def euler_path(kernel: LinearKernel, scheduler: Any, x: torch.Tensor) -> None:
    for k, output in enumerate(outputs(kernel.num_steps)):
        theirs = scheduler.step(output, scheduler.timesteps[k], x).prev_sample
        gaussian = kernel.transition(x, output, torch.full((SHAPE[0],), k))
        torch.testing.assert_close(gaussian.mean, theirs, rtol=2e-6, atol=2e-6)
        assert gaussian.std.tolist() == [0.0] * SHAPE[0]
        x = theirs


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps"])
def test_flow_kernels_without_noise_are_euler(name: str) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    euler_path(build_kernel(name, 10, schedule="sd3", eta=0.0), scheduler, outputs(1)[0])


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps"])
def test_flow_kernels_are_euler_outside_the_window(name: str) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    kernel = build_kernel(name, 10, schedule="sd3", window=(2, 3))
    x, output = outputs(2)
    for k in (0, 1, 5, 9):
        scheduler.set_timesteps(10)
        theirs = scheduler.step(output, scheduler.timesteps[k], x).prev_sample
        ours = kernel.transition(x, output, torch.full((SHAPE[0],), k))
        torch.testing.assert_close(ours.mean, theirs, rtol=2e-6, atol=2e-6)
        assert ours.std.tolist() == [0.0] * SHAPE[0]
