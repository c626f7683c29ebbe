"""The gradient `Updater.accumulate` streams is autograd's of each printed equation, and changed factors are noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vmpo.objectives.objective as objective_module
import vmpo.training.update as update_module
from tests.exact import kaleidoscope_equations as eq
from tests.exact.kaleidoscope_equations import BETA, LOSSES, Equations, K, N, T
from vmpo.comparison.variant import Variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.errors import UserError
from vmpo.exact import LinearGaussian
from vmpo.kernels import DDIM
from vmpo.objectives import OBJECTIVES, Objective
from vmpo.training.rollout import Rollout
from vmpo.training.update import Penalties

torch.set_num_threads(1)
WORLD = LinearGaussian(
    DDIM(eq.ALPHA_BAR[:-1], eq.ALPHA_BAR[1:], torch.arange(T, 0, -1), eta=eq.ETA),
    eq.DATA_MEAN,
    eq.DATA_COV,
    eq.SLOPE,
    eq.CURVATURE,
    beta=BETA,
)
GRADIENT = [name for name, o in OBJECTIVES.items() if o.loss == "gradient"]
TRAJECTORY = OBJECTIVES["trajectory_log_variance"]
# compositions without a name, where a part that no named objective exercises at this size does something
EXTRA: dict[str, tuple[Objective, Callable[[Equations], Tensor]]] = {
    "tight flow_grpo": (
        replace(OBJECTIVES["flow_grpo"], advantage_clip=0.6, clip_range=2e-4),
        lambda e: eq.flow_grpo(e, 2e-4, 0.6),
    ),
    "a quarter from p_ref": (
        replace(OBJECTIVES["log_variance_mixture"], reference_share=0.25),
        lambda e: e.half_variance(e.trajectory),
    ),
    "replay cut at both ends": (
        replace(OBJECTIVES["log_variance_replay"], importance_range=(0.9, 1.1)),
        lambda e: e.weighted(e.trajectory, e.rho_trajectory.clip(0.9, 1.1)),
    ),
    "squared stretches": (
        replace(OBJECTIVES["vmpo_diff"], level="subtrajectory", decay=0.7, kl_old=0.0),
        lambda e: eq.subtrajectories(e, 0.7, lambda f: (f**2).mean() / T, e.ref - e.p + e.gain() - e.M),
    ),
    "reference's x̂_0": (
        replace(OBJECTIVES["detailed_balance_product"], predictor="reference"),
        LOSSES["detailed_balance_product"],
    ),
}
EVERY: dict[str, tuple[Objective, Callable[[Equations], Tensor]]] = {
    **{name: (o, LOSSES[name]) for name, o in OBJECTIVES.items()},
    **EXTRA,
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Moved(NamedTuple):
    training: WorldTraining
    data: Rollout
    drawn_by: tuple[Tensor, Tensor]


def moved(objective: Objective, kl_old: float = eq.MORE_OLD, kl_ref: float = eq.MORE_REF) -> Moved:
    """A rollout of a policy that is not p_ref; then policy, M, V and F moved on, in float64 throughout."""
    training = WorldTraining(WORLD, Variant(objective.name, objective), Budget(N, N, K), seed=0)
    if training.terms.centre is not None:
        training.terms.centre.double()
    denoiser = training.policy.denoiser
    policy = [denoiser.get_parameter("weight"), denoiser.get_parameter("bias")]
    with torch.no_grad():
        for i, parameter in enumerate(policy):
            parameter.add_(0.3 * draw(10 + i, *parameter.shape))
    training.updater.penalties = Penalties(objective.kl_old + kl_old, objective.kl_ref + kl_ref)
    training.updater.micro_batch = 7
    data = training.draw()
    drawn_by = policy[0].detach().clone(), policy[1].detach().clone()
    size = 2e-4 if objective.clip_range < 1e-3 else 0.08  # some ratios beyond the clipping range, some within
    with torch.no_grad():
        for i, parameter in enumerate([*policy, *training.terms.parameters]):
            parameter.add_((size if i < 2 else 0.4) * draw(20 + i, *parameter.shape))
    return Moved(training, data, drawn_by)


Change = Callable[[WorldTraining, Rollout], Rollout]


def streamed(objective: Objective, change: Change = lambda _, data: data, **penalties: float) -> list[Tensor]:
    training, data, _ = moved(objective, **penalties)
    parameters = training.updater.parameters
    data = change(training, data)
    training.updater.accumulate(data, torch.arange(N // K), on_policy=False)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def equations(name: str) -> Equations:
    objective = EVERY[name][0]
    training, data, drawn_by = moved(objective)
    reference_values = objective.predictor == "reference"
    return Equations(training, data.trajectory.x, drawn_by, name in eq.MEAN_LOG_PROB, reference_values)


def penalty(name: str, e: Equations) -> Tensor:
    """Means over rows beside Eq. 8, else Σ_t as in Eq. 22."""
    on_top = {"kl_old": (eq.MORE_OLD, eq.KL_OLD, e.drawn_by), "kl_ref": (eq.MORE_REF, eq.KL_REF, None)}
    total = torch.zeros((), dtype=torch.float64)
    own = {"tight flow_grpo": "flow_grpo"}.get(name, name)
    for more, published, other in on_top.values():
        kl = e.kl(other)
        total = total + (more + published.get(own, 0.0)) * (
            kl.mean() if name in eq.MEAN_OVER_ROWS else kl.sum(1).mean()
        )
    return total


@cache
def written_out(name: str, penalised: bool = True) -> list[Tensor]:
    e = equations(name)
    loss = EVERY[name][1](e)
    if penalised:
        loss = loss + penalty(name, e)
    parameters = e.training.updater.parameters
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def difference_of(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a parameter's gradients; inf if not the same parameters learn."""
    if len(got) != len(expected):
        return float("inf")
    pairs = zip(got, expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


# --- the equations ----------------------------------------------------------------------------------------------------


def test_every_objective_is_written_out() -> None:
    assert LOSSES.keys() == OBJECTIVES.keys()
    assert len(OBJECTIVES) == 38


@pytest.mark.parametrize("name", EVERY)
def test_the_streamed_gradient_is_the_equations(name: str) -> None:
    expected = written_out(name)
    assert all(g.norm() > 1e-4 for g in expected), "every parameter has a gradient here"
    assert difference_of(streamed(EVERY[name][0]), expected) < 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_the_equation_is_most_of_the_gradient_and_not_the_penalties(name: str) -> None:
    assert written_out(name, penalised=False)[0].norm() > 0.02 * written_out(name)[0].norm()


def test_states_densities_and_kls_are_those_of_the_rollout() -> None:
    training, data, drawn_by = moved(OBJECTIVES["detailed_balance_noising"])
    e = Equations(training, data.trajectory.x, drawn_by, False)
    torch.testing.assert_close(e.old, data.log_p_old, rtol=0, atol=1e-10)
    torch.testing.assert_close(e.ref, data.trajectory.log_p_ref, rtol=0, atol=1e-10)
    torch.testing.assert_close(e.noising, data.log_anchor, rtol=0, atol=1e-10)
    torch.testing.assert_close(e.gain(), data.delta_phi, rtol=0, atol=1e-10)
    assert (e.old - e.ref).abs().min() > 1e-6
    assert (e.p - e.old).abs().min() > 1e-6


@pytest.mark.parametrize("name", [n for n, (o, _) in EVERY.items() if o.loss in ("clipped", "clamped")])
def test_rows_lie_below_within_and_above_the_clipping_range(name: str) -> None:
    e, eps = equations(name), EVERY[name][0].clip_range
    rho = (e.p - e.old).exp()
    for rows in (rho < 1 - eps, (rho - 1).abs() < eps, rho > 1 + eps):
        assert rows.sum() >= 3


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("flowrl", 0.8, 1.2), ("log_variance_replay", 0.0, 2.0), ("replay cut at both ends", 0.9, 1.1)],
)
def test_weights_of_trajectories_lie_on_both_sides_of_their_range(name: str, low: float, high: float) -> None:
    rho = equations(name).rho_trajectory
    assert (rho > high).any()
    assert ((rho > low) & (rho < high)).any()
    assert low == 0 or (rho < low).any()


