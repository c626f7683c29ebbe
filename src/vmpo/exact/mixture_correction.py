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
        signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        self.register_buffer("signal", signal[:, None])
        self.register_buffer("noise", noise[:, None])
        self.register_buffer("marginal", (alpha_bar * variance + 1.0 - alpha_bar)[:, None])
        self.register_buffer("centres", centres.clone()[:, None, None])
        self.change = nn.Parameter(torch.zeros(3, len(centres), len(alpha_bar), axes, dtype=torch.float64))

    def reference(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities of x (N, D) under each mode but for constants, distances to them, variances, (J, N, D) each."""
        distance, marginal = x - self.signal[k] * self.centres, self.marginal[k]
        return -0.5 * distance.square() / marginal, distance, marginal.expand_as(distance)

    def changed(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same under the changed modes."""
        log_weight, centre, log_variance = self.change[:, :, k]
        distance = x - self.signal[k] * (self.centres + centre)
        marginal = self.marginal[k] * log_variance.exp()
        return log_weight - 0.5 * (log_variance + distance.square() / marginal), distance, marginal


class MixtureCorrection(MixtureParameters):
    """ε of the changed mixture less ε of the reference's: σ Σ_j w_j(x) (x − α c_j) / v_j, twice; 0 at the start."""

    def forward(self, x: Tensor, step: Tensor, prompt: Tensor) -> Tensor:
        """The correction of the output at x (N, D), step (N,); (N, D). There is one prompt."""
        changed, reference = (
            (log_p.softmax(0) * distance / marginal).sum(0)
            for log_p, distance, marginal in (self.changed(x, step), self.reference(x, step))
        )
        return self.noise[step] * (changed - reference)


class MixtureStateFunction(MixtureParameters):
    """F(x, k) = log of the changed mixture's density less that of the reference's, unnormalised, in nats."""

    def forward(self, x: Tensor, position: Tensor, conditioning: Conditioning) -> Tensor:
        """F of states x (R, D) at positions (R,); (R,), nats. There is one prompt."""
        x = x.to(torch.float64)
        changed, reference = self.changed(x, position)[0], self.reference(x, position)[0]
        return (changed.logsumexp(0) - reference.logsumexp(0)).sum(-1)
