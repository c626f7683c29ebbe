"""Gaussian data, an exact denoiser and a linear or quadratic reward: everything about the tilted chain is Gaussian."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.exact.affine import AffineCorrection, QuadraticStateFunction
from vmpo.exact.gaussian_tilt import expect, quadratic, tilt
from vmpo.exact.world import World, WorldPolicy, check_betas
from vmpo.kernels import LinearKernel


class LinearGaussian(World):
    """p_ref(x_{k+1} | x_k) = N(A_k x_k + c_k, s_k² I) from x_T ~ N(0, I), with r_c(x) = g_c·x − ½ xᵀ Q_c x.

    The reference network is the exact denoiser of the data N(m, Σ): with x_t = a x_0 + b ε it answers
    x̂_0 = m + a Σ (a² Σ + b² I)⁻¹ (x_t − a m), turned into the output by the kernel's x̂_0 = P x_t + Q output. So p_ref
    is the chain a perfectly trained network would run, discretisation included. Soft values are quadratics.

    Args:
        kernel: every step stochastic; its levels say what x_t holds of x_0 and of noise.
        mean: m, (D,).
        cov: Σ, (D, D), symmetric and positive definite.
        slope: g, (C, D).
        curvature: Q, (C, D, D), symmetric and positive semi-definite; None is the linear reward.
        beta: reward temperature.
        name: of the world.

    Raises:
        UserError: shapes that do not fit, Σ not positive definite, Q not positive semi-definite, a step without noise.
    """

    kind = "linear-Gaussian chain with a linear or quadratic reward"
    continuous = True
    kernel: LinearKernel

    def __init__(
        self,
        kernel: LinearKernel,
        mean: Tensor,
        cov: Tensor,
        slope: Tensor,
        curvature: Tensor | None = None,
        *,
        beta: float,
        name: str = "linear-gaussian",
    ) -> None:
        self.mean, self.cov, self.slope = (value.detach().to(torch.float64) for value in (mean, cov, slope))
        (prompts, dims) = self.slope.shape if self.slope.dim() == 2 else (0, 0)
        super().__init__(name, [f"prompt {c}" for c in range(prompts)], kernel, beta, (dims,))
        self.linear = curvature is None
        zero = self.slope.new_zeros(prompts, dims, dims)
        self.curvature = zero if curvature is None else curvature.detach().to(torch.float64)
        self._check_shapes()
        self._output_weight, self._output_bias = self._reference_network()
        steps = torch.arange(kernel.num_steps)
        zeros, ones = self.slope.new_zeros(len(steps), 1), self.slope.new_ones(len(steps), 1)
        eye = torch.eye(dims, dtype=torch.float64)
        of_x, of_output = (kernel.transition(*unit, steps).mean for unit in ((ones, zeros), (zeros, ones)))
        self._response = of_output[:, 0]
        self.transfer = of_x[..., None] * eye + of_output[..., None] * self._output_weight
        self.offset = of_output * self._output_bias
        self.std = kernel.std

    def _check_shapes(self) -> None:
        prompts, dims = self.slope.shape if self.slope.dim() == 2 else (0, 0)
        right = (dims,), (dims, dims), (prompts, dims, dims)
        got = tuple(self.mean.shape), tuple(self.cov.shape), tuple(self.curvature.shape)
        if not prompts or got != right:
            raise UserError(
                f"mean, cov, slope and curvature have shapes {got[0]}, {got[1]}, {tuple(self.slope.shape)}, {got[2]}: "
                "(D,), (D, D), (C, D) and (C, D, D) are right"
            )
        for what, matrix, least in (("cov", self.cov, 1e-12), ("curvature", self.curvature, -1e-12)):
            symmetric = torch.allclose(matrix, matrix.mT)
            if not symmetric or float(torch.linalg.eigvalsh(matrix).min()) < least:
                right_sign = "below 0" if least < 0 else "of 0 or below"
                raise UserError(f"{what} has to be symmetric with no eigenvalue {right_sign}")

    # --- the reference chain --------------------------------------------------------------------------------------

    def _reference_network(self) -> tuple[Tensor, Tensor]:
        """W (T, D, D) and b (T, D) of output_ref = W x + b, (x̂_0 − P x)/Q with the exact x̂_0."""
        signal, noise = (level[:-1] for level in self.kernel.levels())
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        marginal = signal.square()[:, None, None] * self.cov + noise.square()[:, None, None] * eye
        gain = signal[:, None, None] * torch.linalg.solve(marginal, self.cov).mT
        bias = self.mean - signal[:, None] * (gain @ self.mean)
        steps = torch.arange(self.kernel.num_steps)
        one, zero = torch.ones(len(steps), 1, dtype=torch.float64), torch.zeros(len(steps), 1, dtype=torch.float64)
        p, q = (self.kernel.predict_x0(*unit, steps) for unit in ((one, zero), (zero, one)))
        return (gain - p[..., None] * eye) / q[..., None], bias / q

    def _reference_output(self, x: Tensor, step: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", self._output_weight[step], x) + self._output_bias[step]

    @cached_property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean (T+1, D) and covariance (T+1, D, D) of x_k under p_ref."""
        mean, cov = torch.zeros_like(self.mean), torch.eye(len(self.mean), dtype=torch.float64)
        means, covs = [mean], [cov]
        for transfer, offset, std in zip(self.transfer, self.offset, self.std, strict=True):
            mean = transfer @ mean + offset
            cov = transfer @ cov @ transfer.mT + std.square() * torch.eye(len(mean), dtype=torch.float64)
            means.append(mean)
            covs.append(cov)
        return torch.stack(means), torch.stack(covs)

    # --- policies -------------------------------------------------------------------------------------------------

    def policy(self, seed: int = 0) -> WorldPolicy:
        """A learned affine map of x_k for each step and prompt, on top of the reference; no randomness in its start."""
        mean, cov = (values[:-1] for values in self.marginals)
        spread = cov.diagonal(dim1=-2, dim2=-1).sqrt()
        correction = AffineCorrection(mean, spread, self.std / self._response, len(self.prompts))
        return WorldPolicy(self.kernel, self.prompts, self.state_shape, self._reference_output, correction)

    def optimal_shift(self, k: int) -> Tensor:
        """s_k² ∇V_{k+1}/beta of a linear reward: how far the optimal kernel's mean lies from the reference's, (C, D).

        Raises:
            UserError: the reward is not linear, or step k does not exist.
        """
        if not self.linear:
            raise UserError("optimal_shift is for a linear reward; optimal_kernel gives the kernel of a quadratic one")
        self._check_step(k)
        return self.std[k].square() * self._values[k + 1][1]

    def optimal_policy(self) -> WorldPolicy:
        """The policy with p_theta = p* at every step of a linear reward (UserError for a quadratic one)."""
        policy = self.policy()
        shifts = torch.stack([self.optimal_shift(k) for k in range(self.kernel.num_steps)])
        with torch.no_grad():
            policy.denoiser.get_parameter("bias").copy_(shifts / self.std[:, None, None])
        return policy

    def optimal_kernel(self, k: int, x: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """p*(x_{k+1} | x_k = x) ∝ p_ref·exp(V_{k+1}/beta): mean (N, D) and covariance (N, D, D)."""
        self._check_step(k)
        _, slope, curvature = (value[prompt] for value in self._values[k + 1])
        mean = x.to(torch.float64) @ self.transfer[k].mT + self.offset[k]
        _, mean, cov = tilt(mean, self.std[k].square() * torch.eye(x.shape[1], dtype=torch.float64), slope, curvature)
        return mean, cov

    def state_function(self, seed: int = 0) -> nn.Module:
        """A quadratic of x for each position and prompt; V/beta is one."""
        mean, cov = self.marginals
        return QuadraticStateFunction(mean, cov.diagonal(dim1=-2, dim2=-1).sqrt(), len(self.prompts))

    # --- the tilted law -------------------------------------------------------------------------------------------

    def reward(self, x_0: Tensor, prompt: Tensor) -> Tensor:
        x = x_0.to(torch.float64)
        return quadratic(x, self.slope[prompt], self.curvature[prompt])

    @cached_property
    def _values(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """V_k/beta = const + h·x − ½ xᵀ H x for k = 0 … T: const (C,), h (C, D), H (C, D, D)."""
        const = self.slope.new_zeros(len(self.slope))
        slope, curvature = self.slope / self.beta, self.curvature / self.beta
        values = [(const, slope, curvature)]
        for transfer, offset, std in zip(self.transfer.flip(0), self.offset.flip(0), self.std.flip(0), strict=True):
            values.append(expect(transfer, offset, std.square(), *values[-1]))
        return values[::-1]

    def soft_value(self, k: int, x: Tensor, prompt: Tensor) -> Tensor:
        self._check_position(k)
        const, slope, curvature = (value[prompt] for value in self._values[k])
        return self.beta * (const + quadratic(x.to(torch.float64), slope, curvature))

    def _tilted(self, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """log Z (C,), mean (C, D) and covariance (C, D, D) of p_ref(x_0)·exp(r/beta)/Z."""
        mean, cov = (values[-1] for values in self.marginals)
        return tilt(mean.expand_as(self.slope), cov, self.slope / beta, self.curvature / beta)

    def frontier(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        kls, rewards = [], []
        for beta in check_betas(betas).tolist():
            log_z, mean, cov = self._tilted(beta)
            spread = (self.curvature * cov).sum((-2, -1))  # tr(Q S)
            rewards.append(quadratic(mean, self.slope, self.curvature) - 0.5 * spread)
            kls.append(rewards[-1] / beta - log_z)
        return torch.stack(kls), torch.stack(rewards)

    def sample_target(self, n: int, prompt: int, seed: int) -> Tensor:
        _, mean, cov = (values[prompt] for values in self._tilted(self.beta))
        noise = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return mean + noise @ torch.linalg.cholesky(cov).mT
