"""Resampling, SNIS and SMC in float64 against expected copies, enumeration and the exact worlds' tilted law."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.exact import LinearGaussian, MaskedChain, World, WorldPolicy, get_world
from vmpo.kernels import CPS
from vmpo.policies.policy import Conditioning
from vmpo.rollouts import rollout_from_noise
from vmpo.samplers import (
    RESAMPLING,
    SMCResult,
    effective_sample_size,
    get_resampling,
    log_mean_weight,
    resample,
    self_normalised,
    smc,
)
from vmpo.samplers.smc import Particles

torch.set_num_threads(1)
SCHEMES = tuple(RESAMPLING)
PITFALL = (0.1, 0.1, 0.2, 0.6)
WEIGHTS = {
    "pitfall": (PITFALL, 4),
    "zeros": ((0.0, 0.31, 0.0, 0.24, 0.45, 0.0), 6),
    "fewer": ((0.07, 0.5, 0.13, 0.3), 3),
    "more": ((0.55, 0.05, 0.4), 7),
    "equal": ((0.25, 0.25, 0.25, 0.25), 4),
}
LARGEST = 1.0 - 2.0**-53  # the largest float64 that a uniform can be


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_weights(weights: tuple[float, ...]) -> Tensor:
    """With a constant added, which must not matter."""
    return torch.tensor(weights, dtype=torch.float64).log() + 1234.5


# --- resampling -------------------------------------------------------------------------------------------------------


def copies(scheme: Callable[..., Tensor], weights: tuple[float, ...], n: int, repeats: int = 1500) -> Tensor:
    """Copies of each particle, (repeats, N) float64."""
    generator, log_w = seeded(7), log_weights(weights)
    drawn = torch.stack([scheme(log_w, n, generator) for _ in range(repeats)])
    assert drawn.dtype == torch.long
    assert drawn.shape == (repeats, n)
    return torch.nn.functional.one_hot(drawn, len(weights)).sum(1).to(torch.float64)


def assert_unbiased_copies(counts: Tensor, weights: tuple[float, ...], n: int) -> None:
    """E[copies] = n W within four standard errors, exactly where the copies never vary."""
    expected = n * torch.tensor(weights, dtype=torch.float64)
    se = counts.std(0) / math.sqrt(len(counts))
    assert float(se.max()) < 0.05
    assert bool(((counts.mean(0) - expected).abs() <= 4 * se + 1e-12).all()), (counts.mean(0), expected, se)


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_expected_copies_are_n_times_the_weights(scheme: str, case: str) -> None:
    weights, n = WEIGHTS[case]
    counts = copies(RESAMPLING[scheme], weights, n)
    assert_unbiased_copies(counts, weights, n)
    expected = n * torch.tensor(weights, dtype=torch.float64)
    assert bool((counts[:, expected == 0] == 0).all())
    if scheme in ("systematic", "residual"):
        assert bool((counts >= (expected - 1e-9).floor()).all())
    if scheme == "systematic":
        assert bool((counts <= (expected + 1e-9).ceil()).all())
    if scheme == "stratified":  # a stratum may end on either side of a boundary: at most one more or fewer
        assert bool(((counts - expected).abs() < 2).all())


def test_schemes_differ_in_their_spread() -> None:
    """Var of the copies: the multinomial's is n W (1 − W), and every other scheme has less of it."""
    weights = torch.tensor(PITFALL, dtype=torch.float64)
    spread = {name: float(copies(RESAMPLING[name], PITFALL, 4).var(0).sum()) for name in SCHEMES}
    assert spread["multinomial"] == pytest.approx(float((4 * weights * (1 - weights)).sum()), rel=0.1)
    assert spread["systematic"] < spread["residual"] < 0.8 * spread["multinomial"]
    assert spread["stratified"] < 0.8 * spread["multinomial"]


