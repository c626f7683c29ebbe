"""A Gaussian mixture on a lattice with a separable reward: two dimensions that factorise into chains on the line."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.exact.mixture_correction import MixtureCorrection, MixtureStateFunction
from vmpo.exact.quadrature import Interpolant, LineChain
from vmpo.exact.world import Truth, World, WorldPolicy, check_betas
from vmpo.kernels import DDIM, ddim_schedule
from vmpo.kernels.schedules import NUM_TRAIN_TIMESTEPS


class Mixture(World):
    """Modes {−4, 0, 4}² with variance 0.3 an axis, r(x) = −x²/100 − y², beta 1: the first mixture of DAS.

    The chain is DDIM with eta 1 on the linear DDPM schedule with the exact ε of the mixture; it starts at timestep 999
    and its last step goes to ᾱ_0 = 0.9999, so every step has a density. Modes, noise and reward are separable, hence so
    is the tilted chain: its law and its soft values are sums over the axes, by quadrature on the line.

    The T steps are not the data: `truth` is of the chain, `data_truth` of the mixture.

        T         10        25        50       100      data
        log Z   −1.1475   −1.2937   −1.3585   −1.3961   −1.4397
        E r     −0.2481   −0.2589   −0.2703   −0.2788   −0.2907     (DAS: −0.2916, from samples on a grid)
        KL       0.8995    1.0348    1.0883    1.1174    1.1490
        E_ref r −8.628   −10.087   −10.575   −10.822   −11.076

    Source: Kim, Kim & Park, 2025, "Test-time alignment of diffusion models without reward over-optimization",
    arXiv:2501.05803 (data, reward, schedule and the figure −0.2916; it trains a network and runs 100 steps).

    Args:
        num_steps: T, 2 to 999.
        beta: reward temperature.
        rates: a of r(x) = −Σ_d a_d x_d², one an axis, 0 or more.
        centres: of the modes on every axis.
        variance: of a mode on every axis.
        name: of the world.

    Raises:
        UserError: a step without noise, a negative rate, a variance that is not above 0.
    """

    kind = "Gaussian mixture on a lattice with a quadratic reward (DAS's first)"
    continuous = True
    kernel: DDIM

    def __init__(
        self,
        num_steps: int = 50,
        beta: float = 1.0,
        *,
        rates: tuple[float, ...] = (0.01, 1.0),
        centres: tuple[float, ...] = (-4.0, 0.0, 4.0),
        variance: float = 0.3,
        name: str = "mixture",
    ) -> None:
        if not variance > 0 or min(rates) < 0:
            raise UserError(f"variance {variance:g}, rates {rates}: above 0, and 0 or more")
        betas = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
        steps = ddim_schedule((1.0 - betas).cumprod(0), num_steps, spacing="trailing")
        kernel = DDIM(steps.alpha_bar, steps.alpha_bar_prev, steps.timesteps, eta=1.0)
        super().__init__(name, ["prompt 0"], kernel, beta, (len(rates),))
        self.rates = torch.tensor(rates, dtype=torch.float64)
        self.centres, self.variance = torch.tensor(centres, dtype=torch.float64), variance

    # --- the reference chain --------------------------------------------------------------------------------------

    def _epsilon(self, x: Tensor, step: Tensor) -> Tensor:
        """(x − a x̂_0)/b with the exact x̂_0 = E[x_0 | x_t] of the mixture, an axis at a time; x (N, D), step (N,)."""
        alpha_bar = self.kernel.alpha_bar[step][:, None]
        signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        marginal = alpha_bar * self.variance + 1.0 - alpha_bar
        # modes come first: a softmax over a last dimension of three is ten times slower
        distance = x - signal * self.centres[:, None, None]
        weight = (-0.5 * distance.square() / marginal).softmax(0)
        # a mode answers c + a v d / marginal; x − a times that is (1 − ᾱ) d / marginal
        return noise * (weight * distance).sum(0) / marginal

    def _line(self) -> LineChain:
        """One axis of p_ref; the axes differ in their reward only."""

        def mean(k: int, x: Tensor) -> Tensor:
            column, step = x.reshape(-1, 1), torch.full((x.numel(),), k)
            return self.kernel.transition(column, self._epsilon(column, step), step).mean.reshape(x.shape)

        return LineChain(mean, self.kernel.std)

    # --- policies -------------------------------------------------------------------------------------------------

    def policy(self, seed: int = 0) -> WorldPolicy:
        """The exact ε with other weights, centres and variances of the modes at every step; no randomness in it."""
        correction = MixtureCorrection(self.kernel.alpha_bar, len(self.rates), self.centres, self.variance)
        return WorldPolicy(self.kernel, self.prompts, self.state_shape, self._epsilon, correction)

    def state_function(self, seed: int = 0) -> nn.Module:
        """The log-ratio of two mixtures at every position."""
        alpha_bar = torch.cat([self.kernel.alpha_bar, self.kernel.alpha_bar_prev[-1:]])
        return MixtureStateFunction(alpha_bar, len(self.rates), self.centres, self.variance)

    # --- the tilted law -------------------------------------------------------------------------------------------

    def reward(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        return -(x_0.to(torch.float64).square() * self.rates).sum(-1)

    @cached_property
    def _values(self) -> list[list[Interpolant]]:
        """V_k/beta of each axis, [axis][k]."""
        return [self._line().log_values(-rate / self.beta) for rate in self.rates.tolist()]

    def soft_value(self, k: int, x: Tensor, prompt: Tensor) -> Tensor:
        self._check_position(k)
        if k == self.kernel.num_steps:
            return self.reward(x, prompt)
        x = x.to(torch.float64)
        return self.beta * torch.stack([axis[k](x[:, d]) for d, axis in enumerate(self._values)]).sum(0)

    @cached_property
    def _law(self) -> tuple[Tensor, Tensor]:
        """Nodes (n,) and log p_ref(x_0) of one axis (n,)."""
        return self._line().law()

    def _tilted(self, beta: float) -> tuple[Tensor, Tensor]:
        """Of each axis: log Z (D,), and the log density of the tilted law at the nodes (D, n)."""
        nodes, log_ref = self._law
        joint = log_ref - self.rates[:, None] / beta * nodes.square()
        log_z = torch.logsumexp(joint, 1) + torch.log(nodes[1] - nodes[0])
        return log_z, joint - log_z[:, None]

    def frontier(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        nodes, _ = self._law
        spacing = nodes[1] - nodes[0]
        kls, rewards = [], []
        for beta in check_betas(betas).tolist():
            log_z, log_law = self._tilted(beta)
            reward = -(log_law.exp() * self.rates[:, None] * nodes.square()).sum() * spacing
            rewards.append(reward)
            kls.append(reward / beta - log_z.sum())
        return torch.stack(kls)[:, None], torch.stack(rewards)[:, None]

    def density(self, x_0: Tensor) -> Tensor:
        """p_tilt(x_0) of the chain at points (..., D); (...)."""
        nodes, _ = self._law
        _, log_law = self._tilted(self.beta)
        x = x_0.to(torch.float64)
        return torch.stack([Interpolant.of(nodes, axis)(x[..., d]) for d, axis in enumerate(log_law)]).sum(0).exp()

    def sample_target(self, n: int, prompt: int, seed: int) -> Tensor:
        nodes, _ = self._law
        _, log_law = self._tilted(self.beta)
        u = torch.rand(n, len(self.rates), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return torch.stack([_inverse_cdf(nodes, axis.exp(), u[:, d]) for d, axis in enumerate(log_law)], 1)

    def data_truth(self) -> Truth:
        """The tilted law of the mixture itself, without a chain, in closed form: a mode tilted by a square is a normal.

        On an axis, with A = 2a/beta: variance v/(1 + A v), mean c/(1 + A v), weight exp(−½ A c²/(1 + A v))/√(1 + A v).
        """
        rate, squares = self.rates[:, None], self.centres.square()
        shrink = 1.0 + 2.0 * rate / self.beta * self.variance
        log_weight = -rate / self.beta * squares / shrink - 0.5 * shrink.log()
        log_z = (torch.logsumexp(log_weight, 1) - math.log(len(squares))).sum()
        second = self.variance / shrink + squares / shrink.square()
        reward = -(log_weight.softmax(1) * rate * second).sum()
        reward_ref = -(rate * (self.variance + squares.mean())).sum()
        return Truth(*(value.reshape(1) for value in (log_z, reward, reward / self.beta - log_z, reward_ref)))


def _inverse_cdf(nodes: Tensor, density: Tensor, u: Tensor) -> Tensor:
    """Quantiles u of a density at equally spaced nodes, its distribution function linear between them."""
    cumulative = torch.cat([density.new_zeros(1), (0.5 * (density[1:] + density[:-1])).cumsum(0)])
    target = u * cumulative[-1]
    right = torch.searchsorted(cumulative, target, right=True).clamp(1, len(nodes) - 1)
    low, high = cumulative[right - 1], cumulative[right]
    share = (target - low) / (high - low).clamp(min=torch.finfo(density.dtype).tiny)
    return nodes[right - 1] + share * (nodes[right] - nodes[right - 1])
