"""Every objective's streamed gradient is autograd's of its equation, and a changed factor is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exact.kaleidoscope_losses import BATCH, KL_OLD, KL_REF, LOSSES, K, S, penalty, plain
from vmpo.comparison.variant import Variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.exact import LinearGaussian, MaskedChain
from vmpo.kernels import DDIM
from vmpo.objectives import OBJECTIVES, Objective
from vmpo.objectives.levels import mixing
from vmpo.potentials import difference, initial_log_potential, return_to_go, terminal
from vmpo.training.learned_terms import LearnedTerms
from vmpo.training.rollout import Rollout
from vmpo.training.update import Penalties

torch.set_num_threads(1)
BETA = 0.37
ALPHA_BAR = torch.tensor([0.02, 0.3, 0.7, 0.95], dtype=torch.float64)
WORLD = LinearGaussian(
    DDIM(ALPHA_BAR[:-1], ALPHA_BAR[1:], torch.arange(S, 0, -1), eta=1.0),
    torch.tensor([0.4, -0.7], dtype=torch.float64),
    torch.tensor([[1.1, 0.5], [0.5, 0.6]], dtype=torch.float64),
    torch.tensor([[0.6, -0.25], [-0.3, 0.5]], dtype=torch.float64),
    torch.tensor([[[0.5, 0.2], [0.2, 0.9]], [[0.3, 0.0], [0.0, 0.1]]], dtype=torch.float64),
    beta=BETA,
    name="two prompts",
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(objective: Objective) -> tuple[WorldTraining, Rollout]:
    """A rollout, and everything that learns moved away from where it was when the rollout was drawn."""
    training = WorldTraining(WORLD, Variant(objective.name, objective), Budget(BATCH, BATCH, K), seed=0)
    parameters = list(training.policy.denoiser.parameters())
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(0.3 * draw(10 + i, *parameter.shape))
    training.updater.penalties = Penalties(KL_OLD, KL_REF)
    training.updater.micro_batch = 7
    data = training.draw()
    size = 2e-4 if objective.clip_range < 1e-3 else 0.08  # some ratios beyond the clipping range, some within
    with torch.no_grad():
        for i, parameter in enumerate([*parameters, *training.terms.parameters]):
            step = size if i < len(parameters) else 0.4
            parameter.add_(step * draw(20 + i, *parameter.shape).to(parameter))
    return training, data


def streamed(
    objective: Objective, change: Callable[[WorldTraining, Rollout], Rollout] = lambda _, d: d
) -> list[Tensor]:
    training, data = moved(objective)
    data = change(training, data)
    training.updater.accumulate(data, torch.arange(BATCH // K), on_policy=False)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in training.updater.parameters]


def written_out(name: str) -> list[Tensor]:
    training, data = moved(OBJECTIVES[name])
    w = plain(training, data, name)
    loss = LOSSES[name](w) + penalty(name, w)
    found = torch.autograd.grad(loss, training.updater.parameters, allow_unused=True, materialize_grads=True)
    return list(found)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        scale = max(1e-3, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * scale)  # M and the weights of KLs are float32


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_streamed_gradient_is_the_equations(name: str) -> None:
    expected = written_out(name)
    assert all(g.norm() > 1e-6 for g in expected), "every part that learns has a gradient here"
    assert_same(streamed(OBJECTIVES[name]), expected)


def test_every_objective_is_written_out() -> None:
    assert LOSSES.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.loss in ("clipped", "clamped")])
def test_some_rows_are_clipped_and_some_are_not(name: str) -> None:
    training, data = moved(OBJECTIVES[name])
    w = plain(training, data, name)
    beyond = (((w.p - w.old).exp() - 1).abs() > OBJECTIVES[name].clip_range).double().mean()
    assert 0.02 < beyond < 0.98


# --- a test of the tests ----------------------------------------------------------------------------------------------

Change = Callable[[WorldTraining, Rollout], Rollout]


def _reward(training: WorldTraining, data: Rollout) -> Rollout:
    if data.value_gradient is not None:
        return replace(data, value_gradient=1.1 * data.value_gradient)
    return replace(data, delta_phi=1.1 * data.delta_phi)


def _anchor(training: WorldTraining, data: Rollout) -> Rollout:
    return replace(data, log_anchor=0.9 * data.log_anchor)


def _half_old(training: WorldTraining, data: Rollout) -> Rollout:
    training.updater.penalties = Penalties(KL_OLD / 2, KL_REF)
    return data


def _no_ref(training: WorldTraining, data: Rollout) -> Rollout:
    training.updater.penalties = Penalties(KL_OLD, 0.0)
    return data


def _groups(training: WorldTraining, data: Rollout) -> Rollout:
    return replace(data, group=(data.group + torch.arange(BATCH) % 2) % 4)


def _forgotten(training: WorldTraining, data: Rollout) -> Rollout:
    training.terms.value = training.terms.potential = None
    return data


DATA: dict[str, Change] = {
    "the reward's factor": _reward,
    "the weight of KL to p_old": _half_old,
    "the KL to p_ref dropped": _no_ref,
    "the anchor's factor": _anchor,
    "groups mixed up": _groups,
    "what is learned dropped": _forgotten,
}


def changes(name: str) -> list[str]:
    o = OBJECTIVES[name]
    found = ["the reward's factor"]
    if o.loss != "gradient":
        found += ["the weight of KL to p_old", "the KL to p_ref dropped"]
        found += ["the anchor's factor"] if o.anchor != "none" else []
    found += ["groups mixed up"] if o.centre == "group" else []
    found += ["what is learned dropped"] if o.centre == "value" or "learned" in o.potential else []
    return found


@pytest.mark.parametrize(("name", "what"), [(name, what) for name in OBJECTIVES for what in changes(name)])
def test_a_changed_factor_is_noticed(name: str, what: str) -> None:
    with pytest.raises(AssertionError):
        assert_same(streamed(OBJECTIVES[name], DATA[what]), written_out(name))


PARTS: dict[str, list[dict[str, Any]]] = {
    "vmpo_diff": [{"centre": "zero"}, {"level": "subtrajectory"}, {"predictor": "reference"}],
    "vmpo_diff_prompt": [{"centre": "zero"}],
    "vmpo_r2g": [{"per_step": True}, {"anchor": "old"}],
    "vmpo_r2g_prompt": [{"per_step": True}],
    "vmpo_r2g_per_step": [{"per_step": False}],
    "vmpo_learned": [{"potential": "learned"}, {"potential": "difference"}, {"predictor": "reference"}],
    "vmpo_clipped": [{"bessel": False}, {"clip_range": 0.3}, {"anchor": "none"}, {"loss": "ratio"}],
    "log_variance": [{"bessel": False}, {"anchor": "old"}, {"per_step": True}, {"centre": "batch"}],
    "log_variance_diff": [{"bessel": False}, {"level": "to_go"}, {"level": "trajectory"}],
    "trajectory_log_variance": [{"bessel": False}, {"level": "to_go"}, {"importance": "trajectory"}, {"anchor": "old"}],
    "subtrajectory_log_variance": [{"decay": 1.0}, {"level": "trajectory"}, {"bessel": False}],
    "log_variance_old": [{"importance": "step"}, {"bessel": False}],
    "log_variance_mixture": [{"bessel": False}, {"centre": "batch"}],
    "log_variance_replay": [{"importance": "none"}, {"importance_range": (0.0, 1.05)}, {"importance": "step"}],
    "kl_objective": [{"loss": "surrogate"}, {"centre": "group"}, {"per_step": True}],
    "reinforce": [{"bessel": False}, {"anchor": "ref"}, {"loss": "ratio"}],
    "reinforce_kl": [{"bessel": False}, {"standardise": "group"}],
    "reinforce_implicit_kl": [{"level": "trajectory"}, {"anchor": "none"}, {"bessel": False}],
    "ppo": [{"centre": "learned"}, {"clip_range": 0.1}, {"loss": "clamped"}],
    "ppo_kl": [{"centre": "learned"}, {"loss": "ratio"}],
    "ppo_implicit_kl": [{"anchor": "none"}, {"anchor": "old"}],
    "grpo": [{"bessel": True}, {"anchor": "ref"}, {"clip_range": 0.1}, {"standardise": "group"}],
    "grpo_kl": [{"bessel": True}, {"loss": "surrogate"}],
    "grpo_implicit_kl": [{"bessel": True}, {"level": "trajectory"}],
    "grpo_std": [{"standardise": "batch"}, {"standardise": "none"}, {"advantage_clip": 0.5}],
    "flow_grpo": [{"standardise": "group"}, {"clip_range": 1e-2}, {"log_prob": "sum"}, {"advantage_clip": 0.5}],
    "gvpo": [{"anchor": "ref"}, {"importance": "none"}, {"bessel": False}],
    "flowrl": [{"importance_range": (0.5, 2.0)}, {"importance": "none"}, {"anchor": "old"}],
    "detailed_balance": [{"level": "subtrajectory"}, {"predictor": "reference"}],
    "detailed_balance_learned": [{"potential": "learned_product"}, {"anchor": "noising"}],
    "detailed_balance_product": [{"potential": "learned"}, {"potential": "difference"}],
    "detailed_balance_noising": [{"anchor": "ref"}, {"potential": "learned_product"}],
    "nabla_forward": [{"direction": "backward"}, {"direction": "both"}],
    "nabla_backward": [{"direction": "forward"}, {"predictor": "reference"}],
    "nabla_gflownet": [{"direction": "forward"}, {"direction": "backward"}, {"potential": "difference"}],
    "ddpo_sf": [{"centre": "group"}, {"standardise": "none"}, {"advantage_clip": 0.5}, {"log_prob": "sum"}],
    "ddpo_is": [{"clip_range": 1e-2}, {"centre": "group"}, {"loss": "clamped"}],
    "dpok": [{"loss": "clipped"}, {"centre": "learned"}, {"log_prob": "sum"}],
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_another_part_is_another_method(name: str, part: dict[str, Any]) -> None:
    got = streamed(replace(OBJECTIVES[name], **part))
    expected = written_out(name)
    if len(got) != len(expected):
        return  # it does not even learn the same things
    with pytest.raises(AssertionError):
        assert_same(got, expected)


def test_every_objective_has_a_changed_part() -> None:
    assert PARTS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_whole_loss_scaled_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Objective._weight
    monkeypatch.setattr(Objective, "_weight", lambda *a: weight(*a) * (K - 1) / K)
    with pytest.raises(AssertionError):
        assert_same(streamed(OBJECTIVES[name]), written_out(name))


# --- identities -------------------------------------------------------------------------------------------------------


def at_ratio_one(objective: Objective) -> list[Tensor]:
    """The gradient right after the rollout; what is learned is not at zero."""
    training = WorldTraining(WORLD, Variant(objective.name, objective), Budget(BATCH, BATCH, K), seed=0)
    data = training.draw()
    with torch.no_grad():
        for i, parameter in enumerate(training.terms.parameters):
            parameter.add_(0.4 * draw(20 + i, *parameter.shape).to(parameter))
    training.updater.penalties = Penalties(0.0, 0.0)
    training.updater.accumulate(data, torch.arange(BATCH // K), on_policy=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in training.updater.parameters]


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.is_ratio])
def test_at_ratio_one_a_ratio_loss_is_reinforce(name: str) -> None:
    """PPO = REINFORCE with V as its baseline; GRPO, DDPO, DPOK and VMPO clipped likewise (Eq. 18, 19, 21, 32)."""
    objective = OBJECTIVES[name]
    expected = at_ratio_one(replace(objective, loss="surrogate"))
    assert expected[0].norm() > 1e-3
    assert_same(at_ratio_one(objective), expected)


def test_gvpo_at_its_rollout_is_log_variance_without_a_kl_and_off_it_clipped_vmpo_of_trajectories() -> None:
    assert_same(at_ratio_one(OBJECTIVES["gvpo"]), at_ratio_one(replace(OBJECTIVES["reinforce"], per_step=False)))
    training, data = moved(OBJECTIVES["gvpo"])
    w = plain(training, data, "gvpo")
    f = (w.R + (w.old - w.p).sum(1)).detach()
    ratio = (w.p - w.old).sum(1).exp()  # with its graph, as Eq. 46 has it
    losses = []
    for g in w.groups:
        mean = (ratio[g].detach() * f[g]).sum() / ratio[g].detach().sum()
        losses.append(-(ratio[g] * (f[g] - mean)).sum() / (K - 1))
    expected = torch.autograd.grad(torch.stack(losses).mean() + penalty("gvpo", w), training.updater.parameters)
    assert_same(streamed(OBJECTIVES["gvpo"]), list(expected))


def test_the_sign_printed_in_eq_46_has_no_rest_at_the_tilted_law() -> None:
    """One step over five outcomes: with the minus the expected gradient is zero at p_old·exp(r/beta), with plus not."""
    log_old, r = draw(1, 5).log_softmax(0), draw(2, 5)
    theta = (log_old + r / BETA).requires_grad_()
    for sign, rests in ((-1.0, True), (1.0, False)):
        log_p = theta.log_softmax(0)
        A = (r / BETA + sign * (log_p - log_old)).detach()
        A = A - (log_p.exp().detach() * A).sum()
        loss = -(log_old.exp() * (log_p - log_old).exp() * A).sum()  # E_old[ρ A]
        assert (torch.autograd.grad(loss, theta)[0].norm().item() < 1e-12) is rests


def test_flowrl_is_vmpo_of_trajectories_with_log_z_for_its_centre() -> None:
    """Where no weight is clipped or reweighs, and Eq. 47's length-normalised form at temperature beta/T over T²."""
    objective = replace(OBJECTIVES["flowrl"], importance="none", importance_range=None)
    vmpo = Objective("vmpo", level="trajectory", centre="prompt", loss="squared", potential="terminal")
    assert_same(streamed(objective), streamed(vmpo))
    log_p, log_ref, r, log_z = draw(3, 8, S), draw(4, 8, S), draw(5, 8), 0.7
    printed = (log_z + (log_p - log_ref).sum(1) / S - r) ** 2
    ours = (log_z * S + (log_p - log_ref).sum(1) - r / (1 / S)) ** 2 / S**2
    torch.testing.assert_close(printed, ours)


