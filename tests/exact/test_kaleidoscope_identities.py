"""Methods that are one another under some condition, the potentials' constraint, and rest at a Gaussian optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.exact.kaleidoscope_enumeration import (
    BETA,
    LOG_Z,
    OLD,
    OPTIMUM,
    PATHS,
    REF,
    THETA,
    R,
    T,
    draw,
    expected,
    set_centre,
    steps,
    tables,
)
from tests.exact.test_kaleidoscope_equations import EVERY, difference_of, moved, streamed
from vmpo.comparison.variant import Variant, parse_variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.exact import LinearGaussian, MaskedChain
from vmpo.kernels import DDIM
from vmpo.log_weights import LogWeights
from vmpo.objectives import OBJECTIVES, Objective
from vmpo.potentials import initial_log_potential
from vmpo.training.rollout import Rollout
from vmpo.training.update import Penalties

torch.set_num_threads(1)


# --- at ratio 1 -------------------------------------------------------------------------------------------------------


def on_policy(objective: Objective) -> list[Tensor]:
    """The gradient on its own rollout, with what is learned moved; no penalties."""
    training, data, drawn_by = moved(objective)
    denoiser = training.policy.denoiser
    with torch.no_grad():
        for name, values in zip(("weight", "bias"), drawn_by, strict=True):
            denoiser.get_parameter(name).copy_(values)
    training.updater.penalties = Penalties(0.0, 0.0)
    training.updater.accumulate(data, data.group.unique(), on_policy=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in training.updater.parameters]


@pytest.mark.parametrize("name", [n for n, (o, _) in EVERY.items() if o.is_ratio])
def test_at_ratio_one_every_ratio_loss_is_its_surrogate(name: str) -> None:
    objective = EVERY[name][0]
    assert difference_of(on_policy(objective), on_policy(replace(objective, loss="surrogate"))) < 1e-12
    assert difference_of(streamed(objective), streamed(replace(objective, loss="surrogate"))) > 1e-4


@pytest.mark.parametrize(
    ("name", "other"),
    [("ppo", "reinforce"), ("ppo_implicit_kl", "reinforce_implicit_kl"), ("dpok", "reinforce,log_prob=mean")],
)
def test_at_ratio_one_ppo_is_reinforce_with_the_same_value(name: str, other: str) -> None:
    reinforce = parse_variant(other).objective
    with_value = replace(reinforce, centre="value", bessel=False, clip_range=OBJECTIVES[name].clip_range)
    assert difference_of(on_policy(OBJECTIVES[name]), on_policy(with_value)) < 1e-12


@pytest.mark.parametrize(
    ("name", "other", "factor"),
    [
        ("vmpo_clipped", "log_variance", 1.0),
        ("grpo", "reinforce", 0.75),  # (K − 1)/K
        ("gvpo", "trajectory_log_variance,anchor=old", 1.0),
        ("gvpo,anchor=ref", "trajectory_log_variance", 1.0),
        ("log_variance_replay", "trajectory_log_variance", 1.0),
        ("trajectory_log_variance,loss=clipped", "trajectory_log_variance", 1.0),
        ("trajectory_log_variance,loss=clipped,anchor=old", "gvpo", 1.0),
        ("trajectory_log_variance", "reinforce_implicit_kl,level=trajectory", 1.0),
    ],
)
def test_at_ratio_one_methods_are_one(name: str, other: str, factor: float) -> None:
    one, another = (on_policy(parse_variant(spec).objective) for spec in (name, other))
    assert difference_of(one, [factor * g for g in another]) < 1e-12


def test_gvpo_without_its_ratio_is_the_squared_loss_of_zhang_et_al() -> None:
    """1/(K−1) Σ ½((log p_theta/p_old − mean) − (r/beta − mean))², by autograd: the minus of A is its."""
    objective = replace(OBJECTIVES["gvpo"], importance="none")
    training, data, _ = moved(objective, kl_old=0.0, kl_ref=0.0)
    log_p, group = log_p_now(training, data), data.group
    implied, reward = (log_p - data.log_p_old).sum(1), data.delta_phi.sum(1)
    losses = []
    for g in group.unique():
        i = (group == g).nonzero().flatten()
        gap = (implied[i] - implied[i].mean()) - (reward[i] - reward[i].mean())
        losses.append((0.5 * gap**2).sum() / (len(i) - 1))
    loss = torch.stack(losses).mean()
    wanted = list(torch.autograd.grad(loss, training.updater.parameters))
    assert difference_of(streamed(objective, kl_old=0.0, kl_ref=0.0), wanted) < 1e-12


def log_p_now(training: WorldTraining, data: Rollout) -> Tensor:
    sample = torch.arange(len(data.group))
    steps_ = range(training.kernel.num_steps)
    return torch.stack([training.updater.transition(data, sample, sample * 0 + s)[1] for s in steps_], 1)


# --- FlowRL -----------------------------------------------------------------------------------------------------------


def test_flowrl_is_eq_47() -> None:
    """w (log Z + 1/|x| log p_theta/p_ref − r/beta)², |x| = T: the library's loss over T², at the temperature beta/T."""
    cold = MaskedChain(length=2, tokens=2, steps=T, beta=BETA / T, seed=3)
    found = expected("flowrl", THETA, drawn_by=OLD, world=cold)
    assert found.training.terms.centre is not None
    theta = THETA.clone().requires_grad_()
    log_z = (found.training.terms.centre.value[0, 0] / T).detach().requires_grad_()
    log_p, log_old = steps(tables(theta)).sum(1), steps(tables(OLD)).sum(1)
    w = (log_p - log_old).exp().detach().clip(0.8, 1.2)
    assert ((w > 0.8) & (w < 1.2)).any()
    assert (w == 0.8).any()
    assert (w == 1.2).any()
    printed = (log_old.exp() * w * (log_z + (log_p - REF.sum(1)) / T - R) ** 2).sum()
    by_theta, by_log_z = torch.autograd.grad(printed, (theta, log_z))
    torch.testing.assert_close(found.policy / T**2, by_theta, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.learned[0].sum() / T**2, by_log_z / T, rtol=0, atol=1e-12)


