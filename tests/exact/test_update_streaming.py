"""The Updater's gradient over micro-batches is autograd's of the whole loss, written out here without rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from vmpo.kernels import build_kernel
from vmpo.objectives import OBJECTIVES, LearnedCentre, Objective
from vmpo.policies.policy import Conditioning
from vmpo.rollouts import rollout
from vmpo.training.learned_terms import LearnedTerms
from vmpo.training.rollout import Rollout
from vmpo.training.update import Penalties, Updater

SHAPE, GROUPS, K, SCALE = (2, 3), 3, 4, 0.37
N = GROUPS * K
FAILED = 5  # a sample of group 1 whose reward is NaN
KL_OLD, KL_REF = 0.7, 0.3
KERNEL = build_kernel("flow_grpo", 4, eta=0.8, shift=1.7, window=(0, 3))
STEPS = KERNEL.stochastic_steps.tolist()
CHOSEN = [1, 2]  # an update on two of the three groups
NAMES = [
    "vmpo_diff",
    "vmpo_r2g",
    "log_variance",
    "trajectory_log_variance",
    "vmpo_clipped",
    "grpo",
    "grpo_std",
    "flow_grpo",
    "ddpo_is",
]


class DoublePolicy:
    """v = W_2 tanh(W_1 [x, t, c]) in float64; the trained part is added to both matrices, off in the reference."""

    state_shape: tuple[int, ...] = SHAPE
    device = torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        self.base = [0.5 * draw(8, 9), 0.5 * draw(6, 8)]
        self.denoiser: nn.Module = nn.ParameterList([0.1 * draw(8, 9), 0.1 * draw(6, 8)])
        self.on = True

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"c": torch.tensor([[len(p), -1.0] for p in prompts], dtype=torch.float64)})

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        first, second = (b + p if self.on else b for b, p in zip(self.base, self.denoiser.parameters(), strict=True))
        inputs = torch.cat([x_t.double().flatten(1), time[:, None].double() / 1000, conditioning.positive["c"]], 1)
        return (torch.tanh(inputs @ first.T) @ second.T).view(-1, *SHAPE)

    def decode(self, x_0: Tensor) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


class Recorder(torch.optim.SGD):
    """Keeps the gradient it is given and changes nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for g in self.param_groups for p in g["params"]]


