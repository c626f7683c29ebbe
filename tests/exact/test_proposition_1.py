"""Proposition 1 and Eq. 6, 26 to 30, by enumeration and in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from vmpo.objectives import OBJECTIVES, Objective
from vmpo.potentials import difference, return_to_go, terminal

torch.set_num_threads(1)
BETA = 0.37
LOG_VARIANCE = OBJECTIVES["log_variance"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(f(at), at)[0]


# --- one transition, categorical ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Categorical:
    """Everything of one transition over n states, with the factors a mistake could change."""

    theta: Tensor
    log_p_ref: Tensor
    reward: Tensor
    beta: float = BETA
    half: float = 0.5
    ref: float = 1.0

    def log_w(self, theta: Tensor) -> Tensor:
        return self.ref * self.log_p_ref - theta.log_softmax(-1) + self.reward / self.beta

    def half_variance(self, theta: Tensor, h: Tensor) -> Tensor:
        log_w = self.log_w(theta)
        return self.half * (h * (log_w - (h * log_w).sum()) ** 2).sum()


def categorical(n: int = 5) -> Categorical:
    return Categorical(draw(1, n), draw(2, n).log_softmax(-1), draw(3, n))


def kl_to_tilted(world: Categorical, theta: Tensor) -> Tensor:
    log_p, log_tilt = theta.log_softmax(-1), (world.log_p_ref + world.reward / BETA).log_softmax(-1)
    return (log_p.exp() * (log_p - log_tilt)).sum()


def assert_proposition_1(world: Categorical) -> None:
    h = world.theta.softmax(-1)
    got = gradient(lambda theta: world.half_variance(theta, h), world.theta)
    torch.testing.assert_close(got, gradient(lambda theta: kl_to_tilted(world, theta), world.theta))


def test_gradient_of_half_the_variance_is_that_of_kl_categorical() -> None:
    assert_proposition_1(categorical())


@pytest.mark.parametrize("change", [{"beta": 1.0}, {"half": 1.0}, {"ref": 0.0}, {"ref": -1.0}])
def test_proposition_1_fails_with_a_factor_changed(change: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        assert_proposition_1(replace(categorical(), **change))


def test_off_policy_the_gradients_differ_but_the_optimum_does_not() -> None:
    world, h = categorical(), draw(4, 5).softmax(-1)
    off = gradient(lambda theta: world.half_variance(theta, h), world.theta)
    assert (off - gradient(lambda theta: kl_to_tilted(world, theta), world.theta)).norm() > 1e-2
    optimum = world.log_p_ref + world.reward / BETA
    assert world.half_variance(optimum, h) < 1e-24 < 1e-3 < world.half_variance(world.theta, h)


# --- one transition, Gaussian ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [0.0, 0.8], ids=["linear", "quadratic"])
def test_gradient_of_half_the_variance_is_that_of_kl_gaussian(curvature: float) -> None:
    """Two dimensions; the log-weight is a quadratic, its square a quartic: Gauss–Hermite with 5 nodes is exact."""
    mean_ref, std_ref, slope = draw(5, 2), 1.3, draw(6, 2)
    theta = torch.cat([draw(7, 2), torch.tensor([-0.2], dtype=torch.float64)])  # mean and log std

    def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (-((x - mean) ** 2) / (2 * std**2) - std.log()).sum(-1)  # 2π cancels

    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(5))
    grid = torch.cartesian_prod(nodes, nodes)
    h = torch.cartesian_prod(weights, weights).prod(-1) / (2 * torch.pi)
    x = theta[:2] + theta[2].exp() * grid
    tempered = (x @ slope - curvature / 2 * (x**2).sum(-1)) / BETA

    def half_variance(at: Tensor) -> Tensor:
        ref = log_normal(x, mean_ref, torch.tensor(std_ref, dtype=torch.float64))
        log_w = ref - log_normal(x, at[:2], at[2].exp()) + tempered
        return 0.5 * (h * (log_w - (h * log_w).sum()) ** 2).sum()

    def kl(at: Tensor) -> Tensor:
        precision = 1 / std_ref**2 + curvature / BETA
        mean = (mean_ref / std_ref**2 + slope / BETA) / precision
        variance = (2 * at[2]).exp()
        return (0.5 * precision * (variance + (at[:2] - mean) ** 2) - at[2]).sum()

    torch.testing.assert_close(gradient(half_variance, theta), gradient(kl, theta), rtol=1e-10, atol=1e-10)


# --- groups of K samples --------------------------------------------------------------------------------------------


def row_gradient(objective: Objective, theta: Tensor, log_p_of: Callable[[Tensor], Tensor], **given: Tensor) -> Tensor:
    """Gradient of the weighted row losses, with each group's mean weighted by its probability."""
    group, probability = given["group"], given["probability"]
    log_p = log_p_of(theta).detach()
    centre = given.get("centre")
    terms = objective.rows(log_p, given["log_p_ref"], given["delta_phi"], group, centre)
    weight = terms.weight * (len(probability) * probability)[group, None]

    def total(at: Tensor) -> Tensor:
        new = log_p_of(at)
        value = None if centre is None else centre.expand_as(new)
        return (weight * objective.row_loss(new, log_p, terms.advantage, value)).sum()

    return gradient(total, theta)


