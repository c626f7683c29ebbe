"""Every objective written out plainly from its equations, for autograd; shares no code with the library's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmpo.comparison.world_training import WorldTraining
from vmpo.training.rollout import Rollout

D, S, K, BATCH = 2, 3, 4, 16
KL_OLD, KL_REF = 0.7, 0.3


@dataclass
class Plain:
    """One rollout's densities, rewards and learned functions, (N, S) each, with their graphs.

    p, old, ref: log-densities of the current policy, of the one that drew, of the reference; R: r(x_0)/beta, (N,);
    v: r(x̂_0)/beta of the states before each step; F, V: learned functions there; M, centre: learned means of rows, of
    trajectories.
    """

    p: Tensor
    old: Tensor
    ref: Tensor
    noising: Tensor
    R: Tensor
    v: Tensor
    F: Tensor
    V: Tensor
    M: Tensor
    centre: Tensor
    groups: list[Tensor]
    kl: tuple[Tensor, Tensor]
    gradient: Callable[[str, bool], Tensor]

    def variance(self, f: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over groups of ½ Σ_i w (f − mean)²/(K−1), summed over columns; the mean is weighted as well."""
        losses = []
        for g in self.groups:
            w = torch.ones_like(f[g]) if weight is None else weight[g][:, None].expand_as(f[g])
            mean = (w * f[g]).sum(0) / w.sum(0)
            losses.append(0.5 * (w * (f[g] - mean) ** 2).sum() / (K - 1))
        return torch.stack(losses).mean()

    def centred(self, f: Tensor) -> Tensor:
        out = torch.zeros_like(f)
        for g in self.groups:
            out[g] = f[g] - f[g].mean(0)
        return out.detach()

    def ppo(self, A: Tensor, eps: float, divisor: float) -> Tensor:
        """−Σ min(ρA, clip(ρ)A)/divisor over all rows, A detached."""
        ratio, A = (self.p - self.old).exp(), A.detach()
        return -torch.minimum(ratio * A, ratio.clip(1 - eps, 1 + eps) * A).sum() / divisor

    def per_step(self, R: Tensor) -> Tensor:
        return R[:, None].expand(-1, S)

    def difference(self, phi: Tensor) -> Tensor:
        """φ(x_{s+1}) − φ(x_s) with φ(x_0) = r/beta."""
        return torch.cat([phi[:, 1:], self.R[:, None]], 1) - phi

    def to_go(self) -> Tensor:
        """r/beta + the log-ratios of this step and those after it."""
        ratio = self.ref - self.p
        return torch.stack([ratio[:, s:].sum(1) + self.R for s in range(S)], 1).detach()

    def trajectory_ratio(self) -> Tensor:
        return (self.p - self.old).sum(1).exp().detach()


def subtrajectories(w: Plain, decay: float) -> Tensor:
    lw, total, mass = w.ref - w.p + w.difference(w.v), torch.zeros((), dtype=torch.float64), 0.0
    for i in range(S):
        for j in range(i + 1, S + 1):
            total = total + decay ** (j - i) * w.variance(lw[:, i:j].sum(1, keepdim=True))
            mass += decay ** (j - i)
    return total / mass


def critic(w: Plain, G: Tensor) -> tuple[Tensor, Tensor]:
    """Advantage G − V − M and the fit of V + M to G, Σ_t, mean over trajectories."""
    value = w.V + w.M
    return G - value, 0.5 * ((G.detach() - value) ** 2).sum() / BATCH


def ppo(w: Plain, G: Tensor) -> Tensor:
    A, fit = critic(w, G)
    return w.ppo(A, 0.2, BATCH) + fit


def dpok(w: Plain) -> Tensor:
    A, fit = critic(w, w.per_step(w.R))
    return -((w.p - w.old).exp().clip(1 - 1e-4, 1 + 1e-4) * A.detach()).sum() / BATCH + fit


def standard(A: Tensor, spread: Tensor) -> Tensor:
    return A / (spread + 1e-4)


def grpo_std(w: Plain) -> Tensor:
    A = torch.zeros_like(w.p)
    for g in w.groups:
        A[g] = ((w.R[g] - w.R[g].mean()) / (w.R[g].std(correction=0) + 1e-4))[:, None]
    return w.ppo(A, 0.2, BATCH)


def flow_grpo(w: Plain) -> Tensor:
    A = standard(w.centred(w.per_step(w.R)), w.R.std(correction=0)).clip(-5, 5)
    return w.ppo(A, 1e-4, BATCH)


def ddpo(w: Plain) -> Tensor:
    return w.per_step(standard(w.R - w.R.mean(), w.R.std(correction=0)).clip(-5, 5))


