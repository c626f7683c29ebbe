"""Every named objective: masks, weights, invariances, and the compositions that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.log_weights import LogWeights
from vmpo.objectives import OBJECTIVES, LearnedCentre, Objective, RowTerms, get_objective, kl_weight

torch.set_num_threads(1)
NAMES = list(OBJECTIVES)
N, S = 11, 3
GROUP = torch.tensor([7, 2, 7, 40, 2, 7, 2, 40, 7, 2, 7])  # K = 5, 4, 2


def random_matrices(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    log_p, log_p_ref, delta_phi = torch.randn(3, N, S, dtype=torch.float64, generator=generator).to(dtype)
    return log_p, log_p_ref, delta_phi


def rows(objective: Objective, log_p: Tensor | None, log_p_ref: Tensor, delta_phi: Tensor, group: Tensor) -> RowTerms:
    centre = torch.linspace(0.3, 1.1, S).to(delta_phi) if objective.centre == "learned" else None
    return objective.rows(log_p, log_p_ref, delta_phi, group, centre)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_row_leaves_the_loss_and_its_group(name: str) -> None:
    objective = get_objective(name)
    log_p, log_p_ref, delta_phi = random_matrices()
    failed = delta_phi.clone()
    failed[4, 1] = torch.nan
    terms = rows(objective, log_p, log_p_ref, failed, GROUP)
    assert not terms.mask[4].any()
    assert (terms.weight[4] == 0).all()
    assert (terms.advantage[4] == 0).all()
    keep = torch.arange(N) != 4
    without = rows(objective, log_p[keep], log_p_ref[keep], delta_phi[keep], GROUP[keep])
    for got, expected in zip(terms, without, strict=True):
        torch.testing.assert_close(got[keep], expected)


@pytest.mark.parametrize("name", [n for n in NAMES if OBJECTIVES[n].centre == "group"])
def test_a_group_of_one_valid_member_has_no_weight_and_does_not_dilute_the_mean(name: str) -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    delta_phi[3] = torch.nan  # group 40 keeps one member
    objective = get_objective(name)
    terms = rows(objective, log_p, log_p_ref, delta_phi, GROUP)
    assert not terms.mask[GROUP == 40].any()
    assert (terms.weight[GROUP == 40] == 0).all()
    for label, count in ((7, 5), (2, 4)):
        expected = 1 / (2 * (count - 1 if objective.bessel else count))
        torch.testing.assert_close(terms.weight[label == GROUP], torch.full((count, S), expected, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_all_failed_give_finite_zeros(name: str) -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    terms = rows(get_objective(name), log_p, log_p_ref, torch.full_like(delta_phi, torch.nan), GROUP)
    assert not terms.mask.any()
    assert (terms.weight == 0).all()
    assert (terms.advantage == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_order_and_labels_of_trajectories_do_not_matter(name: str) -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    objective, order = get_objective(name), torch.randperm(N, generator=torch.Generator().manual_seed(5))
    terms = rows(objective, log_p, log_p_ref, delta_phi, GROUP)
    moved = rows(objective, log_p[order], log_p_ref[order], delta_phi[order], -3 * GROUP[order])
    for before, after in zip(terms, moved, strict=True):
        torch.testing.assert_close(before[order], after)


@pytest.mark.parametrize("name", NAMES)
def test_needs_log_p_says_whether_the_rows_depend_on_the_current_policy(name: str) -> None:
    objective = get_objective(name)
    log_p, log_p_ref, delta_phi = random_matrices()
    terms = rows(objective, log_p, log_p_ref, delta_phi, GROUP)
    moved = rows(objective, log_p + 0.1 * torch.randn_like(log_p), log_p_ref, delta_phi, GROUP)
    assert torch.equal(terms.advantage, moved.advantage) is not objective.needs_log_p
    if objective.needs_log_p:
        with pytest.raises(ValueError, match="needs the current log p_theta"):
            rows(objective, None, log_p_ref, delta_phi, GROUP)
    else:
        assert torch.equal(rows(objective, None, log_p_ref, delta_phi, GROUP).advantage, terms.advantage)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_float32_or_better_and_nothing_has_a_gradient(name: str, dtype: torch.dtype) -> None:
    log_p, log_p_ref, delta_phi = random_matrices(dtype)
    terms = rows(get_objective(name), log_p.requires_grad_(), log_p_ref, delta_phi, GROUP)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert terms.advantage.dtype == terms.weight.dtype == expected
    assert terms.mask.dtype is torch.bool
    assert not terms.advantage.requires_grad
    assert not terms.weight.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_row_loss_gives_one_finite_number_a_row_with_gradient(name: str) -> None:
    objective = get_objective(name)
    log_p, log_p_ref, delta_phi = random_matrices()
    terms = rows(objective, log_p, log_p_ref, delta_phi, GROUP)
    centre = torch.zeros(S, dtype=torch.float64, requires_grad=True)
    values = centre[1].expand(N) if objective.centre == "learned" else None
    column = log_p[:, 1].requires_grad_()
    loss = objective.row_loss(column, log_p[:, 1].detach() - 0.05, terms.advantage[:, 1], values)
    assert loss.shape == (N,)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert column.grad is not None
    assert (column.grad != 0).any()
    assert (centre.grad is not None) == (objective.centre == "learned")


@pytest.mark.parametrize("name", ["vmpo_diff", "vmpo_r2g"])
def test_a_missing_learned_centre_is_an_error(name: str) -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    with pytest.raises(ValueError, match="learned centre"):
        get_objective(name).rows(log_p, log_p_ref, delta_phi, GROUP)
    with pytest.raises(ValueError, match="learned centre"):
        get_objective(name).row_loss(log_p[:, 0], log_p[:, 0], delta_phi[:, 0])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vmpo_diff", ("step", "learned", "squared", "difference", True, True, False, False)),
        ("vmpo_r2g", ("step", "learned", "squared", "return_to_go", False, True, False, False)),
        ("log_variance", ("step", "group", "surrogate", "return_to_go", False, True, False, True)),
        ("trajectory_log_variance", ("trajectory", "group", "surrogate", "terminal", True, True, False, True)),
        ("vmpo_clipped", ("step", "group", "clipped", "return_to_go", False, True, False, True)),
        ("grpo", ("step", "group", "clipped", "return_to_go", False, False, False, False)),
        ("grpo_std", ("step", "group", "clipped", "return_to_go", False, False, True, False)),
    ],
)
def test_the_parts_of_each_named_method_are_the_published_ones(name: str, parts: tuple[object, ...]) -> None:
    o = get_objective(name)
    assert (o.level, o.centre, o.loss, o.potential, o.per_step, o.reference, o.standardise, o.bessel) == parts


def test_every_named_method_has_its_parts_pinned() -> None:
    pinned = {"vmpo_diff", "vmpo_r2g", "log_variance", "trajectory_log_variance", "vmpo_clipped", "grpo", "grpo_std"}
    assert pinned == set(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_objective_says_what_it_is(name: str) -> None:
    objective = get_objective(name)
    assert objective.name == name
    assert "Eq." in objective.source or "arXiv" in objective.source


@pytest.mark.parametrize(
    ("typed", "nearest"), [("vmpo-diff", "vmpo_diff"), ("gpro", "grpo"), ("log_varience", "log_variance")]
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"no objective '{typed}'; did you mean '{nearest}'"):
        get_objective(typed)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("vmpo_diff", {"loss": "clipped"}, "gives the learned centre no gradient"),
        ("vmpo_diff", {"loss": "surrogate"}, "gives the learned centre no gradient"),
        ("vmpo_r2g", {"centre": "zero"}, "demands log w = 0"),
        ("vmpo_diff", {"centre": "zero", "level": "trajectory"}, "demands log w = 0"),
        ("vmpo_diff", {"reference": False}, "does not depend on the policy"),
        ("log_variance", {"loss": "squared"}, "use loss='surrogate'"),
        ("log_variance", {"potential": "terminal"}, "without reward"),
        ("log_variance", {"level": "trajectory"}, "counts the reward S times"),
        ("log_variance", {"centre": "zero"}, "needs centre='group'"),
        ("grpo_std", {"centre": "zero"}, "needs centre='group'"),
        ("grpo", {"clip_range": 0.0}, "must lie between 0 and 1"),
        ("grpo", {"clip_range": float("nan")}, "must lie between 0 and 1"),
        ("grpo", {"centre": "grup"}, "not one of group, learned, zero"),
    ],
)
def test_unsound_compositions_are_refused_with_the_reason(name: str, changes: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        replace(get_objective(name), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "detailed_balance", "centre": "zero", "loss": "squared", "potential": "difference"},  # Eq. 49
        {"name": "reinforce", "centre": "zero", "reference": False, "per_step": False},  # Eq. 18
        {"name": "trajectory_balance", "level": "trajectory", "centre": "learned", "loss": "squared"},  # as Eq. 47
    ],
)
def test_sound_compositions_without_a_name_are_allowed(changes: dict[str, object]) -> None:
    Objective(**changes)


def test_clip_fraction_counts_the_rows_whose_gradient_is_cut() -> None:
    objective = replace(get_objective("grpo"), clip_range=0.1)
    log_p = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.05], dtype=torch.float64).log().requires_grad_()
    old, advantage = torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    objective.row_loss(log_p, old, advantage).sum().backward()
    assert (log_p.grad == 0).tolist() == [True, False, False, True, False]
    metrics = objective.metrics(log_p, old, advantage)
    assert metrics["clip_fraction"] == pytest.approx(0.4)
    assert metrics["ratio_mean"] == pytest.approx(1.01)
    assert get_objective("log_variance").metrics(log_p, old, advantage)["clip_fraction"] == 0


def test_a_learned_centre_starts_at_the_mean_of_finite_rows() -> None:
    log_w = 30 + torch.randn(N, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_w[2, 0] = torch.nan
    keep = torch.arange(N) != 2
    step, trajectory = LearnedCentre(S, "step"), LearnedCentre(S, "trajectory")
    step.initialise(log_w)
    trajectory.initialise(log_w)
    assert step().dtype == trajectory().dtype == torch.float32
    assert step().shape == trajectory().shape == (S,)
    torch.testing.assert_close(step().double(), log_w[keep].mean(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(trajectory().sum().double(), log_w[keep].sum(1).mean(), rtol=1e-6, atol=1e-4)
    with pytest.raises(ValueError, match="cannot start"):
        step.initialise(torch.full((2, S), torch.nan))


def test_a_scalar_centre_is_the_sum_of_its_shares() -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    objective = Objective("trajectory_balance", "trajectory", "learned", "squared")
    scalar = objective.rows(log_p, log_p_ref, delta_phi, GROUP, torch.tensor(2.1, dtype=torch.float64))
    shares = objective.rows(log_p, log_p_ref, delta_phi, GROUP, torch.full((S,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(scalar.advantage, shares.advantage)


def test_kl_weights_are_means_over_rows_or_sums_over_steps() -> None:
    mask = torch.ones(N, S, dtype=torch.bool)
    mask[[1, 5]] = False
    step_mean, step_sum = kl_weight(get_objective("vmpo_diff"), mask), kl_weight(get_objective("log_variance"), mask)
    assert step_mean.sum().item() == pytest.approx(1)
    assert step_sum.sum().item() == pytest.approx(S)
    assert (step_mean[~mask] == 0).all()
    assert (step_sum[~mask] == 0).all()


def test_log_weights_agree_with_each_group_taken_alone() -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    log_w = 3 * (log_p_ref - log_p + delta_phi)
    log_w[4, 2] = torch.nan
    weights = LogWeights(log_w, GROUP)
    assert weights.groups.tolist() == [2, 7, 40]
    assert weights.count.tolist() == [3, 5, 2]
    assert weights.trajectory().isnan().tolist() == [i == 4 for i in range(N)]
    for g, label in enumerate((2, 7, 40)):
        steps = log_w[(label == GROUP) & log_w.isfinite().all(1)]
        total = steps.sum(1)
        w = total.exp()
        torch.testing.assert_close(weights.group_mean[g], total.mean())
        torch.testing.assert_close(weights.group_variance[g], total.var())
        torch.testing.assert_close(weights.step_mean[g], steps.mean(0))
        torch.testing.assert_close(weights.step_variance[g], steps.var(0))
        torch.testing.assert_close(weights.ess[g], w.sum() ** 2 / (w**2).sum() / len(w))
        torch.testing.assert_close(weights.log_z[g], w.mean().log())
    assert weights.summary()["var_log_w"] == pytest.approx(weights.group_variance.mean().item())
    assert set(weights.summary()) == {"var_log_w", "ess", "log_z"}


def test_log_weights_do_not_overflow_and_leave_undefined_groups_out() -> None:
    log_w = torch.tensor([[900.0], [901.0], [-2000.0], [torch.nan], [5.0]])
    weights = LogWeights(log_w, torch.tensor([0, 0, 1, 1, 2]))
    assert weights.log_z[0].item() == pytest.approx(900 + torch.tensor([1.0, torch.e]).mean().log().item(), abs=1e-3)
    assert weights.log_z[1:].tolist() == [-2000, 5]
    assert weights.ess[1:].tolist() == pytest.approx([1, 1])
    assert weights.group_variance.isnan().tolist() == [False, True, True]
    assert weights.summary()["var_log_w"] == pytest.approx(0.5, abs=1e-3)
    nothing = LogWeights(torch.full((2, 1), torch.nan), torch.tensor([0, 0]))
    assert nothing.log_z.isnan().all()
    assert nothing.ess.isnan().all()
    assert nothing.group_mean.isnan().all()


def test_log_weights_are_computed_in_float32_or_better_and_check_shapes() -> None:
    assert LogWeights(torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(2)).ess.dtype == torch.float32
    with pytest.raises(ValueError, match=r"log_w \(N, S\)"):
        LogWeights(torch.zeros(2), torch.zeros(2))