def tuples(log_h: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """All K-tuples of outcomes: outcome of each row, its group, and each tuple's probability."""
    outcome = torch.tensor(list(product(range(len(log_h)), repeat=K)))
    return outcome.flatten(), torch.arange(len(outcome)).repeat_interleave(K), log_h[outcome].sum(1).exp()


def sampled(world: Categorical, objective: Objective, log_h: Tensor, K: int = 3) -> Tensor:
    outcome, group, probability = tuples(log_h, K)
    return row_gradient(
        objective,
        world.theta,
        lambda theta: theta.log_softmax(-1)[outcome][:, None],
        log_p_ref=world.log_p_ref[outcome][:, None],
        delta_phi=return_to_go(world.reward[outcome], 1, world.beta),
        group=group,
        probability=probability,
    )


def test_the_sampled_gradient_is_unbiased_for_the_kl() -> None:
    world = categorical(4)
    expected = gradient(lambda theta: kl_to_tilted(world, theta), world.theta)
    torch.testing.assert_close(sampled(world, LOG_VARIANCE, world.theta.log_softmax(-1)), expected)


@pytest.mark.parametrize("changed", [{"bessel": False}, {"beta": 1.0}, {"anchor": "none"}])
def test_unbiasedness_fails_with_a_factor_changed(changed: dict[str, object]) -> None:
    world = categorical(4)
    expected = gradient(lambda theta: kl_to_tilted(world, theta), world.theta)
    if "beta" in changed:
        world, objective = replace(world, beta=1.0), LOG_VARIANCE
    else:
        objective = replace(LOG_VARIANCE, **changed)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sampled(world, objective, world.theta.log_softmax(-1)), expected)


def test_estimate_and_gradient_are_unbiased_for_the_variance_under_any_h() -> None:
    """Divided by K−1 the estimator of Eq. 5 is itself unbiased, on-policy and off."""
    world, log_h = categorical(4), draw(9, 4).log_softmax(-1)
    expected = gradient(lambda theta: world.half_variance(theta, log_h.exp()), world.theta)
    torch.testing.assert_close(sampled(world, LOG_VARIANCE, log_h), expected)
    outcome, _, probability = tuples(log_h, 3)
    estimate = 0.5 * world.log_w(world.theta)[outcome].view(-1, 3).var(1)
    torch.testing.assert_close((probability * estimate).sum(), world.half_variance(world.theta, log_h.exp()))


def test_the_forms_of_the_sampled_gradient_agree() -> None:
    """Eq. 26, 28 and 29, and the zero expectation of Eq. 30."""
    world, K = categorical(6), 5
    outcome = torch.tensor([0, 3, 3, 5, 1])
    direct = gradient(lambda theta: 0.5 * world.log_w(theta)[outcome].var(), world.theta)
    score = torch.stack([gradient(lambda theta, o=o: theta.log_softmax(-1)[o], world.theta) for o in outcome])
    f = world.log_w(world.theta)[outcome]
    eq_28 = -((f - f.mean())[:, None] * score).sum(0) / (K - 1)
    eq_29 = -((f / K - (f.sum() - f) / (K * (K - 1)))[:, None] * score).sum(0)
    torch.testing.assert_close(direct, eq_28)
    torch.testing.assert_close(direct, eq_29)
    every = torch.stack([gradient(lambda theta, o=o: theta.log_softmax(-1)[o], world.theta) for o in range(6)])
    assert (world.theta.softmax(-1) @ every).abs().max() < 1e-15


# --- a chain of two transitions ---------------------------------------------------------------------------------------