def test_flowrl_is_vmpo_of_trajectories_with_a_weight() -> None:
    vmpo = Objective("vmpo", level="trajectory", centre="prompt", loss="squared", potential="terminal")
    same = replace(vmpo, importance="trajectory", importance_range=(0.8, 1.2))
    assert difference_of(streamed(OBJECTIVES["flowrl"]), streamed(same)) < 1e-12
    assert difference_of(on_policy(OBJECTIVES["flowrl"]), on_policy(vmpo)) < 1e-12
    assert difference_of(streamed(OBJECTIVES["flowrl"]), streamed(vmpo)) > 1e-3


def test_only_log_z_is_flowrls_centre_at_rest() -> None:
    """−2 E[w (log w − M)] = 0 at M = log Z, and with it the policy's gradient, whatever the weights' clipping."""
    for off, at_rest in ((0.0, True), (0.3, False)):
        found = expected("flowrl", OPTIMUM, drawn_by=OLD, set_terms=set_centre(LOG_Z + off))
        assert (max(g.abs().max().item() for g in [found.policy, *found.learned]) < 1e-10) is at_rest


# --- to_go and trajectory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["trajectory_log_variance", "reinforce_implicit_kl", "grpo_implicit_kl"])
def test_to_go_and_trajectory_have_one_expectation_and_not_one_gradient(spec: str) -> None:
    one, other = (f"{spec},level={level}" for level in ("to_go", "trajectory"))
    torch.testing.assert_close(expected(one, THETA).policy, expected(other, THETA).policy, rtol=0, atol=1e-12)
    assert difference_of(on_policy(parse_variant(one).objective), on_policy(parse_variant(other).objective)) > 1e-2


def test_with_one_step_all_levels_are_one() -> None:
    one_step = MaskedChain(length=2, tokens=2, steps=1, beta=0.37, seed=3)
    budget, found = Budget(8, 8, 4), {}
    for spec in ("log_variance", "trajectory_log_variance", "reinforce_implicit_kl", "log_variance_diff"):
        training = WorldTraining(one_step, parse_variant(spec), budget, seed=0)
        with torch.no_grad():
            training.policy.denoiser.get_parameter("theta").add_(draw(9, 1, 1, 9, 9))
        data = training.draw()
        training.updater.accumulate(data, data.group.unique(), on_policy=True)
        found[spec] = training.policy.denoiser.get_parameter("theta").grad
    for spec, gradient in found.items():
        torch.testing.assert_close(gradient, found["log_variance"], rtol=0, atol=1e-12, msg=spec)


