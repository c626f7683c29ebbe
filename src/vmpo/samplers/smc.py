"""Sequential Monte Carlo: particles of a policy, weighted against the tilted reference and resampled on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.kernels import Kernel
from vmpo.policies.policy import Conditioning, Policy
from vmpo.samplers.resampling import check_log_weights, get_resampling
from vmpo.samplers.snis import effective_sample_size, log_mean_weight

LogPotential = Callable[[int, Tensor], Tensor]
"""φ_k(x), the log-potential in nats of states x (N, *shape) at position k = 0 … T; (N,). −inf is a potential of 0."""


@dataclass(frozen=True)
class SMCResult:
    """One particle system; E[f] under the target is `self_normalised(log_w, f(x_0)).mean`.

    Attributes:
        x_0: clean states, (N, *shape), on the policy's device. Not resampled at the end: use them with their weights,
            or draw from them by `resample(log_w, n, generator)`.
        log_w: nats, (N,) float64 on the CPU, **not** normalised: log (1/N) Σ_i w_i = log_z, and (1/N) Σ_i w_i f(x_0^i)
            is unbiased for Z · E_tilt[f]. Those of several independent systems may be put together as they are.
        log_z: estimate of log Z = log E_ref[exp(r(x_0)/beta)], nats, scalar float64; Ẑ itself is unbiased.
        ess: effective sample size at each position before any resampling there, a share of N, (T+1,).
        ancestors: [k, i] is the particle at position k that particle i at position k+1 comes from, (T, N) long.
        resampled: the positions that were resampled, (T,) bool.
    """

    x_0: Tensor
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    ancestors: Tensor
    resampled: Tensor


@dataclass(frozen=True)
class Particles:
    """All that a particle carries at its position k; the only place that permutes any of it is `take`.

    Attributes:
        x: states, (N, *shape).
        log_phi: φ_k(x), nats, (N,).
        log_rest: log w − φ_k(x) since the last resampling, nats, (N,). Adding φ_{k+1} to it in place of φ_k is what
            adds Δφ_k to log w, and is also right where φ_k was −inf.
    """

    x: Tensor
    log_phi: Tensor
    log_rest: Tensor

    @staticmethod
    def start(x: Tensor, log_phi: Tensor) -> Particles:
        """At x_T, where log w = φ_0(x_T)."""
        return Particles(x, log_phi, torch.zeros_like(log_phi))

    @property
    def log_w(self) -> Tensor:
        """log w since the last resampling, nats, (N,)."""
        return self.log_rest + self.log_phi

    def move(self, x: Tensor, log_ratio: Tensor, log_phi: Tensor) -> Particles:
        """One step on: log w gains log p_ref − log p_theta + φ_{k+1} − φ_k."""
        return Particles(x, log_phi, self.log_rest + log_ratio)

    def take(self, ancestors: Tensor) -> Particles:
        """The particles (N,) long in place of these, each with log w = 0."""
        log_phi = self.log_phi[ancestors]
        return Particles(self.x[ancestors.to(self.x.device)], log_phi, -log_phi)


@torch.no_grad()
def smc(
    policy: Policy,
    kernel: Kernel,
    conditioning: Conditioning,
    potential: LogPotential,
    *,
    particles: int,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> SMCResult:
    """Runs one particle system for one prompt, with the policy as the proposal.

        p_tilt(x_{t:T}) ∝ p_ref(x_{t:T}) Π_{s≥t} U(x_{s:T})                              (Eq. 35)
        log w_0 = φ_0(x_T),   Δ log w_k = log p_ref(x_{k+1}|x_k) − log p_theta(x_{k+1}|x_k) + φ_{k+1} − φ_k
        log Ẑ = Σ_resamplings log (1/N) Σ_i w_i + log (1/N) Σ_i w_i at the end,   E[Ẑ] = Z

    Positions k = 0 … T count the states, noise first. With log U the differences of φ (Eq. 40) and φ_0 at x_T the
    product of the potentials is exp(φ_T) (Eq. 36), so φ_T = r(x_0)/beta makes p_ref·exp(r/beta) the target whatever
    the other φ are; they decide how well resampling does. A step without noise has no density: there only φ changes.

    The system is resampled at a position where the effective sample size falls below a share of N, at none from
    `kernel.deterministic_from` on: copies would stay copies. A φ_k of −inf gets a particle resampled away, so a state
    that may still reach the target needs a finite one.

    Args:
        policy: the proposal p_theta; inside its `reference()`, p_ref.
        kernel: the sampler of both.
        conditioning: N identical rows, `policy.encode([prompt] * particles)`.
        potential: φ_k(x) in nats, called once a position, in order; at T it has to be r(x_0)/beta.
        particles: N.
        ess_threshold: share of N, 0 (never resampled: self-normalised importance sampling) to 1 (always).
        resampling: a name in RESAMPLING.
        generator: draws everything, x_T first; on any device.
        dtype: precision the states are stored in; they are cast before their density is evaluated.

    Raises:
        UserError: a setting that cannot be, rows of several prompts, or log-weights that have a NaN or a +inf or are
            all −inf (then Ẑ is 0).
        ValueError: a potential of another shape than (N,).

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Appendix C.1; Del Moral, Doucet & Jasra 2006; Singhal et
    al. 2025, arXiv 2501.06848, for the choice of potentials.
    """
    scheme = get_resampling(resampling)
    _check_settings(conditioning, particles, ess_threshold)
    shape, steps = (particles, *policy.state_shape), kernel.num_steps
    x = kernel.initial(_noise(shape, generator, policy.device, dtype)).to(dtype)
    system = Particles.start(x, _log_phi(potential, 0, x))
    log_z = torch.zeros((), dtype=torch.float64)
    ess, ancestors = [_ess(system, 0)], torch.arange(particles).repeat(steps, 1)
    resampled = torch.zeros(steps, dtype=torch.bool)
    for k in range(steps):
        if k < kernel.deterministic_from and (ess_threshold == 1 or ess[k] < ess_threshold):
            log_z += log_mean_weight(system.log_w)
            ancestors[k] = scheme(system.log_w, particles, generator)
            resampled[k] = True
            system = system.take(ancestors[k])
        noise = _noise(shape, generator, policy.device, dtype)
        x, log_ratio = _propose(policy, kernel, conditioning, system.x, k, noise, dtype)
        system = system.move(x, log_ratio, _log_phi(potential, k + 1, x))
        ess.append(_ess(system, k + 1))
    log_w = system.log_w + log_z
    return SMCResult(system.x, log_w, log_mean_weight(log_w), torch.stack(ess), ancestors, resampled)


def _propose(
    policy: Policy, kernel: Kernel, conditioning: Conditioning, x: Tensor, k: int, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_{k+1} ~ p_theta(·|x_k), and its log p_ref − log p_theta in nats, (N,) float64; 0 at a step without noise."""
    step = torch.full((len(x),), k, device=x.device)
    times = kernel.times.to(x.device)[step]
    p = kernel.transition(x, policy.predict(x, times, conditioning), step)
    x_next = p.sample(noise).to(dtype)  # cast first: the density is that of what is stored
    if not kernel.stochastic[k]:
        return x_next, torch.zeros(len(x), dtype=torch.float64)
    with policy.reference():
        p_ref = kernel.transition(x, policy.predict(x, times, conditioning), step)
    return x_next, p_ref.log_ratio(p, x_next).cpu().to(torch.float64)


