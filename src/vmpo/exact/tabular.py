"""Chains over an enumerated set of states: the kernel, and tables as policies and state functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.kernels import Categorical, Kernel
from vmpo.policies.policy import Conditioning


class TabularKernel(Kernel):
    """p(x[k+1] | x[k]) = softmax(output) over n states; a state is its index, (B, 1).

    The network is told T, T−1, …, 1. A chain has no predicted clean state: predict_x0 raises.

    Args:
        num_steps: T.
        num_states: n.
        start: index of the state every chain starts in.
        log_noising: log q(x[k] | x[k+1]), (T, n, n) with x[k+1] in rows; None: there is no noising kernel.
    """

    def __init__(self, num_steps: int, num_states: int, start: int, log_noising: Tensor | None = None) -> None:
        super().__init__(torch.arange(num_steps, 0, -1), torch.ones(num_steps, dtype=torch.bool))
        self.num_states, self.start, self.log_noising = num_states, start, log_noising

    def initial(self, noise: Tensor) -> Tensor:
        """The start state in every row, (B, 1), in the noise's dtype."""
        return torch.full_like(noise, self.start)

    def transition(self, x_t: Tensor, output: Tensor, step: Tensor) -> Categorical:  # type: ignore[override]
        """The distribution of the next state; output is (B, 1, n) logits, and says all there is to say."""
        if output.shape != (*x_t.shape, self.num_states):
            raise ValueError(f"output {tuple(output.shape)}: logits {(*x_t.shape, self.num_states)} are right")
        return Categorical(output)

    def noising(self, x_next: Tensor, step: Tensor) -> Categorical:  # type: ignore[override]
        """q(x[k] | x[k+1]) over the n states of x[k]."""
        if self.log_noising is None:
            raise UserError("this tabular chain has no noising kernel q(x_t | x_(t-1)); use an objective with p_ref")
        return Categorical(self.log_noising[step, x_next[:, 0].long()][:, None])

    def predict_x0(self, x_t: Tensor, output: Tensor, step: Tensor) -> Tensor:
        raise UserError("a tabular chain has no predicted clean state: use the exact soft_value or mean_reward")


class TableCorrection(nn.Module):
    """θ[c, k, state, next], 0 at the start; a correction of logits."""

    def __init__(self, prompts: int, steps: int, states: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(prompts, steps, states, states, dtype=torch.float64))

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The correction at states x (N, 1), step (N,) and prompt (N,); (N, 1, n)."""
        return self.theta[prompt, step, x[:, 0].long()][:, None]


class TableStateFunction(nn.Module):
    """F(x, k, c) = θ[c, k, x] in nats, 0 at the start."""

    def __init__(self, prompts: int, positions: int, states: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(prompts, positions, states, dtype=torch.float64))

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x (R, 1) at positions (R,); (R,), nats."""
        return self.theta[conditioning.positive["prompt"], position, x[:, 0].long()]
