"""Small networks of a state and its step, for worlds whose optimum is no finite table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.policies.policy import Conditioning

HIDDEN = 64
WAVES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) * torch.pi


class StateNetwork(nn.Module):
    """An MLP of (x/spread_k, k/T, sin and cos of it), two hidden layers of 64, whose last layer starts at 0.

    Args:
        spread: (K, D), the size of x at each of the K steps or positions.
        outputs: values per state.
        seed: of the first layers; the global generator is left as it was.
    """

    def __init__(self, spread: Tensor, outputs: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("spread", spread.clone())
        self.register_buffer("phase", torch.linspace(0.0, 1.0, len(spread), dtype=torch.float64))
        inputs = spread.shape[1] + 1 + 2 * len(WAVES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()]
        last = nn.Linear(HIDDEN, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last).to(torch.float64)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """The values (N, outputs) at states x (N, D) and k (N,)."""
        phase = self.phase[k][:, None]
        features = [x / self.spread[k], phase, torch.sin(phase * WAVES), torch.cos(phase * WAVES)]
        values: Tensor = self.layers(torch.cat(features, 1))
        return values


class NetworkCorrection(nn.Module):
    """scale_k · network(x, k): a unit of the network moves the kernel's mean by one of its standard deviations."""

    def __init__(self, spread: Tensor, scale: Tensor, seed: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone()[:, None])
        self.network = StateNetwork(spread, spread.shape[1], seed)

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The correction of the output at x (N, D), step (N,); (N, D). There is one prompt."""
        moved: Tensor = self.network(x, step)
        return self.scale[step] * moved


class NetworkStateFunction(nn.Module):
    """F(x, k) = network(x, k) in nats."""

    def __init__(self, spread: Tensor, seed: int) -> None:
        super().__init__()
        self.network = StateNetwork(spread, 1, seed)

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x (R, D) at positions (R,); (R,), nats. There is one prompt."""
        values: Tensor = self.network(x.to(torch.float64), position)
        return values[:, 0]
