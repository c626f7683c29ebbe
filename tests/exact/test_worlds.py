"""Every world's truth against something it was not computed from: samples, quadrature, enumeration, identities."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.exact import WORLDS, LinearGaussian, MaskedChain, Mixture, World, energy_distance, get_world
from vmpo.kernels import CPS, DDIM, FlowGRPOSDE, LinearKernel
from vmpo.rollouts import rollout_from_noise

MEAN = torch.tensor([0.4, -0.7], dtype=torch.float64)
COV = torch.tensor([[1.1, 0.5], [0.5, 0.6]], dtype=torch.float64)
SLOPE = torch.tensor([[0.6, -0.25], [-0.3, 0.8]], dtype=torch.float64)
CURVATURE = torch.tensor([[[0.5, 0.2], [0.2, 0.9]], [[0.7, -0.1], [-0.1, 0.3]]], dtype=torch.float64)
GAUSSIAN = ("gaussian-linear", "gaussian-quadratic", "gaussian-prompts")


@cache
def world(name: str) -> Any:
    return get_world(name)


def kernel(name: str) -> LinearKernel:
    """A kernel of six steps, all with noise; flow kernels stop short of sigma 0."""
    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.55, 0.4, 0.25, 0.1], dtype=torch.float64)
    alpha_bar = torch.tensor([1e-4, 0.02, 0.15, 0.4, 0.7, 0.9, 0.97], dtype=torch.float64)
    if name == "flow_grpo":
        return FlowGRPOSDE(sigmas, 0.6, last_step=True)
    if name == "cps":
        return CPS(sigmas, 0.7)
    return DDIM(alpha_bar[:-1], alpha_bar[1:], torch.arange(6, 0, -1), 0.85, name)


KERNELS = ("epsilon", "v", "sample", "flow_grpo", "cps")


@cache
def gaussian(name: str, quadratic: bool) -> LinearGaussian:
    return LinearGaussian(kernel(name), MEAN, COV, SLOPE, CURVATURE if quadratic else None, beta=0.37)


def chain(w: World, n: int, prompt: int = 0, policy: Any = None, seed: int = 0) -> Any:
    """n trajectories of a policy (p_ref's if None) from float64 noise."""
    noise_generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, w.kernel.num_steps + 1, *w.state_shape, dtype=torch.float64, generator=noise_generator)
    policy = w.policy() if policy is None else policy
    return rollout_from_noise(policy, w.kernel, policy.encode([w.prompts[prompt]] * n), noise, dtype=torch.float64)


def rows(prompt: int, n: int) -> Tensor:
    return torch.full((n,), prompt)


def values(w: World, x: Tensor, prompt: int = 0) -> Tensor:
    """V_k of every state of trajectories (N, T+1, *shape), in nats."""
    prompts = rows(prompt, len(x))
    return torch.stack([w.soft_value(k, x[:, k], prompts) for k in range(x.shape[1])], 1) / w.beta


