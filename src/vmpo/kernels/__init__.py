"""p(x[k+1] | x[k]) as a distribution: DDIM, Flow-GRPO's and DanceGRPO's SDEs, coefficients-preserving sampling."""

from __future__ import annotations

import difflib

from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.categorical import Categorical
from vmpo.kernels.cps import CPS
from vmpo.kernels.dance import DanceSDE
from vmpo.kernels.ddim import DDIM
from vmpo.kernels.flow_grpo import FlowGRPOSDE
from vmpo.kernels.gaussian import DeterministicStep, Gaussian
from vmpo.kernels.kernel import FlowKernel, Kernel, LinearKernel
from vmpo.kernels.schedules import (
    DDIMSchedule,
    ddim_schedule,
    flow_sigmas,
    linear_sigmas,
    scaled_linear_alpha_bar,
    sd3_sigmas,
)

__all__ = [
    "CPS",
    "DDIM",
    "KERNEL_NAMES",
    "Categorical",
    "DDIMSchedule",
    "DanceSDE",
    "DeterministicStep",
    "FlowGRPOSDE",
    "FlowKernel",
    "Gaussian",
    "Kernel",
    "LinearKernel",
    "build_kernel",
    "ddim_schedule",
    "flow_sigmas",
    "linear_sigmas",
    "scaled_linear_alpha_bar",
    "sd3_sigmas",
]

KERNEL_NAMES = ("ddim", "flow_grpo", "dance", "cps")


def build_kernel(
    name: str,
    num_steps: int,
    *,
    eta: float | None = None,
    window: tuple[int, int] | None = None,
    last_step: bool | None = None,
    schedule: str = "linear",
    shift: float = 3.0,
    sigmas: Tensor | None = None,
    alphas_cumprod: Tensor | None = None,
    prediction: str = "epsilon",
    spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_bar: float | None = None,
) -> DDIM | FlowKernel:
    """A kernel by its name, with its published defaults.

    Args:
        name: "ddim", "flow_grpo", "dance" or "cps".
        num_steps: T.
        eta: the strength of the noise; None is the published one: 1 (ddim), 0.7 (flow_grpo, its a), 0.3 (dance),
            0.8 (cps). 0 is the deterministic sampler of the same model.
        window: (first, size) of the steps that add noise; None is all that can.
        last_step: whether the last step may add noise; None is yes for ddim, no for flow_grpo and dance. For cps the
            last step to sigma 0 has no noise to begin with.
        schedule: of the flow kernels, "linear" (shifted linspace to 0) or "sd3" (diffusers' table).
        shift: of either schedule.
        sigmas: (T+1,), in place of schedule and shift (pipelines with dynamic shifting).
        alphas_cumprod: (N,), of ddim; None is Stable Diffusion 1.x's.
        prediction: of ddim, "epsilon", "v" (or diffusers' "v_prediction") or "sample".
        spacing: of ddim, "leading" or "trailing", see ddim_schedule.
        steps_offset: of ddim with leading spacing, the last timestep.
        final_alpha_bar: of ddim, where the last step goes; None is ᾱ_0.

    Raises:
        UserError: a name that does not exist, with the nearest one, or a setting that cannot be.
    """
    if name not in KERNEL_NAMES:
        nearest = difflib.get_close_matches(name, KERNEL_NAMES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"kernel {name!r} does not exist; did you mean {nearest!r}? There are {', '.join(KERNEL_NAMES)}"
        )
    if name == "ddim":
        table = scaled_linear_alpha_bar() if alphas_cumprod is None else alphas_cumprod
        steps = ddim_schedule(
            table, num_steps, spacing=spacing, steps_offset=steps_offset, final_alpha_bar=final_alpha_bar
        )
        return DDIM(
            steps.alpha_bar,
            steps.alpha_bar_prev,
            steps.timesteps,
            1.0 if eta is None else eta,
            "v" if prediction == "v_prediction" else prediction,
            window=window,
            last_step=last_step is not False,
        )
    if sigmas is None:
        sigmas = flow_sigmas(num_steps, shift, schedule)
    elif len(sigmas) != num_steps + 1:
        raise UserError(f"{len(sigmas)} sigmas for {num_steps} steps: one more than the steps is right")
    if name == "flow_grpo":
        return FlowGRPOSDE(sigmas, 0.7 if eta is None else eta, window=window, last_step=bool(last_step))
    if name == "dance":
        return DanceSDE(sigmas, 0.3 if eta is None else eta, window=window, last_step=bool(last_step))
    if last_step:
        raise UserError("cps: last_step is true, but its last step goes to sigma 0 and adds no noise")
    return CPS(sigmas, 0.8 if eta is None else eta, window=window)