def test_a_quarter_of_each_group_is_drawn_from_the_reference() -> None:
    """Its states are p_ref's: with the noise of step k the same, x_{k+1} is μ_ref(x_k) + noise."""
    share, none = (moved(replace(TRAJECTORY, reference_share=s)).data.trajectory.x for s in (0.25, 0.0))
    same = (share == none).flatten(1).all(1)
    assert same.tolist() == [True, True, True, False] * (N // K)


def test_gvpo_off_its_rollout_is_eq_46_with_the_minus() -> None:
    e = equations("gvpo")
    A = (e.r + (e.old - e.p).sum(1)).detach()
    loss = -e.per_group(lambda g: (e.rho_trajectory[g] * (A[g] - A[g].mean())).sum() / (K - 1)) + penalty("gvpo", e)
    expected = torch.autograd.grad(loss, e.training.updater.parameters)
    assert difference_of(streamed(OBJECTIVES["gvpo"]), list(expected)) < 1e-12


# --- a test of the tests ----------------------------------------------------------------------------------------------


def parts(o: Objective) -> list[dict[str, Any]]:
    """Changes of one part that make another method."""
    grouped, ratio, squared = o.centre in ("group", "batch"), o.is_ratio, o.loss == "squared"
    where: list[tuple[bool, dict[str, Any]]] = [
        (grouped, {"bessel": not o.bessel}),
        (o.potential == "return_to_go", {"per_step": not o.per_step}),
        (o.potential == "difference", {"potential": "terminal" if o.level == "trajectory" else "return_to_go"}),
        (o.potential == "difference", {"potential": "learned"}),
        (o.potential == "learned", {"potential": "learned_product"}),
        (o.potential == "learned_product", {"potential": "learned"}),
        (o.needs_values, {"predictor": "reference" if o.predictor == "policy" else "policy"}),
        (o.anchor == "ref" and o.loss != "gradient", {"anchor": "old"}),
        (o.anchor == "ref" and o.loss != "gradient", {"anchor": "none"}),
        (o.anchor in ("none", "old", "noising"), {"anchor": "ref"}),
        (o.importance == "none", {"importance": "trajectory"}),
        (o.importance == "none", {"importance": "step"}),
        (o.importance != "none", {"importance": "none", "importance_range": None}),
        (o.importance != "none", {"importance_range": (0.97, 1.03)}),
        (o.loss in ("clipped", "clamped"), {"clip_range": 0.5 * o.clip_range}),
        (ratio, {"loss": "clamped" if o.loss == "clipped" else "clipped"}),
        (ratio, {"loss": "surrogate"}),
        (not squared and o.loss != "gradient", {"advantage_clip": 0.3}),
        (grouped, {"standardise": "batch" if o.standardise == "none" else "none"}),
        (o.centre == "group", {"standardise": "group" if o.standardise != "group" else "batch"}),
        (o.level == "subtrajectory", {"decay": 0.5}),
        (o.level == "trajectory", {"level": "to_go"}),
        (o.level in ("to_go", "step", "subtrajectory"), {"level": "trajectory"}),
        (o.level == "step", {"level": "subtrajectory"}),
        (grouped, {"centre": "batch" if o.centre == "group" else "group"}),
        (grouped, {"centre": "zero", "bessel": False, "standardise": "none"}),
        (o.is_learned, {"centre": "zero"}),
        (o.centre == "zero" and not squared, {"centre": "group"}),
        (o.loss == "gradient", {"direction": "backward" if o.direction != "backward" else "forward"}),
        (o.loss == "gradient", {"direction": "both" if o.direction != "both" else "forward"}),
        (o.kl_ref > 0, {"kl_ref": 0.0}),
        (o.kl_old > 0, {"kl_old": 0.0}),
        (o.loss != "gradient", {"log_prob": "sum" if o.log_prob == "mean" else "mean"}),
    ]
    found = []
    for applies, change in where:
        if applies:
            try:
                replace(o, **change)
            except UserError:
                continue  # no sound method
            found.append(change)
    return found


PARTS = [(name, change) for name, o in OBJECTIVES.items() for change in parts(o)]


def test_every_objective_has_two_changed_parts() -> None:
    assert all(sum(name == other for other, _ in PARTS) >= 2 for name in OBJECTIVES)
    assert len(PARTS) > 250


@pytest.mark.parametrize(("name", "change"), PARTS, ids=str)
def test_another_part_is_another_method(name: str, change: dict[str, Any]) -> None:
    assert difference_of(streamed(replace(OBJECTIVES[name], **change)), written_out(name)) > 1e-4


def scaled_reward(training: WorldTraining, data: Rollout) -> Rollout:
    gradient = None if data.value_gradient is None else 1.05 * data.value_gradient
    return replace(data, delta_phi=1.05 * data.delta_phi, value_gradient=gradient)


def no_part(which: str) -> Change:
    def change(training: WorldTraining, data: Rollout) -> Rollout:
        part = getattr(training.terms, which)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.zero_()
        return data

    return change


def other_groups(training: WorldTraining, data: Rollout) -> Rollout:
    return replace(data, group=data.group.roll(1))


DATA: list[tuple[str, str, Change, dict[str, float]]] = []
for _name, _o in OBJECTIVES.items():
    DATA.append((_name, "beta", scaled_reward, {}))
    if _o.loss != "gradient":
        for _which, _weight in (("kl_old", eq.MORE_OLD), ("kl_ref", eq.MORE_REF)):
            DATA += [(_name, f"{_which} x {f}", lambda _, d: d, {_which: f * _weight}) for f in (0.0, 2.0)]
    if _o.is_learned:
        DATA.append((_name, "no M", no_part("centre"), {}))
    if _o.centre == "value":
        DATA.append((_name, "no V", no_part("value"), {}))
    if "learned" in _o.potential:
        DATA.append((_name, "no F", no_part("potential"), {}))
    if _o.centre == "group":
        DATA.append((_name, "groups", other_groups, {}))


@pytest.mark.parametrize(
    ("name", "change", "penalties"), [(n, c, p) for n, _, c, p in DATA], ids=[f"{n}-{w}" for n, w, _, _ in DATA]
)
def test_a_changed_factor_is_noticed(name: str, change: Change, penalties: dict[str, float]) -> None:
    assert difference_of(streamed(OBJECTIVES[name], change, **penalties), written_out(name)) > 1e-6


Patch = Callable[[pytest.MonkeyPatch], None]


def _transposed(patch: pytest.MonkeyPatch) -> None:
    mixing = objective_module.mixing
    patch.setattr(objective_module, "mixing", lambda level, a, decay: mixing(level, a.flip(1), decay).flip(1))


def _last_step_forgotten(patch: pytest.MonkeyPatch) -> None:
    mixing = objective_module.mixing
    keep = torch.ones(T, dtype=torch.float64)
    keep[-1] = 0
    patch.setattr(objective_module, "mixing", lambda level, a, decay: mixing(level, a * keep, decay))


def _floor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objective_module, "STD_FLOOR", 1e-2)