class Chain:
    """x_T -> x_1 -> x_0 over three states with tabular transitions; all 27 paths are enumerated."""

    def __init__(self) -> None:
        self.theta, self.log_p_ref = draw(21, 2, 3, 3), draw(22, 2, 3, 3).log_softmax(-1)
        self.log_start, self.reward = draw(23, 3).log_softmax(-1), draw(24, 3)
        self.paths = torch.tensor(list(product(range(3), repeat=3)))

    def on_paths(self, table: Tensor) -> Tensor:
        """Steps' log densities on every path, (27, 2)."""
        a, b, c = self.paths.T
        return torch.stack([table[0, a, b], table[1, b, c]], 1)

    def log_path(self, theta: Tensor) -> Tensor:
        return self.log_start[self.paths[:, 0]] + self.on_paths(theta.log_softmax(-1)).sum(1)

    def soft_values(self) -> Tensor:
        """beta·log E_ref[exp(r/beta) | x] of each state on every path, (27, 3)."""
        v_1 = (self.log_p_ref[1] + self.reward / BETA).logsumexp(-1)
        v_T = (self.log_p_ref[0] + v_1).logsumexp(-1)
        a, b, c = self.paths.T
        return torch.stack([BETA * v_T[a], BETA * v_1[b], self.reward[c]], 1)

    def expected_gradient(self, objective: Objective, delta_phi: Tensor) -> Tensor:
        """On-policy expectation over all pairs of paths (K = 2)."""
        path, group, probability = tuples(self.log_path(self.theta), 2)
        return row_gradient(
            objective,
            self.theta,
            lambda theta: self.on_paths(theta.log_softmax(-1))[path],
            log_p_ref=self.on_paths(self.log_p_ref)[path],
            delta_phi=delta_phi[path],
            group=group,
            probability=probability,
            **({"centre": torch.tensor([0.4, -1.1], dtype=torch.float64)} if objective.centre == "learned" else {}),
        )

    def local_kl(self, theta: Tensor, values: Tensor | None = None) -> Tensor:
        """Σ_t E_{x_t}[KL(p_theta(·|x_t) ‖ p_ref·exp(values of x_{t-1}/beta))], the law of x_t held fixed."""
        p = self.log_path(self.theta).exp()
        log_p = theta.log_softmax(-1)
        a, b, _ = self.paths.T
        log_target = self.log_p_ref if values is None else self.log_p_ref + values[:, None, :] / BETA
        kl = (log_p.exp() * (log_p - log_target)).sum(-1)
        return (p * (kl[0, a] + kl[1, b])).sum()

    def expected_reward(self, theta: Tensor) -> Tensor:
        return (self.log_path(theta).exp() * self.reward[self.paths[:, 2]]).sum()

    def path_kl(self, theta: Tensor) -> Tensor:
        log_path = self.log_path(theta)
        log_tilt = self.log_start[self.paths[:, 0]] + self.on_paths(self.log_p_ref).sum(1)
        return (log_path.exp() * (log_path - log_tilt - self.reward[self.paths[:, 2]] / BETA)).sum()


@pytest.mark.parametrize(("per_step", "temperature"), [(False, BETA), (True, 2 * BETA)])
def test_step_level_return_to_go_descends_the_steps_kl_minus_the_reward(per_step: bool, temperature: float) -> None:
    """Eq. 15 at temperature beta without the factor 1/S, and at S·beta with it."""
    chain = Chain()
    delta_phi = return_to_go(chain.reward[chain.paths[:, 2]], 2, BETA, per_step=per_step)
    expected = gradient(lambda t: chain.local_kl(t) - chain.expected_reward(t) / temperature, chain.theta)
    torch.testing.assert_close(chain.expected_gradient(LOG_VARIANCE, delta_phi), expected)


def test_trajectory_log_variance_descends_the_kl_of_paths_to_the_tilted_law() -> None:
    chain = Chain()
    delta_phi = terminal(chain.reward[chain.paths[:, 2]], 2, BETA)
    got = chain.expected_gradient(OBJECTIVES["trajectory_log_variance"], delta_phi)
    torch.testing.assert_close(got, gradient(chain.path_kl, chain.theta))
    step = chain.expected_gradient(LOG_VARIANCE, return_to_go(chain.reward[chain.paths[:, 2]], 2, BETA, False))
    assert (step - got).norm() > 1e-2  # a step-level weight does not see the KL of the steps that follow


def test_a_noise_term_is_a_control_variate() -> None:
    chain, objective = Chain(), OBJECTIVES["trajectory_log_variance"]
    reward, shift = chain.reward[chain.paths[:, 2]], draw(30, 3)[chain.paths[:, 0]]
    plain = chain.expected_gradient(objective, difference(torch.stack([0 * shift, reward, reward], 1), BETA))
    shifted = chain.expected_gradient(objective, difference(torch.stack([shift, reward, reward], 1), BETA))
    torch.testing.assert_close(plain, shifted)


def test_vmpo_diff_descends_the_kl_to_each_steps_tilted_kernel() -> None:
    """2/S times the gradient of Σ_t KL, whatever M(t): Eq. 8 has no ½ and averages over steps."""
    chain = Chain()
    values = chain.soft_values()
    table = torch.stack([values[[0, 3, 6], 1], chain.reward])
    expected = gradient(lambda theta: chain.local_kl(theta, table), chain.theta)
    got = chain.expected_gradient(OBJECTIVES["vmpo_diff"], difference(values, BETA))
    torch.testing.assert_close(got, 2 / 2 * expected)


def test_grpo_on_policy_is_the_reward_gradient_shrunk_by_the_leave_one_out_factor() -> None:
    chain, K = Chain(), 2
    delta_phi = return_to_go(chain.reward[chain.paths[:, 2]], 2, BETA, per_step=False)
    got = chain.expected_gradient(OBJECTIVES["grpo"], delta_phi)
    torch.testing.assert_close(got, -(K - 1) / K * gradient(chain.expected_reward, chain.theta) / BETA)