def _log_phi(potential: LogPotential, k: int, x: Tensor) -> Tensor:
    log_phi = potential(k, x)
    if log_phi.shape != x.shape[:1]:
        raise ValueError(f"the potential at position {k} has shape {tuple(log_phi.shape)}: ({len(x)},) is right")
    return log_phi.detach().cpu().to(torch.float64)


def _ess(system: Particles, k: int) -> Tensor:
    return effective_sample_size(check_log_weights(system.log_w, f" at position {k}"))


def _noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal, in float32 or better."""
    precision = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=precision, device=generator.device).to(device)


def _check_settings(conditioning: Conditioning, particles: int, ess_threshold: float) -> None:
    if particles < 1:
        raise UserError(f"particles is {particles}: at least 1")
    if not 0 <= ess_threshold <= 1:
        raise UserError(f"ess_threshold is {ess_threshold:g}: a share of the particles, 0 (never) to 1 (always)")
    if len(conditioning) != particles:
        raise UserError(
            f"{len(conditioning)} rows of conditioning for {particles} particles: policy.encode([prompt] * particles)"
        )
    for tensors in (conditioning.positive, conditioning.negative or {}):
        for name, rows in tensors.items():
            if not bool((rows == rows[:1]).all()):
                raise UserError(f"conditioning {name!r} differs between rows: a particle system is for one prompt")
