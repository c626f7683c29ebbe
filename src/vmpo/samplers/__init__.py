"""Samples of the tilted law at test time: self-normalised importance sampling and sequential Monte Carlo."""

from __future__ import annotations

from vmpo.samplers.resampling import RESAMPLING, get_resampling, multinomial, residual, stratified, systematic
from vmpo.samplers.smc import LogPotential, SMCResult, smc
from vmpo.samplers.snis import SNISEstimate, effective_sample_size, log_mean_weight, resample, self_normalised

__all__ = [
    "RESAMPLING",
    "LogPotential",
    "SMCResult",
    "SNISEstimate",
    "effective_sample_size",
    "get_resampling",
    "log_mean_weight",
    "multinomial",
    "resample",
    "residual",
    "self_normalised",
    "smc",
    "stratified",
    "systematic",
]
