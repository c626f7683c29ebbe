"""A reward on another machine or in another environment: JSON over HTTP, as `vmpo serve-reward` speaks it.

    POST /score   {"images": [base64 PNG, ...], "prompts": [...], "metadata": [{...}, ...]}
                  -> {"scores": [0.5, null, ...]}
    POST /check   {"prompts": [...]} -> {}, or status 422 with {"error": "..."}; a server may do without
    GET  /health  -> {"status": "ok", "reward": NAME, "version": ...}; a server may do without

A score is null where it failed. docs/remote-rewards.md has the whole protocol.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import to_pil
from vmpo.rewards.http_request import RequestError, StatusError
from vmpo.rewards.http_reward import HTTPReward, Job
from vmpo.rewards.png import encode_png

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RemoteReward(HTTPReward):
    """The scores of a reward server; NaN where it gave none.

    Pictures are rounded to 8 bits a channel on the way. Options besides those of `HTTPReward`: `batch`, pictures a
    request.

    Raises:
        UserError: before a run, if no server answers, they serve different rewards, or cannot score a prompt.
    """

    batch: int = 16
    range: ClassVar[str] = "the server's"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.batch, int) or self.batch < 1:
            raise UserError(f"batch={self.batch!r} of a remote reward; it is pictures a request, at least 1")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        chunks = finite_rows(images).split(self.batch)
        jobs = [self._job(images, prompts, metadata, rows.tolist()) for rows in chunks if len(rows)]
        scores = torch.full((len(images),), torch.nan)
        for rows, found in zip(chunks, self.ask("/score", jobs), strict=False):
            scores[rows] = torch.tensor(found)
        return scores.to(images.device)

    def _job(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], rows: list[int]) -> Job:
        def body() -> dict[str, Any]:
            return {
                "images": [encode_png(picture) for picture in to_pil(images[rows])],
                "prompts": [prompts[r] for r in rows],
                "metadata": [metadata[r] for r in rows],
            }

        return Job(len(rows), body, lambda reply: read_scores(reply, len(rows)))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Asks every server what it serves, and whether it can score these prompts.

        Raises:
            UserError: if none answers, they serve different rewards, or one cannot score a prompt.
        """
        serving: dict[str, str] = {}
        replies = reachable(self.probe("/health"))
        for url, reply in replies.items():
            if isinstance(reply, dict) and "reward" in reply:
                serving[url] = f"{reply['reward']} {reply.get('options') or ''} ({reply.get('version', 'no version')})"
                logger.info("%s serves %s", url, serving[url])
        if len(set(serving.values())) > 1:
            different = "; ".join(f"{url}: {what}" for url, what in serving.items())
            raise UserError(f"the reward servers of one reward must serve the same, but: {different}")
        for url, reply in self.probe("/check", {"prompts": list(prompts)}).items():
            if isinstance(reply, StatusError) and reply.status == 422:
                raise UserError(f"{url}: {reply}")


def finite_rows(images: Tensor) -> Tensor:
    """Indices of the pictures without NaN or infinity: a broken one would be sent as some other picture."""
    return images.detach().isfinite().flatten(1).all(1).nonzero().flatten().cpu()


def reachable(replies: dict[str, Any]) -> dict[str, Any]:
    """The replies of a probe, with a warning for each server that did not answer.

    Raises:
        UserError: if none answered, or one does not let us in.
    """
    lost = {}
    for url, reply in replies.items():
        if isinstance(reply, StatusError):
            if reply.status in (401, 403):
                raise UserError(
                    f"{url}: {reply}; the option key_env names the environment variable that holds the token"
                )
        elif isinstance(reply, Exception):
            lost[url] = reply
            logger.warning("reward server %s: %s", url, reply)
    if len(lost) == len(replies):
        url, error = next(iter(lost.items()))
        raise UserError(f"no reward server answers: {url}: {error}; start one with 'vmpo serve-reward NAME'")
    return replies


def read_scores(reply: Any, count: int) -> list[float]:
    """The scores of a reply, NaN for null.

    Raises:
        RequestError: if the reply is no object with as many numbers under 'scores'.
    """
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list):
        raise RequestError("the reply has no list 'scores'")
    if len(scores) != count:
        raise RequestError(f"the reply has {len(scores)} scores for {count} pictures")
    found = []
    for score in scores:
        if score is None:
            found.append(math.nan)
            continue
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise RequestError(f"a score is a {type(score).__name__}, not a number or null")
        try:
            found.append(float(score))
        except OverflowError as error:
            raise RequestError("a score is beyond the range of numbers") from error
    return found