def next_values(w: World, k: int, x: Tensor, prompt: int, degree: int = 40) -> Tensor:
    """beta log E_ref[exp(V_{k+1}/beta) | x_k = x] by Gauss–Hermite in two dimensions, x (N, 2)."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(degree))
    z = torch.cartesian_prod(nodes, nodes)
    log_weight = (torch.cartesian_prod(weights, weights) / math.sqrt(2 * math.pi)).log().sum(1)
    policy = w.policy()
    step = rows(k, len(x))
    p = w.kernel.transition(x, policy.predict(x, w.kernel.times[step], policy.encode(w.prompts[:1] * len(x))), step)
    reached = (p.mean[:, None] + p.std[:, None, None] * z).reshape(-1, 2)
    value = w.soft_value(k + 1, reached, rows(prompt, len(reached))).reshape(len(x), -1)
    return w.beta * torch.logsumexp(log_weight + value / w.beta, 1)


# --- all worlds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_the_policy_starts_as_the_reference(name: str) -> None:
    w = world(name)
    policy = w.policy(seed=3)
    x, k = chain(w, 12).x[:, 1], torch.arange(12) % w.kernel.num_steps
    conditioning, time = policy.encode([w.prompts[-1]] * 12), w.kernel.times[k]
    start = policy.predict(x, time, conditioning)
    assert start.dtype == torch.float64
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.add_(0.3)
    changed = policy.predict(x, time, conditioning)
    with policy.reference():
        with policy.reference():
            pass
        assert torch.equal(policy.predict(x, time, conditioning), start)
    assert torch.equal(policy.predict(x, time, conditioning), changed)
    assert not torch.allclose(changed, start)
    assert bool(changed.isfinite().all())
    each = [policy.predict(x[i : i + 1], time[i : i + 1], conditioning[i : i + 1]) for i in range(12)]
    torch.testing.assert_close(torch.cat(each), changed, rtol=1e-13, atol=1e-13)
    assert bool((policy.decode(x) == x).all())


@pytest.mark.parametrize("name", WORLDS)
def test_truth_is_consistent_and_on_its_frontier(name: str) -> None:
    w = world(name)
    truth = w.truth()
    torch.testing.assert_close(truth.kl, truth.reward / w.beta - truth.log_z, rtol=0, atol=1e-12)
    betas = torch.tensor([math.inf, 1e6, 2 * w.beta, w.beta, 0.5 * w.beta], dtype=torch.float64)
    kl, reward = w.frontier(betas)
    assert kl.shape == reward.shape == (5, len(w.prompts))
    torch.testing.assert_close(kl[3], truth.kl, rtol=0, atol=1e-12)
    torch.testing.assert_close(reward[3], truth.reward, rtol=0, atol=1e-12)
    torch.testing.assert_close(reward[0], truth.reward_ref, rtol=0, atol=1e-12)
    assert float(kl[:2].abs().max()) < 1e-9
    assert bool((kl.diff(dim=0)[1:] > 0).all())
    assert bool((reward.diff(dim=0)[1:] > 0).all())


@pytest.mark.parametrize("name", WORLDS)
def test_frontier_has_slope_beta(name: str) -> None:
    """dR/dKL = beta along the curve."""
    w = world(name)
    kl, reward = w.frontier(w.beta * torch.tensor([1 - 1e-4, 1 + 1e-4], dtype=torch.float64))
    slope = (reward[1] - reward[0]) / (kl[1] - kl[0])
    torch.testing.assert_close(slope, torch.full_like(slope, w.beta), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WORLDS)
def test_log_z_and_rewards_against_the_chain(name: str) -> None:
    """Reweighted samples of p_ref, and E_ref[exp(V_k/beta)] = Z at every position."""
    w = world(name)
    n = 40_000
    truth = w.truth()
    for prompt in range(len(w.prompts)):
        x = chain(w, n, prompt, seed=prompt + 1).x
        reward = w.reward(x[:, -1], rows(prompt, n))
        assert_mean(reward, truth.reward_ref[prompt])
        weight = (values(w, x, prompt) - truth.log_z[prompt]).exp()
        for k in range(x.shape[1]):
            assert_mean(weight[:, k], torch.tensor(1.0))
        ratio = weight[:, -1] * (reward - truth.reward[prompt])  # zero mean where the reweighted reward is right
        assert_mean(ratio, torch.tensor(0.0))


def assert_mean(samples: Tensor, expected: Tensor, z: float = 4.5) -> None:
    samples = samples.detach()
    error = samples.std() / math.sqrt(len(samples))
    assert abs(float(samples.mean() - expected)) < z * float(error) + 1e-12, (samples.mean(), expected, error)


@pytest.mark.parametrize("name", WORLDS)
def test_samples_of_the_target(name: str) -> None:
    """Their mean reward is the truth's, and they are what reweighting samples of p_ref gives in mean and square."""
    w = world(name)
    prompt, n = len(w.prompts) - 1, 40_000
    x = w.sample_target(n, prompt, seed=5)
    assert x.shape == (n, *w.state_shape)
    assert x.dtype == torch.float64
    assert torch.equal(x[:9], w.sample_target(n, prompt, seed=5)[:9])
    assert not torch.equal(x[:9], w.sample_target(n, prompt, seed=6)[:9])
    assert_mean(w.reward(x, rows(prompt, n)), w.truth().reward[prompt])
    base = chain(w, n, prompt, seed=11).x[:, -1]
    weight = (w.reward(base, rows(prompt, n)) / w.beta - w.truth().log_z[prompt]).exp()[:, None]
    for power in (1, 2):
        moment = (x**power).mean(0)
        for d in range(len(moment)):
            assert_mean((weight * (base**power - moment))[:, d], torch.tensor(0.0), z=6.0)


