"""Noise schedules as plain tables: the kernels take these, never a scheduler with state.

Flow convention: x_s = (1 - s) x_0 + s x_1 with x_1 noise; sigma s runs from 1 down to 0.
Diffusion convention: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε; the integer timestep t runs down.
All tables are float64 and in sampling order, noise first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmpo.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000


class DDIMSchedule(NamedTuple):
    """The T steps of a DDIM sampler: timesteps (T,) long, alpha_bar (T,) at t and alpha_bar_prev (T,) at the next t."""

    timesteps: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """s ↦ shift · s / (1 + (shift - 1) s) (Esser et al., 2024, arXiv:2403.03206), element by element."""
    if shift <= 0:
        raise UserError(f"shift is {shift:g}: it has to be above 0 (3 for Stable Diffusion 3, 1 for no shift)")
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def linear_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """T+1 sigmas: the shifted linspace(1, 0, T+1), ending in 0 (DanceGRPO, arXiv:2505.07818)."""
    _check_steps(num_steps)
    return shift_sigmas(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift)


def sd3_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """T+1 sigmas of diffusers' FlowMatchEulerDiscreteScheduler without dynamic shifting, as Stable Diffusion 3 uses.

    The linspace runs from 1 to the shifted 1/1000 and is shifted once more, so the last step before 0 starts at a
    sigma near 0.009 (shift 3): the step before it is the largest of the schedule.
    """
    _check_steps(num_steps)
    lowest = shift_sigmas(torch.tensor(1.0 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64), shift)
    sigmas = shift_sigmas(torch.linspace(1.0, float(lowest), num_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def flow_sigmas(num_steps: int, shift: float = 3.0, schedule: str = "linear") -> Tensor:
    """T+1 sigmas by the name of the schedule: "linear" (linear_sigmas) or "sd3" (sd3_sigmas)."""
    if schedule == "linear":
        return linear_sigmas(num_steps, shift)
    if schedule == "sd3":
        return sd3_sigmas(num_steps, shift)
    raise UserError(f"schedule is {schedule!r}: 'linear' or 'sd3'")


def check_sigmas(sigmas: Tensor) -> Tensor:
    """A float64 copy on the CPU of sigmas (T+1,), which must fall strictly from at most 1 to at least 0."""
    table = sigmas.detach().to(device="cpu", dtype=torch.float64, copy=True)
    if table.dim() != 1 or len(table) < 2:
        raise UserError(f"sigmas have shape {tuple(table.shape)}: one dimension with a value more than steps")
    if not bool((table[1:] < table[:-1]).all()) or float(table[0]) > 1.0 or float(table[-1]) < 0.0:
        raise UserError(f"sigmas {table.tolist()}: they have to fall strictly, from at most 1 to at least 0")
    return table


def scaled_linear_alpha_bar(
    beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
) -> Tensor:
    """ᾱ_t = Π_{u ≤ t} (1 - β_u), √β_u linear (Rombach et al., 2022); the defaults are Stable Diffusion 1.x's. (N,)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    return (1.0 - betas).cumprod(0)


def ddim_schedule(
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_bar: float | None = None,
) -> DDIMSchedule:
    """The T steps of a DDIM sampler out of N trained ones.

    leading: t_k = (T - 1 - k) ⌊N/T⌋ + steps_offset; trailing: t_k = round(N (T - k)/T) - 1.
    A step goes to the ᾱ of the next timestep, so the chain hangs together; diffusers uses t - ⌊N/T⌋ instead, which is
    the same for leading spacing and wherever T divides N.

    The last step goes to final_alpha_bar. None is ᾱ_0, the first trained level: DDPO's clamp of t' to 0 (Black et al.,
    2023, arXiv:2305.13301) and diffusers' set_alpha_to_one=False; the sample keeps that much noise and the last step
    has a density if t > 0. 1.0 is set_alpha_to_one=True: the last step is deterministic at any eta.

    Args:
        alphas_cumprod: (N,), ᾱ at every trained timestep.
        num_steps: T.
        spacing: "leading" or "trailing".
        steps_offset: the last timestep of leading spacing; 1 for Stable Diffusion 1.x.
        final_alpha_bar: where the last step goes; None is ᾱ_0.

    Raises:
        UserError: too many steps, timesteps outside the trained ones, an unknown spacing, or ᾱ that does not rise.
    """
    table = alphas_cumprod.detach().to(device="cpu", dtype=torch.float64, copy=True)
    num_train = len(table)
    _check_steps(num_steps, num_train)
    if spacing == "leading":
        timesteps = torch.arange(num_steps - 1, -1, -1) * (num_train // num_steps) + steps_offset
    elif spacing == "trailing":
        timesteps = torch.tensor([round(num_train * (num_steps - k) / num_steps) - 1 for k in range(num_steps)])
    else:
        raise UserError(f"spacing is {spacing!r}: 'leading' or 'trailing'")
    if int(timesteps[0]) >= num_train or int(timesteps[-1]) < 0:
        raise UserError(
            f"timesteps {int(timesteps[0])} to {int(timesteps[-1])} leave the trained 0 to {num_train - 1}: "
            f"use fewer steps than {num_steps} or a steps_offset other than {steps_offset}"
        )
    alpha_bar = table[timesteps]
    final = float(table[0]) if final_alpha_bar is None else final_alpha_bar
    return DDIMSchedule(timesteps, alpha_bar, torch.cat([alpha_bar[1:], alpha_bar.new_tensor([final])]))


def _check_steps(num_steps: int, most: int | None = None) -> None:
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}: at least 1")
    if most is not None and num_steps > most:
        raise UserError(f"num_steps is {num_steps}: the model was trained on {most} timesteps, so at most {most}")
