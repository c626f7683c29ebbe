"""DanceGRPO's SDE: a flow model's ODE with noise of constant strength."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.flow_grpo import sde_step
from vmpo.kernels.kernel import FlowKernel
from vmpo.kernels.schedules import check_sigmas


class DanceSDE(FlowKernel):
    """p(x_{s'} | x_s) = N(x + v dt - ½ eta² ∇log p_s dt, eta² |dt|), ∇log p_s = -(x - (1 - s) x̂_0)/s², dt = s' - s.

    Flow-GRPO's step with g = eta at every sigma. The last step is deterministic unless asked otherwise: DanceGRPO
    decodes x̂_0 of the last step and leaves its density out, which is what a deterministic last step to 0 does.

    Source: Xue et al., 2025, DanceGRPO, arXiv:2505.07818.

    Args:
        sigmas: (T+1,), from noise to data.
        eta: the diffusion coefficient; 0 is the ODE.
        window: (first, size) of the steps that add noise; None is every step the last_step rule leaves.
        last_step: whether the last step adds noise and has a density.

    Raises:
        UserError: a negative eta, sigmas that do not fall, a window that cannot be.
    """

    def __init__(
        self, sigmas: Tensor, eta: float = 0.3, *, window: tuple[int, int] | None = None, last_step: bool = False
    ) -> None:
        if eta < 0:
            raise UserError(f"dance: eta is {eta:g}: at least 0")
        sigmas = check_sigmas(sigmas)
        noisy, std = sde_step(sigmas, torch.full_like(sigmas[:-1], eta))
        super().__init__(sigmas, noisy=noisy, std=std, window=window, last_step=last_step)
        self.eta = eta
