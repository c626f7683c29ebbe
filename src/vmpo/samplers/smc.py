"""Sequential Monte Carlo along the denoising steps: the policy proposes, potentials weigh, particles are resampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels import Kernel
from vmpo.policies.policy import Conditioning, Policy
from vmpo.samplers.resampling import get_resampling

LogPotential = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Particles:
    """The end of a run of SMC.

    Attributes:
        x_0: clean states, (N, *shape).
        log_w: weights since the last resampling, nats, (N,); expectations are Σ w f / Σ w.
        log_z: estimate of log Z, nats; its exponential is unbiased for Z.
        ess: effective sample size after each step, a share of N, (T+1,).
        ancestors: index of each particle's x_T among those drawn, (N,).
        resampled: positions after which particles were resampled.
    """

    x_0: Tensor
    log_w: Tensor
    log_z: float
    ess: Tensor
    ancestors: Tensor
    resampled: tuple[int, ...]


@torch.no_grad()
def smc(
    policy: Policy,
    kernel: Kernel,
    conditioning: Conditioning,
    log_potential: LogPotential,
    generator: torch.Generator,
    *,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    dtype: torch.dtype = torch.float32,
) -> Particles:
    """Samples the tilted law by one system of N particles.

        p_tilt(x_{t:T}) ∝ p_ref(x_{t:T}) exp(φ_t(x_t)),     φ_0 = r/beta                         (Eq. 35, 36)
        log w_t = log p_ref(x_{t-1}|x_t) − log p_theta(x_{t-1}|x_t) + φ_{t-1}(x_{t-1}) − φ_t(x_t)    (Eq. 40)

    and log w_T = φ_T(x_T), so that the potentials multiply to exp(r(x_0)/beta). Particles are resampled after a step
    that leaves the effective sample size below `ess_threshold`·N; everything a particle carries is permuted then.

    Args:
        conditioning: the prompt, N times over.
        log_potential: φ in nats of states x[:, k] (N, *shape) at position k, noise first; at k = T it is r(x_0)/beta.
        generator: of the noise and of the resampling.
        ess_threshold: 0 never resamples (self-normalised importance sampling), above 1 at every step.
        resampling: scheme, see `vmpo.samplers.resampling`.
        dtype: precision the states are stored in.

    Raises:
        UserError: for a scheme that does not exist, a threshold below 0, or weights that are not numbers or all 0.

    Source: Del Moral et al. 2006; Ou et al. 2026, "Diffusion alignment beyond KL", Appendix C.1.
    """
    if ess_threshold < 0:
        raise UserError(f"ess_threshold is {ess_threshold:g}: at least 0")
    scheme, count = get_resampling(resampling), len(conditioning)

    def noise() -> Tensor:
        return torch.randn((count, *policy.state_shape), generator=generator, dtype=torch.float64).to(policy.device)

    x = kernel.initial(noise()).to(dtype)
    ancestors = torch.arange(count)
    phi = log_potential(0, x).double()
    log_w, log_z = phi, 0.0
    ess, resampled = [_ess(log_w)], list[int]()
    for k in range(kernel.num_steps):
        if ess[-1] < ess_threshold:
            chosen = scheme(log_w.cpu(), count, generator)
            log_z += _log_mean(log_w)
            x, phi, ancestors = x[chosen.to(x.device)], phi[chosen.to(phi.device)], ancestors[chosen]
            log_w = torch.zeros_like(log_w)
            resampled.append(k)
        x, log_ratio = _step(policy, kernel, conditioning, x, k, noise(), dtype)
        before, phi = phi, log_potential(k + 1, x).double()
        log_w = log_w + log_ratio + phi - before
        ess.append(_ess(log_w))
    return Particles(x, log_w, log_z + _log_mean(log_w), torch.tensor(ess), ancestors, tuple(resampled))


def _step(
    policy: Policy, kernel: Kernel, conditioning: Conditioning, x: Tensor, k: int, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The next states, and log p_ref − log p_theta of the step; 0 where it adds no noise."""
    step = torch.full((len(x),), k, device=x.device)
    time = kernel.times.to(x.device)[step]
    p = kernel.transition(x, policy.predict(x, time, conditioning), step)
    x_next = p.sample(noise).to(dtype)
    if not kernel.stochastic[k]:
        return x_next, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with policy.reference():
        p_ref = kernel.transition(x, policy.predict(x, time, conditioning), step)
    return x_next, p_ref.log_prob(x_next).double() - p.log_prob(x_next).double()


def _log_mean(log_w: Tensor) -> float:
    return (log_w.logsumexp(0) - torch.tensor(float(len(log_w))).log()).item()


def _ess(log_w: Tensor) -> float:
    """(Σw)²/(N Σw²), a share of N.

    Raises:
        UserError: if a weight is not a number or all are 0: the system has died out.
    """
    if bool(log_w.isnan().any()) or not bool((log_w > -torch.inf).any()):
        raise UserError("a weight of the particles is not a number, or all of them are 0; check the reward")
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().item() / len(log_w)
