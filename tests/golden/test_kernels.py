"""Published numbers of the stochastic kernels: scalars x = 1, output 0.5, next state 0.9."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vmpo.kernels import (
    CPS,
    DDIM,
    DanceSDE,
    FlowGRPOSDE,
    LinearKernel,
    ddim_schedule,
    scaled_linear_alpha_bar,
    sd3_sigmas,
)
from vmpo.kernels.gaussian import Gaussian

X, OUTPUT, NEXT = 1.0, 0.5, 0.9
# The published figures come from float32 tables; these are theirs to the last digit or two.
CLOSE: dict[str, Any] = {"rel": 3e-6, "abs": 2e-7}


def step(kernel: LinearKernel, index: int) -> tuple[Gaussian, float]:
    """The transition and x̂_0 of one scalar row at step `index`."""
    x, output = torch.full((1, 1), X, dtype=torch.float64), torch.full((1, 1), OUTPUT, dtype=torch.float64)
    at = torch.tensor([index])
    return kernel.transition(x, output, at), kernel.predict_x0(x, output, at).item()


def log_prob(gaussian: Gaussian) -> float:
    return gaussian.log_prob(torch.full((1, 1), NEXT, dtype=torch.float64)).item()


# t, prediction, eta, ᾱ_t, ᾱ_t', x̂_0, ε̂, std, mean, log-prob
DDIM_TABLE = [
    (981, "epsilon", 1.0, 0.00577550, 0.00728173, 6.598259, 0.5, 0.45446327, 1.00638381, -0.157699),
    (981, "epsilon", 0.5, 0.00577550, 0.00728173, 6.598259, 0.5, 0.22723164, 1.04809689, 0.350462),
    (981, "v", 1.0, 0.00577550, 0.00728173, -0.422557, 1.035106, 0.45446327, 0.88173838, -0.131108),
    (981, "sample", 1.0, 0.00577550, 0.00728173, 0.5, 0.964792, 0.45446327, 0.89811718, -0.130309),
    (501, "epsilon", 1.0, 0.27499907, 0.30229566, 1.095082, 0.5, 0.29478454, 0.99286237, 0.252954),
    (501, "v", 1.0, 0.27499907, 0.30229566, 0.098669, 1.113672, 0.29478454, 0.92462950, 0.299082),
    (501, "sample", 1.0, 0.27499907, 0.30229566, 0.5, 0.866500, 0.29478454, 0.95211205, 0.286946),
    (1, "epsilon", 1.0, 0.99829603, 0.99915000, 0.980196, 0.5, 0.02064832, 0.99007054, -6.552882),
    (1, "epsilon", 0.5, 0.99829603, 0.99915000, 0.980196, 0.5, 0.01032416, 0.99341199, -37.277934),
]


@pytest.mark.parametrize("row", DDIM_TABLE, ids=lambda row: f"{row[1]}-t{row[0]}-eta{row[2]}")
def test_ddim_of_stable_diffusion(row: tuple[Any, ...]) -> None:
    t, prediction, eta, alpha_bar, alpha_bar_prev, x0, epsilon, std, mean, log_p = row
    schedule = ddim_schedule(scaled_linear_alpha_bar(), 50)
    kernel = DDIM(schedule.alpha_bar, schedule.alpha_bar_prev, schedule.timesteps, eta, prediction)
    index = schedule.timesteps.tolist().index(t)
    assert schedule.alpha_bar[index].item() == pytest.approx(alpha_bar, **CLOSE)
    assert schedule.alpha_bar_prev[index].item() == pytest.approx(alpha_bar_prev, **CLOSE)
    gaussian, predicted = step(kernel, index)
    assert predicted == pytest.approx(x0, rel=3e-6, abs=6e-7)
    implied_noise = (X - math.sqrt(alpha_bar) * predicted) / math.sqrt(1 - alpha_bar)
    # ᾱ itself is published to 8 decimals, which near ᾱ = 1 leaves 5 digits of 1 - ᾱ
    assert implied_noise == pytest.approx(epsilon, rel=2e-5)
    assert gaussian.std.item() == pytest.approx(std, rel=2e-5)
    assert gaussian.mean.item() == pytest.approx(mean, **CLOSE)
    assert log_prob(gaussian) == pytest.approx(log_p, rel=6e-5)


def test_ddim_last_step_of_adjoint_matching() -> None:
    """Trailing spacing, betas 0.002 to 0.009, last step to (1 + ᾱ_19)/2: it keeps noise, std 0.1011."""
    alpha_bar = scaled_linear_alpha_bar(0.002, 0.009)
    final = (1 + alpha_bar[19].item()) / 2
    schedule = ddim_schedule(alpha_bar, 50, spacing="trailing", final_alpha_bar=final)
    assert schedule.timesteps[-1].item() == 19
    assert final == pytest.approx(0.97996, abs=5e-6)
    kernel = DDIM(schedule.alpha_bar, schedule.alpha_bar_prev, schedule.timesteps)
    assert kernel.std[-1].item() == pytest.approx(0.1011, abs=5e-5)


SD3_SIGMAS = [
    1,
    0.96012932,
    0.91334897,
    0.8576923,
    0.79036826,
    0.70727849,
    0.60215056,
    0.46487603,
    0.27804878,
    0.00892857,
    0,
]
FLOW_GRPO_STD = [0.7, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
FLOW_GRPO_G = [3.506, 3.435, 2.273, 1.719, 1.359, 1.088, 0.861, 0.652, 0.434, 0.066]
DANCE_STD = [0.0599, 0.0649, 0.0708, 0.0778, 0.0865, 0.0973, 0.1112, 0.1297, 0.1556, 0.0283]
CPS_STD = [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0.0]


def test_sd3_schedule() -> None:
    assert sd3_sigmas(10, shift=3.0).tolist() == pytest.approx(SD3_SIGMAS, abs=4e-8)


def test_step_std_on_the_sd3_schedule() -> None:
    sigmas = sd3_sigmas(10)
    flow_grpo = FlowGRPOSDE(sigmas, a=0.7, last_step=True)
    assert flow_grpo.std.tolist() == pytest.approx(FLOW_GRPO_STD, abs=5.1e-5)
    g = flow_grpo.std / (sigmas[:-1] - sigmas[1:]).sqrt()
    assert g.tolist() == pytest.approx(FLOW_GRPO_G, abs=5.1e-4)
    assert DanceSDE(sigmas, eta=0.3, last_step=True).std.tolist() == pytest.approx(DANCE_STD, abs=5.1e-5)
    assert CPS(sigmas, eta=0.8).std.tolist() == pytest.approx(CPS_STD, abs=5.1e-5)


# kernel, step, std, mean, log-prob
FLOW_TABLE = [
    ("flow_grpo", 0, 0.70000000, 0.73506466, -0.590022),
    ("flow_grpo", 4, 0.39179423, 0.85116826, 0.010313),
    ("flow_grpo", 8, 0.22536049, 0.74114454, 0.322677),
    ("flow_grpo", 9, 0.00627809, 0.99223476, -103.768787),
    ("dance", 0, 0.05990293, 0.97827048, 1.042461),
    ("dance", 4, 0.08647589, 0.95322850, 1.339513),
    ("dance", 8, 0.15563039, 0.80616263, 0.759558),
    ("dance", 9, 0.02834734, 0.92823661, 2.148182),
]


@pytest.mark.parametrize("row", FLOW_TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_flow_sdes(row: tuple[Any, ...]) -> None:
    name, index, std, mean, log_p = row
    kernel = (FlowGRPOSDE if name == "flow_grpo" else DanceSDE)(sd3_sigmas(10), last_step=True)
    gaussian, predicted = step(kernel, index)
    assert predicted == pytest.approx(X - SD3_SIGMAS[index] * OUTPUT, abs=2e-8)
    assert gaussian.std.item() == pytest.approx(std, rel=2e-6)
    assert gaussian.mean.item() == pytest.approx(mean, **CLOSE)
    assert log_prob(gaussian) == pytest.approx(log_p, rel=5e-6, abs=2e-6)


# step, std, mean, and the published "log-prob", which is minus the squared distance
CPS_TABLE = [
    (0, 0.91313725, 0.31663162, -0.340319),
    (4, 0.67266182, 0.41851236, -0.231830),
    (8, 0.00849158, 0.85704337, -0.001845),
    (9, 0.0, 0.99553571, -0.009127),
]


@pytest.mark.parametrize("row", CPS_TABLE, ids=lambda row: str(row[0]))
def test_cps_has_the_published_moments_and_the_true_density(row: tuple[Any, ...]) -> None:
    index, std, mean, published = row
    gaussian, _ = step(CPS(sd3_sigmas(10), eta=0.8), index)
    assert gaussian.std.item() == pytest.approx(std, rel=2e-6, abs=1e-12)
    assert gaussian.mean.item() == pytest.approx(mean, **CLOSE)
    assert -((NEXT - gaussian.mean.item()) ** 2) == pytest.approx(published, abs=6e-7)
    if std > 0:
        truth = -((NEXT - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        assert log_prob(gaussian) == pytest.approx(truth, rel=5e-6)


def test_published_clamp_leaves_noise_in_the_last_ddim_step() -> None:
    """steps_offset 1: t = 1 goes to ᾱ_0 with noise. steps_offset 0: t = 0 goes to itself, without."""
    table = scaled_linear_alpha_bar()
    for offset, noisy in ((1, True), (0, False)):
        schedule = ddim_schedule(table, 50, steps_offset=offset)
        assert schedule.alpha_bar_prev[-1] == table[0]
        kernel = DDIM(schedule.alpha_bar, schedule.alpha_bar_prev, schedule.timesteps)
        assert bool(kernel.stochastic[-1]) is noisy
        assert bool(kernel.stochastic[:-1].all())
