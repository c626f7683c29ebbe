"""Samplers of the tilted law that correct a policy's samples by their weights."""

from __future__ import annotations

from vmpo.samplers.resampling import RESAMPLING, get_resampling
from vmpo.samplers.smc import Particles, smc
from vmpo.samplers.snis import Estimate, self_normalised, snis

__all__ = ["RESAMPLING", "Estimate", "Particles", "get_resampling", "self_normalised", "smc", "snis"]
