"""Self-normalised importance sampling: expectations and samples of the tilted law from weighted samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.log_weights import LogWeights
from vmpo.samplers.resampling import multinomial


class Estimate(NamedTuple):
    """A self-normalised estimate.

    Attributes:
        mean: Σ w f / Σ w, (…).
        se: its standard error by the delta method, (Σ w² (f − mean)²)^½ / Σ w, (…).
        ess: effective sample size (Σw)²/Σw², in samples.
        log_z: log (1/N) Σ w, nats.
    """

    mean: Tensor
    se: Tensor
    ess: float
    log_z: float


def self_normalised(log_w: Tensor, values: Tensor) -> Estimate:
    """E[f] under the law that the weights w correct to.

        E_tilt[f] ≈ Σ_i w_i f_i / Σ_i w_i,     log w = log p_ref + r/beta − log p_theta       (Eq. 1)

    Biased by O(1/N) and consistent; the mean weight is unbiased for Z.

    Args:
        log_w: of N samples of p_theta, nats, (N,).
        values: f of the samples, (N, …).

    Raises:
        UserError: if a weight is not a number, or all are 0.

    Source: Owen 2013; Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 1.
    """
    if bool(log_w.isnan().any()) or not bool((log_w > -torch.inf).any()):
        raise UserError("no estimate from these weights: one is not a number, or all of them are 0")
    # of weight 0 is a sample like any other, so it may not leave the count as a failed reward does
    finite = log_w.double().clamp(min=log_w[log_w > -torch.inf].min().double() - 1e4)
    weights = LogWeights(finite[:, None], torch.zeros(len(log_w)))
    share = finite.softmax(0).view(-1, *[1] * (values.ndim - 1))
    mean = (share * values).sum(0)
    se = (share * (values - mean)).square().sum(0).sqrt()
    return Estimate(mean, se, weights.ess.item() * len(log_w), weights.log_z.item())


def snis(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices of n samples x ~ Cat(x_i; w_i/Σw), (n,) (Eq. 1)."""
    return multinomial(log_w, n, generator)
