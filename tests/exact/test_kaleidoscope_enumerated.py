"""Which KL an objective's expected gradient is that of, and where it is zero: by enumeration of all paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.exact.kaleidoscope_enumeration import (
    BASE,
    BETA,
    CHAIN,
    EXACT,
    LOG_Z,
    MEAN,
    OLD,
    OPTIMUM,
    PATHS,
    REF,
    SOFT,
    STATES,
    THETA,
    R,
    T,
    expected,
    expected_reward,
    gradient,
    greedy,
    greedy_kernels,
    kernels,
    path_kl,
    set_centre,
    set_table,
    soft_values,
    step_kls,
    steps,
    stretches_kl,
    tables,
)
from vmpo.comparison.world_training import WorldTraining
from vmpo.objectives import OBJECTIVES

torch.set_num_threads(1)


def assert_gradient(found: Tensor, wanted: Tensor) -> None:
    assert wanted.norm() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7 * wanted.abs().max().item() + 1e-10)  # KL's float32


ON_POLICY: dict[str, Callable[[Tensor], Tensor]] = {
    # all of the reward, and the KL of a step and of those after it
    "trajectory_log_variance": path_kl,
    "log_variance_old": path_kl,
    "log_variance_mixture": path_kl,
    "log_variance_replay": path_kl,
    "reinforce_implicit_kl": path_kl,
    "ppo_implicit_kl": path_kl,
    "grpo_implicit_kl": lambda t: path_kl(t) / 2,
    "gvpo,anchor=ref": path_kl,
    "flowrl": lambda t: 2 * path_kl(t),
    "trajectory_log_variance,level=to_go": path_kl,
    # the KL at the visited states
    "log_variance": greedy,
    "vmpo_clipped": greedy,
    "reinforce_kl": greedy,
    "ppo_kl": greedy,
    "kl_objective": greedy,
    "grpo_kl": lambda t: greedy(t, 0.5),
    "vmpo_r2g": lambda t: 2 / T * greedy(t),
    "vmpo_r2g_prompt": lambda t: 2 / T * greedy(t),
    "vmpo_r2g_per_step": lambda t: 2 / T * greedy(t, 1 / T),
    "log_variance,per_step=true": lambda t: greedy(t, 1 / T),
    # the reward alone
    "reinforce": lambda t: -expected_reward(t),
    "ppo": lambda t: -expected_reward(t),
    "grpo": lambda t: -expected_reward(t) / 2,
    "gvpo": lambda t: -expected_reward(t),
    # differences of intermediate rewards
    "vmpo_diff": lambda t: 2 / T * step_kls(t, MEAN.diff(dim=1)),
    "vmpo_diff,intermediate=exact": lambda t: 2 / T * step_kls(t, SOFT.diff(dim=1)),
    "vmpo_diff_prompt,intermediate=exact": lambda t: 2 / T * step_kls(t, SOFT.diff(dim=1)),
    "log_variance_diff": lambda t: step_kls(t, MEAN.diff(dim=1)),
    "log_variance_diff,intermediate=exact": lambda t: step_kls(t, SOFT.diff(dim=1)),
    "detailed_balance": lambda t: 2 * step_kls(t, MEAN.diff(dim=1)),
    "detailed_balance,intermediate=exact": lambda t: 2 * step_kls(t, SOFT.diff(dim=1)),
    "subtrajectory_log_variance": lambda t: stretches_kl(t, MEAN.diff(dim=1)),
    "subtrajectory_log_variance,intermediate=exact": lambda t: stretches_kl(t, SOFT.diff(dim=1)),
    "log_variance_diff,level=trajectory": path_kl,
    "log_variance_diff,level=to_go": path_kl,
}


@pytest.mark.parametrize("spec", ON_POLICY)
def test_on_policy_the_expected_gradient_is_that_of_a_kl(spec: str) -> None:
    """At a random policy, with M and V at random: neither moves an expected on-policy gradient."""
    assert_gradient(expected(spec, THETA).policy, gradient(ON_POLICY[spec], THETA))


def test_the_kls_are_different_functions() -> None:
    kinds = [path_kl, greedy, lambda t: greedy(t, 0.5), lambda t: -expected_reward(t)]
    kinds += [lambda t, f=f, v=v: f(t, v.diff(dim=1)) for f in (step_kls, stretches_kl) for v in (SOFT, MEAN)]
    found = [gradient(kind, THETA) for kind in kinds]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other).norm() > 0.02 * one.norm()


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("trajectory_log_variance,bessel=false", "trajectory_log_variance"),
        ("log_variance,bessel=false", "log_variance"),
        ("grpo_implicit_kl,bessel=true", "grpo_implicit_kl"),
        ("reinforce_kl,kl_ref=2.0", "reinforce_kl"),
        ("vmpo_r2g_per_step,per_step=false", "vmpo_r2g_per_step"),
        ("subtrajectory_log_variance,decay=0.5", "subtrajectory_log_variance"),
        ("log_variance,standardise=group", "log_variance"),
        ("gvpo,importance=none,anchor=none", "log_variance"),
    ],
)
def test_a_changed_factor_changes_the_expected_gradient(spec: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        assert_gradient(expected(spec, THETA).policy, gradient(ON_POLICY[wrong], THETA))


# --- off-policy: under the law that drew --------------------------------------------------------------------------


def variance(h: Tensor, f: Tensor) -> Tensor:
    """½ Var_h of columns, summed, of paths with probabilities h."""
    h = h[:, None]
    return 0.5 * (h * (f - (h * f).sum(0)) ** 2).sum()


def mixed() -> Tensor:
    return torch.logaddexp(steps(tables(OLD)).sum(1) + torch.tensor(0.9).log(), REF.sum(1) + torch.tensor(0.1).log())


OFF_POLICY: dict[str, tuple[Tensor | None, Callable[[Tensor, Tensor], Tensor]]] = {
    "log_variance_old": (None, lambda h, log_w: variance(h, log_w.sum(1, keepdim=True) + R[:, None])),
    "log_variance_mixture": (mixed(), lambda h, log_w: variance(h, log_w.sum(1, keepdim=True) + R[:, None])),
    "log_variance": (None, lambda h, log_w: variance(h, log_w + R[:, None])),
    "log_variance_diff": (None, lambda h, log_w: variance(h, log_w + MEAN.diff(dim=1))),
    "log_variance_diff,intermediate=exact": (mixed(), lambda h, log_w: variance(h, log_w + SOFT.diff(dim=1))),
}


@pytest.mark.parametrize("spec", OFF_POLICY)
def test_off_policy_the_expected_gradient_is_that_of_half_the_variance_under_h(spec: str) -> None:
    """Eq. 4 and 5 under any h: the sampled gradient is unbiased for that of the variance."""
    log_h, loss = OFF_POLICY[spec]
    h = steps(tables(OLD)).sum(1).exp() if log_h is None else log_h.exp()
    torch.testing.assert_close(h.sum(), torch.tensor(1.0, dtype=torch.float64))
    wanted = gradient(lambda theta: loss(h, REF - steps(tables(theta))), THETA)
    assert (wanted - gradient(path_kl, THETA)).norm() > 0.05 * wanted.norm(), "off-policy it is no KL's"
    assert_gradient(expected(spec, THETA, drawn_by=OLD, h=log_h).policy, wanted)


def test_off_policy_the_kl_objective_is_eq_3() -> None:
    log_old = steps(tables(OLD))

    def surrogate(theta: Tensor) -> Tensor:
        rho = (steps(tables(theta)) - log_old).exp()
        return -(log_old.sum(1).exp()[:, None] * rho * R[:, None]).sum()

    found = expected("kl_objective", THETA, drawn_by=OLD, penalties=False).policy
    assert_gradient(found, gradient(surrogate, THETA))


def old_tilt_kl(theta: Tensor) -> Tensor:
    """KL(p_theta ‖ p_old·exp(r/beta)/Z) over paths, up to log Z."""
    log_p = steps(tables(theta)).sum(1)
    return (log_p.exp() * (log_p - steps(tables(OLD)).sum(1) - R)).sum()


def eq_46(theta: Tensor, sign: float) -> Tensor:
    """−E Σ_i ρ_i A_i/(K−1) over pairs drawn by p_old, A = r/beta ± log p_theta/p_old − plain mean, A held."""
    log_p, old = steps(tables(theta)).sum(1), steps(tables(OLD)).sum(1)
    rho, A = (log_p - old).exp(), (R + sign * (log_p - old)).detach()
    i, j = torch.cartesian_prod(torch.arange(len(PATHS)), torch.arange(len(PATHS))).T
    mean = (A[i] + A[j]) / 2
    return -((old[i] + old[j]).exp() * (rho[i] * (A[i] - mean) + rho[j] * (A[j] - mean))).sum()


def test_eq_46_with_the_minus_descends_the_kl_to_the_tilt_of_p_old_and_as_printed_does_not() -> None:
    wanted = gradient(old_tilt_kl, THETA)
    assert_gradient(gradient(lambda t: eq_46(t, -1.0), THETA), wanted)
    assert (gradient(lambda t: eq_46(t, 1.0), THETA) - wanted).norm() > 0.5 * wanted.norm()


def test_gvpo_is_unbiased_off_policy() -> None:
    assert_gradient(expected("gvpo", THETA, drawn_by=OLD).policy, gradient(old_tilt_kl, THETA))


# --- places of rest ---------------------------------------------------------------------------------------------------

PRODUCT = torch.where(BASE.abs() > 1e-12, EXACT / BASE.where(BASE.abs() > 1e-12, torch.ones(())) - 1, 0.0)
# whatever draws: every path's log-weight is what its centre says
CONSTANT: dict[str, Callable[[WorldTraining], None] | None] = {
    "trajectory_log_variance": None,
    "log_variance_old": None,
    "log_variance_mixture": None,
    "log_variance_replay": None,
    "gvpo,anchor=ref": None,
    "flowrl": set_centre(LOG_Z),
    "log_variance_diff,intermediate=exact": None,
    "subtrajectory_log_variance,intermediate=exact": None,
    "vmpo_diff,intermediate=exact": set_centre(0.0),
    "vmpo_diff_prompt,intermediate=exact": set_centre(0.0),
    "detailed_balance,intermediate=exact": None,
    "detailed_balance_learned": set_table("potential", EXACT - BASE),
    "detailed_balance_product": set_table("potential", PRODUCT),
    "vmpo_learned": set_table("potential", PRODUCT),
}


@pytest.mark.parametrize("spec", CONSTANT)
def test_at_the_optimum_nothing_moves_whatever_law_drew(spec: str) -> None:
    found = expected(spec, OPTIMUM, drawn_by=OLD, penalties=False, set_terms=CONSTANT[spec])
    assert all(g.abs().max() < 1e-10 for g in [found.policy, *found.learned])
    elsewhere = expected(spec, THETA, drawn_by=OLD, penalties=False, set_terms=CONSTANT[spec])
    assert all(g.abs().max() > 1e-3 for g in [elsewhere.policy, *elsewhere.learned])


UNBIASED = ["reinforce_implicit_kl", "ppo_implicit_kl", "grpo_implicit_kl", *CONSTANT]


@pytest.mark.parametrize("spec", UNBIASED)
def test_at_the_optimum_the_expected_on_policy_gradient_is_zero_whatever_m_and_v(spec: str) -> None:
    learned = OBJECTIVES[spec.split(",")[0]].potential.startswith("learned")
    fixed = CONSTANT[spec] if learned else None  # F has to be right, M and V are at random
    assert expected(spec, OPTIMUM, penalties=False, set_terms=fixed).policy.abs().max() < 1e-10


def test_ppo_with_the_kl_in_its_return_has_the_soft_value_as_its_value() -> None:
    found = expected("ppo_implicit_kl", OPTIMUM, set_terms=set_table("value", EXACT))
    assert all(g.abs().max() < 1e-10 for g in [found.policy, *found.learned])


BIASED = ["vmpo_r2g", "vmpo_r2g_prompt", "vmpo_r2g_per_step", "vmpo_clipped", "log_variance", "reinforce_kl", "ppo_kl"]
BIASED += [
    "grpo_kl",
    "kl_objective",
    "detailed_balance",
    "vmpo_diff",
    "log_variance_diff",
    "subtrajectory_log_variance",
]
BIASED += ["reinforce", "ppo", "grpo", "grpo_std", "gvpo", "detailed_balance_noising"]


@pytest.mark.parametrize("spec", BIASED)
def test_the_others_do_not_rest_at_the_optimum(spec: str) -> None:
    assert expected(spec, OPTIMUM).policy.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "temperature"),
    [
        ("vmpo_r2g", BETA),
        ("log_variance", BETA),
        ("vmpo_clipped", BETA),
        ("reinforce_kl", BETA),
        ("kl_objective", BETA),
        ("ppo_kl", BETA),
        ("grpo_kl", 2 * BETA),  # K/(K − 1) of K = 2
        ("vmpo_r2g_per_step", T * BETA),
        ("log_variance,per_step=true", T * BETA),
    ],
)
def test_step_level_return_to_go_rests_at_the_greedy_tilt_of_its_temperature(spec: str, temperature: float) -> None:
    """The last step's fixed point is p_ref·exp(r/(Tβ)) with the 1/T of Eq. 39, p_ref·exp(r/β) without."""
    there = expected(spec, greedy_kernels(temperature)).policy
    other = expected(spec, greedy_kernels(BETA if temperature > BETA else T * BETA)).policy
    assert there.abs().max() < 1e-7  # the weights of KLs are float32
    assert other[0, 0].abs().max() > 1e-3
    assert other[0, 1].abs().max() > 1e-3