@pytest.mark.parametrize("name", WORLDS)
def test_distance_is_zero_at_the_target_only(name: str) -> None:
    w = world(name)
    near = w.distance(w.sample_target(3000, 0, seed=8), 0)
    far = w.distance(chain(w, 3000).x[:, -1], 0)
    assert abs(near) < 0.01
    assert far > 0.05


@pytest.mark.parametrize("name", WORLDS)
def test_the_state_function_starts_at_zero_and_is_deterministic(name: str) -> None:
    w = world(name)
    before = torch.random.get_rng_state()
    function, again = w.state_function(seed=2), w.state_function(seed=2)
    w.policy(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = chain(w, 6).x
    position = torch.arange(6) % x.shape[1]
    conditioning = w.policy().encode([w.prompts[-1]] * 6)
    out = function(x[torch.arange(6), position], position, conditioning)
    assert out.shape == (6,)
    assert out.dtype == torch.float64
    assert bool((out == 0).all())
    for one, other in zip(function.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    out.sum().backward()
    assert any(bool((p.grad != 0).any()) for p in function.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", WORLDS)
def test_positions_and_betas_are_checked(name: str) -> None:
    w = world(name)
    x = w.sample_target(2, 0, seed=0)
    for k in (-1, w.kernel.num_steps + 1):
        with pytest.raises(UserError, match="position"):
            w.soft_value(k, x, rows(0, 2))
    with pytest.raises(UserError, match="above 0"):
        w.frontier(torch.tensor([0.5, 0.0]))
    with pytest.raises(UserError, match="prompt 0"):
        w.policy().encode(["promt 0"])


def test_soft_value_ends_in_the_reward() -> None:
    for name in WORLDS:
        w = world(name)
        x = w.sample_target(50, 0, seed=0)
        end = w.soft_value(w.kernel.num_steps, x, rows(0, 50))
        torch.testing.assert_close(end, w.reward(x, rows(0, 50)), rtol=0, atol=1e-13)


def test_names_and_ranges_of_the_registry() -> None:
    assert list(WORLDS) == ["gaussian-linear", "gaussian-quadratic", "gaussian-prompts", "mixture", "masked"]
    assert all(world(name).name == name for name in WORLDS)
    assert 1.0 < float(world("gaussian-linear").truth().log_z) < 2.0
    assert 0.5 < float(world("gaussian-quadratic").truth().log_z) < 2.0
    log_z = world("gaussian-prompts").truth().log_z
    assert float(log_z.min()) == pytest.approx(0.3, abs=0.1)
    assert float(log_z.max()) == pytest.approx(3.0, abs=0.1)
    assert float(world("masked").truth().log_z) == pytest.approx(1.0, abs=0.2)
    with pytest.raises(UserError, match="'mixture'"):
        get_world("mixtur")


def test_a_step_without_noise_is_an_error() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    for silent in (CPS(sigmas, 0.7), FlowGRPOSDE(sigmas, 0.6), CPS(sigmas + 0.0, 0.0)):
        with pytest.raises(UserError, match="adds no noise"):
            LinearGaussian(silent, MEAN, COV, SLOPE, beta=0.37)
    with pytest.raises(UserError, match="adds no noise"):
        Mixture(1000)


def test_energy_distance_of_two_normals() -> None:
    """Unbiased: 2 E|X − Y| − E|X − X'| − E|Y − Y'| for N(0, 1) and N(1.3, 1), from the folded normal's mean."""
    generator = torch.Generator().manual_seed(0)
    found = [
        energy_distance(
            torch.randn(8, 1, dtype=torch.float64, generator=generator),
            torch.randn(6, 1, dtype=torch.float64, generator=generator) + 1.3,
        )
        for _ in range(8000)
    ]
    mean, scale = 1.3, math.sqrt(2.0)
    folded = scale * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * scale**2))
    folded += mean * math.erf(mean / (scale * math.sqrt(2.0)))
    assert_mean(torch.tensor(found, dtype=torch.float64), torch.tensor(2 * folded - 2 * 2 / math.sqrt(math.pi)))
    with pytest.raises(UserError, match="two or more"):
        energy_distance(torch.zeros(1, 2), torch.zeros(5, 2))


# --- linear-Gaussian --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_the_reference_is_the_exact_denoiser(name: str) -> None:
    """x̂_0 of the kernel is E[x_0 | x_t] of the data, by conditioning the joint Gaussian of (x_0, x_t)."""
    w = gaussian(name, False)
    policy = w.policy()
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    for k in range(6):
        step = torch.tensor([k])
        output = policy.predict(x, w.kernel.times[step], policy.encode(["prompt 1"]))
        signal, noise = (float(level[k]) for level in w.kernel.levels())
        joint = torch.cat([torch.eye(2, dtype=torch.float64), signal * torch.eye(2, dtype=torch.float64)])
        cov = joint @ COV @ joint.T
        cov[2:, 2:] += noise**2 * torch.eye(2, dtype=torch.float64)
        expected = MEAN + cov[:2, 2:] @ torch.linalg.inv(cov[2:, 2:]) @ (x[0] - signal * MEAN)
        torch.testing.assert_close(w.kernel.predict_x0(x, output, step)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_bellman_identity(name: str, quadratic: bool) -> None:
    w = gaussian(name, quadratic)
    x = torch.tensor([[0.3, -1.2], [1.9, 0.4], [-2.1, 2.6]], dtype=torch.float64)
    for k in range(6):
        for prompt in (0, 1):
            exact = w.soft_value(k, x, rows(prompt, 3))
            torch.testing.assert_close(exact, next_values(w, k, x, prompt), rtol=0, atol=1e-8)


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_soft_value_against_continued_chains(name: str, quadratic: bool) -> None:
    """Chains of p_ref from one state in the middle, E[exp(r/beta)] within its standard error."""
    w = gaussian(name, quadratic)
    n, k, prompt = 40_000, 3, 1
    generator = torch.Generator().manual_seed(7)
    start = torch.tensor([[0.6, -0.5]], dtype=torch.float64)
    x = start.expand(n, 2)
    policy = w.policy()
    conditioning = policy.encode(["prompt 1"] * n)
    for step in range(k, 6):
        at = rows(step, n)
        p = w.kernel.transition(x, policy.predict(x, w.kernel.times[at], conditioning), at)
        x = p.sample(torch.randn(n, 2, dtype=torch.float64, generator=generator))
    value = w.soft_value(k, start, torch.tensor([prompt]))
    assert_mean(((w.reward(x, rows(prompt, n)) - value) / w.beta).exp(), torch.tensor(1.0))


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_log_z_two_ways(name: str, quadratic: bool) -> None:
    """Backwards, as E[exp(V_0(x_T)/beta)], and forwards, by tilting p_ref(x_0)."""
    w = gaussian(name, quadratic)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(40))
    z = torch.cartesian_prod(nodes, nodes)
    log_weight = torch.cartesian_prod(weights, weights).log().sum(1) - math.log(2 * math.pi)
    for prompt in (0, 1):
        backwards = torch.logsumexp(log_weight + w.soft_value(0, z, rows(prompt, len(z))) / w.beta, 0)
        assert float(backwards) == pytest.approx(float(w.truth().log_z[prompt]), abs=1e-10)


@pytest.mark.parametrize("name", [*KERNELS, "gaussian-prompts"])
def test_the_optimal_policy_has_constant_weights(name: str) -> None:
    """log p_ref/p* + (V_{k+1} − V_k)/beta = 0 at every transition, so log w of a path is log Z up to x_T's V_0."""
    w = world(name) if name in WORLDS else gaussian(name, False)
    for prompt in range(len(w.prompts)):
        trajectory = chain(w, 64, prompt, w.optimal_policy())
        value = values(w, trajectory.x, prompt)
        log_w = trajectory.log_p_ref - trajectory.log_p_old + value.diff(dim=1)
        assert float(log_w.abs().max()) < 1e-10
        assert float(trajectory.kl_ref.sum(1).mean()) > 0.03
        k, x = 2, trajectory.x[:, 2]
        mean, cov = w.optimal_kernel(k, x, rows(prompt, 64))
        torch.testing.assert_close(mean, trajectory.mean_old[:, k], rtol=0, atol=1e-12)
        torch.testing.assert_close(mean - trajectory.mean_ref[:, k], w.optimal_shift(k)[rows(prompt, 64)])
        torch.testing.assert_close(cov, (w.kernel.std[k] ** 2 * torch.eye(2).double()).expand_as(cov))


@pytest.mark.parametrize("name", KERNELS)
def test_the_optimal_kernel_of_a_quadratic_reward(name: str) -> None:
    """log N(y; mean*, cov*) = log p_ref(y | x) + (V_{k+1}(y) − V_k(x))/beta for any x and y."""
    w = gaussian(name, True)
    generator = torch.Generator().manual_seed(1)
    x, y = (1.5 * torch.randn(20, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    policy, prompt = w.policy(), torch.arange(20) % 2
    conditioning = policy.encode([w.prompts[c] for c in prompt])
    for k in range(6):
        step = rows(k, 20)
        p_ref = w.kernel.transition(x, policy.predict(x, w.kernel.times[step], conditioning), step)
        expected = p_ref.log_prob(y) + (w.soft_value(k + 1, y, prompt) - w.soft_value(k, x, prompt)) / w.beta
        found = torch.distributions.MultivariateNormal(*w.optimal_kernel(k, x, prompt)).log_prob(y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)
    for call in (w.optimal_policy, lambda: w.optimal_shift(0)):
        with pytest.raises(UserError, match="linear"):
            call()


@pytest.mark.parametrize("name", GAUSSIAN)
def test_soft_values_are_differentiable(name: str) -> None:
    w = world(name)
    x, prompt = chain(w, 5).x, rows(len(w.prompts) - 1, 5)
    for k in (0, 4, 10):
        at = x[:, k].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, k=k: w.soft_value(k, v, prompt), (at,))
        assert torch.autograd.gradcheck(lambda v: w.reward(v, prompt), (at,))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_state_function_contains_the_soft_value(name: str) -> None:
    """A least-squares fit of its coefficients leaves nothing over."""
    w = world(name)
    function = w.state_function()
    prompt = len(w.prompts) - 1
    x = chain(w, 60, prompt).x
    conditioning = w.policy().encode([w.prompts[prompt]] * 60)
    for k in (0, 5, 10):
        position = rows(k, 60)
        with torch.no_grad():
            columns = []
            for feature in range(function.theta.shape[-1]):
                function.theta.zero_()
                function.theta[k, prompt, feature] = 1.0
                columns.append(function(x[:, k], position, conditioning))
            design = torch.stack(columns, 1)
            target = w.soft_value(k, x[:, k], position * 0 + prompt) / w.beta
            solution = torch.linalg.lstsq(design, target[:, None]).solution
            torch.testing.assert_close((design @ solution)[:, 0], target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["epsilon", "cps"])
def test_a_unit_of_bias_moves_the_mean_by_one_std(name: str) -> None:
    w = gaussian(name, False)
    policy = w.policy()
    with torch.no_grad():
        policy.denoiser.get_parameter("bias")[:, 1] = 1.0
    trajectory = chain(w, 5, 1, policy)
    moved = (trajectory.mean_old - trajectory.mean_ref) / w.kernel.std[:, None]
    torch.testing.assert_close(moved, torch.ones_like(moved))
    assert torch.equal(chain(w, 5, 0, policy).mean_old, chain(w, 5, 0, policy).mean_ref)


def test_bad_gaussians_are_errors() -> None:
    eps = kernel("epsilon")
    with pytest.raises(UserError, match="shapes"):
        LinearGaussian(eps, MEAN, COV, SLOPE[0], beta=0.37)
    with pytest.raises(UserError, match="cov"):
        LinearGaussian(eps, MEAN, -COV, SLOPE, beta=0.37)
    with pytest.raises(UserError, match="curvature"):
        LinearGaussian(eps, MEAN, COV, SLOPE, -CURVATURE, beta=0.37)
    with pytest.raises(UserError, match="beta"):
        LinearGaussian(eps, MEAN, COV, SLOPE, beta=0.0)


# --- mixture ----------------------------------------------------------------------------------------------------------


def test_the_mixture_reproduces_the_published_target() -> None:
    """DAS prints −0.2916, the mean reward of samples on a grid; the exact figure is −0.2907, 0.0009 above it."""
    truth = Mixture().data_truth()
    line = torch.linspace(-8, 8, 1000, dtype=torch.float64)
    log_p, reward = [], []
    for rate in (0.01, 1.0):
        modes = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
        normal = torch.distributions.Normal(modes, math.sqrt(0.3))
        log_p.append(torch.logsumexp(normal.log_prob(line[:, None]), 1) - math.log(3.0))
        reward.append(-rate * line.square())
    tilted = [(lp + r).softmax(0) for lp, r in zip(log_p, reward, strict=True)]
    on_grid = sum(float((p * r).sum()) for p, r in zip(tilted, reward, strict=True))
    log_z = sum(float(torch.logsumexp(lp + r, 0)) + math.log(16 / 999) for lp, r in zip(log_p, reward, strict=True))
    assert float(truth.reward) == pytest.approx(on_grid, abs=1e-9)
    assert float(truth.log_z) == pytest.approx(log_z, abs=1e-9)
    assert float(truth.reward) == pytest.approx(-0.2916, abs=1e-3)
    assert float(truth.reward_ref) == pytest.approx(-1.01 * (0.3 + 32 / 3), abs=1e-12)


@pytest.mark.parametrize(("steps", "log_z", "reward"), [(10, -1.1475, -0.2481), (25, -1.2937, -0.2589)])
def test_the_chain_is_not_the_data(steps: int, log_z: float, reward: float) -> None:
    """The figures of the docstring; both ways to log Z agree, and the gap to the data closes with more steps."""
    w = Mixture(steps)
    assert float(w.truth().log_z) == pytest.approx(log_z, abs=6e-5)
    assert float(w.truth().reward) == pytest.approx(reward, abs=6e-5)
    line = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(line) + math.log(0.01)
    along = [torch.stack([line, line * 0], 1), torch.stack([line * 0, line], 1)]
    origin = w.soft_value(0, torch.zeros(1, 2), rows(0, 1))
    both = [torch.logsumexp(log_normal + w.soft_value(0, x, rows(0, 1801)), 0) for x in along]
    # each sum holds the other axis at V_0(0), so it counts once too often
    assert float(sum(both) - origin) == pytest.approx(log_z, abs=6e-5)
    assert float(sum(both) - origin - w.truth().log_z) == pytest.approx(0.0, abs=1e-8)


def test_the_chain_nears_the_data() -> None:
    gaps = [abs(float(Mixture(steps).truth().log_z - Mixture().data_truth().log_z)) for steps in (10, 25, 50, 100)]
    assert gaps == pytest.approx([0.2921, 0.1460, 0.0811, 0.0435], abs=1e-3)


def test_the_mixture_network_is_the_exact_denoiser() -> None:
    """x̂_0 = Σ_modes p(mode | x_t) E[x_0 | x_t, mode], over all nine modes in two dimensions."""
    w = world("mixture")
    policy = w.policy()
    modes = torch.cartesian_prod(*[torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)] * 2)
    x = torch.tensor([[1.7, -0.9]], dtype=torch.float64)
    for k in range(0, 25, 4):
        step = torch.tensor([k])
        output = policy.predict(x, w.kernel.times[step], policy.encode(w.prompts))
        a = float(w.kernel.alpha_bar[k])
        var = a * 0.3 + 1 - a
        weight = (-(x - math.sqrt(a) * modes).square().sum(1) / (2 * var)).softmax(0)
        inside = modes + math.sqrt(a) * 0.3 / var * (x - math.sqrt(a) * modes)
        expected = (weight[:, None] * inside).sum(0, keepdim=True)
        torch.testing.assert_close(w.kernel.predict_x0(x, output, step), expected, rtol=1e-9, atol=1e-9)


def test_a_mixture_of_other_scalars() -> None:
    """Bellman's identity, log Z of the law by weighted samples of the chain, and the mixture's by a fine grid."""
    w = Mixture(8, beta=1.7, rates=(0.3, 0.05), centres=(-3.0, 1.0), variance=0.5)
    x = torch.tensor([[0.3, -1.2], [-1.1, 2.4]], dtype=torch.float64)
    for k in (0, 3, 7):
        exact = w.soft_value(k, x, rows(0, 2))
        torch.testing.assert_close(exact, next_values(w, k, x, 0, degree=120), rtol=0, atol=1e-6)
    reward = w.reward(chain(w, 40_000).x[:, -1], rows(0, 40_000))
    assert_mean((reward / 1.7 - w.truth().log_z).exp(), torch.tensor(1.0))
    assert_mean((reward / 1.7 - w.truth().log_z).exp() * (reward - w.truth().reward), torch.tensor(0.0))
    line = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    modes = torch.distributions.Normal(torch.tensor([-3.0, 1.0], dtype=torch.float64), math.sqrt(0.5))
    log_z = reward_mean = 0.0
    for rate in (0.3, 0.05):
        joint = torch.logsumexp(modes.log_prob(line[:, None]), 1) - math.log(2) - rate / 1.7 * line.square()
        log_z += float(torch.logsumexp(joint, 0)) + math.log(0.005)
        reward_mean -= float((joint.softmax(0) * rate * line.square()).sum())
    truth = w.data_truth()
    assert float(truth.log_z) == pytest.approx(log_z, abs=1e-11)
    assert float(truth.reward) == pytest.approx(reward_mean, abs=1e-11)
    assert float(truth.kl) == pytest.approx(reward_mean / 1.7 - log_z, abs=1e-11)


def test_bellman_identity_of_the_mixture() -> None:
    """To the error of the tables (1e-6), by Gauss–Hermite with more nodes than their features need."""
    w = world("mixture")
    x = torch.tensor([[0.3, -1.2], [1.9, 2.04], [-3.1, 3.6]], dtype=torch.float64)
    for k in (0, 6, 12, 18, 22, 24):
        exact = w.soft_value(k, x, rows(0, 3))
        torch.testing.assert_close(exact, next_values(w, k, x, 0, degree=120), rtol=0, atol=1e-6)


def test_gradients_of_the_mixture() -> None:
    """They are those of the interpolated values, inside the tables and beyond them."""
    w = world("mixture")
    x = torch.tensor([[0.3, -1.2], [1.9, 2.04], [-3.1, 13.6], [-14.0, 0.0]], dtype=torch.float64)
    for k in (0, 12, 24, 25):
        at = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, k=k: w.soft_value(k, v, rows(0, 4)), (at,), eps=1e-6, atol=1e-4)