@pytest.mark.parametrize("potential", ["learned", "learned_product"])
def test_learned_potentials_telescope_to_the_reward_whatever_they_are(potential: str) -> None:
    """Eq. 36: Σ_t (Δφ_t − learned) = r(x_0)/beta − φ(x_T), a function of x_T alone."""
    objective = replace(OBJECTIVES["detailed_balance_learned"], potential=potential)
    training, data = moved(objective)
    found = data.delta_phi - training.terms.matrix(data)
    w = plain(training, data, "detailed_balance_learned")
    start = w.v[:, 0] + (w.F[:, 0] if potential == "learned" else w.F[:, 0] * w.v[:, 0])
    assert w.F.abs().min() > 1e-3
    torch.testing.assert_close(found.sum(1), w.R - start)


def test_fixed_potentials_multiply_to_the_reward() -> None:
    r, v = draw(6, 9), draw(7, 9, S + 1)
    v[:, -1] = r
    for total in (
        terminal(r, S, BETA).sum(1),
        return_to_go(r, S, BETA).sum(1),
        difference(v, BETA).sum(1) + initial_log_potential(v, BETA),
    ):
        torch.testing.assert_close(total, r / BETA)
    assert (return_to_go(r, S, BETA, per_step=False).sum(1) - r / BETA).abs().min() > 1e-3