def _row_loss(patch: pytest.MonkeyPatch) -> None:
    original = Objective.row_loss
    patch.setattr(Objective, "row_loss", lambda *a: 2 * original(*a))


def _matching(patch: pytest.MonkeyPatch) -> None:
    original = update_module.matching_loss
    patch.setattr(update_module, "matching_loss", lambda *a: (*original(*a)[:2], 2 * original(*a)[2]))


def _kl_weight(patch: pytest.MonkeyPatch) -> None:
    original = update_module.kl_weight
    patch.setattr(update_module, "kl_weight", lambda *a: 2 * original(*a))


def _members(patch: pytest.MonkeyPatch) -> None:
    original = Objective._weight
    patch.setattr(Objective, "_weight", lambda *a: original(*a) * (K - 1) / K)


PATCHES: list[tuple[str, Patch]] = [(name, _members) for name in OBJECTIVES]
PATCHES += [(name, _matching if name in GRADIENT else _row_loss) for name in OBJECTIVES]
PATCHES += [(name, _kl_weight) for name in OBJECTIVES]
PATCHES += [(name, _floor) for name, o in OBJECTIVES.items() if o.standardise != "none"]
PATCHES += [(name, _transposed) for name, o in OBJECTIVES.items() if o.level == "to_go"]
PATCHES += [(name, _last_step_forgotten) for name, o in OBJECTIVES.items() if o.level != "step"]


@pytest.mark.parametrize(("name", "patch"), PATCHES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_mutated_library_is_noticed(name: str, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written_out(name)
    patch(monkeypatch)
    assert difference_of(streamed(OBJECTIVES[name]), expected) > 1e-3
