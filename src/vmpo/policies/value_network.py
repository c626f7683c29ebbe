"""A learned function of latent states, for baselines V(x_t, t, c) and learned potentials F(x_t, t, c)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vmpo.policies.policy import Conditioning


class ValueNetwork(nn.Module):
    """Three linear layers over (x_t, features of the prompt), each gated by its step, zero at the start, in nats.

        h ← silu(W h · g_k),     F = w · h · g_k

    The features of a prompt are its conditioning tensors, averaged over tokens. Computed in float32.

    Args:
        state_shape: shape of a state.
        conditioning: an example, for its widths.
        num_steps: T; positions run from 0 to T.
        width: of the hidden layers.

    Source: the value function of DPOK's code (Fan et al. 2023, arXiv 2305.16381), gated by a learned step embedding.
    """

    def __init__(
        self, state_shape: tuple[int, ...], conditioning: Conditioning, num_steps: int, width: int = 256
    ) -> None:
        super().__init__()
        inputs = math.prod(state_shape) + self._features(conditioning).shape[1]
        self.layers = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 1)])
        self.gates = nn.ModuleList([nn.Embedding(num_steps + 1, layer.out_features) for layer in self.layers])
        for gate in self.gates:
            nn.init.ones_(gate.weight)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    @staticmethod
    def _features(conditioning: Conditioning) -> Tensor:
        tensors = [t if t.ndim == 2 else t.flatten(1, -2).mean(1) for t in conditioning.positive.values()]
        return torch.cat([t.float() for t in tensors], 1)

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states (R, *shape) at positions (R,) of the sampler, noise first, (R,)."""
        device = self.layers[-1].weight.device
        position = position.to(device)
        h = torch.cat([x.to(device).float().flatten(1), self._features(conditioning).to(device)], 1)
        for layer, gate in zip(self.layers[:-1], self.gates[:-1], strict=True):
            h = nn.functional.silu(layer(h) * gate(position))
        return (self.layers[-1](h) * self.gates[-1](position)).squeeze(1)
