"""The truth of a bounded reward: what the tilted distribution p_ref·exp(r/β)/Z is worth, from base samples alone.

Everything follows from the rewards r of independent samples of the reference, a row a prompt:

    log Z(β) = log E_ref[exp(r/β)]                     (nats)
    R(β)     = E_ref[r exp(r/β)] / Z                   expected reward of the tilted distribution
    KL(β)    = KL(tilt ‖ ref) = R/β − log Z            (nats)

For every β, (KL(β), R(β)) lies on the optimal frontier: no distribution whose KL, averaged over prompts, is the same
has a higher average reward. Its slope is dR/dKL = β. A denoising policy leaves the distribution of the first noise
alone and its KL over whole trajectories is no less than that over pictures, so the frontier bounds it from above.

The errors are those between prompts, which cover the choice of prompts as well as the samples of each prompt; they
equal the delete-one-prompt jackknife of these averages. The bias of reweighting with M samples is taken off to first
order by the delta method (bounded, unlike the jackknife, where one sample carries the weight).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from vmpo.evaluation.diversity import weighted_total_variance
from vmpo.evaluation.statistics import Estimate, clustered_mean, prompt_means

MIN_ESS = 5.0
"""A prompt with fewer effective samples is counted as thin: its first-order bias correction is no longer small."""
MAX_THIN = 0.1
"""Share of thin prompts above which a tilted figure is not to be trusted."""


class UntrustedTruth(UserWarning):
    """Too few effective samples: the reweighted figure may be far from the tilted distribution's."""


class FrontierPoint(TypedDict):
    """One β of the optimal frontier; KL and log Z in nats, `ess` the median over prompts."""

    beta: float
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    log_z: float
    log_z_se: float
    ess: float
    trusted: bool


@dataclass(frozen=True)
class Tilted:
    """The tilted distribution of each prompt at one β, all (P,) float64; KL and log Z in nats.

    `reward_sd`, `kl_sd` and `log_z_sd` are the errors from the finite samples of the prompt alone.
    """

    beta: float
    log_z: Tensor
    reward: Tensor
    kl: Tensor
    ess: Tensor
    log_z_sd: Tensor
    reward_sd: Tensor
    kl_sd: Tensor

    @property
    def thin(self) -> float:
        """Share of prompts with fewer than `MIN_ESS` effective samples."""
        measured = self.ess[~self.ess.isnan()]
        return (measured < MIN_ESS).double().mean().item() if measured.numel() else 1.0

    @property
    def trusted(self) -> bool:
        """Whether no more than `MAX_THIN` of the prompts are thin."""
        return self.thin <= MAX_THIN

    def estimate(self, name: str) -> Estimate:
        """Average of 'log_z', 'reward', 'kl' or 'ess' over prompts; of a single prompt, the error of its samples."""
        values: Tensor = getattr(self, name)
        estimate = clustered_mean(values)
        if estimate.n == 1 and name != "ess":
            sd: Tensor = getattr(self, f"{name}_sd")
            return Estimate(estimate.mean, sd[~values.isnan()].item(), 1)
        return estimate

    def point(self) -> FrontierPoint:
        """The averages over prompts as a point of the frontier."""
        kl, reward, log_z = self.estimate("kl"), self.estimate("reward"), self.estimate("log_z")
        return FrontierPoint(
            beta=self.beta,
            kl=kl.mean,
            kl_se=kl.se,
            reward=reward.mean,
            reward_se=reward.se,
            log_z=log_z.mean,
            log_z_se=log_z.se,
            ess=self.ess.nanmedian().item(),
            trusted=self.trusted,
        )


def _checked(rewards: Tensor, beta: float) -> Tensor:
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; they must be (prompts, samples)")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}; it must be positive and finite")
    rewards = rewards.detach().to(torch.float64)
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value; a failed score is NaN, and the truth needs bounded rewards")
    return rewards


