"""Gaussian data and the exact network: the law of x_0 each sampler ends with, in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vmpo.kernels import LinearKernel, build_kernel

# schedule, T, data std, then the final std of: ODE, Flow-GRPO 0.7, DanceGRPO 0.3, CPS 0.8 (published figures)
RESIDUAL_NOISE = [
    ("sd3", 10, 0.1, 0.033, 0.236, 0.152, 0.028),
    ("sd3", 40, 0.1, 0.075, 0.091, 0.098, 0.062),
    ("linear", 16, 0.1, 0.043, 0.128, 0.123, 0.041),
    ("linear", 25, 0.1, 0.059, 0.093, 0.104, 0.054),
    ("sd3", 10, 1.0, 0.818, 0.885, 0.824, 0.674),
]


def final_std(kernel: LinearKernel, sigmas: torch.Tensor, data_std: float) -> float:
    """Var x[k+1] = (A_k + B_k v_k)² Var x[k] + s_k², v_k the slope of the exact velocity E[x_1 - x_0 | x]."""
    s = sigmas[:-1]
    slope = (s - (1 - s) * data_std**2) / ((1 - s) ** 2 * data_std**2 + s**2)
    one = torch.ones(len(s), 1, dtype=torch.float64)
    steps = kernel.transition(one, slope[:, None], torch.arange(len(s)))
    variance: float = 1.0
    for factor, std in zip(steps.mean.flatten().tolist(), steps.std.tolist(), strict=True):
        variance = factor**2 * variance + std**2
    return float(variance**0.5)


@pytest.mark.parametrize("row", RESIDUAL_NOISE, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
@pytest.mark.parametrize(
    ("column", "name", "eta"), [(3, "cps", 0.0), (4, "flow_grpo", 0.7), (5, "dance", 0.3), (6, "cps", 0.8)]
)
def test_residual_noise(row: tuple[Any, ...], column: int, name: str, eta: float) -> None:
    schedule, num_steps, data_std = row[:3]
    # the published figures keep the noise of the last step
    last_step = None if name == "cps" else True
    kernel: Any = build_kernel(name, num_steps, eta=eta, schedule=schedule, last_step=last_step)
    assert final_std(kernel, kernel.sigmas, data_std) == pytest.approx(row[column], abs=6e-4)


@pytest.mark.parametrize(("name", "eta"), [("flow_grpo", 0.7), ("dance", 0.3), ("dance", 1.1), ("cps", 0.0)])
def test_fine_steps_reach_the_data(name: str, eta: float) -> None:
    """The SDEs share the marginals of the ODE (no such limit for coefficients-preserving noise)."""
    kernel: Any = build_kernel(name, 4000, eta=eta)
    assert final_std(kernel, kernel.sigmas, 0.5) == pytest.approx(0.5, rel=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_ddim_keeps_the_noise_level_of_each_step(prediction: str, eta: float) -> None:
    """Given x_0 and the true noise, x_t' has mean √ᾱ' x_0 and variance 1 - ᾱ' at any eta."""
    kernel: Any = build_kernel("ddim", 20, eta=eta, prediction=prediction)
    x0_part, noise_part = _response(kernel, kernel.alpha_bar.sqrt(), (1 - kernel.alpha_bar).sqrt(), prediction)
    torch.testing.assert_close(x0_part, kernel.alpha_bar_prev.sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noise_part**2 + kernel.std**2, 1 - kernel.alpha_bar_prev, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "keeps"), [("cps", True), ("flow_grpo", False), ("dance", False)])
def test_only_cps_keeps_the_noise_level_of_a_flow(name: str, keeps: bool) -> None:
    kernel: Any = build_kernel(name, 10, schedule="sd3")
    s, s_next = kernel.sigmas[:-1], kernel.sigmas[1:]
    x0_part, noise_part = _response(kernel, 1 - s, s, "flow")
    if keeps:
        torch.testing.assert_close(x0_part, 1 - s_next, rtol=1e-12, atol=1e-12)
    level = noise_part**2 + kernel.std**2
    assert torch.allclose(level, s_next**2, rtol=1e-12, atol=1e-12) is keeps
    if not keeps:
        assert bool((level[:-1] > s_next[:-1] ** 2 * (1 + 1e-4)).all())


def _response(
    kernel: LinearKernel, signal: torch.Tensor, noise: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean's parts in x_0 and in the noise when x_t = signal x_0 + noise z and the network is right."""
    steps = torch.arange(kernel.num_steps)
    parts = []
    for x0, z in ((1.0, 0.0), (0.0, 1.0)):
        right = {
            "epsilon": torch.full_like(signal, z),
            "sample": torch.full_like(signal, x0),
            "v": signal * z - noise * x0,
            "flow": torch.full_like(signal, z - x0),
        }[prediction]
        x = signal * x0 + noise * z
        parts.append(kernel.transition(x[:, None], right[:, None], steps).mean.flatten())
    return parts[0], parts[1]
