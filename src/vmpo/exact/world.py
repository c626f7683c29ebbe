"""What an exact world is: a reference chain and a reward whose tilted law p ∝ p_ref·exp(r/beta) is known."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.exact.energy_distance import energy_distance
from vmpo.kernels import Kernel
from vmpo.policies.policy import Conditioning

TARGET_SAMPLES = 2000
"""Samples of the tilted law an energy distance is measured against."""


@dataclass(frozen=True)
class Truth:
    """The tilted law of the chain at its beta, one entry a prompt, (C,) float64.

    Attributes:
        log_z: log E_ref[exp(r(x_0)/beta)] of the chain itself, with its T steps and its x_T, nats.
        reward: E[r(x_0)] under the tilted law.
        kl: KL(p_tilt(x_0) ‖ p_ref(x_0)) = reward/beta − log_z, nats.
        reward_ref: E_ref[r(x_0)].
    """

    log_z: Tensor
    reward: Tensor
    kl: Tensor
    reward_ref: Tensor


class WorldPolicy:
    """The reference output in closed form plus a learned correction; follows the Policy protocol in float64.

        output(x, k, c) = output_ref(x, k) + denoiser(x, k, c)

    Args:
        kernel: its times say which step a row is at.
        prompts: the C prompts, in the order of their indices.
        state_shape: shape of one state.
        reference_output: (x (N, *shape), step (N,)) -> (N, ...), what makes the chain p_ref.
        denoiser: the correction (x, step, prompt) -> (N, ...), all trainable parameters; 0 at the start.

    Raises:
        UserError: the kernel's times do not fall strictly, so they do not name its steps.
    """

    def __init__(
        self,
        kernel: Kernel,
        prompts: list[str],
        state_shape: tuple[int, ...],
        reference_output: Callable[[Tensor, Tensor], Tensor],
        denoiser: nn.Module,
    ) -> None:
        self.denoiser = denoiser
        self.state_shape = state_shape
        self._index = {prompt: c for c, prompt in enumerate(prompts)}
        self._reference_output = reference_output
        self._in_reference = 0
        times = kernel.times.to(torch.float64)
        if not bool((times[1:] < times[:-1]).all()):
            raise UserError(f"times {times.tolist()}: they have to fall strictly, so that each names one step")
        self._last = len(times) - 1
        self._between = (0.5 * (times[1:] + times[:-1])).flip(0).contiguous()

    @property
    def device(self) -> torch.device:
        """The CPU: worlds are small."""
        return torch.device("cpu")

    def encode(self, prompts: list[str]) -> Conditioning:
        """The index of each prompt, {"prompt": (N,) long}.

        Raises:
            UserError: a prompt this world does not have, with the nearest one.
        """
        for prompt in set(prompts) - self._index.keys():
            nearest = difflib.get_close_matches(prompt, self._index, n=1, cutoff=0.0)[0]
            raise UserError(f"prompt {prompt!r} does not exist in this world; did you mean {nearest!r}?")
        return Conditioning({"prompt": torch.tensor([self._index[prompt] for prompt in prompts], dtype=torch.long)})

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The output at x_t (N, *shape) and time (N,), float64; each row's step is the one of the nearest time."""
        x = x_t.to(torch.float64)
        step = self._last - torch.bucketize(time.to(torch.float64), self._between)
        output = self._reference_output(x, step)
        if self._in_reference:
            return output
        correction: Tensor = self.denoiser(x, step, conditioning.positive["prompt"])
        return output + correction

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 itself: a world has no pictures."""
        return x_0

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside this context the correction is off and the policy is p_ref; contexts may be nested."""
        self._in_reference += 1
        try:
            yield
        finally:
            self._in_reference -= 1


