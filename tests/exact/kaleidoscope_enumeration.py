"""The updater's expected gradient over all paths of a small chain, and the chain's own KLs written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vmpo.training.update as update_module
from vmpo.comparison.variant import parse_variant
from vmpo.comparison.world_training import Budget, WorldTraining
from vmpo.exact import MaskedChain
from vmpo.objectives import Objective
from vmpo.training.rollout import Rollout
from vmpo.training.update import Penalties
from vmpo.trajectory import Trajectory

torch.set_num_threads(1)
CHAIN = MaskedChain(length=2, tokens=2, steps=2, beta=0.37, seed=3)
BETA, T, STATES = CHAIN.beta, 2, CHAIN.num_states
PATHS, LOG_REF = CHAIN.paths()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


THETA, OLD = 0.6 * draw(1, 1, T, STATES, STATES), 0.4 * draw(2, 1, T, STATES, STATES)


# --- the chain written out --------------------------------------------------------------------------------------------


def tables(theta: Tensor) -> list[Tensor]:
    """log p_theta(next | state) of each step."""
    return [(CHAIN.log_p_ref[k].clamp(min=-1e9) + theta[0, k]).log_softmax(-1) for k in range(T)]


def steps(log_tables: Any) -> Tensor:
    """log p of each step of every path, (paths, T)."""
    return torch.stack([log_tables[k][PATHS[:, k], PATHS[:, k + 1]] for k in range(T)], 1)


def states(k: int, find: Callable[..., Tensor]) -> Tensor:
    """A function of states at position k along the paths, in nats."""
    return find(k, PATHS[:, k : k + 1].double(), torch.zeros(len(PATHS), dtype=torch.long)) / BETA


REF = steps(CHAIN.log_p_ref)
R = states(T, CHAIN.soft_value)
SOFT = torch.stack([states(k, CHAIN.soft_value) for k in range(T + 1)], 1)
MEAN = torch.stack([states(k, CHAIN.mean_reward) for k in range(T + 1)], 1)


def path_kl(theta: Tensor) -> Tensor:
    """KL(p_theta ‖ p_ref·exp(r/beta)/Z) over paths, up to log Z."""
    log_p = steps(tables(theta))
    return (log_p.sum(1).exp() * (log_p - REF).sum(1)).sum() - (log_p.sum(1).exp() * R).sum()


def expected_reward(theta: Tensor) -> Tensor:
    return (steps(tables(theta)).sum(1).exp() * R).sum()


def visited_kl(theta: Tensor, gain: Tensor, i: int = 0, j: int = T) -> Tensor:
    """E over x_i, held, of KL(p_theta(x_{i+1…j}|x_i) ‖ p_ref·exp(gain)); later states free, as they fall from it."""
    log_p = steps(tables(theta))
    weight = log_p.detach()[:, :i].sum(1) + log_p[:, i:j].sum(1) + log_p.detach()[:, j:].sum(1)
    return (weight.exp() * ((log_p - REF)[:, i:j].sum(1) - gain[:, i:j].sum(1))).sum()


def step_kls(theta: Tensor, gain: Tensor) -> Tensor:
    return sum((visited_kl(theta, gain, k, k + 1) for k in range(T)), torch.zeros((), dtype=torch.float64))


def stretches_kl(theta: Tensor, gain: Tensor, decay: float = 0.9) -> Tensor:
    pairs = [(i, j) for i in range(T) for j in range(i + 1, T + 1)]
    total = sum(decay ** (j - i) * visited_kl(theta, gain, i, j) for i, j in pairs)
    return total / sum(decay ** (j - i) for i, j in pairs)


def none() -> Tensor:
    return torch.zeros(len(PATHS), T, dtype=torch.float64)


def greedy(theta: Tensor, share: float = 1.0) -> Tensor:
    """Σ_t KL(p_theta ‖ p_ref) at the visited states less share·E[r]/beta: Eq. 15, 22."""
    return step_kls(theta, none()) - share * expected_reward(theta)


def gradient(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    at = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


# --- the updater's expected gradient ----------------------------------------------------------------------------------


class Expected(NamedTuple):
    policy: Tensor
    learned: list[Tensor]
    data: Rollout
    training: WorldTraining


def expected(
    spec: str | Objective,
    theta: Tensor,
    *,
    drawn_by: Tensor | None = None,
    h: Tensor | None = None,
    penalties: bool = True,
    set_terms: Callable[[WorldTraining], None] | None = None,
    members: int = 2,
    world: MaskedChain = CHAIN,
) -> Expected:
    """E of `Updater.accumulate` over groups of K = 2 independent paths (single paths where no group counts).

    Args:
        spec: of the objective, as `vmpo compare` takes it.
        theta: of the policy.
        drawn_by: theta of p_old; None: the policy itself.
        h: log of the law the paths are drawn from, if not p_old.
        set_terms: sets M, V and F, which are random otherwise.
        members: K.
        world: the chain at another beta.
    """
    variant = parse_variant(spec if isinstance(spec, str) else spec.name)
    variant = variant if isinstance(spec, str) else replace(variant, objective=spec)
    size = members if variant.objective.centre == "group" else 1
    chosen = torch.cartesian_prod(*[torch.arange(len(PATHS))] * size).flatten()
    old = theta if drawn_by is None else drawn_by
    training = WorldTraining(world, variant, Budget(len(chosen), len(chosen), size), seed=0)
    parameter = training.policy.denoiser.get_parameter("theta")
    if training.terms.centre is not None:
        training.terms.centre.double()
    with torch.no_grad():
        parameter.copy_(theta)
        for i, learned in enumerate(training.terms.parameters):
            learned.copy_(0.5 + draw(30 + i, *learned.shape))
    if set_terms is not None:
        set_terms(training)
    log_p = steps(tables(old))[chosen]
    probabilities = lambda t: torch.stack([t[k].exp()[PATHS[chosen, k]] for k in range(T)], 1)[:, :, None]  # noqa: E731
    x = PATHS[chosen, :, None].double()
    zeros = torch.zeros_like(log_p)
    drawn = Trajectory(x, log_p, REF[chosen], probabilities(tables(old)), probabilities(CHAIN.log_p_ref), zeros, {})
    data = training._rollout(drawn)
    law = (log_p.sum(1) if h is None else h[chosen]).view(-1, size).sum(1).exp()
    share = (law * len(law)).repeat_interleave(size)[:, None]  # of each row, whose weight is that of a mean
    stream, kl_weight = training.updater._stream, update_module.kl_weight
    if not penalties:
        training.updater.penalties = Penalties(0.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training.updater, "_stream", lambda d, local, t: stream(d, local, t._replace(weight=t.weight * share))
        )
        patch.setattr(update_module, "kl_weight", lambda o, mask: kl_weight(o, mask) * share)
        training.updater.accumulate(data, training.group.unique(), on_policy=False)
    assert parameter.grad is not None
    learned = [torch.zeros_like(p) if p.grad is None else p.grad for p in training.terms.parameters]
    return Expected(parameter.grad, learned, data, training)


# --- policies that are at rest somewhere ------------------------------------------------------------------------------


def kernels(values: list[Tensor], base: Any = CHAIN.log_p_ref) -> Tensor:
    """theta of p ∝ base·exp(values of the next state), (1, T, n, n)."""
    moved = [(base[k].clamp(min=-1e9) - CHAIN.log_p_ref[k].clamp(min=-1e9)) + values[k] for k in range(T)]
    return torch.stack(moved)[None]


def soft_values(base: Any) -> list[Tensor]:
    """V/beta of the states after each step, under a base chain."""
    reward = CHAIN.reward(torch.arange(STATES)[:, None].double(), torch.zeros(STATES, dtype=torch.long)) / BETA
    return [torch.logsumexp(base[1] + reward, -1), reward]


def greedy_kernels(temperature: float) -> Tensor:
    """The last step tilted by r, the first by E_theta[r | x_1], both at a temperature."""
    reward = soft_values(CHAIN.log_p_ref)[1] * BETA / temperature
    last = (CHAIN.log_p_ref[1].clamp(min=-1e9) + reward).softmax(-1)
    return kernels([last @ reward, reward])


OPTIMUM = CHAIN.optimal_policy().denoiser.get_parameter("theta").detach()
LOG_Z = CHAIN.truth().log_z[0]
EXACT, BASE = CHAIN._soft_values[:1] / BETA, CHAIN._mean_rewards[:1] / BETA


def set_centre(value: Tensor | float) -> Callable[[WorldTraining], None]:
    def change(training: WorldTraining) -> None:
        assert training.terms.centre is not None
        training.terms.centre.value.data.fill_(float(value))

    return change


def set_table(which: str, values: Tensor, centre: float | None = None) -> Callable[[WorldTraining], None]:
    def change(training: WorldTraining) -> None:
        getattr(training.terms, which).theta.data.copy_(values)
        if training.terms.centre is not None:
            training.terms.centre.value.data.fill_(centre or 0.0)

    return change
