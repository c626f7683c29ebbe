"""What every kernel promises, in one suite over all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vmpo.errors import UserError
from vmpo.kernels import (
    DDIM,
    DeterministicStep,
    FlowGRPOSDE,
    Gaussian,
    LinearKernel,
    build_kernel,
    ddim_schedule,
    flow_sigmas,
    scaled_linear_alpha_bar,
)

T = 8
SHAPE = (3, 2, 5)
DIMS = math.prod(SHAPE)


def build(name: str, **settings: Any) -> Any:
    """A kernel whose strength of noise is none of the defaults."""
    family, _, prediction = name.partition("-")
    eta = {"ddim": 0.85, "flow_grpo": 0.6, "dance": 0.45, "cps": 0.7}[family]
    extra: dict[str, Any] = {"prediction": prediction} if prediction else {}
    return build_kernel(family, T, **{"eta": eta, "shift": 2.5, **extra, **settings})


def closed_form(name: str, kernel: Any, x: Tensor, output: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """(mean, x̂_0, std) of a step with noise, as the papers write it."""
    if name.startswith("ddim"):
        a, a_next = kernel.alpha_bar[k].item(), kernel.alpha_bar_prev[k].item()
        if name == "ddim-epsilon":
            x0, noise = (x - math.sqrt(1 - a) * output) / math.sqrt(a), output
        elif name == "ddim-sample":
            x0, noise = output, (x - math.sqrt(a) * output) / math.sqrt(1 - a)
        else:
            x0 = math.sqrt(a) * x - math.sqrt(1 - a) * output
            noise = math.sqrt(a) * output + math.sqrt(1 - a) * x
        std = 0.85 * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - std**2) * noise, x0, std
    s, s_next = kernel.sigmas[k].item(), kernel.sigmas[k + 1].item()
    dt, x0, x1 = s_next - s, x - s * output, x + (1 - s) * output
    if name == "cps":
        std = s_next * math.sin(0.7 * math.pi / 2)
        return (1 - s_next) * x0 + math.sqrt(s_next**2 - std**2) * x1, x0, std
    g = 0.45 if name == "dance" else 0.6 * math.sqrt(s / (1 - (kernel.sigmas[1].item() if k == 0 else s)))
    score = -(x - x0 * (1 - s)) / s**2
    return x + output * dt - 0.5 * g**2 * score * dt, x0, g * math.sqrt(-dt)


NAMES = ["ddim-epsilon", "ddim-v", "ddim-sample", "flow_grpo", "dance", "cps"]
every_kernel = pytest.mark.parametrize("name", NAMES)


def draw(seed: int, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_at_every_noisy_step(kernel: LinearKernel, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    steps = kernel.stochastic_steps
    return draw(1, len(steps), dtype), draw(2, len(steps), dtype), steps


@every_kernel
def test_moments_are_the_papers(name: str) -> None:
    kernel = build(name)
    x, output, steps = rows_at_every_noisy_step(kernel)
    ours, ours_x0 = kernel.transition(x, output, steps), kernel.predict_x0(x, output, steps)
    for row, k in enumerate(steps.tolist()):
        mean, x0, std = closed_form(name, kernel, x[row], output[row], k)
        torch.testing.assert_close(ours.mean[row], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours_x0[row], x0, rtol=1e-10, atol=1e-10)
        assert ours.std[row].item() == pytest.approx(std, rel=1e-10)


@every_kernel
def test_log_prob_entropy_and_kl_are_sums_over_the_elements(name: str) -> None:
    kernel = build(name)
    x, output, steps = rows_at_every_noisy_step(kernel)
    p, q = kernel.transition(x, output, steps), kernel.transition(x, output + 0.3 * draw(3, len(steps)), steps)
    wide = Gaussian(q.mean, 1.7 * q.std)
    at = p.sample(draw(4, len(steps)))
    torch.testing.assert_close(p.log_prob(at), truth(p).log_prob(at), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(p.entropy(), truth(p).entropy(), rtol=1e-12, atol=1e-10)
    for other in (q, wide):
        torch.testing.assert_close(p.kl(other), kl_divergence(truth(p), truth(other)), rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(
            p.log_ratio(other, at), truth(p).log_prob(at) - truth(other).log_prob(at), rtol=1e-10, atol=1e-9
        )
    assert p.kl(p).tolist() == [0.0] * len(steps)
    assert p.log_ratio(p, at).tolist() == [0.0] * len(steps)
    assert p.log_prob(at).shape == (len(steps),)


def truth(gaussian: Gaussian) -> Any:
    std = gaussian.std.view(-1, *[1] * len(SHAPE)).expand_as(gaussian.mean)
    return Independent(Normal(gaussian.mean, std), len(SHAPE))


@every_kernel
def test_gradient_of_log_prob_is_that_of_the_closed_form(name: str) -> None:
    kernel = build(name)
    x, output, steps = rows_at_every_noisy_step(kernel)
    at = kernel.transition(x, output, steps).sample(draw(5, len(steps))).requires_grad_()
    scale = torch.linspace(0.5, 1.5, len(steps), dtype=torch.float64)

    ours = output.clone().requires_grad_()
    (kernel.transition(x, ours, steps).log_prob(at) * scale).sum().backward()
    assert at.grad is None  # the state is data: no gradient through it

    theirs = output.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, k in enumerate(steps.tolist()):
        mean, _, std = closed_form(name, kernel, x[row], theirs[row], k)
        total = total + scale[row] * Normal(mean, std).log_prob(at[row].detach()).sum()
    total.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert ours.grad.abs().min() > 0


@every_kernel
def test_sample_is_mean_plus_std_noise(name: str) -> None:
    kernel = build(name)
    x, output = draw(1, T), draw(2, T)
    gaussian = kernel.transition(x, output, torch.arange(T))
    noise = draw(6, T)
    expected = torch.stack([gaussian.mean[k] + gaussian.std[k] * noise[k] for k in range(T)])
    torch.testing.assert_close(gaussian.sample(noise), expected, rtol=0, atol=1e-14)
    silent = ~kernel.stochastic
    assert gaussian.sample(noise)[silent].equal(gaussian.mean[silent])
    z = (gaussian.sample(noise) - gaussian.mean)[~silent] / kernel.std[~silent].view(-1, *[1] * len(SHAPE))
    torch.testing.assert_close(z, noise[~silent], rtol=1e-8, atol=1e-8)


@every_kernel
def test_rows_at_mixed_steps_equal_rows_one_by_one(name: str) -> None:
    kernel = build(name, window=(2, 3))
    steps = torch.tensor([4, 0, 2, 7, 3, 2, 4])
    x, output, noise = draw(1, 7), draw(2, 7), draw(3, 7)
    mixed = kernel.transition(x, output, steps)
    for row in range(7):
        one = slice(row, row + 1)
        alone = kernel.transition(x[one], output[one], steps[one])
        assert alone.mean.equal(mixed.mean[one])
        assert alone.std.equal(mixed.std[one])
        assert kernel.predict_x0(x[one], output[one], steps[one]).equal(kernel.predict_x0(x, output, steps)[one])
        if alone.std.item() > 0:
            noisy = Gaussian(mixed.mean[[0, 2, row]], mixed.std[[0, 2, row]])
            at = mixed.sample(noise)
            assert noisy.log_prob(at[[0, 2, row]])[2].item() == alone.log_prob(at[one]).item()


@every_kernel
def test_steps_without_noise_have_no_density(name: str) -> None:
    kernel = build(name, window=(1, 2))
    gaussian = kernel.transition(draw(1, 2), draw(2, 2), torch.tensor([1, 5]))
    assert gaussian.std[0] > 0
    assert gaussian.std[1] == 0
    noisy = Gaussian(gaussian.mean, gaussian.std + 1)
    for ask in (
        lambda: gaussian.log_prob(gaussian.mean),
        lambda: gaussian.entropy(),
        lambda: gaussian.kl(noisy),
        lambda: noisy.kl(gaussian),
        lambda: gaussian.log_ratio(noisy, gaussian.mean),
        lambda: noisy.log_ratio(gaussian, gaussian.mean),
    ):
        with pytest.raises(DeterministicStep, match=r"rows \[1\]"):
            ask()
    assert issubclass(DeterministicStep, ValueError)


LAST_BY_DEFAULT = {"ddim-epsilon": True, "ddim-v": True, "ddim-sample": True}


@every_kernel
def test_which_steps_add_noise(name: str) -> None:
    kernel = build(name)
    last = LAST_BY_DEFAULT.get(name, False)
    assert kernel.num_steps == T
    assert kernel.stochastic.dtype == torch.bool
    assert kernel.stochastic.tolist() == [True] * (T - 1) + [last]
    assert kernel.stochastic_steps.tolist() == list(range(T if last else T - 1))
    assert kernel.deterministic_from == (T if last else T - 1)
    assert kernel.stochastic.equal(kernel.std > 0)

    windowed = build(name, window=(2, 3))
    assert windowed.stochastic_steps.tolist() == [2, 3, 4]
    assert windowed.deterministic_from == 5
    assert windowed.std[2:5].equal(kernel.std[2:5])

    silent = build(name, eta=0.0)
    assert silent.stochastic_steps.tolist() == []
    assert silent.deterministic_from == 0
    x, output, steps = draw(1, T), draw(2, T), torch.arange(T)
    outside = [0, 1, 5, 6, 7]
    ours, ode = windowed.transition(x, output, steps), silent.transition(x, output, steps)
    assert ours.mean[outside].equal(ode.mean[outside])
    assert not bool((ours.mean[2:5] == ode.mean[2:5]).any())


@pytest.mark.parametrize("name", NAMES[:-1])
def test_the_last_step_is_a_choice(name: str) -> None:
    assert build(name, last_step=True).deterministic_from == T
    assert build(name, last_step=False).deterministic_from == T - 1


@every_kernel
def test_after_the_last_noise_the_state_is_fixed(name: str) -> None:
    """From x[:, deterministic_from] on, the noise makes no difference; one state earlier it does."""
    kernel = build(name, window=(1, 4))

    def run(x: Tensor, first: int, seed: int) -> Tensor:
        for k in range(first, T):
            step = torch.full((len(x),), k)
            x = kernel.transition(x, torch.tanh(x), step).sample(draw(seed + k, len(x)))
        return x

    start = draw(1, 2)
    assert run(start, kernel.deterministic_from, 10).equal(run(start, kernel.deterministic_from, 50))
    assert not run(start, kernel.deterministic_from - 1, 10).equal(run(start, kernel.deterministic_from - 1, 50))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@every_kernel
def test_unchanged_policy_has_ratio_one_on_stored_states(name: str, half: torch.dtype) -> None:
    """Cast to the storage dtype first, then evaluate: the stored value has the same density again, to the last bit."""
    kernel = build(name)
    x, output, steps = rows_at_every_noisy_step(kernel, half)
    behaviour = kernel.transition(x, output, steps)
    drawn = behaviour.sample(draw(7, len(steps), torch.float32))
    stored = drawn.to(half)
    assert behaviour.mean.dtype == drawn.dtype == torch.float32
    old = behaviour.log_prob(stored)
    new = kernel.transition(x, output, steps).log_prob(stored)
    assert (new - old).tolist() == [0.0] * len(steps)
    # the trap: the density of the value before the cast is another one
    assert bool(((behaviour.log_prob(drawn) - old).abs() > 1e-4).any())


@every_kernel
def test_half_precision_outputs_are_cast_up_before_the_arithmetic(name: str) -> None:
    """A product of a half-precision output and a schedule scalar would stay in half precision."""
    kernel = build(name)
    x, output, steps = rows_at_every_noisy_step(kernel, torch.bfloat16)
    ours, wide = kernel.transition(x, output, steps), kernel.transition(x.float(), output.float(), steps)
    assert ours.mean.dtype == ours.std.dtype == torch.float32
    assert ours.mean.equal(wide.mean)
    assert kernel.predict_x0(x, output, steps).equal(kernel.predict_x0(x.float(), output.float(), steps))
    noise = draw(8, len(steps), torch.bfloat16)
    assert ours.sample(noise).dtype == torch.float32
    exact = kernel.transition(x.double(), output.double(), steps)
    assert exact.mean.dtype == exact.log_prob(x).dtype == torch.float64
    torch.testing.assert_close(ours.mean.double(), exact.mean, rtol=1e-6, atol=1e-5)
    assert ours.log_prob(x).dtype == torch.float32


def test_log_ratio_keeps_what_the_difference_of_float32_sums_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, noise, gap = (torch.randn(1, 65536, generator=generator) for _ in range(3))
    p, q = Gaussian(mean, torch.tensor([0.35])), Gaussian(mean + 1e-6 * gap, torch.tensor([0.35]))
    x = p.sample(noise)
    wide_p, wide_q = Gaussian(p.mean.double(), p.std.double()), Gaussian(q.mean.double(), q.std.double())
    right = (wide_p.log_prob(x) - wide_q.log_prob(x)).item()
    assert p.log_ratio(q, x).item() == pytest.approx(right, rel=1e-3)
    assert abs((p.log_prob(x) - q.log_prob(x)).item() - right) > 0.1 * abs(right)


def test_kernel_does_not_follow_a_scheduler() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    sigmas = scheduler.sigmas.double()  # in the kernel's own dtype, so that only a copy keeps it apart
    kernel: Any = build_kernel("flow_grpo", T, sigmas=sigmas)
    x, output, steps = draw(1, T), draw(2, T), torch.arange(T)
    before = kernel.transition(x, output, steps)
    times = kernel.times.clone()
    schedule = kernel.sigmas.clone()
    for table in (sigmas, scheduler.sigmas):
        table.mul_(0.5)
    scheduler.set_timesteps(40)
    after = kernel.transition(x, output, steps)
    assert after.mean.equal(before.mean)
    assert after.std.equal(before.std)
    assert kernel.times.equal(times)
    assert kernel.sigmas.equal(schedule)

    steps_table = ddim_schedule(scaled_linear_alpha_bar(), T)
    ddim = DDIM(*(steps_table.alpha_bar, steps_table.alpha_bar_prev, steps_table.timesteps))
    before = ddim.transition(x, output, steps)
    for table in steps_table:
        table.zero_()
    assert ddim.transition(x, output, steps).mean.equal(before.mean)
    assert ddim.times.min() > 0


def test_first_step_of_flow_grpo_is_known_by_its_index() -> None:
    """A schedule that starts a hair below 1 has the same first step, not a g of 1/(1 - s)."""
    sigmas = flow_sigmas(T, 3.0)
    nearly = sigmas.clone()
    nearly[0] = 1 - 1e-9
    kernel, other = FlowGRPOSDE(sigmas, a=0.6), FlowGRPOSDE(nearly, a=0.6)
    assert kernel.std[0].item() == pytest.approx(0.6, rel=1e-12)
    torch.testing.assert_close(other.std, kernel.std, rtol=1e-7, atol=0)
    assert FlowGRPOSDE(torch.tensor([0.9, 0.5, 0.0]), a=0.6).std[0].item() == pytest.approx(
        0.6 * math.sqrt(0.9 / 0.5 * 0.4), rel=1e-6
    )


def test_ddim_root_is_signed_beyond_eta_one() -> None:
    a, a_next, t = torch.tensor([0.3]), torch.tensor([0.6]), torch.tensor([500])
    std = 1.6 * math.sqrt((0.4 / 0.7) * 0.5)
    assert std**2 > 0.4
    kernel = DDIM(a, a_next, t, eta=1.6)
    mean = kernel.transition(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.tensor([0])).mean.item()
    expected = -math.sqrt(0.6) * math.sqrt(0.7 / 0.3) - math.sqrt(std**2 - 0.4)
    assert mean == pytest.approx(expected, rel=1e-6)


def test_ddim_reaches_a_final_alpha_of_one_without_noise() -> None:
    kernel = build_kernel("ddim", T, eta=1.0, final_alpha_bar=1.0)
    assert kernel.stochastic.tolist() == [True] * (T - 1) + [False]
    x, output, last = draw(1, 1), draw(2, 1), torch.tensor([T - 1])
    torch.testing.assert_close(kernel.transition(x, output, last).mean, kernel.predict_x0(x, output, last))


def test_ddim_starts_from_pure_noise_for_v() -> None:
    """Zero terminal signal: v and sample predictions are finite, epsilon is refused."""
    a, a_next, t = torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.9]), torch.tensor([999, 400])
    kernel = DDIM(a, a_next, t, prediction="v")
    x, output = draw(1, 1), draw(2, 1)
    assert kernel.predict_x0(x, output, torch.tensor([0])).equal(-output)
    with pytest.raises(UserError, match="epsilon"):
        DDIM(a, a_next, t, prediction="epsilon")


@every_kernel
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    kernel = build(name)
    x, output = draw(1, 2), draw(2, 2)
    with pytest.raises(ValueError, match="one number a row"):
        kernel.transition(x, output, torch.tensor(1))
    with pytest.raises(ValueError, match="shape of x_t"):
        kernel.transition(x, output[:1], torch.tensor([1, 1]))
    gaussian = kernel.transition(x, output, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="the distribution has"):
        gaussian.log_prob(x[:1])
    with pytest.raises(ValueError, match="one std a row"):
        Gaussian(x, torch.ones(1))