def test_density_of_the_mixture() -> None:
    """Integrates to 1, and its ratio at two points is that of p_ref times the rewards."""
    w = world("mixture")
    line = torch.linspace(-8, 8, 641, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    density = w.density(grid)
    assert density.shape == (641, 641)
    assert float(density.sum() * 0.025**2) == pytest.approx(1.0, abs=1e-8)
    mean_reward = (density * w.reward(grid.reshape(-1, 2), rows(0, 641**2)).reshape(641, 641)).sum() * 0.025**2
    assert float(mean_reward) == pytest.approx(float(w.truth().reward), abs=1e-7)


# --- masked chain -----------------------------------------------------------------------------------------------------


def test_masked_rows_sum_to_one_and_end_unmasked() -> None:
    w = world("masked")
    assert w.num_states == 64
    torch.testing.assert_close(w.log_p_ref.exp().sum(-1), torch.ones(3, 64).double(), rtol=0, atol=1e-14)
    law = w.law(w.policy())
    assert float(law[~w.clean].abs().max()) == 0.0
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-14)
    x = chain(w, 500).x
    assert bool((x[:, 0] == 63).all())
    assert bool(w.clean[x[:, -1, 0].long()].all())


def test_masked_kernel_by_hand() -> None:
    """From all masks, step 0 of 3: each position is revealed with probability 1/3, tokens from their marginals."""
    w = world("masked")
    sequences = w.digits[w.clean]
    marginal = [[float(w._joint[sequences[:, i] == v].sum()) for v in range(3)] for i in range(3)]
    reached = w.digits.tolist().index([3, 2, 0])
    expected = (2 / 3) * (1 / 3) * marginal[1][2] * (1 / 3) * marginal[2][0]
    assert float(w.log_p_ref[0, 63, reached].exp()) == pytest.approx(expected, abs=1e-15)
    # step 1 of 3 from (mask, 2, 0): half the time, from p(x_0^0 | x^1 = 2, x^2 = 0); revealed positions stay
    given = w._joint[(sequences[:, 1] == 2) & (sequences[:, 2] == 0)]
    end = w.digits.tolist().index([1, 2, 0])
    assert float(w.log_p_ref[1, reached, end].exp()) == pytest.approx(0.5 * float(given[1] / given.sum()), abs=1e-15)
    other = w.digits.tolist().index([1, 1, 0])
    assert float(w.log_p_ref[1, reached, other].exp()) == 0.0