LOSSES: dict[str, Callable[[Plain], Tensor]] = {
    "vmpo_diff": lambda w: ((w.ref - w.p + w.difference(w.v) - w.M) ** 2).mean(),
    "vmpo_diff_prompt": lambda w: ((w.ref - w.p + w.difference(w.v) - w.M) ** 2).mean(),
    "vmpo_r2g": lambda w: ((w.ref - w.p + w.per_step(w.R) - w.M) ** 2).mean(),
    "vmpo_r2g_prompt": lambda w: ((w.ref - w.p + w.per_step(w.R) - w.M) ** 2).mean(),
    "vmpo_r2g_per_step": lambda w: ((w.ref - w.p + w.per_step(w.R) / S - w.M) ** 2).mean(),
    "vmpo_learned": lambda w: ((w.ref - w.p + w.difference((1 + w.F) * w.v) - w.M) ** 2).mean(),
    "vmpo_clipped": lambda w: w.ppo(w.centred(w.ref - w.p + w.per_step(w.R)), 0.2, len(w.groups) * (K - 1)),
    "log_variance": lambda w: w.variance(w.ref - w.p + w.per_step(w.R)),
    "log_variance_diff": lambda w: w.variance(w.ref - w.p + w.difference(w.v)),
    "trajectory_log_variance": lambda w: w.variance(((w.ref - w.p).sum(1) + w.R)[:, None]),
    "subtrajectory_log_variance": lambda w: subtrajectories(w, 0.9),
    "log_variance_old": lambda w: w.variance(((w.ref - w.p).sum(1) + w.R)[:, None]),
    "log_variance_mixture": lambda w: w.variance(((w.ref - w.p).sum(1) + w.R)[:, None]),
    "log_variance_replay": lambda w: w.variance(
        ((w.ref - w.p).sum(1) + w.R)[:, None], w.trajectory_ratio().clip(0.0, 2.0)
    ),
    "kl_objective": lambda w: -((w.p - w.old).exp() * w.per_step(w.R)).sum() / BATCH,
    "reinforce": lambda w: -(w.centred(w.per_step(w.R)) * w.p).sum() / (len(w.groups) * (K - 1)),
    "reinforce_kl": lambda w: -(w.centred(w.per_step(w.R)) * w.p).sum() / (len(w.groups) * (K - 1)),
    "reinforce_implicit_kl": lambda w: -(w.centred(w.to_go()) * w.p).sum() / (len(w.groups) * (K - 1)),
    "ppo": lambda w: ppo(w, w.per_step(w.R)),
    "ppo_kl": lambda w: ppo(w, w.per_step(w.R)),
    "ppo_implicit_kl": lambda w: ppo(w, w.to_go()),
    "grpo": lambda w: w.ppo(w.centred(w.per_step(w.R)), 0.2, BATCH),
    "grpo_kl": lambda w: w.ppo(w.centred(w.per_step(w.R)), 0.2, BATCH),
    "grpo_implicit_kl": lambda w: w.ppo(w.centred(w.to_go()), 0.2, BATCH),
    "grpo_std": grpo_std,
    "flow_grpo": flow_grpo,
    "gvpo": lambda w: w.variance(((w.old - w.p).sum(1) + w.R)[:, None], w.trajectory_ratio()),
    "flowrl": lambda w: (w.trajectory_ratio().clip(0.8, 1.2) * ((w.ref - w.p).sum(1) + w.R - w.centre) ** 2).mean(),
    "detailed_balance": lambda w: ((w.ref - w.p + w.difference(w.v)) ** 2).sum() / BATCH,
    "detailed_balance_learned": lambda w: ((w.ref - w.p + w.difference(w.v + w.F)) ** 2).sum() / BATCH,
    "detailed_balance_product": lambda w: ((w.ref - w.p + w.difference((1 + w.F) * w.v)) ** 2).sum() / BATCH,
    "detailed_balance_noising": lambda w: ((w.noising - w.p + w.difference(w.v + w.F)) ** 2).sum() / BATCH,
    "nabla_forward": lambda w: w.gradient("forward", False),
    "nabla_backward": lambda w: w.gradient("backward", False),
    "nabla_gflownet": lambda w: w.gradient("forward", True) + w.gradient("backward", True),
    "ddpo_sf": lambda w: -(ddpo(w) * w.p).sum() / BATCH,
    "ddpo_is": lambda w: w.ppo(ddpo(w), 1e-4, BATCH),
    "dpok": dpok,
}
MEAN_OVER_ROWS = ("vmpo_diff", "vmpo_r2g", "vmpo_learned")
MEAN_LOG_PROB = ("flow_grpo", "ddpo_sf", "ddpo_is", "dpok")


