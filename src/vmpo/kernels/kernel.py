"""What a sampler step is: p(x[k+1] | x[k]) as a distribution, with every number of the schedule passed in.

All kernels here have a mean that is linear in the state and in the network output,

    mean = A_k x_t + B_k output,   std = s_k,   x̂_0 = P_k x_t + Q_k output,

so a kernel is a table of five coefficients a step, worked out once in float64. It follows that
∂ log p(x) / ∂ output = B_k (x - mean) / s_k², and KL(p_θ ‖ p_ref) = B_k² ‖output_θ - output_ref‖² / (2 s_k²).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels.gaussian import Gaussian
from vmpo.kernels.schedules import NUM_TRAIN_TIMESTEPS

Pair = tuple[Tensor, Tensor]  # the coefficients of x_t and of the output, (T,) each


class Kernel(ABC):
    """The steps of a sampler; step k goes from x[:, k] to x[:, k+1], noise first.

    A kernel holds its own copy of the schedule and no state that moves, so using a scheduler elsewhere cannot change
    it, and rows of one call may be at different steps.

    Attributes:
        num_steps: T.
        times: (T,), what the network is told at each step.
        stochastic: (T,) bool, the steps that add noise; only these have densities.
    """

    num_steps: int
    times: Tensor
    stochastic: Tensor

    def __init__(self, times: Tensor, stochastic: Tensor) -> None:
        self.num_steps = len(times)
        self.times = times
        self.stochastic = stochastic

    @property
    def stochastic_steps(self) -> Tensor:
        """(S,) long: the steps that add noise, in sampling order."""
        return self.stochastic.nonzero().flatten()

    @property
    def deterministic_from(self) -> int:
        """The first j for which x[:, j] fixes all later states: T if the last step adds noise, 0 if none does.

        x[:, j] is then the last thing a density speaks of: what follows, the final image included, is a function of
        x[:, j] and of the network that runs the remaining steps.
        """
        steps = self.stochastic_steps
        return int(steps[-1]) + 1 if len(steps) else 0

    def initial(self, noise: Tensor) -> Tensor:
        """x_T from standard normal noise (B, *shape): the noise itself, for kernels that start from N(0, I)."""
        return noise

    @abstractmethod
    def transition(self, x_t: Tensor, output: Tensor, step: Tensor) -> Gaussian:
        """p(x[k+1] | x[k]) for each row.

        Args:
            x_t: (B, *shape), the state x[:, k].
            output: (B, *shape), what the network answered at (x_t, times[k]).
            step: (B,) long, k of each row.

        Returns:
            Gaussian with mean (B, *shape) and std (B,), in float32 or better; std is 0 where the step adds no noise.
        """

    def noising(self, x_next: Tensor, step: Tensor) -> Gaussian:
        """q(x[k] | x[k+1]), the noising kernel that the steps undo.

        Args:
            x_next: (B, *shape), the cleaner state x[:, k+1].
            step: (B,) long, k of each row.

        Raises:
            UserError: the kernel has none.
        """
        raise UserError(f"{type(self).__name__} has no noising kernel q(x_t | x_(t-1)); use an objective with p_ref")

    @abstractmethod
    def predict_x0(self, x_t: Tensor, output: Tensor, step: Tensor) -> Tensor:
        """x̂_0 = E[x_0 | x_t] as the output has it, (B, *shape); arguments as in transition."""


class LinearKernel(Kernel):
    """A kernel whose mean is A_k x_t + B_k output, from tables.

    Args:
        times: (T,).
        x0: (P, Q), the coefficients of x̂_0.
        noisy: (A, B) of the steps that add noise.
        std: (T,), their standard deviations; a step with 0 is deterministic.
        ode: (A, B) of the steps that do not.
        window: (first, size) of the steps that may add noise; None is all of them.
        last_step: whether the last step may add noise.

    Raises:
        UserError: the window holds a step that does not exist or cannot add noise.
    """

    def __init__(
        self,
        times: Tensor,
        *,
        x0: Pair,
        noisy: Pair,
        std: Tensor,
        ode: Pair,
        window: tuple[int, int] | None,
        last_step: bool,
    ) -> None:
        stochastic = _stochastic_steps(std, window, last_step)
        super().__init__(times, stochastic)
        a, b = (torch.where(stochastic, on, off) for on, off in zip(noisy, ode, strict=True))
        self._table = torch.stack([a, b, torch.where(stochastic, std, 0.0), *x0])
        if not bool(self._table.isfinite().all()):
            raise UserError("the schedule gives coefficients that are not finite: epsilon prediction needs ᾱ above 0")

    @property
    def std(self) -> Tensor:
        """(T,) float64: the standard deviation of each step, 0 where it adds no noise."""
        return self._table[2].clone()

    @abstractmethod
    def levels(self) -> Pair:
        """What x[k] holds of x_0 and of unit noise, (α, σ), (T+1,) float64 each, noise first."""

    def noising(self, x_next: Tensor, step: Tensor) -> Gaussian:
        """N(α/α' x', σ² − (α/α')² σ'²): x[k] from the cleaner x[k+1] such that all marginals are α x_0 + σ ε."""
        alpha, sigma = self.levels()
        ratio = alpha[:-1] / alpha[1:]
        std = (sigma[:-1].square() - (ratio * sigma[1:]).square()).clamp(min=0).sqrt()
        dtype = torch.promote_types(x_next.dtype, torch.float32)
        rows = step.cpu()
        scale = _rows(ratio[rows].to(x_next.device, dtype), x_next)
        return Gaussian(scale * x_next.to(dtype), std[rows].to(x_next.device, dtype))

    def transition(self, x_t: Tensor, output: Tensor, step: Tensor) -> Gaussian:
        x_t, output, table = self._gather(x_t, output, step)
        a, b = _rows(table[0], x_t), _rows(table[1], x_t)
        return Gaussian(a * x_t + b * output, table[2])

    def predict_x0(self, x_t: Tensor, output: Tensor, step: Tensor) -> Tensor:
        x_t, output, table = self._gather(x_t, output, step)
        return _rows(table[3], x_t) * x_t + _rows(table[4], x_t) * output

    def _gather(self, x_t: Tensor, output: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both inputs in float32 or better, and the table's columns (5, B) of their steps beside them."""
        if output.shape != x_t.shape or step.shape != x_t.shape[:1]:
            raise ValueError(
                f"x_t {tuple(x_t.shape)}, output {tuple(output.shape)}, step {tuple(step.shape)}: "
                "output has the shape of x_t, and step is one number a row"
            )
        # cast first: the product of a half-precision output with a schedule scalar would stay in half precision
        dtype = torch.promote_types(torch.promote_types(x_t.dtype, output.dtype), torch.float32)
        table = self._table.to(dtype).to(x_t.device)
        return x_t.to(dtype), output.to(dtype), table[:, step.to(x_t.device)]


class FlowKernel(LinearKernel):
    """A kernel of a flow model, whose output is the velocity v = x_1 - x_0.

    x̂_0 = x - s v, the deterministic step is Euler's x + v (s' - s), and the network is told 1000 s.
    `sigmas` (T+1,) float64 keeps the schedule.
    """

    def __init__(
        self, sigmas: Tensor, *, noisy: Pair, std: Tensor, window: tuple[int, int] | None, last_step: bool
    ) -> None:
        self.sigmas = sigmas
        s, s_next = sigmas[:-1], sigmas[1:]
        one = torch.ones_like(s)
        times = (s * NUM_TRAIN_TIMESTEPS).to(torch.float32)
        super().__init__(
            times, x0=(one, -s), noisy=noisy, std=std, ode=(one, s_next - s), window=window, last_step=last_step
        )

    def levels(self) -> Pair:
        return 1.0 - self.sigmas, self.sigmas


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _stochastic_steps(std: Tensor, window: tuple[int, int] | None, last_step: bool) -> Tensor:
    """(T,) bool. A window is taken at its word: S is its size, or it is an error."""
    able = std > 0
    if not last_step:
        able[-1] = False
    if window is None:
        return able
    first, size = window
    num_steps = len(std)
    if first < 0 or size < 1 or first + size > num_steps:
        raise UserError(
            f"window ({first}, {size}): first and size have to lie within steps 0 to {num_steps - 1}, with size 1 or "
            "more (eta 0 turns all noise off)"
        )
    inside = torch.zeros_like(able)
    inside[first : first + size] = True
    if not able.any():
        raise UserError(f"window ({first}, {size}): there is no stochastic step at this eta; set eta above 0")
    silent = (inside & ~able).nonzero().flatten().tolist()
    if silent:
        raise UserError(
            f"window ({first}, {size}): this kernel adds no noise at step {silent[0]} of 0 to {num_steps - 1}, "
            f"only at {able.nonzero().flatten().tolist()}"
        )
    return inside
