"""Resampling, self-normalised importance sampling and SMC against enumeration and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.exact import LinearGaussian, MaskedChain, World, WorldPolicy, get_world
from vmpo.rollouts import rollout_from_noise
from vmpo.samplers import RESAMPLING, get_resampling, self_normalised, smc, snis

torch.set_num_threads(1)
smc_module = import_module("vmpo.samplers.smc")  # the package has the function under this name
CHAIN = MaskedChain(length=2, tokens=2, steps=2, beta=0.6, seed=3)
WEIGHTS = torch.tensor([0.1, 0.0, 0.1, 0.2, 0.6], dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_offspring_are_unbiased(scheme: str) -> None:
    """E[copies of i] = n w_i, for scaled weights and n ≠ N."""
    n, runs = 4, 4000
    rng = generator(1)
    counts = torch.zeros(runs, 5, dtype=torch.float64)
    for row in counts:
        row += torch.bincount(RESAMPLING[scheme](WEIGHTS.log() + 300.0, n, rng), minlength=5)
    mean, se = counts.mean(0), counts.std(0) / runs**0.5
    assert ((mean - n * WEIGHTS).abs() <= 4 * se + 1e-12).all()
    assert counts[:, 1].sum() == 0, "a particle of weight 0 has no offspring"


def test_systematic_and_residual_keep_the_whole_copies() -> None:
    rng = generator(2)
    for scheme in ("systematic", "residual"):
        for _ in range(200):
            counts = torch.bincount(RESAMPLING[scheme](WEIGHTS.log(), 10, rng), minlength=5)
            if scheme == "systematic":
                assert ((counts - 10 * WEIGHTS).abs() < 1).all()
            assert (counts >= (10 * WEIGHTS + 1e-9).floor()).all()


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_the_top_of_the_cumulative_weights_has_no_gap(scheme: str) -> None:
    log_w = torch.full((10,), -0.1, dtype=torch.float64)  # ten times 0.1 sums to less than 1

    class Top:
        """Draws as near to 1 as a double gets."""

        def __call__(self, *size: int, **_: object) -> Tensor:
            return torch.full((size[0],), 1 - 2**-53, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Top())
        chosen = RESAMPLING[scheme](log_w, 10, generator(0))
    assert chosen.max() == 9


def test_weights_that_cannot_be_resampled_are_refused() -> None:
    for bad in (torch.full((3,), -torch.inf), torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.inf])):
        with pytest.raises(UserError, match="cannot be resampled"):
            get_resampling("systematic")(bad, 2, generator(0))
    with pytest.raises(UserError, match="did you mean 'systematic'"):
        get_resampling("sistematic")


# --- self-normalised importance sampling ------------------------------------------------------------------------------


def test_snis_agrees_with_enumeration() -> None:
    paths, log_p = CHAIN.paths()
    rng = generator(4)
    drawn = paths[torch.multinomial(log_p.exp(), 40_000, True, generator=rng), -1]
    prompt = torch.zeros(len(drawn), dtype=torch.long)
    reward = CHAIN.reward(drawn[:, None].double(), prompt)
    log_w = reward / CHAIN.beta
    found = self_normalised(log_w, reward)
    assert abs(found.mean - CHAIN.truth().reward[0]) < 4 * found.se < 0.05
    assert abs(found.log_z - CHAIN.truth().log_z[0].item()) < 4 * (len(drawn) / found.ess - 1) ** 0.5 / 200
    assert found.ess == pytest.approx((log_w.exp().sum() ** 2 / (2 * log_w).exp().sum()).item())
    law = torch.bincount(drawn[snis(log_w, 40_000, rng)], minlength=CHAIN.num_states).double() / 40_000
    assert 0.5 * (law - CHAIN.target()).abs().sum() < 0.015


def test_the_error_of_snis_is_the_spread_of_its_estimates() -> None:
    rng = torch.Generator().manual_seed(5)
    log_w, f = (torch.randn(2000, 50, dtype=torch.float64, generator=rng) for _ in range(2))
    found = [self_normalised(w, x) for w, x in zip(log_w, f, strict=True)]
    spread = torch.stack([e.mean for e in found]).std()
    assert torch.stack([e.se for e in found]).square().mean().sqrt() == pytest.approx(spread.item(), rel=0.1)


def test_a_sample_of_weight_zero_counts() -> None:
    log_w = torch.tensor([0.0, -torch.inf, 0.3], dtype=torch.float64)
    found = self_normalised(log_w, torch.tensor([1.0, 100.0, 2.0], dtype=torch.float64))
    w = torch.tensor([1.0, 0.0, torch.e**0.3], dtype=torch.float64)
    assert found.mean.item() == pytest.approx(((w[0] + 2 * w[2]) / w.sum()).item())
    assert found.log_z == pytest.approx((w.sum() / 3).log().item())
    with pytest.raises(UserError, match="no estimate"):
        self_normalised(torch.full((2,), -torch.inf), torch.zeros(2))


# --- SMC --------------------------------------------------------------------------------------------------------------


def potentials(world: World) -> dict[str, Callable[[int, Tensor], Tensor]]:
    last = world.kernel.num_steps

    def prompt(x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.long)

    def terminal(k: int, x: Tensor) -> Tensor:
        return world.reward(x, prompt(x)) / world.beta if k == last else torch.zeros(len(x), dtype=torch.float64)

    def mean(k: int, x: Tensor) -> Tensor:
        found = world.mean_reward(k, x, prompt(x))
        assert found is not None
        return found / world.beta

    return {
        "terminal": terminal,
        "mean": mean,
        "exact": lambda k, x: world.soft_value(k, x, prompt(x)) / world.beta,
    }


def perturbed(world: MaskedChain) -> WorldPolicy:
    policy = world.policy()
    theta = policy.denoiser.get_parameter("theta")
    with torch.no_grad():
        theta.add_(0.4 * torch.randn(theta.shape, dtype=torch.float64, generator=generator(6)))
    return policy


def ratios(name: str, threshold: float, runs: int = 1500, module: ModuleType = smc_module) -> Tensor:
    """Ẑ/Z of independent systems of five particles under a perturbed proposal."""
    policy, rng = perturbed(CHAIN), generator(7)
    conditioning = policy.encode(CHAIN.prompts * 5)
    potential = potentials(CHAIN)[name]
    log_z = [
        module.smc(policy, CHAIN.kernel, conditioning, potential, rng, ess_threshold=threshold).log_z
        for _ in range(runs)
    ]
    return (torch.tensor(log_z, dtype=torch.float64) - CHAIN.truth().log_z[0]).exp()


@pytest.mark.parametrize(("name", "threshold"), [("terminal", 0.0), ("mean", 0.9), ("exact", 2.0), ("mean", 2.0)])
def test_the_estimate_of_z_is_unbiased(name: str, threshold: float) -> None:
    ratio = ratios(name, threshold)
    se = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 4 * se < 0.1


def test_potentials_that_stay_behind_at_resampling_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published bug: states are permuted, what they carry is not."""
    ratio = ratios("mean", 2.0)
    source = smc_module.__loader__.get_source(smc_module.__name__)  # type: ignore[union-attr]
    changed = source.replace("phi[chosen.to(phi.device)]", "phi")
    assert changed != source
    broken = ModuleType("broken_smc")
    monkeypatch.setitem(__import__("sys").modules, "broken_smc", broken)
    exec(compile(changed, "broken_smc", "exec"), broken.__dict__)
    wrong = ratios("mean", 2.0, module=broken)
    se = (wrong.var() + ratio.var()).div(len(ratio)).sqrt()
    assert abs(wrong.mean() - 1) > 6 * se, "the check above would not see it"