def penalty(name: str, w: Plain) -> Tensor:
    """0.7 KL to the drawing policy and 0.3 KL to the reference: means over rows (Eq. 8), or Σ_t (Eq. 22)."""
    if name.startswith("nabla"):
        return torch.zeros((), dtype=torch.float64)
    old, ref = (kl.mean() if name.startswith(MEAN_OVER_ROWS) else kl.sum() / BATCH for kl in w.kl)
    return KL_OLD * old + KL_REF * ref


def plain(training: WorldTraining, data: Rollout, name: str) -> Plain:
    """Everything again from the states, by torch's own distributions."""
    world, policy, kernel, x = training.world, training.policy, training.kernel, data.trajectory.x
    prompt, conditioning, scale = training.prompt, training.conditioning, 1 / D if name in MEAN_LOG_PROB else 1.0

    def normal(state: Tensor, s: int, *, reference: bool) -> torch.distributions.Normal:
        step = torch.full((BATCH,), s)
        if reference:
            with policy.reference():
                output = policy.predict(state, kernel.times[step], conditioning)
        else:
            output = policy.predict(state, kernel.times[step], conditioning)
        return torch.distributions.Normal(kernel.transition(state, output, step).mean, kernel.std[s])  # type: ignore[attr-defined]

    now = [normal(x[:, s], s, reference=False) for s in range(S)]
    ref = [normal(x[:, s], s, reference=True) for s in range(S)]
    log = lambda ds: scale * torch.stack([d.log_prob(x[:, s + 1]).sum(1) for s, d in enumerate(ds)], 1)  # noqa: E731
    old = [torch.distributions.Normal(data.trajectory.mean_old[:, s], kernel.std[s]) for s in range(S)]  # type: ignore[attr-defined]
    divergence = torch.distributions.kl_divergence
    kl = tuple(
        scale * torch.stack([divergence(a, b).sum(1) for a, b in zip(now, b_, strict=True)], 1) for b_ in (old, ref)
    )
    at = lambda f: torch.stack([f(x[:, s], torch.full((BATCH,), s), conditioning) for s in range(S)], 1)  # noqa: E731
    terms, zeros = training.terms, torch.zeros(BATCH, S, dtype=torch.float64)
    M, centre = zeros, zeros[:, 0]
    if name == "flowrl":
        centre = terms.centre.value.double()[prompt, 0]  # type: ignore[union-attr]
    elif terms.centre is not None:
        value = terms.centre.value.double()
        M = value[prompt] if name.endswith("_prompt") else value.expand(BATCH, -1)
    alpha, sigma = kernel.levels()  # type: ignore[attr-defined]
    ratio = alpha[:-1] / alpha[1:]
    spread = (sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2).sqrt()
    q = [torch.distributions.Normal(ratio[s] * x[:, s + 1], spread[s]) for s in range(S)]

    def gradient(direction: str, learned: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for s in range(S):
            here, there = x[:, s].clone().requires_grad_(), x[:, s + 1].clone().requires_grad_()
            log_w = (
                normal(here, s, reference=True).log_prob(there).sum()
                - normal(here, s, reference=False).log_prob(there).sum()
            )
            variable, position, sign = (there, s + 1, 1.0) if direction == "forward" else (here, s, -1.0)
            found = torch.autograd.grad(log_w, variable, create_graph=True)[0]
            assert data.value_gradient is not None
            phi = data.value_gradient[:, position]
            if learned and position < S:
                assert terms.potential is not None
                F = terms.potential(variable, torch.full((BATCH,), position), conditioning).sum()
                phi = phi + torch.autograd.grad(F, variable, create_graph=True)[0]
            total = total + ((found + sign * phi) ** 2).sum()
        return total / (BATCH * S)

    values = torch.zeros(BATCH, S + 1, dtype=torch.float64) if data.values is None else data.values
    return Plain(
        p=log(now),
        old=log(old).detach(),
        ref=log(ref).detach(),
        noising=torch.stack([d.log_prob(x[:, s]).sum(1) for s, d in enumerate(q)], 1),
        R=world.reward(x[:, -1], prompt) / world.beta,
        v=values[:, :S],
        F=at(terms.potential) if terms.potential is not None else zeros,
        V=at(terms.value) if terms.value is not None else zeros,
        M=M,
        centre=centre,
        groups=list(torch.arange(BATCH).view(-1, K)),
        kl=(kl[0], kl[1]),
        gradient=gradient,
    )