def test_one_centre_for_prompts_of_different_log_z_leaves_their_variance() -> None:
    """At the optimum of both prompts: ½ Var_c(log Z(c)) is left of E(log w − M)² with M(t), nothing with M(t, c)."""
    log_w = torch.tensor([0.3, 1.3])[:, None].expand(2, 6).double()
    one = (log_w - log_w.mean()).square().mean()
    assert one.item() == pytest.approx(0.25)
    assert (log_w - log_w.mean(1, keepdim=True)).square().mean() == 0
    objective, prompt = OBJECTIVES["flowrl"], torch.arange(2).repeat_interleave(6)
    log_p = draw(8, 12, S)
    found = objective.rows(log_p, log_p, terminal(log_w.flatten() * BETA, S, BETA), prompt, torch.tensor(0.8), log_p)
    error = found.advantage - log_p - 0.8 / S
    torch.testing.assert_close((found.weight[:, :1] * error[:, :1] ** 2).sum(), one, rtol=1e-6, atol=1e-7)


# --- expected gradients by enumeration --------------------------------------------------------------------------------

CHAIN = MaskedChain(length=2, tokens=2, steps=2, beta=0.6, seed=3)
PATHS, LOG_REF_PATH = CHAIN.paths()


def enumerated(theta: Tensor) -> tuple[Tensor, Tensor]:
    """log p_theta and log p_ref of each step of every path, (paths, T)."""
    columns = []
    for k in range(2):
        table = (CHAIN.log_p_ref[k].clamp(min=-1e9) + theta[k]).log_softmax(-1)
        columns.append(table[PATHS[:, k], PATHS[:, k + 1]])
    ref = torch.stack([CHAIN.log_p_ref[k][PATHS[:, k], PATHS[:, k + 1]] for k in range(2)], 1)
    return torch.stack(columns, 1), ref


