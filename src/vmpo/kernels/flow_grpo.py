"""Flow-GRPO's SDE: a flow model's ODE with noise that is strong early and fades with sigma."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.kernel import FlowKernel, Pair
from vmpo.kernels.schedules import check_sigmas


class FlowGRPOSDE(FlowKernel):
    """p(x_{s'} | x_s) = N(x (1 + g² dt/(2s)) + v (1 + g² (1 - s)/(2s)) dt, g² |dt|), g = a √(s / (1 - s)), dt = s' - s.

    Euler-Maruyama on dx = (v - ½ g² ∇log p_s) ds + g dW, with ∇log p_s = -(x + (1 - s) v)/s.

    At the first step g = a √(s_0 / (1 - s_1)): at s_0 = 1 the formula divides by zero. It is the first step that is
    meant, not a sigma that equals 1 to the last bit, so schedules that start just below 1 stay finite too. With s_0 = 1
    the first step has std = a.

    The last step is deterministic unless asked otherwise. Flow-GRPO adds its noise but leaves it out of the loss,
    because the density is too peaked to be of use: std 0.006 in 10 steps of Stable Diffusion 3, where an unnoticeable
    change of the mean moves the log-likelihood by hundreds of nats. Here such noise is not added either: the last
    step returns x̂_0, and the densities speak of everything random that the image depends on.

    Source: Liu et al., 2025, Flow-GRPO, arXiv:2505.05470.

    Args:
        sigmas: (T+1,), from noise to data.
        a: the noise level; 0 is the ODE.
        window: (first, size) of the steps that add noise; None is every step the last_step rule leaves.
        last_step: whether the last step adds noise and has a density.

    Raises:
        UserError: a negative a, sigmas that do not fall, a window that cannot be.
    """

    def __init__(
        self, sigmas: Tensor, a: float = 0.7, *, window: tuple[int, int] | None = None, last_step: bool = False
    ) -> None:
        if a < 0:
            raise UserError(f"flow_grpo: the noise level is {a:g}: at least 0")
        sigmas = check_sigmas(sigmas)
        s = sigmas[:-1]
        clean = 1.0 - s
        clean[0] = 1.0 - sigmas[1]
        noisy, std = sde_step(sigmas, a * (s / clean).sqrt())
        super().__init__(sigmas, noisy=noisy, std=std, window=window, last_step=last_step)
        self.a = a


def sde_step(sigmas: Tensor, g: Tensor) -> tuple[Pair, Tensor]:
    """The coefficients of (x, v) in the mean, and the std, of an Euler-Maruyama step with diffusion g (T,)."""
    s, dt = sigmas[:-1], sigmas[1:] - sigmas[:-1]
    drift = g.square() / (2.0 * s)
    return (1.0 + drift * dt, (1.0 + drift * (1.0 - s)) * dt), g * torch.sqrt(-dt)