class World(ABC):
    """A reference chain p_ref, a reward of x_0 for each of C prompts, and the law p_ref·exp(r/beta)/Z they make.

    Positions k = 0 … T count the states x[:, k], noise first. The tilted law is that of the whole chain: it tilts x_T
    too, which no policy can, so the best policy falls short of it by the spread of soft_value at position 0.

    Attributes:
        name: what `get_world` calls it.
        prompts: the C prompts.
        kernel: the sampler; every step of it is stochastic.
        beta: reward temperature.
        kind: what it is, in a few words.
        continuous: whether states live in R^D; rewards and soft values are then differentiable.
        state_shape: shape of one state.

    Raises:
        UserError: beta is not above 0, or a step of the kernel adds no noise.
    """

    kind: str
    continuous: bool

    def __init__(
        self, name: str, prompts: list[str], kernel: Kernel, beta: float, state_shape: tuple[int, ...]
    ) -> None:
        if not beta > 0:
            raise UserError(f"beta is {beta:g}: above 0")
        silent = (~kernel.stochastic).nonzero().flatten().tolist()
        if silent:
            raise UserError(
                f"step {silent[0]} of 0 to {kernel.num_steps - 1} adds no noise, so it has no density: an exact world "
                "needs every step stochastic (eta above 0, no window, a last step that stops short of the data)"
            )
        self.name, self.prompts, self.kernel, self.beta = name, prompts, kernel, beta
        self.state_shape = state_shape

    @abstractmethod
    def policy(self, seed: int = 0) -> WorldPolicy:
        """A fresh trainable policy; it equals the reference exactly at the start."""

    @abstractmethod
    def state_function(self, seed: int = 0) -> nn.Module:
        """A learnable F(x (R, *shape), position (R,), conditioning) -> (R,) in nats, 0 at the start (StateFunction)."""

    @abstractmethod
    def reward(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        """r(x_0) of x_0 (N, *shape) for prompts (N,) long; (N,), differentiable in x_0 if continuous."""

    @abstractmethod
    def soft_value(self, k: int, x: Tensor, prompt: Tensor) -> Tensor:
        """V_k(x) = beta log E_ref[exp(r(x_0)/beta) | x_k = x], in units of reward; V_T is r.

        Args:
            k: position, 0 to T.
            x: states x[:, k], (N, *shape).
            prompt: (N,) long.

        Returns:
            (N,) float64, differentiable in x if continuous.

        Raises:
            UserError: a position that does not exist.
        """

    def mean_reward(self, k: int, x: Tensor, prompt: Tensor) -> Tensor | None:
        """E_ref[r(x_0) | x_k = x] (N,) where it is exact (Eq. 44, left-hand side); None where r(x̂_0) stands for it."""
        return None

    @cached_property
    def _truth(self) -> Truth:
        kl, reward = self.frontier(torch.tensor([self.beta], dtype=torch.float64))
        _, reward_ref = self.frontier(torch.tensor([torch.inf], dtype=torch.float64))
        return Truth(reward[0] / self.beta - kl[0], reward[0], kl[0], reward_ref[0])

    def truth(self) -> Truth:
        """log Z, reward, KL and reference reward of the chain, computed once."""
        return self._truth

    @abstractmethod
    def frontier(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        """The optimal reward–KL curve: (kl in nats, reward) of the law tilted at each beta, each (len(betas), C)."""

    @abstractmethod
    def sample_target(self, n: int, prompt: int, seed: int) -> Tensor:
        """x_0 of the tilted law of the chain, (n, *shape), independent samples."""

    def distance(self, x_0: Tensor, prompt: int, seed: int = 0) -> float:
        """Energy distance of samples x_0 (N, *shape) to the tilted law, by 2000 samples of it; unbiased, may be < 0."""
        return energy_distance(x_0, self.sample_target(TARGET_SAMPLES, prompt, seed))

    def _check_position(self, k: int) -> None:
        if not 0 <= k <= self.kernel.num_steps:
            raise UserError(f"position {k}: 0 (the noise) to {self.kernel.num_steps} (x_0)")

    def _check_step(self, k: int) -> None:
        if not 0 <= k < self.kernel.num_steps:
            raise UserError(f"step {k}: 0 to {self.kernel.num_steps - 1}")


def check_betas(betas: Tensor) -> Tensor:
    """Temperatures (B,) in float64; inf, where nothing is tilted, is one (UserError unless all are above 0)."""
    table = torch.as_tensor(betas, dtype=torch.float64)
    if table.dim() != 1 or not bool((table > 0).all()):
        raise UserError(f"betas {table.tolist()}: one dimension, all above 0")
    return table
