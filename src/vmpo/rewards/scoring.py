"""Guarded scoring of a batch, and the sum of several rewards.

A reward is any callable

    (images float (B, 3, H, W) in [0, 1], prompts list[str], metadata list[dict]) -> float tensor (B,)

that may carry `range` (its usual range, as text), `differentiable` (whether gradients reach the images) and
`check_prompts(prompts)`, which raises UserError for a prompt it cannot score. A score that failed is NaN and stays
NaN; it never becomes 0, which would be a grade like any other.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vmpo.errors import UserError

logger = logging.getLogger(__name__)

RewardFunction = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]
GROUP_EPSILON = 1e-4  # Flow-GRPO's, added to the standard deviation

_logged: set[tuple[str, str]] = set()


class Reward(Protocol):
    """A reward with its facts; what `load_reward` returns."""

    @property
    def range(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], /) -> Tensor: ...


def check_prompts(rewards: Mapping[str, RewardFunction], prompts: Sequence[str]) -> None:
    """Lets every reward look at the prompts before a run; raises the UserError of the first that cannot score one."""
    for reward in rewards.values():
        check = getattr(reward, "check_prompts", None)
        if check is not None:
            check(prompts)


def score_images(
    rewards: Mapping[str, RewardFunction],
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
) -> dict[str, Tensor]:
    """Scores (B,) of every reward, on the images' device in float32 or better; NaN where a reward failed.

    An exception makes the whole batch of that reward NaN, a non-finite score only its sample; both are logged,
    once for each kind of message.

    Raises:
        UserError: what a reward raises as such, and for a result that is no real tensor of shape (B,).
        ValueError: if images, prompts and metadata do not fit together.
    """
    num = len(images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; it must be (B, 3, H, W)")
    if len(prompts) != num or len(metadata) != num:
        raise ValueError(f"{num} images, {len(prompts)} prompts and {len(metadata)} metadata; the numbers must agree")
    return {name: _score(name, reward, images, prompts, metadata) for name, reward in rewards.items()}


def _score(
    name: str, reward: RewardFunction, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Tensor:
    try:
        scores = reward(images, prompts, metadata)
    except UserError:
        raise
    except Exception as error:  # a scorer may fail in any way; one bad batch must not end a run
        log_once(name, f"{type(error).__name__}: {error}", "this batch has no score from it")
        return torch.full((len(images),), torch.nan, device=images.device)
    if not isinstance(scores, Tensor) or scores.is_complex():
        kind = f"a {scores.dtype} tensor" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"reward '{name}' returned {kind}; it must return a float tensor of shape ({len(images)},)")
    if scores.shape != (len(images),):
        raise UserError(
            f"reward '{name}' returned the shape {tuple(scores.shape)}; expected ({len(images)},), one score a picture"
        )
    scores = scores.to(images.device, scores.dtype if scores.dtype == torch.float64 else torch.float32)
    finite = scores.isfinite()
    if not finite.all():
        log_once(name, "non-finite score", "such samples are left out")
    return torch.where(finite, scores, torch.nan)


def log_once(name: str, message: str, consequence: str) -> None:
    """Warns of a failure, once for each reward and kind of message."""
    kind = (name, re.sub(r"0x[0-9a-f]+|\d+", "#", message))  # addresses and counts do not make a new kind
    if kind not in _logged:
        _logged.add(kind)
        logger.warning("reward '%s' failed: %s; %s (shown once)", name, message, consequence)


def combine(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    how: Literal["sum", "group_normalised"] = "sum",
) -> Tensor:
    """Total reward (B,) of each sample; NaN where a weighted reward is NaN.

    sum:               r = Σ_k w_k r_k
    group_normalised:  r = Σ_k w_k (r_k - mean_g r_k) / (std_g r_k + 1e-4)

    with the mean and the population standard deviation over the scored samples of a group. A reward of weight 0
    or without a weight is only watched: its NaN does not count.

    Arguments:
        scores: the scores of each reward, with shape (B,).
        weights: the weight w_k of each reward.
        group: the group index of each sample, with shape (B,).
        how: 'sum' or 'group_normalised'.

    Raises:
        UserError: for a weight without a reward, a weight that is not finite, no weight but 0, or an unknown `how`.

    References:
        Flow-GRPO (Liu et al., 2025, arXiv:2505.05470), for the normalisation in a group.
    """
    if how not in ("sum", "group_normalised"):
        raise UserError(f"rewards can be combined by 'sum' or 'group_normalised', not by '{how}'")
    used = _used_weights(weights, scores)
    terms = []
    for name, weight in used.items():
        r = scores[name]
        terms.append(weight * (r if how == "sum" else _normalise_in_group(r, group)))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _used_weights(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; the rewards are {', '.join(names)}"
            raise UserError(f"there is a weight for '{name}' but no such reward{hint}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward '{name}' is {weight}; it must be finite")
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise UserError("no reward has a weight other than 0")
    return used


def _normalise_in_group(r: Tensor, group: Tensor) -> Tensor:
    """(r - mean) / (population std + 1e-4) within each group, over the samples that are not NaN."""
    index = torch.unique(group, return_inverse=True)[1].to(r.device)
    scored = ~r.isnan()
    values = torch.where(scored, r, 0.0).double()
    num_groups = int(index.max()) + 1 if len(index) else 0

    def group_sum(x: Tensor) -> Tensor:
        return torch.zeros(num_groups, dtype=torch.float64, device=r.device).index_add(0, index, x)

    count = group_sum(scored.double()).clamp_min(1)
    mean = (group_sum(values) / count)[index]
    residual = torch.where(scored, values - mean, 0.0)
    std = (group_sum(residual**2) / count).sqrt()[index]
    return torch.where(scored, residual / (std + GROUP_EPSILON), torch.nan).to(r.dtype)