def test_masked_truth_by_all_paths() -> None:
    w = MaskedChain(beta=0.7, num_prompts=2, seed=4)
    states, log_p = w.paths()
    assert states.shape == (729, 4)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-13)
    x_0 = states[:, -1:].double()
    for prompt in (0, 1):
        reward = w.reward(x_0, rows(prompt, 729))
        log_z = torch.logsumexp(log_p + reward / 0.7, 0)
        weight = (log_p + reward / 0.7 - log_z).exp()
        truth = w.truth()
        assert float(truth.log_z[prompt]) == pytest.approx(float(log_z), abs=1e-12)
        assert float(truth.reward[prompt]) == pytest.approx(float((weight * reward).sum()), abs=1e-12)
        assert float(truth.reward_ref[prompt]) == pytest.approx(float((log_p.exp() * reward).sum()), abs=1e-12)
        target = torch.zeros(64).double().index_add(0, states[:, -1], weight)
        torch.testing.assert_close(w.target(prompt), target, rtol=0, atol=1e-13)
        for k in range(4):
            for state in states[:, k].unique():
                through = states[:, k] == state
                share = log_p[through].softmax(0)  # the law of paths through a state at k is that of what follows it
                at, c = state.reshape(1, 1).double(), torch.tensor([prompt])
                soft = 0.7 * torch.logsumexp(share.log() + reward[through] / 0.7, 0)
                assert float(w.soft_value(k, at, c)) == pytest.approx(float(soft), abs=1e-12)
                mean = float((share * reward[through]).sum())
                assert float(w.mean_reward(k, at, c)) == pytest.approx(mean, abs=1e-12)


