"""Resampling: ancestors drawn in proportion to weights, each scheme unbiased, E[copies of i] = n W_i."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from vmpo.errors import UserError

Resampling = Callable[[Tensor, int, torch.Generator], Tensor]
"""(log_w (N,), n, generator) -> ancestors (n,)."""


def check_log_weights(log_w: Tensor, where: str = "") -> Tensor:
    """The log-weights (N,) of one particle system in float64, detached; −inf is a weight of 0.

    Args:
        log_w: nats, (N,), N at least 1.
        where: what the error message adds, for instance the position.

    Raises:
        ValueError: log_w is not (N,), or is empty.
        UserError: a NaN or a +inf among them, or nothing but −inf.
    """
    if log_w.dim() != 1 or not len(log_w):
        raise ValueError(f"log-weights have shape {tuple(log_w.shape)}: (N,) of one particle system is right")
    log_w = log_w.detach().to(torch.float64)
    broken = int((log_w.isnan() | (log_w == torch.inf)).sum())
    if broken:
        raise UserError(
            f"log-weights{where}: {broken} of {len(log_w)} are NaN or +inf; a reward has to be finite, or −inf for "
            "a weight of 0, so leave out particles whose score failed"
        )
    if not bool((log_w > -torch.inf).any()):
        raise UserError(
            f"log-weights{where}: all {len(log_w)} are −inf, so every particle has weight 0; more particles, or a "
            "proposal that reaches where the target lives"
        )
    return log_w


def normalised_weights(log_w: Tensor) -> Tensor:
    """W_i = w_i / Σ_j w_j, (N,) float64 (errors as in `check_log_weights`)."""
    return check_log_weights(log_w).softmax(0)


def systematic(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The quantiles of W at the points (j + U)/n, j = 0 … n−1, with one uniform U.

        copies of i ∈ {⌊n W_i⌋, ⌈n W_i⌉},     E[copies of i] = n W_i

    Args:
        log_w: nats, any constant added, (N,).
        n: how many to draw.
        generator: on any device.

    Returns:
        Ancestors, ascending, (n,) long in 0 … N−1, on the device of log_w; never one of weight 0.

    Raises:
        UserError: a NaN or +inf among the log-weights, nothing but −inf, or n below 1.

    Source: Kitagawa 1996; Douc, Cappé & Moulines 2005, "Comparison of resampling schemes for particle filtering".
    """
    weights, n = normalised_weights(log_w), _check_number(n)
    return _quantiles(weights, (_grid(n, weights) + _uniforms(1, generator, weights)) / n)


def stratified(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The quantiles of W at the points (j + U_j)/n, j = 0 … n−1, with one uniform a stratum.

        E[copies of i] = n W_i,     each ancestor is independent of the others

    Arguments, result and errors as in `systematic`.

    Source: Kitagawa 1996; Douc, Cappé & Moulines 2005.
    """
    weights, n = normalised_weights(log_w), _check_number(n)
    return _quantiles(weights, (_grid(n, weights) + _uniforms(n, generator, weights)) / n)


def multinomial(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n independent draws from Cat(W), in the order drawn.

        copies of (1, …, N) ~ Multinomial(n, W),     E[copies of i] = n W_i

    Arguments, result (not ascending) and errors as in `systematic`.

    Source: Gordon, Salmond & Smith 1993; the selection of Ou et al. 2026, "Diffusion alignment beyond KL", Eq. 1.
    """
    weights, n = normalised_weights(log_w), _check_number(n)
    return _quantiles(weights, _uniforms(n, generator, weights))


def residual(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """⌊n W_i⌋ copies of each for certain, and R = n − Σ_i ⌊n W_i⌋ independent draws in proportion to what is left.

        copies of i = ⌊n W_i⌋ + Multinomial(R, (n W − ⌊n W⌋)/R)_i,     E[copies of i] = n W_i

    Arguments, result (the certain copies first) and errors as in `systematic`.

    Source: Liu & Chen 1998; Douc, Cappé & Moulines 2005.
    """
    weights, n = normalised_weights(log_w), _check_number(n)
    expected = n * weights
    certain = expected.floor()
    copies = torch.arange(len(weights), device=weights.device).repeat_interleave(certain.long())
    rest = n - len(copies)
    if not rest:
        return copies
    left = expected - certain
    return torch.cat([copies, _quantiles(left / left.sum(), _uniforms(rest, generator, weights))])


RESAMPLING: dict[str, Resampling] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}
"""Each scheme by its name."""


def get_resampling(name: str) -> Resampling:
    """A scheme by its name (UserError for a name that does not exist, with the nearest one)."""
    if name not in RESAMPLING:
        nearest = difflib.get_close_matches(name, RESAMPLING, n=1, cutoff=0.0)[0]
        raise UserError(
            f"resampling {name!r} does not exist; did you mean {nearest!r}? There are {', '.join(RESAMPLING)}"
        )
    return RESAMPLING[name]


def _quantiles(weights: Tensor, u: Tensor) -> Tensor:
    """The smallest index whose cumulative weight lies above u, for each u; only weights above 0 take part."""
    possible = weights.nonzero().flatten()
    cumulative = weights[possible].cumsum(0)
    cumulative[-1] = 1.0  # its rounding would leave u above it without an index
    below_one = torch.nextafter(u.new_ones(()), u.new_zeros(()))  # (n−1 + U)/n can round up to 1
    found = torch.searchsorted(cumulative.clamp(max=1.0), u.clamp(max=below_one), right=True)
    return possible[found]


def _grid(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.float64, device=like.device)


def _uniforms(n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)


def _check_number(n: int) -> int:
    if n < 1:
        raise UserError(f"{n} particles: at least 1")
    return n