def tilt(rewards: Tensor, beta: float) -> Tilted:
    """log Z, reward and KL of the tilted distribution of each prompt, by self-normalised reweighting.

    With w_i = softmax(r/β) over the n samples of a prompt, and the first-order bias taken off:

        log Z = log mean exp(r/β) + ½(Σ w² − 1/n)·n/(n−1),    R = Σ w r + Σ w² (r − Σ w r).

    Arguments:
        rewards: (P, M) of independent base samples; NaN (failed) entries are left out.
        beta: Temperature of the reward, in units of the reward.

    Raises:
        ValueError: for another shape, an infinite reward or a temperature that is not positive.
    """
    r = _checked(rewards, beta)
    valid = ~r.isnan()
    n = valid.sum(dim=1).double()
    empty = n < 2  # one sample says nothing of a tilt
    r = r.nan_to_num(0.0)
    log_w = torch.where(valid, r / beta, -torch.inf)
    w = torch.softmax(log_w, dim=1).nan_to_num(0.0)
    squares = w.square()
    plain = (w * r).sum(dim=1)
    centred = r - plain.unsqueeze(1)

    spread = (squares.sum(dim=1) - 1 / n).clamp_min(0) * n / (n - 1)
    log_z = torch.logsumexp(log_w, dim=1) - n.log() + 0.5 * spread
    reward = plain + (squares * centred).sum(dim=1)
    kl_influence = torch.where(valid, w * (centred / beta - 1) + (1 / n).unsqueeze(1), 0.0)

    def measured(values: Tensor) -> Tensor:
        return torch.where(empty, torch.nan, values)

    return Tilted(
        beta=beta,
        log_z=measured(log_z),
        reward=measured(reward),
        kl=measured(reward / beta - log_z),
        ess=measured(1 / squares.sum(dim=1)),
        log_z_sd=measured(spread.sqrt()),
        reward_sd=measured((squares * centred.square()).sum(dim=1).sqrt()),
        kl_sd=measured(kl_influence.square().sum(dim=1).sqrt()),
    )


def beta_grid(rewards: Tensor, num: int = 33) -> list[float]:
    """`num` temperatures in equal ratios, from 20 times the range of the rewards down to a hundredth of it."""
    finite = rewards[rewards.isfinite()].double()
    width = (finite.max() - finite.min()).item() if finite.numel() else 0.0
    width = width if width > 0 else 1.0
    exponents = torch.linspace(math.log10(20.0), -2.0, num, dtype=torch.float64)
    return [width * 10**e for e in exponents.tolist()]


def optimal_frontier(rewards: Tensor, betas: Sequence[float] | None = None) -> list[FrontierPoint]:
    """The reward–KL frontier over β, from large β (no tilt) to small; points with thin weights are not `trusted`.

    Arguments:
        rewards: (P, M) of independent base samples, NaN where failed.
        betas: Temperatures; by default `beta_grid(rewards)`.
    """
    chosen = beta_grid(rewards) if betas is None else sorted(betas, reverse=True)
    return [tilt(rewards, beta).point() for beta in chosen]


def reward_at_kl(frontier: Sequence[FrontierPoint], kl: float) -> tuple[float, float]:
    """Best expected reward at a KL in nats, and its standard error, between the points of the frontier.

    Cubic Hermite interpolation with the known slopes dR/dKL = β. At a fixed KL the error is that of R − β·KL = β·log Z,
    the two errors being correlated, so se = β·se(log Z). Outside the frontier the nearest end holds.

    Raises:
        ValueError: if the frontier is empty or the KL is NaN.
    """
    if not frontier or math.isnan(kl):
        raise ValueError("the frontier is empty or the KL is NaN; give a measured frontier and a KL in nats")
    points: list[FrontierPoint] = []
    for point in sorted(frontier, key=lambda p: -p["beta"]):
        if not points or point["kl"] > points[-1]["kl"]:  # noise at the far end must not fold the curve back
            points.append(point)
    if kl <= points[0]["kl"]:
        return points[0]["reward"], points[0]["reward_se"]
    if kl >= points[-1]["kl"]:
        return points[-1]["reward"], points[-1]["reward_se"]
    right = next(i for i, point in enumerate(points) if point["kl"] > kl)
    a, b = points[right - 1], points[right]
    h = b["kl"] - a["kl"]
    t = (kl - a["kl"]) / h
    reward = (
        (1 + 2 * t) * (1 - t) ** 2 * a["reward"]
        + t * (1 - t) ** 2 * h * a["beta"]
        + t**2 * (3 - 2 * t) * b["reward"]
        - t**2 * (1 - t) * h * b["beta"]
    )
    se = (1 - t) * a["beta"] * a["log_z_se"] + t * b["beta"] * b["log_z_se"]
    return reward, se


