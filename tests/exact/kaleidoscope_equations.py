"""Every objective from its printed equation: densities, x̂_0 and potentials worked out here, from the states alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from vmpo.comparison.world_training import WorldTraining

D, T, K, N, BETA = 2, 4, 4, 16, 0.37
DTYPE = torch.float64
ALPHA_BAR = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.95], dtype=DTYPE)
ETA = 0.9
DATA_MEAN = torch.tensor([0.4, -0.7], dtype=DTYPE)
DATA_COV = torch.tensor([[1.1, 0.5], [0.5, 0.6]], dtype=DTYPE)
SLOPE = torch.tensor([[0.6, -0.25], [-0.3, 0.5]], dtype=DTYPE)
CURVATURE = torch.tensor([[[0.5, 0.2], [0.2, 0.9]], [[0.3, 0.0], [0.0, 0.1]]], dtype=DTYPE)
GROUPS = list(torch.arange(N).view(-1, K))
PROMPT = torch.tensor([0, 1, 0, 1]).repeat_interleave(K)
Learned = tuple[Tensor, Tensor]  # W and b of the policy


def reward(x: Tensor) -> Tensor:
    return (SLOPE[PROMPT] * x).sum(1) - 0.5 * torch.einsum("ni,nij,nj->n", x, CURVATURE[PROMPT], x)


def gaussian(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance·I), graph in all three."""
    return -0.5 * ((x - mean) ** 2).sum(1) / variance - 0.5 * D * (2 * torch.pi * variance).log()