# --- Eq. 34, 36, 37 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", ["return_to_go", "terminal", "difference", "learned", "learned_product"])
@pytest.mark.parametrize("where", ["gaussian", "masked"])
def test_potentials_multiply_to_the_reward_but_for_the_first_state(potential: str, where: str) -> None:
    """Eq. 36 for random F: Σ Δφ, less what is learned, plus log U(x_T), is r(x_0)/beta."""
    name = {"return_to_go": "trajectory_log_variance", "terminal": "trajectory_log_variance"}.get(potential)
    objective = replace(OBJECTIVES[name or "detailed_balance"], potential=potential)
    if where == "gaussian":
        training, data, _ = moved(objective)
    else:
        training, data = (found := expected(objective, THETA)).training, found.data
    world, x = training.world, data.trajectory.x
    reward = world.reward(x[:, -1], training.prompt) / world.beta
    total = data.delta_phi.sum(1)
    first = torch.zeros_like(total)
    if data.values is not None:
        assert data.values.shape == (len(x), training.kernel.num_steps + 1)
        torch.testing.assert_close(data.values[:, -1], reward)
        first = initial_log_potential(data.values * world.beta, world.beta)
    learned = training.terms.matrix(data)
    if learned is not None:
        assert training.terms.potential is not None
        total = total - learned.sum(1)
        zero = torch.zeros(len(x), dtype=torch.long)
        F = training.terms.potential(x[:, 0], zero, training.conditioning).detach()
        first = first + (F if potential == "learned" else F * first)
        assert F.abs().max() > 0.1
        assert learned.abs().max() > 0.1
    torch.testing.assert_close(total + first, reward, rtol=1e-12, atol=1e-12)
    assert reward.std() > 0.1


@pytest.mark.parametrize("kind", ["return_to_go", "difference", "terminal", "drawn"])
def test_the_variance_of_trajectories_is_bounded_by_that_of_steps(kind: str) -> None:
    """Eq. 34 and 39, 41: V(log w_{0:T}) ≤ T Σ_t V(log w_t), equal where all steps have one log-weight."""
    if kind == "drawn":
        noise = draw(3, 20, T + 2) @ draw(4, T + 2, T + 2) + 2 * draw(5, 20, 1)
        weights = LogWeights(noise, torch.arange(20) % 2)
    else:
        name = {"return_to_go": "vmpo_r2g_per_step", "difference": "log_variance_diff"}.get(kind, "flowrl")
        training, data, _ = moved(OBJECTIVES[name])
        log_w = data.log_anchor - log_p_now(training, data).detach() + data.delta_phi
        weights = LogWeights(log_w, data.group)
    columns, steps_ = weights.log_w, weights.log_w.shape[1]
    for g in weights.groups:
        f = columns[weights.group == g]
        total, each = torch.var(f.sum(1)), torch.var(f, 0).sum()
        assert total <= steps_ * each
        torch.testing.assert_close(weights.group_variance[g], total)
        torch.testing.assert_close(weights.step_variance[g].sum(), each)
        same = f[:, :1].expand_as(f)
        torch.testing.assert_close(torch.var(same.sum(1)), steps_ * torch.var(same, 0).sum())


# --- centres ----------------------------------------------------------------------------------------------------------

TWO = MaskedChain(length=2, tokens=2, steps=1, beta=0.37, num_prompts=2, seed=5)


