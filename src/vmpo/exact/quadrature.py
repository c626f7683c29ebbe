"""A chain on the line by quadrature: its law forwards, its soft values backwards.

Both use equally spaced nodes, whose sum converges faster than any power of the spacing for smooth functions that vanish
at both ends: here Gaussians and what Gaussians were convolved with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NODES = torch.linspace(-10.0, 10.0, 161, dtype=torch.float64)
"""Standard normal nodes of an expectation over one step; wide enough for a tilt that moves the mean by 2 std."""
FINEST_LAW, WIDTH_LAW = 0.005, 9.0
FINEST_VALUE, WIDTH_VALUE = 0.01, 12.0
COARSEST = 0.05
SMALLEST_LOG = -700.0


@dataclass(frozen=True)
class Interpolant:
    """A function on equally spaced nodes, cubic between them (Hermite, C¹) and linear beyond them.

    Attributes:
        start: the first node.
        spacing: between nodes.
        value: (..., n), the function at its nodes.
        slope: (..., n), its derivative.
    """

    start: float
    spacing: float
    value: Tensor
    slope: Tensor

    @staticmethod
    def of(nodes: Tensor, value: Tensor) -> Interpolant:
        """The interpolant of values (n,) at nodes (n,), slopes to fourth order."""
        spacing = float(nodes[1] - nodes[0])
        (slope,) = torch.gradient(value, spacing=spacing, edge_order=2)
        slope[2:-2] = (value[:-4] - 8.0 * value[1:-3] + 8.0 * value[3:-1] - value[4:]) / (12.0 * spacing)
        return Interpolant(float(nodes[0]), spacing, value, slope)

    def __call__(self, x: Tensor) -> Tensor:
        """The function at x, same shape; differentiable in x."""
        last = len(self.value) - 1
        inside = x.clamp(self.start, self.start + last * self.spacing)
        place = (inside - self.start) / self.spacing
        left = place.detach().floor().long().clamp(0, last - 1)
        t = place - left
        f0, f1 = self.value[left], self.value[left + 1]
        d0, d1 = self.slope[left], self.slope[left + 1]
        rise, s0, s1 = f1 - f0, d0 * self.spacing, d1 * self.spacing
        cubic = f0 + t * (s0 + t * (3.0 * rise - 2.0 * s0 - s1 + t * (s0 + s1 - 2.0 * rise)))
        beyond = torch.where(inside.detach() < x.detach(), self.slope[-1], self.slope[0])
        return cubic + beyond * (x - inside)


@dataclass(frozen=True)
class LineChain:
    """x_{k+1} ~ N(mean_k(x_k), s_k²) on the line, from x_T ~ N(0, 1).

    Attributes:
        mean: (k, x) -> mean_k(x), elementwise.
        std: s_k, (T,).
    """

    mean: Callable[[int, Tensor], Tensor]
    std: Tensor

    def law(self) -> tuple[Tensor, Tensor]:
        """Nodes (n,) and log p(x_0) at them (n,): p_{k+1}(y) = ∫ p_k(x) N(y; mean_k(x), s_k²) dx."""
        nodes = _nodes(WIDTH_LAW, FINEST_LAW)
        law = _normal(nodes)
        for k, std in enumerate(self.std.tolist()):
            mean = self.mean(k, nodes)
            # as few nodes as resolve the kernel as a function of x: its width is the std over the slope of the mean
            steepest = float(mean.diff().max()) / FINEST_LAW
            every = max(1, int(min(0.5 * std / steepest, COARSEST) / FINEST_LAW))
            z = (nodes[:, None] - mean[::every]) / std
            law = _normal(z) @ law[::every] * (every * FINEST_LAW / std)
        return nodes, law.log().clamp(min=SMALLEST_LOG)

    def log_values(self, rate: float) -> list[Interpolant]:
        """log E[exp(rate x_0²) | x_k] for k = 0 … T, rate ≤ 0: one step's expectation at a time, in log space."""
        nodes = _nodes(WIDTH_VALUE, FINEST_VALUE)
        log_weight = _normal(NODES).log() + torch.log(NODES[1] - NODES[0])
        values = [Interpolant.of(nodes, rate * nodes.square())]
        for k in range(len(self.std) - 1, -1, -1):
            reached = self.mean(k, nodes)[:, None] + self.std[k] * NODES
            values.append(Interpolant.of(nodes, torch.logsumexp(log_weight + values[-1](reached), 1)))
        return values[::-1]


def _nodes(width: float, spacing: float) -> Tensor:
    count = round(width / spacing)
    return torch.arange(-count, count + 1, dtype=torch.float64) * spacing


def _normal(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / (2.0 * torch.pi) ** 0.5
