"""DDIM with eta: the sampler of DDPO, DPOK and VMPO on Stable Diffusion 1.x."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.kernel import LinearKernel, Pair

PREDICTIONS = ("epsilon", "v", "sample")


class DDIM(LinearKernel):
    """p(x_{t'} | x_t) = N(√ᾱ' x̂_0 + √(1 - ᾱ' - s²) ε̂, s²), s² = eta² (1 - ᾱ')/(1 - ᾱ) · (1 - ᾱ/ᾱ').

    ᾱ belongs to t and ᾱ' to the next timestep t'. x̂_0 is not clipped. Noise is added wherever s > 0; a step with
    ᾱ' = 1 or ᾱ' = ᾱ (a last timestep of 0 that goes to ᾱ_0) has s = 0 and is deterministic at any eta. What the last
    step goes to is the last entry of alpha_bar_prev: see ddim_schedule.

    The root is signed, sign(u) √|u|. For eta ≤ 1 its argument is never negative and this is the ordinary root; for
    eta > 1 it may be, and the sign keeps the step finite and continuous in eta (as adjoint matching's sampler does,
    Domingo-Enrich et al., 2024, arXiv:2409.08861). The marginals of the chain are preserved only for eta ≤ 1.

    Source: Song et al., 2020, arXiv:2010.02502, eq. 12 and 16; v: Salimans & Ho, 2022, arXiv:2202.00512.

    Args:
        alpha_bar: (T,), ᾱ at each step's timestep, noise first.
        alpha_bar_prev: (T,), ᾱ where each step goes.
        timesteps: (T,) integers, what the network is told.
        eta: 0 is DDIM, 1 is ancestral sampling.
        prediction: what the network answers: epsilon, v = √ᾱ ε - √(1 - ᾱ) x_0, or sample (x_0).
        window: (first, size) of the steps that add noise; None is every step.
        last_step: whether the last step may add noise; DDPO's does and is trained on.

    Raises:
        UserError: an unknown prediction, a negative eta, ᾱ outside [0, 1], a window that cannot be.
    """

    def __init__(
        self,
        alpha_bar: Tensor,
        alpha_bar_prev: Tensor,
        timesteps: Tensor,
        eta: float = 1.0,
        prediction: str = "epsilon",
        *,
        window: tuple[int, int] | None = None,
        last_step: bool = True,
    ) -> None:
        if eta < 0:
            raise UserError(f"ddim: eta is {eta:g}: at least 0")
        a = alpha_bar.detach().to(device="cpu", dtype=torch.float64, copy=True)
        a_next = alpha_bar_prev.detach().to(device="cpu", dtype=torch.float64, copy=True)
        times = timesteps.detach().to(device="cpu", copy=True)
        if not a.shape == a_next.shape == times.shape or a.dim() != 1:
            raise UserError("ddim: alpha_bar, alpha_bar_prev and timesteps have to have one value a step each")
        if not bool(((a >= 0) & (a < 1) & (a_next >= a) & (a_next > 0) & (a_next <= 1)).all()):
            raise UserError("ddim: a step has to go from alpha_bar in [0, 1) to an alpha_bar_prev not below it")
        x0, epsilon = _predictions(a, prediction)
        std = eta * ((1.0 - a_next) / (1.0 - a) * (1.0 - a / a_next)).sqrt()
        super().__init__(
            times,
            x0=x0,
            noisy=_mean(x0, epsilon, a_next, std),
            std=std,
            ode=_mean(x0, epsilon, a_next, torch.zeros_like(std)),
            window=window,
            last_step=last_step,
        )
        self.alpha_bar, self.alpha_bar_prev, self.eta, self.prediction = a, a_next, eta, prediction

    def levels(self) -> Pair:
        alpha_bar = torch.cat([self.alpha_bar, self.alpha_bar_prev[-1:]])
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def _predictions(a: Tensor, prediction: str) -> tuple[Pair, Pair]:
    """The coefficients of (x_t, output) in x̂_0 and in ε̂."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    signal, noise = a.sqrt(), (1.0 - a).sqrt()
    if prediction == "epsilon":
        return (1.0 / signal, -noise / signal), (zero, one)
    if prediction == "sample":
        return (zero, one), (1.0 / noise, -signal / noise)
    if prediction == "v":
        return (signal, -noise), (noise, signal)
    raise UserError(f"ddim: prediction is {prediction!r}: one of {', '.join(PREDICTIONS)}")


def _mean(x0: Pair, epsilon: Pair, a_next: Tensor, std: Tensor) -> Pair:
    rest = 1.0 - a_next - std.square()
    direction = rest.sign() * rest.abs().sqrt()
    return a_next.sqrt() * x0[0] + direction * epsilon[0], a_next.sqrt() * x0[1] + direction * epsilon[1]
