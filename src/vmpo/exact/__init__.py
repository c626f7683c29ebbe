"""Worlds whose reward-tilted law is known exactly: where every objective, potential and sampler can be checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

from vmpo.errors import UserError
from vmpo.exact.energy_distance import energy_distance
from vmpo.exact.linear_gaussian import LinearGaussian
from vmpo.exact.masked_chain import MaskedChain
from vmpo.exact.mixture import Mixture
from vmpo.exact.world import Truth, World, WorldPolicy
from vmpo.kernels import DDIM

__all__ = [
    "WORLDS",
    "LinearGaussian",
    "MaskedChain",
    "Mixture",
    "Truth",
    "World",
    "WorldPolicy",
    "energy_distance",
    "get_world",
]

MEAN = [0.4, -0.7]
COV = [[1.1, 0.5], [0.5, 0.6]]
BETA = 0.37


def _ten_steps() -> DDIM:
    """DDIM, eta 1, ᾱ/(1 − ᾱ) geometric from 1e-4 to 49: the last step stops at ᾱ = 0.98, so no std is tiny."""
    snr = torch.logspace(-4.0, torch.log10(torch.tensor(49.0)).item(), 11, dtype=torch.float64)
    alpha_bar = snr / (1.0 + snr)
    return DDIM(alpha_bar[:-1], alpha_bar[1:], torch.arange(10, 0, -1), eta=1.0)


def _gaussian(name: str, slope: list[list[float]], curvature: list[list[list[float]]] | None = None) -> LinearGaussian:
    table = torch.float64
    return LinearGaussian(
        _ten_steps(),
        torch.tensor(MEAN, dtype=table),
        torch.tensor(COV, dtype=table),
        torch.tensor(slope, dtype=table),
        None if curvature is None else torch.tensor(curvature, dtype=table),
        beta=BETA,
        name=name,
    )


WORLDS: dict[str, Callable[[], World]] = {
    "gaussian-linear": lambda: _gaussian("gaussian-linear", [[0.6, -0.25]]),
    "gaussian-quadratic": lambda: _gaussian("gaussian-quadratic", [[0.8, -0.3]], [[[0.5, 0.2], [0.2, 0.9]]]),
    "gaussian-prompts": lambda: _gaussian("gaussian-prompts", [[0.2, 0.0], [0.5, -0.2], [0.4, 0.8], [-0.9, -0.5]]),
    "mixture": lambda: Mixture(name="mixture"),
    "masked": lambda: MaskedChain(name="masked"),
}
"""The constructor of each world by its name."""


def get_world(name: str) -> World:
    """A fresh world by its name (UserError for a name that does not exist, with the nearest one)."""
    if name not in WORLDS:
        nearest = difflib.get_close_matches(name, WORLDS, n=1, cutoff=0.0)[0]
        raise UserError(f"world {name!r} does not exist; did you mean {nearest!r}? There are {', '.join(WORLDS)}")
    return WORLDS[name]()