def test_copies_notice_a_search_that_stops_short() -> None:
    """The known fault, an inverse of the cumulative that cannot reach the last draws: offspring (.4, 1.6, 0, 2)."""

    def short(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
        drawn = RESAMPLING["residual"](log_w, n, generator)
        return torch.where(drawn == 2, 1, drawn)

    with pytest.raises(AssertionError):
        assert_unbiased_copies(copies(short, PITFALL, 4), PITFALL, 4)


@pytest.mark.parametrize("uniform", [0.0, LARGEST])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_uniforms_stay_among_possible_particles(
    monkeypatch: pytest.MonkeyPatch, scheme: str, uniform: float
) -> None:
    module = sys.modules["vmpo.samplers.resampling"]
    tenths = torch.full((10,), 0.1, dtype=torch.float64)
    assert float(tenths.cumsum(0)[-1]) < 1.0  # the sum falls short, so u lies above it
    assert (9.0 + LARGEST) / 10.0 == 1.0  # and the last point rounds up to 1
    padded = torch.cat([tenths.new_zeros(3), tenths, tenths.new_zeros(4)]).log()

    def rand(n: int, **options: Any) -> Tensor:
        return torch.full((n,), uniform, dtype=options["dtype"])

    monkeypatch.setattr(module.torch, "rand", rand)
    for n in (1, 3, 10, 13):
        drawn = RESAMPLING[scheme](padded, n, seeded(0))
        assert int(drawn.min()) >= 3
        assert int(drawn.max()) <= 12
    if scheme != "residual":
        assert int(drawn[-1]) == (3 if uniform == 0 and scheme == "multinomial" else 12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_is_reproducible_and_takes_a_single_particle(scheme: str) -> None:
    log_w = log_weights(PITFALL)
    first, again, other = (RESAMPLING[scheme](log_w, 37, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert scheme == "systematic" or not torch.equal(first, other)
    assert torch.equal(RESAMPLING[scheme](log_w[:1], 5, seeded(0)), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_mean_nothing_are_errors(scheme: str) -> None:
    for bad in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(UserError, match="log-weights"):
            RESAMPLING[scheme](torch.tensor(bad), 2, seeded(0))
    with pytest.raises(UserError, match="at least 1"):
        RESAMPLING[scheme](torch.zeros(2), 0, seeded(0))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        RESAMPLING[scheme](torch.zeros(2, 2), 2, seeded(0))


def test_a_scheme_that_does_not_exist() -> None:
    assert get_resampling("residual") is RESAMPLING["residual"]
    with pytest.raises(UserError, match="did you mean 'systematic'"):
        get_resampling("sistematic")


# --- worlds -----------------------------------------------------------------------------------------------------------


@cache
def masked() -> MaskedChain:
    return MaskedChain(2, 3, 3, beta=0.7, reward_scale=0.7, seed=4)


@cache
def quadratic() -> LinearGaussian:
    world = get_world("gaussian-quadratic")
    assert isinstance(world, LinearGaussian)
    return world


def perturbed(world: World, scale: float) -> WorldPolicy:
    policy, generator = world.policy(), seeded(2)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return policy


def potentials(world: World) -> dict[str, Callable[[int, Tensor], Tensor]]:
    """φ_k in nats; all end in r(x_0)/beta. Without an exact mean reward, a tempered r(x̂_0) stands for it."""
    last = world.kernel.num_steps

    def prompt(x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.long)

    def terminal(k: int, x: Tensor) -> Tensor:
        return world.reward(x, prompt(x)) / world.beta if k == last else torch.zeros(len(x), dtype=torch.float64)

    def mean_reward(k: int, x: Tensor) -> Tensor:
        value = world.mean_reward(k, x, prompt(x))
        if value is not None:
            return value / world.beta
        if k == last:
            return terminal(k, x)
        step, policy = torch.full((len(x),), k), world.policy()
        output = policy.predict(x, world.kernel.times[step], policy.encode(world.prompts[:1] * len(x)))
        return (0.3 + 0.05 * k) * world.reward(world.kernel.predict_x0(x, output, step), prompt(x)) / world.beta

    def soft_value(k: int, x: Tensor) -> Tensor:
        return world.soft_value(k, x, prompt(x)) / world.beta

    return {"terminal": terminal, "mean_reward": mean_reward, "soft_value": soft_value}


def run(
    world: World, policy: WorldPolicy, potential: str, n: int, generator: torch.Generator, **options: Any
) -> SMCResult:
    conditioning = policy.encode(world.prompts[:1] * n)
    phi = potentials(world)[potential]
    return smc(
        policy, world.kernel, conditioning, phi, particles=n, generator=generator, dtype=torch.float64, **options
    )


# --- SNIS -------------------------------------------------------------------------------------------------------------


def test_self_normalised_agrees_with_enumeration() -> None:
    """Over proposals from a perturbed policy: mean within its standard error, which is of the right size itself."""
    world, policy, n = masked(), perturbed(masked(), 0.3), 400
    states = torch.arange(world.num_states)
    of_state = torch.stack([world.reward(states[:, None], 0 * states), (states % 4 == 0).double()], 1)
    truth = world.target() @ of_state
    generator, estimates = seeded(11), []
    for _ in range(60):
        result = run(world, policy, "terminal", n, generator, ess_threshold=0.0)
        estimates.append(self_normalised(result.log_w, of_state[result.x_0[:, 0].long()]))
    z = torch.stack([(e.mean - truth) / e.se for e in estimates])
    assert bool((z.mean(0).abs() < 4 / math.sqrt(60)).all())
    assert bool(((z.std(0) - 1).abs() < 0.4).all())
    assert 0.2 < float(estimates[0].ess) < 0.9


def test_self_normalised_of_equal_weights_is_the_mean() -> None:
    values = torch.randn(50, 2, 3, dtype=torch.float64, generator=seeded(5))
    estimate = self_normalised(torch.full((50,), -7.0), values)
    torch.testing.assert_close(estimate.mean, values.mean(0))
    torch.testing.assert_close(estimate.se, values.std(0) / math.sqrt(50))
    assert float(estimate.ess) == pytest.approx(1.0, abs=1e-14)


def test_a_sample_of_weight_zero_counts_in_n_and_its_value_is_not_read() -> None:
    log_w = torch.tensor([0.3, -torch.inf, 1.1, -torch.inf], dtype=torch.float64)
    weights = log_w.exp()
    values = torch.tensor([2.0, torch.nan, -1.0, torch.inf], dtype=torch.float64)
    estimate = self_normalised(log_w, values)
    mean = float((weights[0] * 2.0 - weights[2]) / weights.sum())
    assert float(estimate.mean) == pytest.approx(mean, abs=1e-14)
    assert float(effective_sample_size(log_w)) == pytest.approx(
        float(weights.sum() ** 2 / (4 * weights.square().sum()))
    )
    assert float(log_mean_weight(log_w)) == pytest.approx(math.log(float(weights.mean())), abs=1e-14)
    assert set(resample(log_w, 200, seeded(0)).tolist()) == {0, 2}
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="1 of 4 samples"):
            self_normalised(log_w, values.index_fill(0, torch.tensor([2]), bad))
    assert bool(self_normalised(log_w[:1], values[:1]).se.isnan())


def test_resampled_samples_follow_the_target() -> None:
    """One step of Eq. 1: draws of Cat(w) among samples of the reference have the tilted law."""
    world, n = masked(), 4000
    result = run(world, world.policy(), "terminal", n, seeded(3), ess_threshold=0.0)
    drawn = result.x_0[resample(result.log_w, n, seeded(4))][:, 0].long()
    law = torch.bincount(drawn, minlength=world.num_states) / n
    assert float(0.5 * (law - world.target()).abs().sum()) < 0.04
    plain = torch.bincount(result.x_0[:, 0].long(), minlength=world.num_states) / n
    assert float(0.5 * (plain - world.target()).abs().sum()) > 0.2


# --- SMC: unbiased ----------------------------------------------------------------------------------------------------


def assert_unbiased(
    policy: WorldPolicy, potential: str, threshold: float, *, systems: int = 700, resampling: str = "systematic"
) -> None:
    """E[Ẑ] = Z and E[(1/N) Σ w r(x_0)] = Z E_tilt[r] with N = 4, within four standard errors, Ẑ's below 2 % of Z."""
    world, generator = masked(), seeded(17)
    log_z, weighted = [], []
    options = {"ess_threshold": threshold, "resampling": resampling}
    for _ in range(systems):
        result = run(world, policy, potential, 4, generator, **options)
        log_z.append(result.log_z)
        weighted.append((result.log_w.exp() * world.reward(result.x_0, torch.zeros(4).long())).mean())
        assert float(result.log_z) == pytest.approx(float(result.log_w.logsumexp(0)) - math.log(4), abs=1e-12)
    truth = world.truth()
    z, estimate, tilted = float(truth.log_z.exp()), torch.stack(log_z).exp(), torch.stack(weighted)
    root = math.sqrt(systems)
    off = (float(estimate.mean()) - z) / (float(estimate.std()) / root)
    assert abs(off) < 4, f"E[Z] is off by {off:.1f} standard errors"
    assert abs(float(tilted.mean()) - z * float(truth.reward)) < 4 * float(tilted.std()) / root
    assert float(estimate.std()) / root < 0.02 * z * math.sqrt(max(700 / systems, 1.0))


@cache
def proposal(name: str) -> WorldPolicy:
    return masked().policy() if name == "reference" else perturbed(masked(), 0.25)


@pytest.mark.parametrize(
    ("potential", "threshold"),
    [("terminal", 0.0), *((p, share) for p in ("terminal", "mean_reward", "soft_value") for share in (0.5, 1.0))],
)
@pytest.mark.parametrize("name", ["reference", "perturbed"])
def test_z_is_unbiased(name: str, potential: str, threshold: float) -> None:
    """Without resampling (0) the potentials are one, by the test below."""
    assert_unbiased(proposal(name), potential, threshold)


@pytest.mark.parametrize("resampling", ["stratified", "multinomial", "residual"])
def test_z_is_unbiased_under_every_scheme(resampling: str) -> None:
    assert_unbiased(proposal("perturbed"), "mean_reward", 0.5, resampling=resampling)


def test_without_resampling_the_potentials_only_telescope() -> None:
    log_z = [
        run(masked(), proposal("perturbed"), p, 6, seeded(1), ess_threshold=0.0).log_w for p in potentials(masked())
    ]
    torch.testing.assert_close(log_z[0], log_z[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(log_z[0], log_z[2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("potential", ["mean_reward", "soft_value"])
def test_fewer_systems_pass_when_nothing_is_forgotten(potential: str) -> None:
    assert_unbiased(proposal("perturbed"), potential, 1.0, systems=250)


def unpermuted_potential(self: Particles, ancestors: Tensor) -> Particles:
    return Particles(self.x[ancestors], self.log_phi, -self.log_phi)


def unpermuted_states(self: Particles, ancestors: Tensor) -> Particles:
    return Particles(self.x, self.log_phi[ancestors], -self.log_phi[ancestors])


def kept_weights(self: Particles, ancestors: Tensor) -> Particles:
    return Particles(self.x[ancestors], self.log_phi[ancestors], self.log_rest[ancestors])


def no_initial_potential(x: Tensor, log_phi: Tensor) -> Particles:
    return Particles(x, log_phi, -log_phi)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("take", unpermuted_potential),
        ("take", unpermuted_states),
        ("take", kept_weights),
        ("start", staticmethod(no_initial_potential)),
    ],
)
@pytest.mark.parametrize("potential", ["mean_reward", "soft_value"])
def test_the_check_notices(monkeypatch: pytest.MonkeyPatch, potential: str, method: str, wrong: Any) -> None:
    """The same check as above, on fewer systems, with one thing forgotten."""
    monkeypatch.setattr(Particles, method, wrong)
    with pytest.raises(AssertionError, match="E\\[Z\\] is off"):
        assert_unbiased(proposal("perturbed"), potential, 1.0, systems=250)


# --- SMC: exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_optimal_policy_with_the_soft_value_has_constant_weights(threshold: float, particles: int) -> None:
    world = get_world("masked")
    assert isinstance(world, MaskedChain)
    policy = world.optimal_policy()
    result = run(world, policy, "soft_value", particles, seeded(particles), ess_threshold=threshold)
    log_z = float(world.truth().log_z[0])
    assert float(result.log_z) == pytest.approx(log_z, abs=1e-10)
    torch.testing.assert_close(result.log_w, torch.full_like(result.log_w, log_z), atol=1e-10, rtol=0)
    torch.testing.assert_close(result.ess, torch.ones(4, dtype=torch.float64))
    assert bool((result.resampled == (threshold == 1)).all())


def test_optimal_policy_of_the_gaussian_world_keeps_the_spread_of_the_noise_only() -> None:
    """log w = V_0(x_T)/beta of each particle: no transition can change x_T."""
    world, generator = get_world("gaussian-linear"), seeded(6)
    assert isinstance(world, LinearGaussian)
    result = run(world, world.optimal_policy(), "soft_value", 5, generator, ess_threshold=0.0)
    x_t = torch.randn(5, 2, dtype=torch.float64, generator=seeded(6))
    expected = world.soft_value(0, x_t, torch.zeros(5).long()) / world.beta
    torch.testing.assert_close(result.log_w, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("potential", ["terminal", "mean_reward", "soft_value"])
def test_weighted_particles_have_the_mean_of_the_tilted_gaussian(potential: str) -> None:
    """Independent systems put together by their log-weights; errors between systems, by the delta method."""
    world, n, systems = quadratic(), 100, 50
    policy, generator = perturbed(world, 0.05), seeded(9)
    results = [
        run(world, policy, potential, n, generator, ess_threshold=0.9, resampling="residual") for _ in range(systems)
    ]
    z = torch.stack([r.log_z for r in results]).exp()
    assert abs(float(z.mean() - world.truth().log_z.exp())) < 4 * float(z.std()) / math.sqrt(systems)
    moments = [torch.cat([r.x_0, r.x_0.square()], 1) for r in results]
    weighted = torch.stack([(r.log_w.exp()[:, None] * f).mean(0) for r, f in zip(results, moments, strict=True)])
    estimate = weighted.mean(0) / z.mean()
    se = (weighted - estimate * z[:, None]).std(0) / (math.sqrt(systems) * z.mean())
    _, mean, cov = (value[0] for value in world._tilted(world.beta))
    truth = torch.cat([mean, cov.diagonal() + mean.square()])
    assert bool(((estimate - truth).abs() < 4 * se).all()), (estimate, truth, se)
    assert bool((se < 0.05).all())
    proposed = run(world, policy, "terminal", 5000, generator, ess_threshold=0.0).x_0
    assert float(((proposed.mean(0) - truth[:2]).abs() / se[:2]).max()) > 8  # the proposal is elsewhere
    pooled = self_normalised(torch.cat([r.log_w for r in results]), torch.cat(moments))
    torch.testing.assert_close(pooled.mean, estimate, atol=1e-10, rtol=0)
    assert any(bool(r.resampled.any()) for r in results)


# --- SMC: mechanics ---------------------------------------------------------------------------------------------------


def windowed() -> tuple[WorldPolicy, CPS]:
    """Five steps of which the second and third add noise; a policy that is not its reference."""
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.1], dtype=torch.float64)
    kernel = CPS(sigmas, 0.7, window=(1, 2))
    correction = AffineVelocity()
    return WorldPolicy(kernel, ["p"], (2,), lambda x, step: 0.6 * x + 0.1 * step[:, None], correction), kernel


class AffineVelocity(torch.nn.Module):
    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        return 0.25 - 0.1 * x * (1 + step[:, None])


def test_without_resampling_it_is_a_rollout_with_weights() -> None:
    """Same noise, same states; steps without noise add nothing but the potential."""
    policy, kernel = windowed()
    conditioning, generator = policy.encode(["p"] * 6), seeded(8)
    noise = torch.stack([torch.randn(6, 2, dtype=torch.float64, generator=generator) for _ in range(6)], 1)
    trajectory = rollout_from_noise(policy, kernel, conditioning, noise, dtype=torch.float64)
    seen = {}

    def phi(k: int, x: Tensor) -> Tensor:
        seen[k] = x
        return (1 + k) * x.sin().sum(1)

    options = {"particles": 6, "dtype": torch.float64}
    result = smc(policy, kernel, conditioning, phi, generator=seeded(8), ess_threshold=0.0, **options)
    log_w = (trajectory.log_p_ref - trajectory.log_p_old).sum(1) + phi(5, trajectory.x_0)
    torch.testing.assert_close(result.x_0, trajectory.x_0, atol=0, rtol=0)
    torch.testing.assert_close(result.log_w, log_w, atol=1e-10, rtol=0)
    assert not bool(result.resampled.any())
    assert torch.equal(result.ancestors, torch.arange(6).expand(5, 6))
    for k in range(5):
        torch.testing.assert_close(seen[k], trajectory.x[:, k], atol=0, rtol=0)
    result = smc(policy, kernel, conditioning, phi, generator=seeded(8), ess_threshold=1.0, **options)
    assert result.resampled.tolist() == [True, True, True, False, False]  # from position 3 on copies stay copies


def test_ancestors_say_where_each_particle_came_from() -> None:
    """A step without noise maps a particle to a function of its ancestor; ess is the one before resampling."""
    policy, kernel = windowed()
    conditioning, n = policy.encode(["p"] * 8), 8
    seen: list[Tensor] = []

    def phi(k: int, x: Tensor) -> Tensor:
        seen.append(x)
        return 2.0 * x.sum(1)

    result = smc(policy, kernel, conditioning, phi, particles=n, generator=seeded(2), dtype=torch.float64)
    assert bool(result.resampled[0])
    for k in (0, 3, 4):
        step = torch.full((n,), k)
        parents = seen[k][result.ancestors[k]]
        output = policy.predict(parents, kernel.times[step], conditioning)
        torch.testing.assert_close(seen[k + 1], kernel.transition(parents, output, step).mean, atol=1e-12, rtol=0)
    assert float(result.ess[0]) == pytest.approx(float(effective_sample_size(2.0 * seen[0].sum(1))), abs=1e-12)
    below = [*(result.ess[:3] < 0.5).tolist(), False, False]
    assert result.resampled.tolist() == below
    identity = torch.arange(n)
    assert all(torch.equal(result.ancestors[k], identity) for k in range(5) if not result.resampled[k])


def test_a_potential_of_zero_is_a_weight_of_zero_where_it_is_resampled_only() -> None:
    """−inf at an intermediate position removes a particle if the system is resampled there, and is undone if not."""
    policy, kernel = windowed()
    conditioning = policy.encode(["p"] * 8)
    removed: list[Tensor] = []

    def phi(k: int, x: Tensor) -> Tensor:
        value = 0.4 * x.sum(1)
        if k == 2:
            removed.append(x[:3])
            value[:3] = -torch.inf
        return value

    options = {"particles": 8, "dtype": torch.float64}
    result = smc(policy, kernel, conditioning, phi, generator=seeded(2), ess_threshold=0.0, **options)
    plain = smc(
        policy, kernel, conditioning, lambda k, x: 0.4 * x.sum(1), generator=seeded(2), ess_threshold=0.0, **options
    )
    torch.testing.assert_close(result.log_w, plain.log_w, atol=1e-12, rtol=0)
    assert float(result.ess[2]) <= 5 / 8
    result = smc(policy, kernel, conditioning, phi, generator=seeded(2), ess_threshold=1.0, **options)
    assert int(result.ancestors[2].min()) >= 3
    assert bool(result.log_w.isfinite().all())


def test_half_precision_states_have_the_density_of_what_is_stored() -> None:
    """The reference as its own proposal: log w is exactly φ_T, whatever the states are rounded to."""
    world = quadratic()
    policy = world.policy()
    conditioning = policy.encode(world.prompts[:1] * 4)
    for dtype in (torch.bfloat16, torch.float32):
        phi = potentials(world)["terminal"]
        options = {"particles": 4, "generator": seeded(1), "dtype": dtype}
        result = smc(policy, world.kernel, conditioning, phi, ess_threshold=0.0, **options)
        assert result.x_0.dtype == dtype
        assert torch.equal(result.log_w, phi(10, result.x_0))
        assert result.log_w.dtype == torch.float64


def test_what_cannot_be_is_an_error() -> None:
    world = masked()
    policy, phi = world.policy(), potentials(world)["terminal"]
    rows = policy.encode(world.prompts * 3)
    options: dict[str, Any] = {"particles": 3, "generator": seeded(0)}

    def attempt(conditioning: Conditioning = rows, potential: Any = phi, **changed: Any) -> None:
        smc(policy, world.kernel, conditioning, potential, **(options | changed))

    with pytest.raises(UserError, match="particles is 0"):
        attempt(particles=0)
    with pytest.raises(UserError, match="3 rows of conditioning for 4 particles"):
        attempt(particles=4)
    with pytest.raises(UserError, match="one prompt"):
        attempt(Conditioning({"prompt": torch.tensor([0, 0, 1])}))
    with pytest.raises(UserError, match="ess_threshold"):
        attempt(ess_threshold=1.5)
    with pytest.raises(UserError, match="did you mean 'residual'"):
        attempt(resampling="residuals")
    with pytest.raises(ValueError, match=r"position 0 has shape \(3, 1\)"):
        attempt(potential=lambda k, x: x)
    with pytest.raises(UserError, match="at position 2: 3 of 3 are NaN"):
        attempt(potential=lambda k, x: torch.full((3,), math.nan if k == 2 else 0.0))
    with pytest.raises(UserError, match="at position 3: all 3 are −inf"):
        attempt(potential=lambda k, x: torch.full((3,), -math.inf if k == 3 else 0.0))
