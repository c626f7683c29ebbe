"""Resampling: from weighted particles to equally weighted ones, without bias."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from vmpo.errors import UserError

Scheme = Callable[[Tensor, int, torch.Generator], Tensor]


def multinomial(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n independent draws of an index with probability w_i/Σw, (n,)."""
    return _inverse_cdf(log_w, torch.rand(n, dtype=torch.float64, generator=generator))


def stratified(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """One draw from each of n equal strata of the cumulative weights, (n,)."""
    return _inverse_cdf(log_w, (torch.arange(n) + torch.rand(n, dtype=torch.float64, generator=generator)) / n)


def systematic(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The same with one uniform for all strata: an index has ⌊n w_i/Σw⌋ or one more copies, (n,)."""
    return _inverse_cdf(log_w, (torch.arange(n) + torch.rand(1, dtype=torch.float64, generator=generator)) / n)


def residual(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """⌊n w_i/Σw⌋ copies of each index, the rest multinomial on the remainders, (n,)."""
    expected = n * _normalised(log_w)
    # a product such as 4 · 0.75 may come out as 3 − 1e-16
    copies = (expected + 1e-9).floor()
    kept = torch.arange(len(expected)).repeat_interleave(copies.long())
    left = n - len(kept)
    if left == 0:
        return kept
    return torch.cat([kept, multinomial((expected - copies).clamp(min=0).log(), left, generator)])


RESAMPLING: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
}


def get_resampling(name: str) -> Scheme:
    """The scheme of a name (UserError for one that does not exist, with the nearest)."""
    if name not in RESAMPLING:
        near = difflib.get_close_matches(name, RESAMPLING, n=1, cutoff=0.0)[0]
        raise UserError(f"no resampling scheme '{name}'; did you mean '{near}'? There are {', '.join(RESAMPLING)}")
    return RESAMPLING[name]


def _normalised(log_w: Tensor) -> Tensor:
    """w/Σw in float64, (N,).

    Raises:
        UserError: if a weight is NaN or +∞, or all are 0.
    """
    log_w = log_w.to(torch.float64)
    if bool((log_w.isnan() | (log_w == torch.inf)).any()) or not bool(log_w.isfinite().any()):
        raise UserError("particles cannot be resampled: a weight is not a number, or all of them are 0")
    return log_w.softmax(0)


def _inverse_cdf(log_w: Tensor, u: Tensor) -> Tensor:
    """The particle whose share of the cumulative weights holds each u in [0, 1), (n,); never one of weight 0."""
    weights = _normalised(log_w)
    alive = weights.nonzero().flatten()
    cumulative = weights[alive].cumsum(0)
    cumulative[-1] = 1.0  # rounding must not leave a gap at the top
    return alive[torch.searchsorted(cumulative, u, right=True).clamp(max=len(alive) - 1)]
