"""Kernels by name: published defaults, and what a wrong setting is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vmpo.errors import UserError
from vmpo.kernels import (
    CPS,
    DDIM,
    DanceSDE,
    FlowGRPOSDE,
    LinearKernel,
    build_kernel,
    ddim_schedule,
    flow_sigmas,
    scaled_linear_alpha_bar,
)

T = 8
PUBLISHED = {"ddim": 1.0, "flow_grpo": 0.7, "dance": 0.3, "cps": 0.8}


@pytest.mark.parametrize("name", PUBLISHED)
def test_build_kernel_has_the_published_defaults(name: str) -> None:
    kernel: Any = build_kernel(name, T)
    assert getattr(kernel, "a" if name == "flow_grpo" else "eta") == PUBLISHED[name]
    if name != "ddim":
        linear = torch.linspace(1, 0, T + 1, dtype=torch.float64)
        torch.testing.assert_close(kernel.sigmas, 3 * linear / (1 + 2 * linear))
        torch.testing.assert_close(kernel.times, (1000 * kernel.sigmas[:-1]).float())
    else:
        assert kernel.times.tolist() == [125 * k + 1 for k in range(T - 1, -1, -1)]


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: build_kernel("flowgrpo", T), "did you mean 'flow_grpo'"),
    (lambda: build_kernel("dims", T), "did you mean 'ddim'"),
    (lambda: build_kernel("dance", T, schedule="karras"), "schedule"),
    (lambda: build_kernel("dance", 0), "num_steps"),
    (lambda: build_kernel("ddim", 1001), "num_steps"),
    (lambda: build_kernel("ddim", 1000), "steps_offset"),
    (lambda: build_kernel("ddim", T, prediction="flow"), "prediction"),
    (lambda: build_kernel("ddim", T, spacing="linspace"), "spacing"),
    (lambda: build_kernel("dance", T, shift=0.0), "shift"),
    (lambda: build_kernel("dance", T, sigmas=torch.linspace(1, 0, T)), "sigmas"),
    (lambda: build_kernel("dance", 1, sigmas=torch.tensor([0.0, 1.0])), "fall strictly"),
    (lambda: build_kernel("cps", T, last_step=True), "last_step"),
    (lambda: build_kernel("flow_grpo", T, window=(0, 0)), "window"),
    (lambda: build_kernel("flow_grpo", T, window=(-1, 2)), "window"),
    (lambda: build_kernel("flow_grpo", T, window=(6, 2)), "no noise at step 7"),
    (lambda: build_kernel("ddim", T, window=(6, 3)), "window"),
    (lambda: build_kernel("ddim", T, eta=0.0, window=(0, 2)), "no stochastic step at this eta; set eta above 0"),
    (lambda: CPS(flow_sigmas(T), eta=1.2), "eta"),
    (lambda: DanceSDE(flow_sigmas(T), eta=-0.1), "eta"),
    (lambda: FlowGRPOSDE(flow_sigmas(T), a=-0.1), "noise level"),
    (lambda: DDIM(torch.ones(2) * 0.5, torch.ones(2) * 0.4, torch.tensor([2, 1])), "alpha_bar"),
]


@pytest.mark.parametrize(("mistake", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_mistakes_are_told_in_one_line(mistake: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        mistake()
    assert "\n" not in str(caught.value)


def test_classes_have_the_published_defaults() -> None:
    sigmas, table = flow_sigmas(T), ddim_schedule(scaled_linear_alpha_bar(), T)
    pairs: list[tuple[LinearKernel, LinearKernel]] = [
        (FlowGRPOSDE(sigmas), FlowGRPOSDE(sigmas, a=0.7, last_step=False)),
        (DanceSDE(sigmas), DanceSDE(sigmas, eta=0.3, last_step=False)),
        (CPS(sigmas), CPS(sigmas, eta=0.8)),
        (
            DDIM(table.alpha_bar, table.alpha_bar_prev, table.timesteps),
            DDIM(table.alpha_bar, table.alpha_bar_prev, table.timesteps, 1.0, "epsilon", last_step=True),
        ),
    ]
    for default, explicit in pairs:
        assert default.std.equal(explicit.std)
