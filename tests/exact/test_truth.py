"""The tilted distribution of a discrete reward is known in closed form; reweighting base samples must find it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from vmpo.evaluation.truth import (
    UntrustedTruth,
    beta_at_kl,
    gap_to_frontier,
    measure_truth,
    optimal_frontier,
    rejection_sample,
    reward_at_kl,
    tilt,
)

VALUES = torch.tensor([0.0, 0.35, 0.8, 1.3], dtype=torch.float64)
PROBS = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)
BETA = 0.37


def exact(beta: float, probs: Tensor = PROBS) -> tuple[float, float, float]:
    """log Z, E_tilt[r] and KL(tilt ‖ ref) of the discrete reward."""
    log_z = torch.logsumexp(probs.log() + VALUES / beta, 0).item()
    tilted = torch.softmax(probs.log() + VALUES / beta, 0)
    return log_z, (tilted * VALUES).sum().item(), (tilted * (tilted / probs).log()).sum().item()


def draw(num_prompts: int, num_samples: int, seed: int, probs: Tensor = PROBS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(probs, num_prompts * num_samples, replacement=True, generator=generator)
    return VALUES[index].view(num_prompts, num_samples)


def test_every_figure_is_unbiased_within_its_error() -> None:
    rewards = draw(4000, 48, seed=1)
    tilted = tilt(rewards, BETA)
    for name, truth in zip(("log_z", "reward", "kl"), exact(BETA), strict=True):
        estimate = tilted.estimate(name)
        assert abs(estimate.mean - truth) < 4 * estimate.se, name
    # the same samples without the correction miss by much more: the test can see a bias of this size
    plain = (torch.logsumexp(rewards / BETA, 1) - math.log(48)).mean().item()
    assert abs(plain - exact(BETA)[0]) > 6 * tilted.estimate("log_z").se


@pytest.mark.parametrize("name", ["log_z", "reward", "kl"])
def test_errors_cover_what_repetition_shows(name: str) -> None:
    runs = [tilt(draw(40, 64, seed), BETA) for seed in range(300)]
    estimates = [run.estimate(name) for run in runs]
    spread = torch.tensor([e.mean for e in estimates]).std().item()
    stated = torch.tensor([e.se for e in estimates]).mean().item()
    assert stated == pytest.approx(spread, rel=0.15)
    within = (getattr(runs[0], f"{name}_sd").square().mean() / 40).sqrt().item()
    assert within == pytest.approx(spread, rel=0.25)


def test_errors_include_the_choice_of_prompts() -> None:
    hard = torch.tensor([0.9, 0.05, 0.03, 0.02], dtype=torch.float64)
    rewards = torch.cat([draw(30, 64, 5), draw(30, 64, 6, hard)])
    estimate = tilt(rewards, BETA).estimate("reward")
    truth = (exact(BETA)[1] + exact(BETA, hard)[1]) / 2
    assert abs(estimate.mean - truth) < 0.05
    between = abs(exact(BETA)[1] - exact(BETA, hard)[1]) / 2 / math.sqrt(59)
    assert estimate.se > between


def test_a_failed_sample_is_as_if_never_drawn() -> None:
    rewards = draw(5, 20, seed=2)
    failed = torch.cat([rewards, torch.full((5, 3), torch.nan, dtype=torch.float64)], dim=1)
    for name in ("log_z", "reward", "kl", "ess"):
        torch.testing.assert_close(getattr(tilt(failed, BETA), name), getattr(tilt(rewards, BETA), name))
    failed[0] = torch.nan
    assert tilt(failed, BETA).estimate("reward").n == 4


def test_constant_reward_is_not_tilted() -> None:
    tilted = tilt(torch.full((3, 8), 0.6), 0.2)
    torch.testing.assert_close(tilted.log_z, torch.full((3,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(tilted.ess, torch.full((3,), 8.0, dtype=torch.float64))
    assert tilted.kl.abs().max() < 1e-6


def test_frontier_is_the_known_one_and_interpolates() -> None:
    frontier = optimal_frontier(draw(3000, 256, seed=3))
    assert len(frontier) > 20
    for point in frontier:
        if not point["trusted"]:
            continue
        log_z, reward, kl = exact(point["beta"])
        assert abs(point["reward"] - reward) < 4 * point["reward_se"] + 1e-9
        assert abs(point["kl"] - kl) < 4 * point["kl_se"] + 1e-9
        assert abs(point["log_z"] - log_z) < 4 * point["log_z_se"] + 1e-9
    for beta in (1.7, 0.51, 0.22):
        _, reward, kl = exact(beta)
        found, se = reward_at_kl(frontier, kl)
        assert abs(found - reward) < 4 * se + 2e-4
        assert se < 0.01
    assert reward_at_kl(frontier, 50.0)[0] == pytest.approx(VALUES.max().item(), abs=1e-3)
    assert reward_at_kl(frontier, 0.0)[0] == pytest.approx((PROBS * VALUES).sum().item(), abs=0.02)


def test_error_at_a_fixed_kl_is_calibrated() -> None:
    kl = exact(0.2)[2]  # where the error at fixed KL is more than twice that at fixed temperature
    found = [reward_at_kl(optimal_frontier(draw(40, 64, seed)), kl) for seed in range(150)]
    spread = torch.tensor([reward for reward, _ in found]).std().item()
    assert sum(se for _, se in found) / len(found) == pytest.approx(spread, rel=0.2)


def test_gap_of_a_policy_is_beta_times_its_kl_to_the_tilt() -> None:
    _, reward, kl = exact(BETA)
    rewards = draw(400, 200, seed=7)
    assert beta_at_kl(rewards, kl) == pytest.approx(BETA, rel=0.02)

    optimal = draw(400, 30, seed=8, probs=torch.softmax(PROBS.log() + VALUES / BETA, 0))
    gap = gap_to_frontier(rewards, optimal, torch.full((400,), kl))
    assert abs(gap["gap"]) < 4 * gap["se"]
    assert gap["frontier_reward"] == pytest.approx(reward, abs=0.01)

    worse = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64)
    worse_kl = (worse * (worse / PROBS).log()).sum().item()
    gap = gap_to_frontier(rewards, draw(400, 30, 9, worse), torch.full((400,), worse_kl))
    truth = reward_at_kl(optimal_frontier(draw(3000, 256, 10)), worse_kl)[0] - (worse * VALUES).sum().item()
    assert abs(gap["gap"] - truth) < 4 * gap["se"]
    assert gap["gap"] > 6 * gap["se"]

    far = gap_to_frontier(rewards, optimal, torch.full((400,), 40.0))
    assert far["frontier_reward"] == pytest.approx(VALUES.max().item(), abs=1e-2)


def test_rejection_gives_the_tilted_distribution() -> None:
    rewards = draw(1, 60_000, seed=11).squeeze(0)
    bound = 1.5  # above the largest reward
    keep = rejection_sample(rewards, BETA, bound, torch.Generator().manual_seed(12))
    log_z, mean, _ = exact(BETA)
    accepted = math.exp(log_z - bound / BETA)
    n = rewards.numel()
    assert abs(keep.double().mean().item() - accepted) < 4 * math.sqrt(accepted * (1 - accepted) / n)

    kept = rewards[keep]
    expected = torch.softmax(PROBS.log() + VALUES / BETA, 0) * kept.numel()
    observed = torch.stack([(kept == value).sum() for value in VALUES]).double()
    chi_square = ((observed - expected).square() / expected).sum().item()
    assert chi_square < 16.27  # three degrees of freedom, p = 0.001
    assert kept.mean().item() == pytest.approx(mean, abs=0.02)

    assert not rejection_sample(torch.tensor([torch.nan]), BETA, bound).any()
    with pytest.raises(ValueError, match="above reward_max"):
        rejection_sample(rewards, BETA, 1.2)


def test_thin_weights_are_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = measure_truth(draw(50, 128, seed=13), BETA)
    assert "note" not in fine
    generator = torch.Generator().manual_seed(14)
    with pytest.warns(UntrustedTruth, match="effective samples"):
        thin = measure_truth(torch.rand(50, 16, generator=generator), 0.01)
    assert thin["thin_prompts"] > 0.9
    assert not thin["frontier"][-1]["trusted"]


def test_entry_for_the_evaluation_file() -> None:
    rewards = draw(60, 100, seed=15)
    features = torch.stack([rewards, -2 * rewards], dim=-1)
    truth = measure_truth(rewards, BETA, features, draw(60, 10, 16), torch.full((60,), 0.3))
    tilted = torch.softmax(PROBS.log() + VALUES / BETA, 0)
    mean = (tilted * VALUES).sum()
    variance = 5 * (tilted * (VALUES - mean).square()).sum().item()
    assert abs(truth["diversity"]["mean"] - variance) < 4 * truth["diversity"]["se"]
    assert set(truth["gap"]) >= {"kl", "frontier_reward", "policy_reward", "gap", "se"}
    assert truth["beta"] == BETA


@pytest.mark.parametrize(
    ("rewards", "beta"),
    [(torch.zeros(4), 0.1), (torch.zeros(2, 3), 0.0), (torch.full((2, 3), torch.inf), 0.1)],
)
def test_bad_input_is_named(rewards: Tensor, beta: float) -> None:
    with pytest.raises(ValueError, match=r"must be|infinite"):
        tilt(rewards, beta)
