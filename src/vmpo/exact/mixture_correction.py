"""Denoisers of a mixture with other weights, centres and variances: the learnable class around a mixture's optimum.

The tilt of a Gaussian mixture by a quadratic reward is a mixture again, with other weights, centres and variances. So
in the limit of many steps the optimal denoiser is that of such a mixture; every step has parameters of its own, because
with few steps the optimum is not the same mixture throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmpo.policies.policy import Conditioning


class MixtureParameters(nn.Module):
    """Log-weights, centres and variances of J modes by step and axis, as changes from the reference's, 0 at first.

    Args:
        alpha_bar: (K,), ᾱ of each step or position.
        axes: D; they are independent.
        centres: (J,), of the reference's modes.
        variance: of the reference's modes.
    """

    def __init__(self, alpha_bar: Tensor, axes: int, centres: Tensor, variance: float) -> None:
        super().__init__()
        self.register_buffer("signal", alpha_bar.sqrt()[:, None, None])
        self.register_buffer("noise", (1.0 - alpha_bar).sqrt()[:, None, None])
        self.register_buffer("centres", centres.clone())
        self.variance = variance
        self.change = nn.Parameter(torch.zeros(3, len(alpha_bar), axes, len(centres), dtype=torch.float64))

    def modes(self, x: Tensor, k: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities of x (N, D) under each mode, distances to them and marginal variances, (N, D, J) each."""
        log_weight, centre, log_variance = change[:, k]
        signal, noise = self.signal[k], self.noise[k]
        distance = x[..., None] - signal * (self.centres + centre)
        marginal = (signal.square() * self.variance + noise.square()) * log_variance.exp()
        return log_weight - 0.5 * (marginal.log() + distance.square() / marginal), distance, marginal


class MixtureCorrection(MixtureParameters):
    """ε of the changed mixture less ε of the reference's: σ Σ_j w_j(x) (x − α c_j) / v_j, twice; 0 at the start."""

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The correction of the output at x (N, D), step (N,); (N, D). There is one prompt."""
        noise = self.noise[step][..., 0]
        changed, reference = (
            ((log_p.softmax(-1) * distance) / marginal).sum(-1)
            for log_p, distance, marginal in (
                self.modes(x, step, self.change),
                self.modes(x, step, torch.zeros_like(self.change)),
            )
        )
        return noise * (changed - reference)


class MixtureStateFunction(MixtureParameters):
    """F(x, k) = log of the changed mixture's density less that of the reference's, unnormalised, in nats."""

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x (R, D) at positions (R,); (R,), nats. There is one prompt."""
        x = x.to(torch.float64)
        changed = self.modes(x, position, self.change)[0].logsumexp(-1)
        reference = self.modes(x, position, torch.zeros_like(self.change))[0].logsumexp(-1)
        return (changed - reference).sum(-1)