def beta_at_kl(rewards: Tensor, kl: float) -> float:
    """The temperature whose tilted distribution has the given average KL in nats, by bisection on log β.

    A KL out of the samples' reach gives the nearest end of `beta_grid`.
    """
    grid = beta_grid(rewards)
    low, high = math.log(grid[-1]), math.log(grid[0])
    for _ in range(60):
        middle = (low + high) / 2
        if tilt(rewards, math.exp(middle)).estimate("kl").mean > kl:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def gap_to_frontier(rewards: Tensor, policy_rewards: Tensor, policy_kl: Tensor) -> dict[str, float]:
    """How far a policy is from the best expected reward at its own KL, paired by prompt.

    At β* with KL(β*) = κ the optimum is R* = β*(log Z(β*) + κ), a minimum over β, so that to first order the error of
    β* drops out; the gap R* − R = mean over prompts of β*(log Z_p + κ_p) − R_p is β* times the KL of the policy to
    the tilted distribution.

    Arguments:
        rewards: (P, M) of base samples.
        policy_rewards: (P, M') of the policy on the same prompts.
        policy_kl: (P,) or (P, M') KL(p_theta ‖ p_ref) in nats.

    Returns:
        kl, frontier_reward, policy_reward, gap, se (of the gap, between prompts) and beta (β*). Where the KL is out of
        reach of the samples, the frontier is flat and R* is its end.
    """
    kl, policy = prompt_means(policy_kl), prompt_means(policy_rewards)
    measured = ~(kl.isnan() | policy.isnan() | tilt(rewards, 1.0).ess.isnan())
    kl, policy, rewards = kl[measured], policy[measured], rewards[measured]
    if not measured.any():
        return dict.fromkeys(("kl", "frontier_reward", "policy_reward", "gap", "se", "beta"), math.nan)
    beta = beta_at_kl(rewards, kl.mean().item())
    best = tilt(rewards, beta)
    reached = best.kl.mean().item() > 0.98 * kl.mean().item()
    frontier = beta * (best.log_z + kl) if reached else best.reward
    gap = clustered_mean(frontier - policy)
    return {
        "kl": kl.mean().item(),
        "frontier_reward": frontier.mean().item(),
        "policy_reward": policy.mean().item(),
        "gap": gap.mean,
        "se": gap.se,
        "beta": beta,
    }


def rejection_sample(
    rewards: Tensor, beta: float, reward_max: float, generator: torch.Generator | None = None
) -> Tensor:
    """Which base samples to keep so that the kept ones are exact samples of the tilted distribution.

    A sample is kept with probability exp((r − r_max)/β); on average Z·exp(−r_max/β) of them are. Failed (NaN) ones
    never are.

    Arguments:
        rewards: Any shape.
        reward_max: An upper bound of the reward, not merely the largest one seen.

    Returns:
        Bool tensor of the same shape.

    Raises:
        ValueError: if a reward lies above the bound.
    """
    r = rewards.detach().to("cpu", torch.float64)
    if (r > reward_max).any():
        raise ValueError(f"a reward is {r.nan_to_num(-math.inf).max().item():g}, above reward_max = {reward_max:g}")
    keep = torch.rand(r.shape, generator=generator, dtype=torch.float64) < ((r - reward_max) / beta).exp()
    return keep.to(rewards.device)


def measure_truth(
    rewards: Tensor,
    beta: float,
    features: Tensor | None = None,
    policy_rewards: Tensor | None = None,
    policy_kl: Tensor | None = None,
    betas: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The `truth` entry of `evaluation.json`: tilted figures at β, the frontier and, given a policy, its gap.

    Warns `UntrustedTruth`, and says so under "note", where more than a tenth of the prompts have an ESS below 5.

    Arguments:
        rewards: (P, M) of independent base samples.
        beta: Temperature the policy was trained for.
        features: (P, M, F) of the same samples, for the tilted diversity.
        policy_rewards: (P, M') and `policy_kl` (P,) or (P, M') in nats, for the gap to the frontier.
    """
    tilted = tilt(rewards, beta)
    truth: dict[str, Any] = {
        "beta": beta,
        "log_z": tilted.estimate("log_z").as_dict(),
        "reward": tilted.estimate("reward").as_dict(),
        "kl": tilted.estimate("kl").as_dict(),
        "ess": tilted.ess.nanmedian().item(),
        "thin_prompts": tilted.thin,
        "samples_per_prompt": rewards.shape[1],
        "frontier": optimal_frontier(rewards, betas),
    }
    if features is not None:
        log_w = torch.where(rewards.isnan(), -torch.inf, rewards.double() / beta)
        usable = (log_w > -torch.inf).sum(dim=1) > 1
        truth["diversity"] = weighted_total_variance(features[usable], log_w[usable]).as_dict()
    if policy_rewards is not None and policy_kl is not None:
        truth["gap"] = gap_to_frontier(rewards, policy_rewards, policy_kl)
    if not tilted.trusted:
        truth["note"] = (
            f"{tilted.thin:.0%} of the prompts have fewer than {MIN_ESS:g} effective samples at beta = {beta:g}: "
            f"the tilted figures are not reliable; use more than {rewards.shape[1]} base samples a prompt"
        )
        warnings.warn(truth["note"], UntrustedTruth, stacklevel=2)
    return truth