def test_the_optimal_masked_policy() -> None:
    w = MaskedChain(beta=0.7, num_prompts=2, seed=4)
    policy = w.optimal_policy()
    for prompt in (0, 1):
        assert w.total_variation(policy, prompt) < 1e-12
        assert w.total_variation(w.policy(), prompt) > 0.1
        trajectory = chain(w, 200, prompt, policy)
        log_w = trajectory.log_p_ref - trajectory.log_p_old + values(w, trajectory.x, prompt).diff(dim=1)
        assert float(log_w.abs().max()) < 1e-12
        total = (trajectory.log_p_ref - trajectory.log_p_old).sum(1) + values(w, trajectory.x, prompt)[:, -1]
        torch.testing.assert_close(total, w.truth().log_z[prompt].expand(200), rtol=0, atol=1e-12)


def test_masked_gradients_are_finite() -> None:
    w = world("masked")
    policy, trajectory = w.policy(), chain(w, 300)
    conditioning = policy.encode(w.prompts * 300)
    for k in range(3):
        x, step = trajectory.x[:, k], rows(k, 300)
        p = w.kernel.transition(x, policy.predict(x, w.kernel.times[step], conditioning), step)
        (p.log_prob(trajectory.x[:, k + 1]).mean() + p.entropy().mean()).backward()
    (theta,) = policy.denoiser.parameters()
    assert bool(theta.grad.isfinite().all())
    assert bool((theta.grad[0][w.log_p_ref.isinf()] == 0).all())
    with pytest.raises(UserError, match="predicted clean state"):
        w.kernel.predict_x0(x, x, step)


def test_distance_of_the_masked_chain_is_unbiased() -> None:
    """Its mean over sets of reference samples is Σ (p_ref − q)²."""
    w = world("masked")
    x = chain(w, 20_000).x[:, -1]
    found = torch.tensor([w.distance(x[i : i + 50], 0) for i in range(0, 20_000, 50)], dtype=torch.float64)
    assert_mean(found, (w.law(w.policy()) - w.target()).square().sum())
