"""The categorical step against plain sums, where outcomes are impossible and where uniforms are extreme."""

from __future__ import annotations

import math

import pytest
import torch

from vmpo.kernels import Categorical

NEVER = -torch.inf


def some_logits(seed: int = 3) -> torch.Tensor:
    """(4, 2, 5) with impossible outcomes first, last and in between; not normalised."""
    logits = 1.7 * torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.9
    logits[0, :, 0] = logits[1, :, 4] = logits[2, :, 2] = logits[3, :, 1] = NEVER
    return logits


def every_value() -> torch.Tensor:
    """All 25 values of two elements, (25, 2)."""
    return torch.cartesian_prod(torch.arange(5), torch.arange(5))


@pytest.mark.parametrize("row", range(4))
def test_densities_are_sums_over_all_values(row: int) -> None:
    p_logits, q_logits = some_logits()[row], some_logits()[row] * 0.4
    values = every_value()
    p, q = (Categorical(logits.expand(25, -1, -1)) for logits in (p_logits, q_logits))
    log_p, log_q = p.log_prob(values.double()), q.log_prob(values)
    mass = log_p.exp()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-14)
    possible = mass > 0
    kl = float((mass[possible] * (log_p - log_q)[possible]).sum())
    entropy = -float((mass[possible] * log_p[possible]).sum())
    assert float(p.kl(q)[0]) == pytest.approx(kl, abs=1e-13)
    assert kl > 0.05
    assert float(p.entropy()[0]) == pytest.approx(entropy, abs=1e-13)
    torch.testing.assert_close(p.log_ratio(q, values)[possible], (log_p - log_q)[possible], rtol=0, atol=1e-13)


def test_kl_is_infinite_where_the_other_cannot_go() -> None:
    p = Categorical(torch.tensor([[[0.3, 0.7]]], dtype=torch.float64))
    q = Categorical(torch.tensor([[[0.0, NEVER]]], dtype=torch.float64))
    assert float(p.kl(q)) == math.inf
    assert float(q.kl(p)) == pytest.approx(-float(p.log_probs[0, 0, 0]), abs=1e-14)


def test_mean_and_with_mean_are_inverse() -> None:
    p = Categorical(some_logits())
    again = p.with_mean(p.mean)
    torch.testing.assert_close(again.mean, p.mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(p.kl(again), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(again.mean == 0, p.mean == 0)


def test_gradients_are_finite_at_impossible_outcomes() -> None:
    logits = some_logits().requires_grad_()
    p, q = Categorical(logits), Categorical(some_logits().masked_fill(some_logits() > NEVER, 0.2))
    x = p.sample(torch.zeros(4, 2, dtype=torch.float64))
    total = p.log_prob(x) + p.kl(q) + q.kl(p) + p.entropy() + p.kl(p.with_mean(p.mean)) + p.with_mean(p.mean).entropy()
    (gradient,) = torch.autograd.grad(total.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[logits == NEVER] == 0).all())


def test_score_of_log_prob() -> None:
    """∂ log p(x)/∂ logits is the indicator of x minus the probabilities."""
    logits = some_logits().requires_grad_()
    x = Categorical(logits).sample(torch.full((4, 2), 0.6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(Categorical(logits).log_prob(x).sum(), logits)
    expected = torch.nn.functional.one_hot(x.long(), 5) - Categorical(logits).mean
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-14)


def test_sample_inverts_the_cumulative_distribution() -> None:
    """Equally spaced uniforms hit each outcome in proportion to its probability, to one of them in 100,000."""
    p = Categorical(some_logits()[:1].expand(100_000, -1, -1))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    x = p.sample(torch.special.ndtri(u)[:, None].expand(-1, 2))
    for element in range(2):
        counts = torch.bincount(x[:, element].long(), minlength=5).double() / 100_000
        torch.testing.assert_close(counts, p.mean[0, element], rtol=0, atol=2e-5)


@pytest.mark.parametrize("extreme", [-60.0, -8.3, 8.3, 60.0, -math.inf, math.inf])
def test_no_impossible_outcome_is_ever_drawn(extreme: float) -> None:
    p = Categorical(some_logits())
    x = p.sample(torch.full((4, 2), extreme, dtype=torch.float64))
    assert bool(p.log_prob(x).isfinite().all())
    lowest, highest = ([1, 0, 0, 0], [4, 3, 4, 4])
    expected = torch.tensor(lowest if extreme < 0 else highest)
    assert torch.equal(x, expected[:, None].expand(-1, 2).double())


def test_a_huge_negative_logit_behaves_like_minus_infinity() -> None:
    hard, soft = some_logits(), some_logits().clamp(min=-1e9)
    p, q = Categorical(hard), Categorical(soft)
    assert torch.equal(p.mean, q.mean)
    torch.testing.assert_close(q.kl(Categorical(soft * 0.5)), p.kl(Categorical(hard * 0.5)), rtol=0, atol=1e-14)
    assert torch.equal(p.sample(torch.ones(4, 2)), q.sample(torch.ones(4, 2)))


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [NEVER, NEVER]])
def test_logits_without_an_outcome_are_errors(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="logits"):
        Categorical(torch.tensor([[bad]]))


def test_shapes_are_checked() -> None:
    p = Categorical(some_logits())
    for call in (p.sample, p.log_prob):
        with pytest.raises(ValueError, match="shape"):
            call(torch.zeros(4, 3))