def test_without_resampling_it_is_importance_sampling() -> None:
    policy, rng = perturbed(CHAIN), generator(8)
    found = smc(
        policy, CHAIN.kernel, policy.encode(CHAIN.prompts * 64), potentials(CHAIN)["mean"], rng, ess_threshold=0.0
    )
    reward = CHAIN.reward(found.x_0, torch.zeros(64, dtype=torch.long))
    assert found.resampled == ()
    assert torch.equal(found.ancestors, torch.arange(64))
    assert found.log_z == pytest.approx(self_normalised(found.log_w, reward).log_z, abs=1e-6)


def test_with_soft_values_and_the_optimal_policy_one_particle_is_exact() -> None:
    policy = CHAIN.optimal_policy()
    for seed in range(5):
        found = smc(policy, CHAIN.kernel, policy.encode(CHAIN.prompts), potentials(CHAIN)["exact"], generator(seed))
        assert found.log_z == pytest.approx(CHAIN.truth().log_z[0].item(), abs=1e-9)
        assert found.ess.min() == pytest.approx(1.0)


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_particles_follow_the_tilted_law_of_the_linear_chain(scheme: str) -> None:
    world = get_world("gaussian-linear")
    assert isinstance(world, LinearGaussian)
    policy = world.policy()
    found = smc(
        policy,
        world.kernel,
        policy.encode(world.prompts * 4000),
        potentials(world)["exact"],
        generator(9),
        ess_threshold=0.9,
        resampling=scheme,
        dtype=torch.float64,
    )
    target = world.sample_target(40_000, 0, seed=1)
    estimate = self_normalised(found.log_w, found.x_0)
    error = 4 * (target.var(0) / 4000 * 3).sqrt()  # resampling thrice over leaves fewer independent lines
    assert ((estimate.mean - target.mean(0)).abs() < error).all()
    assert abs(found.log_z - world.truth().log_z[0].item()) < 0.08
    assert len(found.resampled) > 0


def test_deterministic_steps_weigh_by_the_potential_alone() -> None:
    """A chain of the same states with no noise anywhere: weights are exp(φ_0) and log Z is their mean."""
    world = get_world("gaussian-linear")
    from vmpo.kernels import DDIM

    kernel = world.kernel
    assert isinstance(kernel, DDIM)
    still = DDIM(kernel.alpha_bar, kernel.alpha_bar_prev, kernel.times, eta=0.0)
    policy = world.policy()
    conditioning = policy.encode(world.prompts * 50)
    found = smc(policy, still, conditioning, potentials(world)["terminal"], generator(3), ess_threshold=0.0)
    noise = torch.randn((50, 2), dtype=torch.float64, generator=generator(3))
    path = rollout_from_noise(policy, still, conditioning, noise[:, None].expand(-1, 11, -1), dtype=torch.float32)
    expected = world.reward(path.x_0, torch.zeros(50, dtype=torch.long)) / world.beta
    torch.testing.assert_close(found.log_w, expected.double(), rtol=1e-5, atol=1e-5)


def test_dead_particles_stop_with_a_reason() -> None:
    policy = CHAIN.policy()
    with pytest.raises(UserError, match="check the reward"):
        smc(
            policy,
            CHAIN.kernel,
            policy.encode(CHAIN.prompts * 3),
            lambda k, x: torch.full((len(x),), torch.nan),
            generator(0),
        )
    with pytest.raises(UserError, match="at least 0"):
        smc(policy, CHAIN.kernel, policy.encode(CHAIN.prompts), lambda k, x: x[:, 0], generator(0), ess_threshold=-1.0)
