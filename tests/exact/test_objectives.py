"""Identities between methods, the variance bound, and a chain whose optimum is known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vmpo.log_weights import LogWeights
from vmpo.objectives import OBJECTIVES, LearnedCentre, Objective
from vmpo.potentials import difference, initial_log_potential, return_to_go, terminal

torch.set_num_threads(1)
BETA, S = 0.37, 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def coefficients(objective: Objective, log_p: Tensor, log_p_ref: Tensor, delta_phi: Tensor, group: Tensor) -> Tensor:
    """d loss / d log p_theta of every row at ratio 1, (N, S)."""
    log_w = log_p_ref - log_p + delta_phi
    centre = log_w.mean(0) if objective.centre == "learned" else None
    terms = objective.rows(log_p, log_p_ref, delta_phi, group, centre)
    new = log_p.clone().requires_grad_()
    loss = objective.row_loss(new, log_p, terms.advantage, None if centre is None else centre.expand_as(new))
    return torch.autograd.grad((terms.weight * loss).sum(), new)[0]


# --- Eq. 34 and 37 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_trajectory_variance_is_at_most_s_times_the_steps_sum(seed: int) -> None:
    log_w = draw(seed, 20, S) @ draw(seed + 50, S, S) + draw(seed + 90, 20, 1)
    weights = LogWeights(log_w, torch.arange(20) % 3)
    assert (weights.group_variance <= S * weights.step_variance.sum(1) + 1e-12).all()


def test_the_bound_is_tight_for_steps_that_agree_and_needs_its_factor() -> None:
    log_w = draw(3, 8, 1).expand(8, S)
    weights = LogWeights(log_w, torch.zeros(8))
    torch.testing.assert_close(weights.group_variance, S * weights.step_variance.sum(1))
    assert (weights.group_variance > 1.5 * weights.step_variance.sum(1)).all()


# --- methods against each other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vmpo_clipped", "grpo", "grpo_std"])
def test_clipped_at_ratio_one_is_reinforce(name: str) -> None:
    objective, log_p, log_p_ref, delta_phi = OBJECTIVES[name], draw(1, 9, S), draw(2, 9, S), draw(3, 9, S)
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
    terms = objective.rows(log_p, log_p_ref, delta_phi, group)
    expected = -terms.weight * terms.advantage
    torch.testing.assert_close(coefficients(objective, log_p, log_p_ref, delta_phi, group), expected)


def test_grpo_advantage_is_a_shrunk_leave_one_out_advantage() -> None:
    K, reward = 5, draw(4, 5)
    terms = OBJECTIVES["grpo"].rows(None, draw(1, K, S), return_to_go(reward, S, BETA, False), torch.zeros(K))
    others = (reward.sum() - reward) / (K - 1)
    torch.testing.assert_close(terms.advantage, ((K - 1) / K * (reward - others) / BETA)[:, None].expand(K, S))


def test_standardised_advantages_have_unit_spread() -> None:
    delta_phi = return_to_go(draw(4, 7), S, BETA, False)
    terms = OBJECTIVES["grpo_std"].rows(None, draw(1, 7, S), delta_phi, torch.zeros(7))
    std = delta_phi.std(0, correction=0)
    torch.testing.assert_close(terms.advantage.std(0, correction=0), std / (std + 1e-4))


def test_equal_rewards_give_a_standardised_advantage_of_zero() -> None:
    terms = OBJECTIVES["grpo_std"].rows(None, draw(1, 7, S), torch.full((7, S), 0.83), torch.zeros(7))
    assert terms.mask.all()
    assert terms.advantage.abs().max() < 1e-2


def test_vmpo_with_its_centre_at_the_mean_is_scaled_log_variance() -> None:
    """mean over K·S rows of −2A ∇log p against 1/(K−1) Σ −A ∇log p: the ratio is 2(K−1)/(K·S)."""
    K = 5
    matrices = draw(1, K, S), draw(2, K, S), draw(3, K, S) / BETA
    vmpo = coefficients(OBJECTIVES["vmpo_r2g"], *matrices, torch.zeros(K))
    log_variance = coefficients(OBJECTIVES["log_variance"], *matrices, torch.zeros(K))
    torch.testing.assert_close(vmpo, 2 * (K - 1) / (K * S) * log_variance)


def test_vmpo_clipped_at_ratio_one_is_log_variance() -> None:
    matrices, group = (draw(1, 9, S), draw(2, 9, S), draw(3, 9, S)), torch.arange(9) % 2
    clipped, plain = (coefficients(OBJECTIVES[n], *matrices, group) for n in ("vmpo_clipped", "log_variance"))
    torch.testing.assert_close(clipped, plain)


def test_one_step_trajectories_make_the_levels_one() -> None:
    matrices, group = (draw(1, 9, 1), draw(2, 9, 1), draw(3, 9, 1)), torch.arange(9) % 2
    step, whole = (coefficients(OBJECTIVES[n], *matrices, group) for n in ("log_variance", "trajectory_log_variance"))
    torch.testing.assert_close(step, whole)


@pytest.mark.parametrize("level", ["step", "trajectory"])
def test_the_centre_that_minimises_the_squared_loss_is_the_mean(level: str) -> None:
    """Eq. 7: at its data-dependent start M has no gradient."""
    objective = Objective("any", level, "learned", "squared", "difference")  # type: ignore[arg-type]
    log_p, log_p_ref, delta_phi = draw(1, 8, S), draw(2, 8, S), 30 + draw(3, 8, S)
    centre = LearnedCentre(S, objective.level).double()
    centre.initialise(log_p_ref - log_p + delta_phi)
    terms = objective.rows(log_p, log_p_ref, delta_phi, torch.zeros(8), centre().detach())
    (terms.weight * objective.row_loss(log_p, log_p, terms.advantage, centre().expand(8, S))).sum().backward()
    assert centre.value.grad is not None
    assert centre.value.grad.abs().max() < 1e-12


# --- a linear-Gaussian chain ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianChain:
    """x_{s+1} ~ N(a_s x_s, σ_s²) under the reference; r(x_0) = b·x_0 − q·x_0²/2, so every soft value is quadratic.

    `soft_values` holds (Q, B, C) before each step: the soft value in nats is −Q x²/2 + B x + C.
    """

    a: tuple[float, ...] = (0.9, 1.2, 0.7)
    std: tuple[float, ...] = (0.8, 0.5, 0.6)
    b: float = 0.45
    q: float = 0.3

    def soft_values(self) -> list[tuple[float, float, float]]:
        Q, B, C = self.q / BETA, self.b / BETA, 0.0
        values = [(Q, B, C)]
        for a, std in zip(reversed(self.a), reversed(self.std), strict=True):
            precision = 1 / std**2 + Q
            C += 0.5 * B**2 / precision - 0.5 * torch.tensor(precision * std**2, dtype=torch.float64).log().item()
            Q, B = a**2 / std**2 - (a / std**2) ** 2 / precision, a * B / (std**2 * precision)
            values.insert(0, (Q, B, C))
        return values

    def rollout(self, x: Tensor, seed: int, optimal: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """States (N, S+1) under the optimal policy or the reference, log p_theta and log p_ref (N, S)."""
        states, log_p, log_p_ref = [x], [], []
        for s, (a, std) in enumerate(zip(self.a, self.std, strict=True)):
            Q, B, _ = self.soft_values()[s + 1] if optimal else (0.0, 0.0, 0.0)
            precision = 1 / std**2 + Q
            p = torch.distributions.Normal((a * x / std**2 + B) / precision, precision**-0.5)
            x_next = p.mean + p.stddev * draw(seed + s, len(x))
            log_p.append(p.log_prob(x_next))
            log_p_ref.append(torch.distributions.Normal(a * x, std).log_prob(x_next))
            states.append(x_next)
            x = x_next
        return torch.stack(states, 1), torch.stack(log_p, 1), torch.stack(log_p_ref, 1)

    def reward(self, x_0: Tensor) -> Tensor:
        return self.b * x_0 - self.q / 2 * x_0**2

    def values(self, states: Tensor) -> Tensor:
        """Soft values in units of reward, (N, S+1)."""
        columns = [
            BETA * (-Q / 2 * x**2 + B * x + C) for x, (Q, B, C) in zip(states.T, self.soft_values(), strict=True)
        ]
        return torch.stack(columns, 1)


GROUP = torch.arange(24) // 8


def optimum(*, shared_noise: bool) -> tuple[GaussianChain, Tensor, Tensor]:
    """The chain, states and log p_ref − log p* of 3 groups of 8; one x_T a group, or one a sample."""
    chain = GaussianChain()
    start = draw(40, 24)
    states, log_p, log_p_ref = chain.rollout(start[GROUP * 8] if shared_noise else start, seed=60)
    return chain, states, log_p_ref - log_p


def test_at_the_optimum_trajectory_weights_are_constant_and_log_z_is_exact() -> None:
    chain, states, log_ratio = optimum(shared_noise=True)
    log_z = chain.values(states)[::8, 0] / BETA
    for delta_phi in (
        terminal(chain.reward(states[:, -1]), S, BETA),
        return_to_go(chain.reward(states[:, -1]), S, BETA),
    ):
        weights = LogWeights(log_ratio + delta_phi, GROUP)
        assert weights.group_variance.max() < 1e-10
        assert (weights.ess - 1).abs().max() < 1e-10
        torch.testing.assert_close(weights.log_z, log_z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mutation", ["beta", "reference"])
def test_the_optimum_is_not_reached_with_a_factor_changed(mutation: str) -> None:
    chain, states, log_ratio = optimum(shared_noise=True)
    delta_phi = terminal(chain.reward(states[:, -1]), S, 1.0 if mutation == "beta" else BETA)
    weights = LogWeights(delta_phi + (0 if mutation == "reference" else log_ratio), GROUP)
    assert weights.group_variance.min() > 1e-3


def test_differences_of_soft_values_make_every_steps_weight_one() -> None:
    chain, states, log_ratio = optimum(shared_noise=False)
    values = chain.values(states)
    log_w = log_ratio + difference(values, BETA)
    assert log_w.abs().max() < 1e-10
    # without the x_T term the weights spread as the soft values of the starting noises do
    spread = LogWeights(log_w + 0, GROUP).trajectory() + initial_log_potential(values, BETA)
    torch.testing.assert_close(spread, values[:, 0] / BETA, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["log_variance", "trajectory_log_variance", "vmpo_diff", "vmpo_clipped"])
def test_the_optimum_has_no_gradient_under_its_soft_values(name: str) -> None:
    chain, states, log_ratio = optimum(shared_noise=False)
    delta_phi = difference(chain.values(states), BETA)
    zeros = torch.zeros_like(log_ratio)
    assert coefficients(OBJECTIVES[name], zeros, log_ratio, delta_phi, GROUP).abs().max() < 1e-10


def test_step_level_return_to_go_is_not_at_rest_at_the_tilted_law() -> None:
    """Its bound (Eq. 39) is loose there: r(x_0) is not known from one transition."""
    chain, states, log_ratio = optimum(shared_noise=True)
    weights = LogWeights(log_ratio + return_to_go(chain.reward(states[:, -1]), S, BETA), GROUP)
    assert weights.group_variance.max() < 1e-10
    assert weights.step_variance.sum(1).min() > 1e-2


def test_log_z_from_the_reference_estimates_the_closed_form() -> None:
    """E_ref[w] = Z: 4000 samples from one noise, within four standard errors."""
    chain = GaussianChain()
    states, _, _ = chain.rollout(torch.full((4000,), 0.3, dtype=torch.float64), seed=70, optimal=False)
    weights = LogWeights(terminal(chain.reward(states[:, -1]), S, BETA), torch.zeros(4000))
    error = ((1 / weights.ess.item() - 1) / 4000) ** 0.5
    assert abs(weights.log_z.item() - chain.values(states)[0, 0].item() / BETA) < 4 * error < 0.2
