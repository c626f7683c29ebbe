"""Coefficients-preserving sampling: part of the predicted noise is replaced by fresh noise, so none is left over."""

from __future__ import annotations

import math

from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.kernel import FlowKernel
from vmpo.kernels.schedules import check_sigmas


class CPS(FlowKernel):
    """p(x_{s'} | x_s) = N((1 - s') x̂_0 + s' cos(eta π/2) x̂_1, s'² sin²(eta π/2)), x̂_0 = x - s v, x̂_1 = x + (1 - s) v.

    The two noises together have the level s' that the schedule asks for. A step to s' = 0 adds none and is
    deterministic. The density is the true one: published code drops the variance and the constants and reports
    -mean (x - mean)², which is not a log-probability and whose gradient is 2 s'² sin²(eta π/2) / D of the true one.

    Source: Wang & Yu, 2025, arXiv:2509.05952.

    Args:
        sigmas: (T+1,), from noise to data.
        eta: the share of fresh noise, in [0, 1]; 0 is the ODE (Euler).
        window: (first, size) of the steps that add noise; None is every step but one to 0.

    Raises:
        UserError: eta outside [0, 1], sigmas that do not fall, a window that cannot be.
    """

    def __init__(self, sigmas: Tensor, eta: float = 0.8, *, window: tuple[int, int] | None = None) -> None:
        if not 0 <= eta <= 1:
            raise UserError(f"cps: eta is {eta:g}: from 0 (no noise) to 1 (all of it fresh)")
        sigmas = check_sigmas(sigmas)
        s, s_next = sigmas[:-1], sigmas[1:]
        kept = s_next * math.cos(eta * math.pi / 2)
        noisy = ((1.0 - s_next) + kept, kept * (1.0 - s) - (1.0 - s_next) * s)
        std = s_next * math.sin(eta * math.pi / 2)
        super().__init__(sigmas, noisy=noisy, std=std, window=window, last_step=True)
        self.eta = eta
