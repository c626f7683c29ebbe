"""Self-normalised importance sampling: expectations and draws of the target from weighted samples of a proposal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.log_weights import LogWeights
from vmpo.samplers.resampling import check_log_weights, multinomial, normalised_weights


@dataclass(frozen=True)
class SNISEstimate:
    """A self-normalised estimate of E[f] under the target.

    Attributes:
        mean: Σ_i W_i f_i, (*shape) float64, in the units of f.
        se: its standard error by the delta method, (*shape) float64; NaN for one sample.
        ess: effective sample size as a share of N, in (0, 1], scalar float64.
    """

    mean: Tensor
    se: Tensor
    ess: Tensor


def self_normalised(log_w: Tensor, values: Tensor) -> SNISEstimate:
    """E_tilt[f] from N independent samples of a proposal and their log-weights.

        μ̂ = Σ_i W_i f_i,   se² = N/(N−1) Σ_i W_i² (f_i − μ̂)²,   W_i = w_i / Σ_j w_j

    The bias of μ̂ is O(1/N). With equal weights the error is the usual s/√N. Particles of one `smc` run are not
    independent, so there the error is too small: repeat the run.

    Args:
        log_w: log target − log proposal, any constant added, nats, (N,); −inf is a weight of 0.
        values: f of each sample, (N, *shape); of a sample of weight 0 it is not read.

    Raises:
        ValueError: shapes that do not fit.
        UserError: a NaN or +inf among the log-weights, nothing but −inf, or a value that is not finite.

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 1 and Appendix C.1; Owen 2013, "Monte Carlo theory,
    methods and examples", Section 9.2.
    """
    if values.shape[:1] != log_w.shape:
        raise ValueError(f"values {tuple(values.shape)} for log-weights {tuple(log_w.shape)}: (N, ...) and (N,) fit")
    n = len(log_w)
    weights = normalised_weights(log_w).view(-1, *[1] * (values.dim() - 1))
    f = torch.where(weights > 0, values.detach().to(weights.device, torch.float64), 0.0)
    broken = int((~f.isfinite()).flatten(1).any(1).sum()) if f.dim() > 1 else int((~f.isfinite()).sum())
    if broken:
        raise UserError(f"values: {broken} of {n} samples are not finite; leave failed samples out with their weights")
    mean = (weights * f).sum(0)
    variance = (weights * (f - mean)).square().sum(0)
    se = (variance * n / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, torch.nan)
    return SNISEstimate(mean, se, effective_sample_size(log_w))


def resample(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices of n independent draws from the weighted samples.

        x ~ Cat(x^i; w^i / Σ_j w^j)        (Eq. 1)

    Args:
        log_w: any constant added, nats, (N,).
        n: how many.
        generator: on any device.

    Returns:
        (n,) long in 0 … N−1; never one of weight 0.

    Raises:
        UserError: a NaN or +inf among the log-weights, nothing but −inf, or n below 1.

    Source: Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 1.
    """
    return multinomial(log_w, n, generator)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(Σ w)² / (N Σ w²), a share of N in (0, 1], scalar float64; log_w (N,) in nats, errors as in `check_log_weights`.

    A sample of weight 0 counts in N, where `LogWeights` takes −inf for a failed one.
    """
    weights = _one_group(log_w)
    return weights.ess[0] * (weights.count[0] / len(log_w))


def log_mean_weight(log_w: Tensor) -> Tensor:
    """log (1/N) Σ_i w_i, nats, scalar float64: log Ẑ if w is target over proposal; else as `effective_sample_size`."""
    weights = _one_group(log_w)
    return weights.log_z[0] + (weights.count[0] / len(log_w)).log()


def _one_group(log_w: Tensor) -> LogWeights:
    log_w = check_log_weights(log_w)
    return LogWeights(log_w[:, None], torch.zeros_like(log_w, dtype=torch.long))