@pytest.mark.parametrize(
    ("spec", "leaves"),
    [("vmpo_r2g", True), ("vmpo_r2g_prompt", False), ("flowrl,centre=learned", True), ("flowrl", False)],
)
def test_at_the_optimum_m_of_t_leaves_the_variance_between_prompts_and_m_of_t_c_nothing(
    spec: str, leaves: bool
) -> None:
    """One step, two prompts: log w = log Z(c), so min over M(t) of E(log w − M)² is Var_c log Z(c)."""
    paths = torch.arange(TWO.num_states)[TWO.clean]
    n, log_z = len(paths), TWO.truth().log_z
    variance = log_z.var(correction=0)
    assert variance > 0.01
    training = WorldTraining(TWO, parse_variant(spec), Budget(2 * n, 2 * n, n), seed=0)
    assert training.terms.centre is not None
    training.terms.centre.double()
    training.policy = TWO.optimal_policy()
    training.updater.policy = training.policy
    training.updater.penalties = Penalties(0.0, 0.0)
    data = training.draw()
    training.start_centre(data)
    loss = training.updater.accumulate(data, torch.arange(2), on_policy=True)[0].item()
    centre = training.terms.centre.value
    assert centre.grad is not None
    assert centre.grad.abs().max() < 1e-6, "the start is the minimum over M"
    assert loss == pytest.approx(variance.item() if leaves else 0.0, abs=1e-6)
    moves = max(p.grad.abs().max().item() for p in training.policy.denoiser.parameters() if p.grad is not None)
    assert (moves > 1e-3) is leaves
    if not leaves:
        torch.testing.assert_close(centre.detach()[:, 0], log_z, rtol=0, atol=1e-6)


# --- gradients of states at a Gaussian optimum ------------------------------------------------------------------------

ALPHA_BAR = torch.tensor([0.05, 0.4, 0.8, 0.95], dtype=torch.float64)
LINEAR = LinearGaussian(
    DDIM(ALPHA_BAR[:-1], ALPHA_BAR[1:], torch.arange(3, 0, -1), eta=1.0),
    torch.tensor([0.4, -0.7], dtype=torch.float64),
    torch.tensor([[1.1, 0.5], [0.5, 0.6]], dtype=torch.float64),
    torch.tensor([[0.6, -0.25], [-0.3, 0.5]], dtype=torch.float64),
    beta=0.37,
)


def at_linear_optimum(
    name: str, intermediate: str, change: Callable[[WorldTraining, Rollout], Rollout] = lambda _, data: data
) -> list[Tensor]:
    training = WorldTraining(LINEAR, Variant(name, OBJECTIVES[name], intermediate), Budget(16, 16, 4), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for mine, theirs in zip(
            training.policy.denoiser.parameters(), LINEAR.optimal_policy().denoiser.parameters(), strict=True
        ):
            mine.copy_(theirs)
    data = change(training, training.draw())
    training.updater.accumulate(data, data.group.unique(), on_policy=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in training.updater.parameters]


@pytest.mark.parametrize("name", ["nabla_forward", "nabla_backward", "nabla_gflownet"])
def test_gradient_losses_rest_at_the_optimum_with_exact_values_alone(name: str) -> None:
    assert max(g.abs().max() for g in at_linear_optimum(name, "exact")) < 1e-10
    assert at_linear_optimum(name, "predicted")[0].abs().max() > 1e-3


@pytest.mark.parametrize(("sign", "at_rest"), [(1.0, True), (-1.0, False)])
def test_the_learned_gradient_is_taken_off_at_x_t(sign: float, at_rest: bool) -> None:
    """∇-GFlowNet with values V − F and F random rests at the optimum; Eq. 55's + ∇F in its second line would not.

    Where F is subtracted from V at x_{t-1} and, by the printed sign, added at x_t, the two lines disagree.
    """

    def split(training: WorldTraining, data: Rollout) -> Rollout:
        assert training.terms.potential is not None
        with torch.no_grad():
            for parameter in training.terms.potential.parameters():
                parameter.add_(draw(41, *parameter.shape))
        gradient, local = data.value_gradient, torch.arange(16)
        assert gradient is not None
        found = gradient.clone()
        for s in range(3):
            F = training.terms.gradient(data, local, torch.full_like(local, s))
            assert F is not None
            found[:, s] -= sign * F.detach()
        return replace(data, value_gradient=found)

    largest = max(g.abs().max().item() for g in at_linear_optimum("nabla_gflownet", "exact", split))
    assert (largest < 1e-10) is at_rest


def test_enumerated_paths_are_all() -> None:
    torch.testing.assert_close(steps(tables(THETA)).sum(1).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert len(PATHS) == 16