def table(values: str) -> Tensor:
    """Intermediate rewards of the states of every path, (paths, T+1)."""
    prompt, find = torch.zeros(len(PATHS), dtype=torch.long), getattr(CHAIN, values)
    return torch.stack([find(k, PATHS[:, k : k + 1].double(), prompt) for k in range(3)], 1)


def expected_gradient(level: str, delta_phi: Tensor, theta: Tensor, *, anchor: bool = True) -> Tensor:
    """−E_theta[Σ_t (level's log-weight) ∇log p_theta], exactly."""
    theta = theta.clone().requires_grad_()
    log_p, ref = enumerated(theta)
    log_w = (ref - log_p.detach() if anchor else 0.0) + delta_phi
    coefficient = mixing(level, log_w.expand(len(PATHS), 2))  # type: ignore[arg-type]
    loss = -(log_p.sum(1).exp().detach()[:, None] * coefficient * log_p).sum()
    return torch.autograd.grad(loss, theta)[0]


REWARD = CHAIN.reward(PATHS[:, -1:].double(), torch.zeros(len(PATHS), dtype=torch.long))
THETA = 0.5 * draw(30, 2, CHAIN.num_states, CHAIN.num_states)
OPTIMUM = (
    torch.stack([CHAIN.soft_value(k + 1, torch.arange(9)[:, None].double(), torch.zeros(9).long()) for k in range(2)])[
        :, None, :
    ].expand(2, 9, 9)
    / CHAIN.beta
)


