"""The gradient summed over micro-batches of rows is the gradient of the whole loss, written out here without rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vmpo.objectives import OBJECTIVES, Objective, RowTerms

torch.set_num_threads(1)
BETA, S = 0.37, 3
GROUP = torch.tensor([7, 2, 7, 40, 2, 7, 11, 2, 11, 7, 2, 40, 7, 11])  # K = 5, 4, 3, 2 before failures
N = len(GROUP)
FAILED = [4, 11]  # of group 2, and of group 40, which leaves that group a single member
EXTRA = [
    Objective("trajectory_balance", "trajectory", "learned", "squared", "terminal"),
    Objective("detailed_balance", "step", "zero", "squared", "difference"),
    Objective("reinforce", "step", "zero", "surrogate", "return_to_go", per_step=False, anchor="none"),
    Objective("trajectory_clipped", "trajectory", "group", "clipped", "terminal", bessel=True),
    Objective("detailed_surrogate", "step", "group", "surrogate", "difference", bessel=True),
]
NAMES = ["vmpo_diff", "vmpo_r2g", "log_variance", "trajectory_log_variance", "vmpo_clipped", "grpo", "grpo_std"]
ALL = [*(OBJECTIVES[name] for name in NAMES), *EXTRA]  # all compositions: test_kaleidoscope_equations.py


class Problem:
    """Densities as a smooth function of theta, everything else fixed; rewards of FAILED rows are NaN."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        self.features, self.log_p_ref, self.noise = draw(N, S, 7), 2 * draw(N, S), draw(N, S)
        self.theta, self.delta_phi = draw(7), draw(N, S) / BETA
        self.delta_phi[FAILED[0], 1] = torch.nan
        self.delta_phi[FAILED[1]] = torch.nan
        self.centre = 1.3 + draw(S)

    def log_p(self, theta: Tensor) -> Tensor:
        return torch.tanh(self.features @ theta) - 1.5

    def log_p_old(self) -> Tensor:
        return self.log_p(self.theta) + 0.3 * self.noise  # ratios on both sides of the clipping range

    def valid(self, least: int) -> list[Tensor]:
        """Row indices of each group with enough valid members."""
        members = [[i for i in range(N) if GROUP[i] == g and i not in FAILED] for g in (7, 2, 40, 11)]
        return [torch.tensor(m) for m in members if len(m) >= least]


def direct_loss(objective: Objective, problem: Problem, theta: Tensor, centre: Tensor) -> Tensor:
    """The loss as the paper writes it, over whole groups; autograd goes through everything but an advantage."""
    log_p = problem.log_p(theta)
    log_w = problem.delta_phi + (problem.log_p_ref - log_p if objective.anchor == "ref" else 0)
    if objective.centre == "learned":
        rows = torch.cat(problem.valid(1))
        if objective.level == "trajectory":
            return ((log_w[rows].sum(1) - centre.sum()) ** 2).mean()
        return ((log_w[rows] - centre) ** 2).mean()
    losses = []
    for rows in problem.valid(2 if objective.centre == "group" else 1):
        K = len(rows)
        f = log_w[rows] if objective.level == "step" else log_w[rows].sum(1, keepdim=True)
        A = f - f.mean(0) if objective.centre == "group" else f
        if objective.name.startswith(("log_variance", "trajectory_log", "detailed_surrogate")):
            losses.append((A**2).sum() / (2 * (K - 1)))
        elif objective.loss == "squared":
            losses.append((A**2).sum() / K)
        elif objective.loss == "surrogate":
            losses.append(-(A.detach() * log_p[rows]).sum() / K)
        else:
            A = A.detach()
            if objective.standardise == "group":
                A = A / (A.pow(2).mean(0).sqrt() + 1e-4)
            ratio, eps = (log_p[rows] - problem.log_p_old()[rows]).exp(), objective.clip_range
            kept = torch.minimum(ratio * A, ratio.clip(1 - eps, 1 + eps) * A)
            losses.append(-kept.sum() / (K - 1 if "vmpo" in objective.name or "trajectory" in objective.name else K))
    return torch.stack(losses).mean()


