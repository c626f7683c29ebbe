"""How far a policy on an exact world is from the tilted law that is known there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vmpo.exact import MaskedChain, World, WorldPolicy
from vmpo.log_weights import LogWeights
from vmpo.rollouts import rollout_from_noise
from vmpo.samplers import self_normalised

MEASURED = 2048
MEASURED_AT_END = 32_768
DRAWN_POINTS = 800


def measure(world: World, policy: WorldPolicy, n: int = MEASURED, seed: int = 4711) -> dict[str, float]:
    """Draws n trajectories and compares their weights and rewards with the truth; means over prompts.

        log w = Σ_t (log p_ref − log p_theta) + r(x_0)/beta
        kl_target = KL(p_theta(x_{0:T}) ‖ p_tilt(x_{0:T})) = log Z − E[log w]

    The noise comes in antithetic pairs (z, −z), which cancels the error of every odd function; standard errors are over
    pairs. All in nats but `ess` (a share of n) and `reward`.
    """
    _, log_w, reward, kl_ref, prompt = _draw(world, policy, n, seed)
    truth, weights = world.truth(), LogWeights(log_w[:, None], prompt)
    kl = truth.log_z[prompt] - log_w
    return {
        "var_log_w": weights.group_variance.mean().item(),
        "ess": weights.ess.mean().item(),
        "log_z": weights.log_z.mean().item(),
        "log_z_error": (weights.log_z - truth.log_z).abs().mean().item(),
        "kl_target": kl.mean().item(),
        "kl_target_se": _paired_se(kl),
        "kl_ref": kl_ref.mean().item(),
        "reward": reward.mean().item(),
        "reward_se": _paired_se(reward),
        "reward_weighted": _weighted(log_w, reward, prompt),
    }


def measure_end(world: World, policy: WorldPolicy) -> tuple[dict[str, Any], list[list[float]], list[float] | None]:
    """`measure` with more trajectories and the distance to the target; samples to draw; the law, where enumerable.

    The distance is the total variation of exact laws on a masked chain, the energy distance to samples elsewhere.
    """
    found: dict[str, Any] = measure(world, policy, MEASURED_AT_END)
    x_0, *_, prompt = _draw(world, policy, DRAWN_POINTS * len(world.prompts), seed=1234)
    points = x_0[prompt == 0].tolist()
    if isinstance(world, MaskedChain):
        found |= {"distance": world.total_variation(policy), "distance_kind": "total variation"}
        law = world.law(policy)
        states = torch.arange(world.num_states)[:, None]
        exact = (law * world.reward(states, torch.zeros(world.num_states, dtype=torch.long))).sum().item()
        return found | {"reward": exact, "reward_se": 0.0}, points, law[world.clean].tolist()
    large, *_, index = _draw(world, policy, 2000 * len(world.prompts), seed=99)
    distances = [_distance(world, large[index == c], c) for c in range(len(world.prompts))]
    return found | {"distance": sum(distances) / len(distances), "distance_kind": "energy distance"}, points, None


def _distance(world: World, x_0: Tensor, prompt: int) -> float:
    return world.distance(x_0, prompt) if bool(x_0.isfinite().all()) else math.nan


@torch.no_grad()
def _draw(world: World, policy: WorldPolicy, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_0, log w, reward, KL to the reference and prompt of n trajectories, the second half antithetic to the first."""
    half, generator = n // 2, torch.Generator().manual_seed(seed)
    prompt = (torch.arange(half) % len(world.prompts)).repeat(2)
    shape = (half, world.kernel.num_steps + 1, *world.state_shape)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    conditioning = policy.encode([world.prompts[c] for c in prompt.tolist()])
    drawn = rollout_from_noise(policy, world.kernel, conditioning, torch.cat([noise, -noise]), dtype=torch.float64)
    reward = world.reward(drawn.x_0, prompt)
    log_w = (drawn.log_p_ref - drawn.log_p_old).sum(1) + reward / world.beta
    return drawn.x_0, log_w, reward, drawn.kl_ref.sum(1), prompt


def _weighted(log_w: Tensor, reward: Tensor, prompt: Tensor) -> float:
    """Σ w r / Σ w within prompts (Eq. 1): the tilted law's expected reward, whatever policy drew the samples."""
    if not bool((log_w + reward).isfinite().all()):
        return math.nan  # a policy that has run away
    found = [self_normalised(log_w[prompt == c], reward[prompt == c]).mean for c in prompt.unique()]
    return torch.stack(found).mean().item()


def _paired_se(values: Tensor) -> float:
    pairs = 0.5 * (values[: len(values) // 2] + values[len(values) // 2 :])
    return (pairs.std() / math.sqrt(len(pairs))).item()