@pytest.mark.parametrize("level", ["trajectory", "to_go"])
def test_on_policy_the_gradient_is_that_of_the_kl_of_paths(level: str) -> None:
    theta = THETA.clone().requires_grad_()
    log_p, ref = enumerated(theta)
    log_tilt = ref.sum(1) + REWARD / CHAIN.beta
    kl = (log_p.sum(1).exp() * (log_p.sum(1) - log_tilt)).sum()
    expected = torch.autograd.grad(kl, theta)[0]
    assert expected.norm() > 1e-2
    found = expected_gradient(level, terminal(REWARD, 2, CHAIN.beta), THETA)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("level", "potential", "rests"),
    [
        ("trajectory", "terminal", True),
        ("to_go", "terminal", True),
        ("step", "soft_value", True),
        ("subtrajectory", "soft_value", True),
        ("step", "return_to_go", False),
        ("step", "per step", False),
        ("step", "mean_reward", False),
    ],
)
def test_which_objectives_rest_at_the_tilted_law(level: str, potential: str, rests: bool) -> None:
    beta = CHAIN.beta
    delta_phi = {
        "terminal": lambda: terminal(REWARD, 2, beta),
        "return_to_go": lambda: return_to_go(REWARD, 2, beta, per_step=False),
        "per step": lambda: return_to_go(REWARD, 2, beta),
    }.get(potential, lambda: difference(table(potential), beta))()
    found = expected_gradient(level, delta_phi, OPTIMUM).norm().item()
    assert (found < 1e-10) is rests
    assert (found > 1e-3) is not rests


def test_the_optimum_is_the_tilted_law() -> None:
    log_p, _ = enumerated(OPTIMUM)
    law = torch.zeros(CHAIN.num_states, dtype=torch.float64).index_add(0, PATHS[:, -1], log_p.sum(1).exp())
    torch.testing.assert_close(law, CHAIN.target(), rtol=1e-10, atol=1e-12)


def test_an_empty_set_of_learned_terms_takes_nothing_off() -> None:
    training, data = moved(OBJECTIVES["grpo"])
    terms = LearnedTerms(OBJECTIVES["grpo"], training.kernel.stochastic_steps)
    assert not terms
    assert terms.matrix(data) is None
    assert terms.parameters == []
