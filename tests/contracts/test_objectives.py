"""Every named objective: masks, weights, invariances, and the compositions that are refused."""

from __future__ import annotations

from dataclasses import fields, replace

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


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(12))


def random_matrices(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    log_p, log_p_ref, delta_phi = torch.randn(3, N, S, dtype=torch.float64, generator=generator).to(dtype)
    return log_p, log_p_ref, delta_phi


def rows(objective: Objective, log_p: Tensor | None, log_p_ref: Tensor, delta_phi: Tensor, group: Tensor) -> RowTerms:
    centre = torch.linspace(0.3, 1.1, S).to(delta_phi) if objective.is_learned else None
    old = None if log_p is None else log_p.detach() - 0.05
    return objective.rows(log_p, log_p_ref, delta_phi, group, centre, old)


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
        expected = torch.full((count, S), 1 / (2 * (count - 1 if objective.bessel else count)), dtype=torch.float64)
        if objective.importance == "trajectory":  # log p − log p_old is 0.05 at every step
            low, high = objective.importance_range or (0.0, torch.inf)
            expected = expected * torch.tensor(0.05 * S, dtype=torch.float64).exp().clamp(low, high)
        torch.testing.assert_close(terms.weight[label == GROUP], expected)


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
    values = centre[1].expand(N) if objective.is_learned else None
    column = log_p[:, 1].requires_grad_()
    if objective.loss == "gradient":
        pytest.skip("its rows are gradients of states: tests/exact/test_kaleidoscope_equations.py")
    loss = objective.row_loss(column, log_p[:, 1].detach() - 0.5 * objective.clip_range, terms.advantage[:, 1], values)
    assert loss.shape == (N,)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert column.grad is not None
    assert (column.grad != 0).any()
    assert (centre.grad is not None) == objective.is_learned


@pytest.mark.parametrize("name", ["vmpo_diff", "vmpo_r2g", "flowrl", "ppo"])
def test_a_missing_learned_centre_is_an_error(name: str) -> None:
    log_p, log_p_ref, delta_phi = random_matrices()
    if name == "flowrl":  # at step level a row's target does not depend on the centre
        with pytest.raises(ValueError, match="learned centre"):
            get_objective(name).rows(log_p, log_p_ref, delta_phi, GROUP, None, log_p)
    with pytest.raises(ValueError, match="learned centre"):
        get_objective(name).row_loss(log_p[:, 0], log_p[:, 0], delta_phi[:, 0])


PARTS = {  # level, centre, loss, potential, per_step, anchor, standardise, bessel; then what else is not the default
    "vmpo_diff": ("step", "learned", "squared", "difference", True, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_diff_prompt": ("step", "prompt", "squared", "difference", True, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_r2g": ("step", "learned", "squared", "return_to_go", False, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_r2g_prompt": ("step", "prompt", "squared", "return_to_go", False, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_r2g_per_step": ("step", "learned", "squared", "return_to_go", True, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_learned": ("step", "learned", "squared", "learned_product", True, "ref", "none", False, {"kl_old": 1.0}),
    "vmpo_clipped": ("step", "group", "clipped", "return_to_go", False, "ref", "none", True, {}),
    "log_variance": ("step", "group", "surrogate", "return_to_go", False, "ref", "none", True, {}),
    "log_variance_diff": ("step", "group", "surrogate", "difference", True, "ref", "none", True, {}),
    "trajectory_log_variance": ("trajectory", "group", "surrogate", "terminal", True, "ref", "none", True, {}),
    "subtrajectory_log_variance": ("subtrajectory", "group", "surrogate", "difference", True, "ref", "none", True, {}),
    "log_variance_old": ("trajectory", "group", "surrogate", "terminal", True, "ref", "none", True, {"reuse": 4}),
    "log_variance_mixture": (
        *("trajectory", "group", "surrogate", "terminal", True, "ref", "none", True),
        {"reference_share": 0.1},
    ),
    "log_variance_replay": (
        *("trajectory", "group", "surrogate", "terminal", True, "ref", "none", True),
        {"replay": 3, "importance": "trajectory", "importance_range": (0.0, 2.0)},
    ),
    "kl_objective": ("step", "zero", "ratio", "return_to_go", False, "none", "none", False, {"kl_ref": 1.0}),
    "reinforce": ("step", "group", "surrogate", "return_to_go", False, "none", "none", True, {}),
    "reinforce_kl": ("step", "group", "surrogate", "return_to_go", False, "none", "none", True, {"kl_ref": 1.0}),
    "reinforce_implicit_kl": ("to_go", "group", "surrogate", "terminal", False, "ref", "none", True, {}),
    "ppo": ("step", "value", "clipped", "return_to_go", False, "none", "none", False, {"reuse": 2}),
    "ppo_kl": ("step", "value", "clipped", "return_to_go", False, "none", "none", False, {"reuse": 2, "kl_ref": 1.0}),
    "ppo_implicit_kl": ("to_go", "value", "clipped", "terminal", False, "ref", "none", False, {"reuse": 2}),
    "grpo": ("step", "group", "clipped", "return_to_go", False, "none", "none", False, {}),
    "grpo_kl": ("step", "group", "clipped", "return_to_go", False, "none", "none", False, {"kl_ref": 1.0}),
    "grpo_implicit_kl": ("to_go", "group", "clipped", "terminal", False, "ref", "none", False, {}),
    "grpo_std": ("step", "group", "clipped", "return_to_go", False, "none", "group", False, {}),
    "flow_grpo": (
        *("step", "group", "clipped", "return_to_go", False, "none", "batch", False),
        {"advantage_clip": 5.0, "clip_range": 1e-4, "log_prob": "mean", "kl_ref": 0.04},
    ),
    "gvpo": (
        *("trajectory", "group", "surrogate", "terminal", True, "old", "none", True),
        {"importance": "trajectory", "reuse": 2},
    ),
    "flowrl": (
        *("trajectory", "prompt", "squared", "terminal", True, "ref", "none", False),
        {"importance": "trajectory", "importance_range": (0.8, 1.2), "reuse": 2},
    ),
    "detailed_balance": ("step", "zero", "squared", "difference", True, "ref", "none", False, {}),
    "detailed_balance_learned": ("step", "zero", "squared", "learned", True, "ref", "none", False, {}),
    "detailed_balance_product": ("step", "zero", "squared", "learned_product", True, "ref", "none", False, {}),
    "detailed_balance_noising": ("step", "zero", "squared", "learned", True, "noising", "none", False, {}),
    "nabla_forward": ("step", "zero", "gradient", "difference", True, "ref", "none", False, {}),
    "nabla_backward": ("step", "zero", "gradient", "difference", True, "ref", "none", False, {"direction": "backward"}),
    "nabla_gflownet": ("step", "zero", "gradient", "learned", True, "ref", "none", False, {"direction": "both"}),
    "ddpo_sf": (
        *("step", "batch", "surrogate", "return_to_go", False, "none", "batch", False),
        {"advantage_clip": 5.0, "log_prob": "mean"},
    ),
    "ddpo_is": (
        *("step", "batch", "clipped", "return_to_go", False, "none", "batch", False),
        {"advantage_clip": 5.0, "log_prob": "mean", "clip_range": 1e-4, "reuse": 2},
    ),
    "dpok": (
        *("step", "value", "clamped", "return_to_go", False, "none", "none", False),
        {"clip_range": 1e-4, "log_prob": "mean", "kl_ref": 0.01, "reuse": 2},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_each_named_method_are_the_published_ones(name: str) -> None:
    o = get_objective(name)
    *parts, others = PARTS[name]
    assert [o.level, o.centre, o.loss, o.potential, o.per_step, o.anchor, o.standardise, o.bessel] == parts
    listed = ("name", "level", "centre", "loss", "potential", "per_step", "anchor", "standardise", "bessel", "source")
    default = Objective("default")
    own = {f.name: getattr(o, f.name) for f in fields(Objective) if f.name not in listed}
    assert {part: value for part, value in own.items() if value != getattr(default, part)} == others


def test_every_named_method_has_its_parts_pinned() -> None:
    assert PARTS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_named_objective_says_what_it_is(name: str) -> None:
    objective = get_objective(name)
    assert objective.name == name
    assert "Eq." in objective.source or "arXiv" in objective.source


@pytest.mark.parametrize(
    ("typed", "nearest"), [("vmpo-diff", "vmpo_diff"), ("grppo", "grpo"), ("log_varience", "log_variance")]
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"no objective '{typed}'; did you mean '{nearest}'"):
        get_objective(typed)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("vmpo_r2g", {"centre": "zero"}, "demands log w = 0"),
        ("vmpo_diff", {"centre": "zero", "level": "trajectory"}, "demands log w = 0"),
        ("vmpo_diff", {"anchor": "none"}, "does not depend on the policy"),
        ("vmpo_diff", {"level": "to_go"}, "use level='subtrajectory'"),
        ("vmpo_diff", {"centre": "value"}, "take up what the policy should"),
        ("vmpo_diff", {"anchor": "noising"}, "need a learned log-density"),
        ("trajectory_log_variance", {"centre": "learned", "bessel": False}, "fitted row by row"),
        ("log_variance", {"loss": "squared"}, "use loss='surrogate'"),
        ("log_variance", {"potential": "terminal"}, "without reward"),
        ("log_variance", {"potential": "learned"}, "gives the learned potential no gradient"),
        ("log_variance", {"level": "trajectory"}, "counts the reward S times"),
        ("log_variance", {"level": "subtrajectory"}, "stretches of level='subtrajectory' have no target"),
        ("reinforce_implicit_kl", {"potential": "return_to_go", "per_step": True}, "loses part of the reward"),
        ("log_variance", {"centre": "zero"}, "needs centre='group' or 'batch'"),
        ("grpo_std", {"centre": "zero"}, "needs centre='group' or 'batch'"),
        ("grpo", {"clip_range": 0.0}, "must lie between 0 and 1"),
        ("grpo", {"clip_range": float("nan")}, "must lie between 0 and 1"),
        ("grpo", {"centre": "grup"}, "not one of group, batch, learned, prompt, value, zero"),
        ("flow_grpo", {"advantage_clip": 0.0}, "must be above 0"),
        ("subtrajectory_log_variance", {"decay": 0.0}, "must be above 0 and at most 1"),
        ("grpo", {"reference_share": 0.2}, "no importance weight"),
        ("log_variance_replay", {"reference_share": 0.2}, "no importance weight"),
        ("grpo", {"importance": "step"}, "has the ratio in it already"),
        ("reinforce", {"replay": 2}, "policies long gone"),
        ("flowrl", {"importance_range": (1.2, 0.8)}, "0 <= low < high"),
        ("grpo", {"reuse": 0}, "used once or more"),
        ("nabla_forward", {"potential": "terminal"}, "differentiates the reward of every state"),
        ("nabla_forward", {"anchor": "old"}, "matches ∇log p_ref"),
        ("nabla_forward", {"centre": "group"}, "nothing to centre"),
        ("nabla_forward", {"importance": "step"}, "under any sampling"),
        ("nabla_forward", {"log_prob": "mean"}, "no log-density to divide"),
        ("ddpo_sf", {"standardise": "group"}, "has one group, the batch"),
    ],
)
def test_unsound_compositions_are_refused_with_the_reason(name: str, changes: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        replace(get_objective(name), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "detailed_balance", "centre": "zero", "loss": "squared", "potential": "difference"},  # Eq. 49
        {"name": "plain_reinforce", "centre": "zero", "anchor": "none", "per_step": False},  # Eq. 18
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
        LearnedCentre(S, "step").initialise(torch.full((2, S), torch.nan))


def test_a_centre_for_each_prompt_starts_when_the_prompt_is_first_seen() -> None:
    log_w = draw(N, S) + 30
    prompt = torch.tensor([0, 3, 0, 3, 3, 0, 0, 3, 0, 3, 0])
    centre = LearnedCentre(S, "step", num_prompts=5)
    centre.initialise(log_w, prompt)
    for c in (0, 3):
        torch.testing.assert_close(centre(torch.tensor([c]))[0].double(), log_w[prompt == c].mean(0), rtol=1e-6, atol=0)
    assert centre.seen.tolist() == [True, False, False, True, False]
    centre.initialise(log_w + 7, torch.where(prompt == 3, 4, prompt))
    torch.testing.assert_close(centre(torch.tensor([0]))[0].double(), log_w[prompt == 0].mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(centre(torch.tensor([4]))[0].double(), log_w[prompt == 3].mean(0) + 7, rtol=1e-6, atol=0)
    whole = LearnedCentre(S, "trajectory", num_prompts=2)
    whole.initialise(log_w, prompt // 3)
    torch.testing.assert_close(
        whole(torch.tensor([1])).sum().double(), log_w[prompt == 3].sum(1).mean(), rtol=1e-6, atol=0
    )


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