def test_gvpo_rests_at_the_tilt_of_the_policy_that_drew() -> None:
    base = tables(OLD)
    there = kernels(soft_values(base), base)
    assert expected("gvpo", there, drawn_by=OLD).policy.abs().max() < 1e-10
    assert expected("gvpo", OPTIMUM, drawn_by=OLD).policy.abs().max() > 1e-3


def test_detailed_balance_with_the_noising_kernel_rests_at_exp_r_without_p_ref() -> None:
    reward = soft_values(CHAIN.log_p_ref)[1]
    flow, log_q = [torch.where(CHAIN.clean, reward, -torch.inf)], CHAIN.kernel.log_noising
    assert log_q is not None
    for k in (1, 0):  # log-mass of x_k when x_0 has exp(r) and q noises it; rows of log_q are the cleaner states
        flow.append(torch.logsumexp(log_q[k] + flow[-1][:, None], 0))
    flow = flow[::-1]
    law = [(log_q[k].T + flow[k + 1] - flow[k][:, None]).clamp(min=-1e9) for k in range(T)]
    reachable = torch.stack([CHAIN.log_p_ref[k].isfinite() for k in range(T)])
    theta = torch.where(reachable, torch.stack(law) - CHAIN.log_p_ref.clamp(min=-1e9), 0.0)[None]
    final = torch.zeros(STATES, dtype=torch.float64).index_add(0, PATHS[:, -1], steps(tables(theta)).sum(1).exp())
    torch.testing.assert_close(final, torch.where(CHAIN.clean, reward, -torch.inf).softmax(0))
    assert (final - CHAIN.target()).abs().max() > 1e-2
    wanted = torch.stack([*flow[:T], reward])[None] - BASE
    potential = set_table("potential", torch.where(wanted.isfinite() & (wanted.abs() < 1e6), wanted, 0.0))
    found = expected("detailed_balance_noising", theta, drawn_by=OLD, set_terms=potential)
    assert all(g.abs().max() < 1e-10 for g in [found.policy, *found.learned])
    at_tilt = expected("detailed_balance_noising", OPTIMUM, drawn_by=OLD, set_terms=potential)
    assert at_tilt.policy.abs().max() > 1e-3