def streamed_gradient(
    objective: Objective, problem: Problem, change: Callable[[RowTerms], RowTerms] = lambda terms: terms
) -> tuple[Tensor, Tensor]:
    """Gradients for theta and the centre, summed over random micro-batches of rows."""
    theta, centre = problem.theta.clone().requires_grad_(), problem.centre.clone().requires_grad_()
    learned = objective.centre == "learned"
    log_p = problem.log_p(problem.theta) if objective.needs_log_p else None
    terms = change(
        objective.rows(log_p, problem.log_p_ref, problem.delta_phi, GROUP, problem.centre if learned else None)
    )
    order = torch.randperm(N * S, generator=torch.Generator().manual_seed(8))
    for rows in order.split([1, 7, 2, 13, 5, N * S - 28]):
        i, s = rows // S, rows % S
        new = torch.tanh(problem.features[i, s] @ theta) - 1.5
        old = problem.log_p_old()[i, s]
        loss = objective.row_loss(new, old, terms.advantage[i, s], centre[s] if learned else None)
        (terms.weight[i, s] * loss).sum().backward()
    assert theta.grad is not None
    return theta.grad, centre.grad if centre.grad is not None else torch.zeros(S, dtype=torch.float64)


def full_gradient(objective: Objective, problem: Problem) -> tuple[Tensor, Tensor]:
    theta, centre = problem.theta.clone().requires_grad_(), problem.centre.clone().requires_grad_()
    direct_loss(objective, problem, theta, centre).backward()
    assert theta.grad is not None
    return theta.grad, centre.grad if centre.grad is not None else torch.zeros(S, dtype=torch.float64)


def assert_streams(objective: Objective, problem: Problem, change: Callable[[RowTerms], RowTerms]) -> None:
    for got, expected in zip(
        streamed_gradient(objective, problem, change), full_gradient(objective, problem), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_streamed_equals_full(objective: Objective) -> None:
    problem = Problem()
    assert full_gradient(objective, problem)[0].norm() > 1e-2
    assert_streams(objective, problem, lambda terms: terms)


def test_the_problem_clips_some_rows_and_not_others() -> None:
    problem = Problem()
    ratio = (problem.log_p(problem.theta) - problem.log_p_old()).exp()
    share = ((ratio - 1).abs() > OBJECTIVES["grpo"].clip_range).double().mean()
    assert 0.1 < share < 0.9


MUTATIONS: dict[str, Callable[[RowTerms], RowTerms]] = {
    "factor 2": lambda t: t._replace(weight=2 * t.weight),
    "K for K-1": lambda t: t._replace(weight=1 / (1 / t.weight + 3)),
    "rows of a failed reward count": lambda t: t._replace(
        advantage=torch.where(t.mask, t.advantage, 1.0), weight=torch.full_like(t.weight, t.weight.max())
    ),
    "beta dropped": lambda t: t._replace(advantage=BETA * t.advantage),
    "sign": lambda t: t._replace(advantage=-t.advantage),
    "advantage off by a constant": lambda t: t._replace(advantage=t.advantage + 0.1),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_the_comparison_notices(objective: Objective, mutation: str) -> None:
    with pytest.raises(AssertionError):
        assert_streams(objective, Problem(), MUTATIONS[mutation])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("log_variance", {"bessel": False}),
        ("log_variance", {"anchor": "none"}),
        ("log_variance", {"standardise": "group"}),
        ("trajectory_log_variance", {"level": "step", "potential": "difference"}),
        ("vmpo_clipped", {"bessel": False}),
        ("vmpo_clipped", {"anchor": "none"}),
        ("grpo", {"anchor": "ref"}),
        ("grpo", {"bessel": True}),
        ("grpo", {"loss": "surrogate"}),
        ("grpo_std", {"standardise": "none"}),
    ],
)
def test_a_composition_with_another_part_is_another_method(name: str, change: dict[str, object]) -> None:
    problem, objective = Problem(), OBJECTIVES[name]
    streamed = streamed_gradient(replace(objective, **change), problem)[0]
    expected = full_gradient(objective, problem)[0]
    assert (streamed - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["vmpo_diff", "vmpo_r2g"])
def test_a_squared_loss_at_step_level_stays_exact_when_the_policy_has_moved(name: str) -> None:
    problem, objective = Problem(), OBJECTIVES[name]
    terms = objective.rows(None, problem.log_p_ref, problem.delta_phi, GROUP, problem.centre)
    moved = problem.theta + 0.2
    flat = [m.flatten() for m in (problem.log_p(moved), problem.log_p_old(), terms.advantage)]
    loss = objective.row_loss(*flat, problem.centre.expand(N, S).flatten())
    total = (terms.weight.flatten() * loss).sum()
    torch.testing.assert_close(total, direct_loss(objective, problem, moved, problem.centre))
