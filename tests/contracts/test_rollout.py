"""A rollout's densities are those of the states it stores, under the policy and under the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from vmpo.kernels import Kernel, build_kernel
from vmpo.objectives import get_objective
from vmpo.policies.adapters import add_lora, lora_parameters
from vmpo.policies.loading import load_policy
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.policy import Conditioning
from vmpo.rollouts import noise_for, rollout
from vmpo.training.checks import check_ratio
from vmpo.training.update import Penalties, Rollout, Updater
from vmpo.trajectory import Trajectory

PROMPTS = ['a sign that says "ACTOR"', 'a label that reads "AIR"', 'a poster that shows "ALIEN"']
SEEDS = [3, 70, 12]
KERNELS = {
    "flow_grpo": build_kernel("flow_grpo", 4, eta=0.6, shift=2.0),
    "dance": build_kernel("dance", 4, eta=0.4, shift=2.0),
    "cps": build_kernel("cps", 4, eta=0.6, shift=2.0),
    "window": build_kernel("flow_grpo", 4, eta=0.6, shift=2.0, window=(1, 2)),
}


@pytest.fixture(scope="module")
def policies(tiny_model: Path) -> dict[str, PipelinePolicy]:
    """The adapter at its start, and after a perturbation."""
    found = {}
    for name in ("start", "moved"):
        found[name] = policy = load_policy(str(tiny_model), Call(24, 64, max_sequence_length=0))
        add_lora(policy, rank=4, alpha=6, targets=None, seed=5)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in lora_parameters(found["moved"]):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def conditioning(policies: dict[str, PipelinePolicy]) -> Conditioning:
    return policies["start"].encode(PROMPTS)


@torch.no_grad()
def output_at(policy: PipelinePolicy, kernel: Kernel, x_t: Tensor, k: int, conditioning: Conditioning) -> Tensor:
    return policy.predict(x_t, torch.full((len(x_t),), float(kernel.times[k])), conditioning)


def mean_and_std(kernel: Kernel, x_t: Tensor, output: Tensor, k: int) -> tuple[Tensor, float]:
    p = kernel.transition(x_t, output, torch.full((len(x_t),), k))
    return p.mean, p.std[0].item()


def updater_of(policy: PipelinePolicy, kernel: Kernel, micro_batch: int) -> Updater:
    optimizer = torch.optim.SGD(lora_parameters(policy), lr=0.0)
    return Updater(
        policy,
        kernel,
        get_objective("log_variance"),
        None,
        Penalties(0.0, 0.0),
        optimizer,
        Accelerator(cpu=True),
        micro_batch=micro_batch,
        grad_clip=1.0,
    )


def rollout_record(drawn: Trajectory, conditioning: Conditioning) -> Rollout:
    n = len(drawn)
    return Rollout(
        drawn,
        conditioning,
        list(range(n)),
        torch.zeros(n, dtype=torch.long),
        drawn.log_p_old,
        drawn.log_p_ref,
        torch.zeros_like(drawn.log_p_old),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_densities_are_those_of_the_stored_states(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning, name: str, dtype: torch.dtype
) -> None:
    policy, kernel = policies["moved"], KERNELS[name]
    drawn = rollout(policy, kernel, conditioning, SEEDS, dtype=dtype)
    assert drawn.x.shape == (3, 5, 4, 6, 16)
    assert drawn.x.dtype == dtype
    steps = kernel.stochastic_steps.tolist()
    assert drawn.log_p_old.shape == drawn.log_p_ref.shape == drawn.kl_ref.shape == (3, len(steps))
    for s, k in enumerate(steps):
        x_t, x_next = drawn.x[:, k], drawn.x[:, k + 1].double()
        output = output_at(policy, kernel, x_t, k, conditioning)
        with policy.reference():
            output_ref = output_at(policy, kernel, x_t, k, conditioning)
        mean, std = mean_and_std(kernel, x_t, output, k)
        mean_ref, _ = mean_and_std(kernel, x_t, output_ref, k)
        for found_mean, found, expected_mean in (
            (drawn.mean_old, drawn.log_p_old, mean),
            (drawn.mean_ref, drawn.log_p_ref, mean_ref),
        ):
            assert torch.equal(found_mean[:, s], expected_mean)
            normal = torch.distributions.Normal(expected_mean.double(), std)
            expected = normal.log_prob(x_next).sum((1, 2, 3))
            torch.testing.assert_close(found[:, s].double(), expected, rtol=1e-6, atol=1e-3)
        closed_form = (mean.double() - mean_ref.double()).square().sum((1, 2, 3)) / (2 * std**2)
        assert closed_form.min() > 1e-4
        torch.testing.assert_close(drawn.kl_ref[:, s].double(), closed_form, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_ratio_of_an_unchanged_policy_is_exactly_one(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning, name: str, dtype: torch.dtype
) -> None:
    policy, kernel = policies["moved"], KERNELS[name]
    drawn = rollout(policy, kernel, conditioning, SEEDS, dtype=dtype)
    record, updater = rollout_record(drawn, conditioning), updater_of(policy, kernel, len(SEEDS))
    assert check_ratio(updater, record) == 0.0
    rows = torch.arange(len(SEEDS))
    for s in range(len(updater.steps)):
        _, log_p = updater.transition(record, rows, torch.full_like(rows, s))
        assert log_p.requires_grad
        assert torch.equal(log_p.detach(), drawn.log_p_old[:, s])


def test_half_precision_states_before_the_cast_would_not_give_ratio_one(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    """The pitfall the test above guards against is real: the state before its cast has another density."""
    policy, kernel = policies["moved"], KERNELS["flow_grpo"]
    drawn = rollout(policy, kernel, conditioning, SEEDS, dtype=torch.bfloat16)
    noise = noise_for(SEEDS, 4, policy.state_shape, policy.device)
    p = kernel.transition(
        drawn.x[:, 0], output_at(policy, kernel, drawn.x[:, 0], 0, conditioning), torch.zeros(3, dtype=torch.long)
    )
    assert (p.log_prob(p.sample(noise[:, 1])) - drawn.log_p_old[:, 0]).abs().max() > 1e-3


def test_a_window_is_stochastic_inside_and_the_ode_outside(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    policy, kernel = policies["moved"], KERNELS["window"]
    drawn = rollout(policy, kernel, conditioning, SEEDS)
    assert kernel.stochastic_steps.tolist() == [1, 2]
    for k in (0, 3):
        x_t = drawn.x[:, k]
        gap = float(kernel.sigmas[k + 1] - kernel.sigmas[k])  # type: ignore[attr-defined]
        euler = x_t + gap * output_at(policy, kernel, x_t, k, conditioning)
        torch.testing.assert_close(drawn.x[:, k + 1], euler, rtol=0, atol=1e-5)
    for s, k in enumerate((1, 2)):
        noise = noise_for(SEEDS, 4, policy.state_shape, policy.device)[:, k + 1]
        std = mean_and_std(kernel, drawn.x[:, k], torch.zeros_like(drawn.x[:, k]), k)[1]
        torch.testing.assert_close(drawn.x[:, k + 1], drawn.mean_old[:, s] + std * noise, rtol=0, atol=1e-5)


def test_predicted_clean_states_are_kept_where_asked(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    """x̂_0 = x − sigma·v, indexed by stochastic step, not by sampler step."""
    policy, kernel = policies["moved"], KERNELS["window"]
    drawn = rollout(policy, kernel, conditioning, SEEDS, x0_hat_at=[1])
    assert list(drawn.x0_hat) == [1]
    x_t, sigma = drawn.x[:, 2], float(kernel.sigmas[2])  # type: ignore[attr-defined]
    expected = x_t - sigma * output_at(policy, kernel, x_t, 2, conditioning)
    torch.testing.assert_close(drawn.x0_hat[1], expected, rtol=0, atol=1e-5)
    assert not rollout(policy, kernel, conditioning, SEEDS).x0_hat


def test_an_adapter_at_its_start_is_the_reference(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    drawn = rollout(policies["start"], KERNELS["cps"], conditioning, SEEDS)
    assert torch.equal(drawn.kl_ref, torch.zeros_like(drawn.kl_ref))
    assert torch.equal(drawn.log_p_old, drawn.log_p_ref)
    assert torch.equal(drawn.mean_old, drawn.mean_ref)


def test_a_rollout_under_the_reference_is_the_base_models(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    with policies["moved"].reference():
        drawn = rollout(policies["moved"], KERNELS["cps"], conditioning, SEEDS)
        again = rollout(policies["moved"], KERNELS["cps"], conditioning, SEEDS)
    base = rollout(policies["start"], KERNELS["cps"], conditioning, SEEDS)
    for found in (drawn, again):
        assert torch.equal(found.x, base.x)
        assert torch.equal(found.kl_ref, torch.zeros_like(found.kl_ref))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning, batch: int
) -> None:
    policy, kernel = policies["moved"], KERNELS["flow_grpo"]
    whole = rollout(policy, kernel, conditioning, SEEDS, batch=3, x0_hat_at=[0, 2])
    done: list[int] = []
    parts = rollout(policy, kernel, conditioning, SEEDS, batch=batch, x0_hat_at=[0, 2], progress=done.append)
    assert done[-1] == 3
    assert len(done) == -(-3 // batch)
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.log_p_old, whole.log_p_old, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(parts.x0_hat, whole.x0_hat, rtol=0, atol=1e-5)
    swapped = rollout(policy, kernel, conditioning[torch.tensor([2, 1, 0])], SEEDS[::-1], batch=3)
    torch.testing.assert_close(swapped.x.flip(0), whole.x, rtol=0, atol=1e-5)


def test_a_deterministic_sampler_has_states_and_no_densities(
    policies: dict[str, PipelinePolicy], conditioning: Conditioning
) -> None:
    drawn = rollout(policies["moved"], build_kernel("flow_grpo", 3, eta=0.0), conditioning, SEEDS)
    assert drawn.x.shape == (3, 4, 4, 6, 16)
    assert drawn.log_p_old.shape == drawn.kl_ref.shape == (3, 0)