def problem() -> tuple[DoublePolicy, Rollout]:
    """A rollout, and the policy moved off what drew it, so that ratios differ from 1 and KLs from 0."""
    policy = DoublePolicy()
    conditioning = policy.encode([3 * "a", 5 * "a", 2 * "a"])[torch.arange(N) // K]
    drawn = rollout(policy, KERNEL, conditioning, list(range(40, 40 + N)), dtype=torch.float64, batch=5)
    generator = torch.Generator().manual_seed(6)
    delta_phi = torch.randn(N, len(STEPS), dtype=torch.float64, generator=generator) / 0.43
    delta_phi[FAILED] = torch.nan
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    group = torch.arange(N) // K
    return policy, Rollout(
        drawn, conditioning, list(range(N)), group, SCALE * drawn.log_p_old, SCALE * drawn.log_p_ref, delta_phi
    )


def centre_of(objective: Objective) -> LearnedCentre | None:
    if objective.centre != "learned":
        return None
    centre = LearnedCentre(len(STEPS), objective.level)
    with torch.no_grad():
        centre.value.copy_(torch.tensor([0.4, -1.1, 0.7]))
    return centre


def streamed(name: str, micro_batch: int, groups: list[int] = CHOSEN) -> tuple[list[Tensor], dict[str, float]]:
    """What the optimiser is given by one `Updater.step`."""
    policy, data = problem()
    centre = centre_of(OBJECTIVES[name])
    trained = [*policy.denoiser.parameters(), *(centre.parameters() if centre else [])]
    optimizer = Recorder(trained, lr=1.0)
    updater = Updater(
        cast(Any, policy),
        KERNEL,
        OBJECTIVES[name],
        LearnedTerms(OBJECTIVES[name], KERNEL.stochastic_steps, centre),
        Penalties(KL_OLD, KL_REF),
        optimizer,
        cast(Any, SimpleNamespace(num_processes=1, process_index=0)),
        micro_batch=micro_batch,
        grad_clip=1e12,
        density_scale=SCALE,
    )
    metrics = updater.step(data, torch.tensor(groups), on_policy=False)
    return optimizer.seen, metrics


class Whole:
    """log p_theta and exact KLs of all samples' steps with their graph, from the formulas of a Gaussian."""

    def __init__(self, policy: DoublePolicy, data: Rollout) -> None:
        log_p, kl_old, kl_ref = [], [], []
        x = data.trajectory.x
        for s, k in enumerate(STEPS):
            output = policy.predict(x[:, k], KERNEL.times[k].expand(N), data.conditioning)
            p = KERNEL.transition(x[:, k], output, torch.full((N,), k))
            std = p.std[0]
            normal = torch.distributions.Normal(p.mean, std)
            log_p.append(normal.log_prob(x[:, k + 1]).sum((1, 2)))
            for kls, mean in ((kl_old, data.trajectory.mean_old), (kl_ref, data.trajectory.mean_ref)):
                kls.append((p.mean - mean[:, s]).square().sum((1, 2)) / (2 * std**2))
        self.log_p, self.kl_old, self.kl_ref = (SCALE * torch.stack(v, 1) for v in (log_p, kl_old, kl_ref))


def members(group: int) -> list[int]:
    return [i for i in range(group * K, (group + 1) * K) if i != FAILED]


def policy_loss(name: str, whole: Whole, data: Rollout, centre: LearnedCentre | None, groups: list[int]) -> Tensor:
    """The objective as the paper writes it, over whole groups."""
    log_w = data.log_anchor - whole.log_p + data.delta_phi
    if centre is not None:  # Eq. 8: the mean over all transitions
        kept = [i for g in groups for i in members(g)]
        return (log_w[kept] - centre.value.double()).square().mean()
    losses = []
    # of the whole rollout, whichever groups this update is on, as the code of DDPO and Flow-GRPO has it
    every = data.delta_phi[[i for g in range(GROUPS) for i in members(g)]]
    if name == "ddpo_is":  # the mean over samples: the loss of no group
        i = [i for g in groups for i in members(g)]
        A = ((data.delta_phi[i] - every.mean(0)) / (every.std(0, correction=0) + 1e-4)).clip(-5, 5)
        ratio = (whole.log_p[i] - data.log_p_old[i]).exp()
        return -torch.minimum(ratio * A, ratio.clip(1 - 1e-4, 1 + 1e-4) * A).sum(1).mean()
    for g in groups:
        i = members(g)
        if name == "log_variance":  # Eq. 5
            losses.append(log_w[i].var(0).sum() / 2)
        elif name == "trajectory_log_variance":  # Eq. 37, left
            losses.append(log_w[i].sum(1).var() / 2)
        else:
            weight = log_w[i].detach() if name == "vmpo_clipped" else data.delta_phi[i]
            A = weight - weight.mean(0)
            if name == "grpo_std":
                A = A / (weight.std(0, correction=0) + 1e-4)
            if name == "flow_grpo":
                A = (A / (every.std(0, correction=0) + 1e-4)).clip(-5, 5)
            reach = 1e-4 if name == "flow_grpo" else 0.2
            ratio = (whole.log_p[i] - data.log_p_old[i]).exp()
            kept = torch.minimum(ratio * A, ratio.clip(1 - reach, 1 + reach) * A).sum()  # Eq. 21, 32
            losses.append(-kept / (len(i) - 1 if name == "vmpo_clipped" else len(i)))
    return torch.stack(losses).mean()


def full(name: str, groups: list[int] = CHOSEN, *, penalty: float = 1.0) -> list[Tensor]:
    """Autograd's gradient of the whole loss; each KL is a mean over transitions (Eq. 8) or trajectories (Eq. 22)."""
    policy, data = problem()
    centre = centre_of(OBJECTIVES[name])
    whole = Whole(policy, data)
    kept = [i for g in groups for i in members(g)]
    per_row = centre is not None
    loss = policy_loss(name, whole, data, centre, groups)
    for weight, kl in ((KL_OLD, whole.kl_old[kept]), (KL_REF, whole.kl_ref[kept])):
        loss = loss + penalty * weight * (kl.mean() if per_row else kl.sum(1).mean())
    trained = [*policy.denoiser.parameters(), *(centre.parameters() if centre else [])]
    return list(torch.autograd.grad(loss, trained))


def assert_equal_gradients(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert other.norm() > 1e-3
        scale = other.abs().max().item()
        # 1e-6 where the weights or M are float32 numbers; the network and its densities are float64
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("micro_batch", [1, 3, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_gradient_is_the_whole_losss(name: str, micro_batch: int) -> None:
    assert_equal_gradients(streamed(name, micro_batch)[0], full(name))


@pytest.mark.parametrize("name", NAMES)
def test_all_groups_at_once(name: str) -> None:
    assert_equal_gradients(streamed(name, 5, [0, 1, 2])[0], full(name, [0, 1, 2]))


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_part_is_noticed(name: str) -> None:
    got = streamed(name, 3)[0]
    for other in (full(name, penalty=0.0), full(name, penalty=2.0), full(name, [0, 1, 2])):
        with pytest.raises(AssertionError):
            assert_equal_gradients(got, other)


def test_the_problem_clips_some_rows_and_not_others() -> None:
    policy, data = problem()
    ratio = (Whole(policy, data).log_p - data.log_p_old).exp()
    assert 0.05 < ((ratio - 1).abs() > 0.2).double().mean() < 0.95


@pytest.mark.parametrize("name", ["log_variance", "grpo"])
def test_metrics_are_means_over_the_rows_that_count(name: str) -> None:
    policy, data = problem()
    whole = Whole(policy, data)
    kept = [i for g in CHOSEN for i in members(g)]
    metrics = streamed(name, 3)[1]
    ratio = (whole.log_p - data.log_p_old).exp()[kept].mean()
    assert metrics["ratio_mean"] == pytest.approx(ratio.item(), rel=1e-6)
    assert metrics["kl_old"] == pytest.approx(whole.kl_old[kept].sum(1).mean().item(), rel=1e-6)
    norm = torch.cat([g.flatten() for g in full(name)]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    policy, data = problem()
    optimizer = Recorder(list(policy.denoiser.parameters()), lr=1.0)
    accelerator = cast(Any, SimpleNamespace(num_processes=1, process_index=0))
    objective = OBJECTIVES["log_variance"]
    terms = LearnedTerms(objective, KERNEL.stochastic_steps)
    parts = (cast(Any, policy), KERNEL, objective, terms, Penalties(KL_OLD, KL_REF), optimizer)
    updater = Updater(*parts, accelerator, micro_batch=7, grad_clip=1e-2, density_scale=SCALE)
    updater.step(data, torch.tensor(CHOSEN), on_policy=False)
    assert torch.cat([g.flatten() for g in optimizer.seen]).norm() == pytest.approx(1e-2, rel=1e-4)
    assert all(p.grad is None for p in policy.denoiser.parameters()), "the next update must start from nothing"
