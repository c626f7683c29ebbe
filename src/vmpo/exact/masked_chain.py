"""Masked diffusion of short sequences, with every state enumerated: the tilted law by plain sums."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.exact.tabular import TableCorrection, TableStateFunction, TabularKernel
from vmpo.exact.world import World, WorldPolicy, check_betas

IMPOSSIBLE = -1e9
"""Logit of a transition the reference cannot make: exp of it is exactly 0, and no difference of two is NaN."""


class MaskedChain(World):
    """Absorbing diffusion of L positions over V tokens: a step from mask level m_t to m_s = m_t − 1/T reveals each
    masked position on its own with probability (m_t − m_s)/m_t, the token from p(x_0^i | x_t).

    Tokens come from the exact conditionals of a fixed correlated law over the V^L sequences, a position at a time, as
    from a perfectly trained network; revealing several at once forgets their correlation, so p_ref(x_0) is not that
    law. The tilted chain does not factorise over positions; policies are therefore tables over all (V+1)^L states.

    A state x (N, 1) is its index, digits base V+1 with V for the mask. The reward of a state with masks is 0; the chain
    never ends in one.

    Args:
        length: L.
        tokens: V.
        steps: T.
        beta: reward temperature.
        reward_scale: standard deviation of the rewards.
        num_prompts: C; each has a reward table of its own.
        seed: of the joint law and the rewards.
        name: of the world.

    Raises:
        UserError: too few positions, tokens, steps or prompts.
    """

    kind = "masked diffusion of short sequences, enumerated"
    continuous = False
    kernel: TabularKernel

    def __init__(
        self,
        length: int = 3,
        tokens: int = 3,
        steps: int = 3,
        *,
        beta: float = 0.5,
        reward_scale: float = 0.8,
        num_prompts: int = 1,
        seed: int = 0,
        name: str = "masked-chain",
    ) -> None:
        if min(length, steps, num_prompts) < 1 or tokens < 2:
            raise UserError(
                f"length {length}, steps {steps}, prompts {num_prompts}, tokens {tokens}: at least 1, 1, 1 and 2"
            )
        self.length, self.tokens, self.num_states = length, tokens, (tokens + 1) ** length
        kernel = TabularKernel(steps, self.num_states, start=self.num_states - 1)
        super().__init__(name, [f"prompt {c}" for c in range(num_prompts)], kernel, beta, (1,))
        place = (tokens + 1) ** torch.arange(length - 1, -1, -1)
        self.digits = torch.arange(self.num_states)[:, None] // place % (tokens + 1)
        self.clean = (self.digits < tokens).all(1)
        generator = torch.Generator().manual_seed(seed)
        sequences = int(self.clean.sum())
        self._joint = torch.randn(sequences, dtype=torch.float64, generator=generator).mul(1.2).softmax(0)
        self._rewards = torch.zeros(num_prompts, self.num_states, dtype=torch.float64)
        table = torch.randn(num_prompts, sequences, dtype=torch.float64, generator=generator)
        self._rewards[:, self.clean] = reward_scale * table
        self.log_p_ref = torch.stack([self._step_law(k).log() for k in range(steps)])
        self._reference_logits = self.log_p_ref.clamp(min=IMPOSSIBLE)
        kernel.log_noising = torch.stack([self._noising_law(k).log() for k in range(steps)]).clamp(min=IMPOSSIBLE)

    def _step_law(self, k: int) -> Tensor:
        """p_ref(next | state) of step k, (n, n)."""
        masked = self.digits == self.tokens
        sequences = self.digits[self.clean]
        agrees = ((self.digits[:, None] == sequences) | masked[:, None]).all(-1).to(torch.float64)
        posterior = agrees * self._joint
        posterior = posterior / posterior.sum(1, keepdim=True)
        is_token = (sequences[..., None] == torch.arange(self.tokens)).to(torch.float64)
        conditional = torch.einsum("ns,siv->niv", posterior, is_token)  # p(x_0^i = v | state)
        revealed = 1.0 / (self.kernel.num_steps - k)
        hidden = torch.full_like(conditional[..., :1], 1.0 - revealed)
        change = torch.cat([revealed * conditional, hidden], -1)
        keep = nn.functional.one_hot(self.digits, self.tokens + 1).to(torch.float64)
        factor = torch.where(masked[..., None], change, keep)  # (n, L, V+1)
        position = torch.arange(self.length)
        return factor[:, position, self.digits].prod(-1)

    def _noising_law(self, k: int) -> Tensor:
        """q(x[k] | x[k+1]), (n, n): each token is masked with probability (m_t − m_s)/(1 − m_s) = 1/(k+1)."""
        masked = 1.0 / (k + 1)
        here, cleaner = self.digits[None], self.digits[:, None]
        same, hides = here == cleaner, (here == self.tokens) & (cleaner < self.tokens)
        stays = torch.where(cleaner == self.tokens, 1.0, 1.0 - masked)
        return torch.where(same, stays, torch.where(hides, masked, 0.0)).to(torch.float64).prod(-1)

    # --- policies -------------------------------------------------------------------------------------------------

    def _reference_output(self, x: Tensor, step: Tensor) -> Tensor:
        return self._reference_logits[step, x[:, 0].long()][:, None]

    def policy(self, seed: int = 0) -> WorldPolicy:
        """A logit for each prompt, step, state and next state on top of log p_ref; no randomness in its start."""
        correction = TableCorrection(len(self.prompts), self.kernel.num_steps, self.num_states)
        return WorldPolicy(self.kernel, self.prompts, self.state_shape, self._reference_output, correction)

    def optimal_policy(self) -> WorldPolicy:
        """The policy with p_theta = p*, log p_ref + V_{k+1}/beta."""
        policy = self.policy()
        values = self._soft_values[:, 1:, None, :] / self.beta
        with torch.no_grad():
            policy.denoiser.get_parameter("theta").copy_(values.expand(-1, -1, self.num_states, -1))
        return policy

    def state_function(self, seed: int = 0) -> nn.Module:
        """A value for each prompt, position and state; V/beta is one."""
        return TableStateFunction(len(self.prompts), self.kernel.num_steps + 1, self.num_states)

    @torch.no_grad()
    def law(self, policy: Any, prompt: int = 0) -> Tensor:
        """The law of x_0 under a policy (of this world's states) for a prompt, (n,), by passing on its tables."""
        states = torch.arange(self.num_states, dtype=torch.float64)[:, None]
        conditioning = policy.encode([self.prompts[prompt]] * self.num_states)
        law = torch.zeros(self.num_states, dtype=torch.float64)
        law[self.kernel.start] = 1.0
        for k in range(self.kernel.num_steps):
            step = torch.full((self.num_states,), k)
            output = policy.predict(states, self.kernel.times[step], conditioning)
            law = law @ self.kernel.transition(states, output, step).mean[:, 0].to(torch.float64)
        return law

    def total_variation(self, policy: Any, prompt: int = 0) -> float:
        """½ Σ |law(policy) − tilted law|, in [0, 1]."""
        return float(0.5 * (self.law(policy, prompt) - self.target(prompt)).abs().sum())

    # --- the tilted law -------------------------------------------------------------------------------------------

    def reward(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        return self._rewards[prompt, x_0[:, 0].long()]

    @cached_property
    def _reference_law(self) -> Tensor:
        law = torch.zeros(self.num_states, dtype=torch.float64)
        law[self.kernel.start] = 1.0
        for log_p in self.log_p_ref:
            law = law @ log_p.exp()
        return law

    @cached_property
    def _soft_values(self) -> Tensor:
        """(C, T+1, n)."""
        values = [self._rewards]
        for log_p in self.log_p_ref.flip(0):
            values.append(self.beta * torch.logsumexp(log_p + values[-1][:, None] / self.beta, -1))
        return torch.stack(values[::-1], 1)

    @cached_property
    def _mean_rewards(self) -> Tensor:
        """(C, T+1, n)."""
        values = [self._rewards]
        for log_p in self.log_p_ref.flip(0):
            values.append(values[-1] @ log_p.exp().mT)
        return torch.stack(values[::-1], 1)

    def soft_value(self, k: int, x: Tensor, prompt: Tensor) -> Tensor:
        self._check_position(k)
        return self._soft_values[prompt, k, x[:, 0].long()]

    def mean_reward(self, k: int, x: Tensor, prompt: Tensor) -> Tensor:
        self._check_position(k)
        return self._mean_rewards[prompt, k, x[:, 0].long()]

    def target(self, prompt: int = 0) -> Tensor:
        """The tilted law of x_0, (n,)."""
        return (self._reference_law.log() + self._rewards[prompt] / self.beta).softmax(0)

    def frontier(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        log_ref = self._reference_law.log()
        betas = check_betas(betas)
        scaled = self._rewards / betas[:, None, None]
        log_z = torch.logsumexp(log_ref + scaled, -1)
        law = (log_ref + scaled - log_z[..., None]).exp()
        reward = (law * self._rewards).sum(-1)
        return reward / betas[:, None] - log_z, reward

    def sample_target(self, n: int, prompt: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.target(prompt), n, True, generator=generator).to(torch.float64)[:, None]

    def distance(self, x_0: Tensor, prompt: int, seed: int = 0) -> float:
        """Σ (p − q)² of the law p of the samples and the tilted law q: the energy distance of the metric 1[x ≠ y].

        Unbiased, and q is exact, so the seed is not used. `total_variation` compares a policy instead of samples.
        """
        counts = torch.bincount(x_0[:, 0].long(), minlength=self.num_states).to(torch.float64)
        n, target = counts.sum(), self.target(prompt)
        pairs = (counts * (counts - 1.0)).sum() / (n * (n - 1.0))
        return float(pairs - 2.0 * (counts * target).sum() / n + target.square().sum())

    def paths(self) -> tuple[Tensor, Tensor]:
        """Every path of p_ref with its log-probability: states (M, T+1) long, noise first, and log p (M,), nats."""
        states, log_p = torch.tensor([[self.kernel.start]]), torch.zeros(1, dtype=torch.float64)
        for step in self.log_p_ref:
            reached = log_p[:, None] + step[states[:, -1]]
            row, following = reached.isfinite().nonzero(as_tuple=True)
            states, log_p = torch.cat([states[row], following[:, None]], 1), reached[row, following]
        return states, log_p