class Equations:
    """What the equations speak of, from the states x_T … x_0 of N trajectories, (N, T) each, with graphs.

    Args:
        training: for the states' shape only through `x`; its policy's and learned terms' parameters.
        x: states, (N, T+1, D).
        drawn_by: W and b of p_old.
        mean_log_prob: log p divided by D.
        reference_values: intermediate rewards at x̂_0 of p_ref instead of p_old.
    """

    def __init__(
        self, training: WorldTraining, x: Tensor, drawn_by: Learned, mean_log_prob: bool, reference_values: bool = False
    ) -> None:
        self.training, self.terms, self.x, self.drawn_by = training, training.terms, x, drawn_by
        self.reference_values = reference_values
        denoiser = training.policy.denoiser
        self.now: Learned = (denoiser.get_parameter("weight"), denoiser.get_parameter("bias"))
        self.scaled = 1 / D if mean_log_prob else 1.0
        self.a, self.a_next = ALPHA_BAR[:-1], ALPHA_BAR[1:]
        self.variance = ETA**2 * (1 - self.a_next) / (1 - self.a) * (1 - self.a / self.a_next)

    # --- the sampler: DDIM's equation 12 around the exact denoiser of Gaussian data -----------------------------------

    def x0_hat(self, x: Tensor, k: int, learned: Learned | None) -> Tensor:
        a = self.a[k]
        gain = a.sqrt() * DATA_COV @ torch.linalg.inv(a * DATA_COV + (1 - a) * torch.eye(D, dtype=DTYPE))
        exact = DATA_MEAN + (x - a.sqrt() * DATA_MEAN) @ gain.T
        if learned is None:
            return exact
        denoiser = self.training.policy.denoiser
        z = (x - denoiser.centre[k]) / denoiser.spread[k]
        noise = denoiser.scale[k] * (torch.einsum("nij,nj->ni", learned[0][k, PROMPT], z) + learned[1][k, PROMPT])
        return exact - ((1 - a) / a).sqrt() * noise

    def mean(self, x: Tensor, k: int, learned: Learned | None) -> Tensor:
        clean = self.x0_hat(x, k, learned)
        noise = (x - self.a[k].sqrt() * clean) / (1 - self.a[k]).sqrt()
        return self.a_next[k].sqrt() * clean + (1 - self.a_next[k] - self.variance[k]).sqrt() * noise

    def log_p(self, x: Tensor, x_next: Tensor, k: int, learned: Learned | None) -> Tensor:
        return gaussian(x_next, self.mean(x, k, learned), self.variance[k])

    def _columns(self, one: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([one(k) for k in range(T)], 1)

    def _log_p(self, learned: Learned | None) -> Tensor:
        return self.scaled * self._columns(lambda k: self.log_p(self.x[:, k], self.x[:, k + 1], k, learned))

    @cached_property
    def p(self) -> Tensor:
        return self._log_p(self.now)

    @cached_property
    def old(self) -> Tensor:
        return self._log_p(self.drawn_by)

    @cached_property
    def ref(self) -> Tensor:
        return self._log_p(None)

    @cached_property
    def noising(self) -> Tensor:
        """log q(x_t | x_{t-1}) = log N(√(ᾱ_t/ᾱ_{t-1}) x_{t-1}, 1 − ᾱ_t/ᾱ_{t-1})."""
        ratio = self.a / self.a_next
        return self._columns(lambda k: gaussian(self.x[:, k], ratio[k].sqrt() * self.x[:, k + 1], 1 - ratio[k]))

    def kl(self, other: Learned | None) -> Tensor:
        gap = lambda k: self.mean(self.x[:, k], k, self.now) - self.mean(self.x[:, k], k, other)  # noqa: E731
        return self.scaled * self._columns(lambda k: (gap(k) ** 2).sum(1) / (2 * self.variance[k]))

    # --- rewards, in nats ---------------------------------------------------------------------------------------------

    @cached_property
    def r(self) -> Tensor:
        """r(x_0)/beta, (N,)."""
        return reward(self.x[:, T]) / BETA

    @property
    def R(self) -> Tensor:  # noqa: N802
        """The same at every step."""
        return self.r[:, None].expand(-1, T)

    def phi(self, x: Tensor, k: int, kind: str = "difference") -> Tensor:
        """Tempered intermediate reward of x_k; at x_0 r/beta itself, whatever F."""
        if k == T:
            return reward(x) / BETA
        base = reward(self.x0_hat(x, k, None if self.reference_values else self.drawn_by)) / BETA
        if kind == "difference":
            return base
        return base + self.F(x, k) if kind == "learned" else base * (1 + self.F(x, k))

    def F(self, x: Tensor, k: int) -> Tensor:  # noqa: N802 (the paper's letter)
        assert self.terms.potential is not None
        return self.terms.potential(x, torch.full((N,), k), self.training.conditioning)

    def gain(self, kind: str = "difference") -> Tensor:
        """φ(x_{t-1}) − φ(x_t), Eq. 40."""
        return self._columns(lambda k: self.phi(self.x[:, k + 1], k + 1, kind) - self.phi(self.x[:, k], k, kind))

    # --- what is learned beside the policy ----------------------------------------------------------------------------

    @property
    def M(self) -> Tensor:  # noqa: N802
        """M(t) or M(t, c), (N, T)."""
        assert self.terms.centre is not None
        value = self.terms.centre.value
        return value[PROMPT] if value.ndim == 2 else value.expand(N, -1)

    @property
    def log_z(self) -> Tensor:
        """One M a trajectory, (N,)."""
        assert self.terms.centre is not None
        return self.terms.centre.value[PROMPT, 0] if self.terms.centre.value.ndim == 2 else self.terms.centre.value

    @property
    def baseline(self) -> Tensor:
        assert self.terms.value is not None
        value = self.terms.value
        return self.M + self._columns(lambda k: value(self.x[:, k], torch.full((N,), k), self.training.conditioning))

    # --- pieces of losses ---------------------------------------------------------------------------------------------

    @property
    def to_go(self) -> Tensor:
        """G'_t of Eq. 23 with the KL of this step and all later ones."""
        ratio = self.ref - self.p
        return self._columns(lambda k: self.r + ratio[:, k:].sum(1)).detach()

    @property
    def trajectory(self) -> Tensor:
        """log w_{0:T}, (N, 1)."""
        return (self.ref - self.p).sum(1, keepdim=True) + self.r[:, None]

    @property
    def rho_trajectory(self) -> Tensor:
        return (self.p - self.old).sum(1).exp()

    def per_group(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over groups of a loss of their rows' indices."""
        return torch.stack([loss(g) for g in GROUPS]).mean()

    def half_variance(self, f: Tensor) -> Tensor:
        """Σ_columns ½ Var, divisor K − 1, mean over groups (Eq. 4, 5)."""
        return self.per_group(lambda g: 0.5 * torch.var(f[g], 0).sum())

    def weighted(self, f: Tensor, weight: Tensor) -> Tensor:
        """Σ_i c_i (f_i − mean f) f_i/(K − 1), c and the bracket fixed: of gradient −Σ c A ∇log p_theta/(K − 1)."""

        def one(g: Tensor) -> Tensor:
            A = (f[g] - f[g].mean(0)).detach()
            return (weight[g].detach()[:, None] * A * f[g]).sum() / (K - 1)

        return self.per_group(one)

    def less_group_mean(self, f: Tensor) -> Tensor:
        return torch.cat([f[g] - f[g].mean(0) for g in GROUPS])  # groups lie one after the other

    def score(self, A: Tensor, divisor: int) -> Tensor:
        """−1/divisor Σ_i Σ_t A log p_theta, mean over groups (Eq. 18, 31)."""
        return -(A.detach() * self.p).sum() / (len(GROUPS) * divisor)

    def clipped(self, A: Tensor, eps: float, divisor: int) -> Tensor:
        """−1/divisor Σ_i Σ_t min(ρA, clip(ρ)A), mean over groups (Eq. 19, 21, 32)."""
        rho, A = (self.p - self.old).exp(), A.detach()
        return -torch.minimum(rho * A, rho.clip(1 - eps, 1 + eps) * A).sum() / (len(GROUPS) * divisor)

    def with_critic(self, G: Tensor, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        """Surrogate of G − b(x_t), plus the least squares of b to G (Eq. 7 for a state)."""
        return surrogate(G - self.baseline) + 0.5 * ((G.detach() - self.baseline) ** 2).sum(1).mean()

    def fisher(self, direction: str, kind: str) -> Tensor:
        """Mean over rows of ‖∇ log w‖² by autograd through both densities and φ (Eq. 51 to 55)."""
        rows = []
        for k in range(T):
            x, x_next = (self.x[:, j].clone().requires_grad_() for j in (k, k + 1))
            log_w = self.log_p(x, x_next, k, None) - self.log_p(x, x_next, k, self.now)
            log_w = log_w + self.phi(x_next, k + 1, kind) - self.phi(x, k, kind)
            by = x_next if direction == "forward" else x
            rows.append((torch.autograd.grad(log_w.sum(), by, create_graph=True)[0] ** 2).sum(1))
        return torch.stack(rows).mean()


def subtrajectories(e: Equations, decay: float, loss: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """Σ_{i<j} λ^{j−i} loss(Σ_{i≤t<j} log w_t) / Λ."""
    stretches = [(i, j) for i in range(T) for j in range(i + 1, T + 1)]
    total = sum(decay ** (j - i) * loss(log_w[:, i:j].sum(1, keepdim=True)) for i, j in stretches)
    return total / sum(decay ** (j - i) for i, j in stretches)


def standardised(A: Tensor, spread: Tensor) -> Tensor:
    return A / (spread + 1e-4)


def grpo_std(e: Equations) -> Tensor:
    spread = torch.cat([e.r[g].std(correction=0).expand(K) for g in GROUPS])[:, None]
    return e.clipped(standardised(e.less_group_mean(e.R), spread), 0.2, K)


def batch_reward(e: Equations, bound: float = 5.0) -> Tensor:
    return standardised(e.R - e.r.mean(), e.r.std(correction=0)).clip(-bound, bound)


def flow_grpo(e: Equations, eps: float = 1e-4, bound: float = 5.0) -> Tensor:
    return e.clipped(standardised(e.less_group_mean(e.R), e.r.std(correction=0)).clip(-bound, bound), eps, K)


def dpok(e: Equations) -> Tensor:
    rho = (e.p - e.old).exp().clip(1 - 1e-4, 1 + 1e-4)
    return e.with_critic(e.R, lambda A: -(rho * A.detach()).sum(1).mean())


def squares(e: Equations, log_w: Tensor) -> Tensor:
    return ((log_w - e.M) ** 2).mean()


LOSSES: dict[str, Callable[[Equations], Tensor]] = {
    "vmpo_diff": lambda e: squares(e, e.ref - e.p + e.gain()),
    "vmpo_diff_prompt": lambda e: squares(e, e.ref - e.p + e.gain()),
    "vmpo_r2g": lambda e: squares(e, e.ref - e.p + e.R),
    "vmpo_r2g_prompt": lambda e: squares(e, e.ref - e.p + e.R),
    "vmpo_r2g_per_step": lambda e: squares(e, e.ref - e.p + e.R / T),
    "vmpo_learned": lambda e: squares(e, e.ref - e.p + e.gain("product")),
    "vmpo_clipped": lambda e: e.clipped(e.less_group_mean(e.ref - e.p + e.R), 0.2, K - 1),
    "log_variance": lambda e: e.half_variance(e.ref - e.p + e.R),
    "log_variance_diff": lambda e: e.half_variance(e.ref - e.p + e.gain()),
    "trajectory_log_variance": lambda e: e.half_variance(e.trajectory),
    "subtrajectory_log_variance": lambda e: subtrajectories(e, 0.9, e.half_variance, e.ref - e.p + e.gain()),
    "log_variance_old": lambda e: e.half_variance(e.trajectory),
    "log_variance_mixture": lambda e: e.half_variance(e.trajectory),
    "log_variance_replay": lambda e: e.weighted(e.trajectory, e.rho_trajectory.clip(0, 2)),
    "kl_objective": lambda e: -((e.p - e.old).exp() * e.R).sum(1).mean(),
    "reinforce": lambda e: e.score(e.less_group_mean(e.R), K - 1),
    "reinforce_kl": lambda e: e.score(e.less_group_mean(e.R), K - 1),
    "reinforce_implicit_kl": lambda e: e.score(e.less_group_mean(e.to_go), K - 1),
    "ppo": lambda e: e.with_critic(e.R, lambda A: e.clipped(A, 0.2, K)),
    "ppo_kl": lambda e: e.with_critic(e.R, lambda A: e.clipped(A, 0.2, K)),
    "ppo_implicit_kl": lambda e: e.with_critic(e.to_go, lambda A: e.clipped(A, 0.2, K)),
    "grpo": lambda e: e.clipped(e.less_group_mean(e.R), 0.2, K),
    "grpo_kl": lambda e: e.clipped(e.less_group_mean(e.R), 0.2, K),
    "grpo_implicit_kl": lambda e: e.clipped(e.less_group_mean(e.to_go), 0.2, K),
    "grpo_std": grpo_std,
    "flow_grpo": flow_grpo,
    "gvpo": lambda e: e.weighted((e.old - e.p).sum(1, keepdim=True) + e.r[:, None], e.rho_trajectory),
    "flowrl": lambda e: (e.rho_trajectory.detach().clip(0.8, 1.2) * (e.trajectory[:, 0] - e.log_z) ** 2).mean(),
    "detailed_balance": lambda e: ((e.ref - e.p + e.gain()) ** 2).sum(1).mean(),
    "detailed_balance_learned": lambda e: ((e.ref - e.p + e.gain("learned")) ** 2).sum(1).mean(),
    "detailed_balance_product": lambda e: ((e.ref - e.p + e.gain("product")) ** 2).sum(1).mean(),
    "detailed_balance_noising": lambda e: ((e.noising - e.p + e.gain("learned")) ** 2).sum(1).mean(),
    "nabla_forward": lambda e: e.fisher("forward", "difference"),
    "nabla_backward": lambda e: e.fisher("backward", "difference"),
    "nabla_gflownet": lambda e: e.fisher("forward", "learned") + e.fisher("backward", "learned"),
    "ddpo_sf": lambda e: e.score(batch_reward(e), K),
    "ddpo_is": lambda e: e.clipped(batch_reward(e), 1e-4, K),
    "dpok": dpok,
}
KL_REF = {"reinforce_kl": 1.0, "ppo_kl": 1.0, "grpo_kl": 1.0, "kl_objective": 1.0, "flow_grpo": 0.04, "dpok": 0.01}
KL_OLD = dict.fromkeys([name for name in LOSSES if name.startswith("vmpo") and name != "vmpo_clipped"], 1.0)
MEAN_OVER_ROWS = (*KL_OLD, "squared stretches", "nabla_forward", "nabla_backward", "nabla_gflownet")
MEAN_LOG_PROB = ("flow_grpo", "ddpo_sf", "ddpo_is", "dpok", "tight flow_grpo")
MORE_OLD, MORE_REF = 0.7, 0.3
