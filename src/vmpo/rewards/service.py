"""One reward as a service: requests of the protocol of `vmpo.rewards.remote` in, scores out; HTTP is elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vmpo.errors import UserError
from vmpo.rewards.png import decode_png
from vmpo.rewards.scoring import Reward, check_prompts, score_images


class RefusedError(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class RewardService:
    """A reward with its name and options, scored in batches by one thread at a time."""

    name: str
    reward: Reward
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    scored: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def health(self) -> dict[str, Any]:
        """Which reward and version runs, and how many pictures it has scored or failed to score."""
        return {
            "status": "ok",
            "reward": self.name,
            "options": self.options,
            "version": f"vmpo {_version()}",
            "range": self.reward.range,
            "scored": self.scored,
            "failed": self.failed,
        }

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Whether the prompts can be scored.

        Raises:
            RefusedError: otherwise.
        """
        with _user_errors_refused():
            check_prompts({self.name: self.reward}, _texts(request))
        return {}

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """The scores of a request's pictures, None where one failed.

        Raises:
            RefusedError: for a request that is not of the protocol.
        """
        prompts, encoded = _texts(request), request.get("images")
        metadata = request.get("metadata", [{}] * len(prompts))
        if not isinstance(encoded, list) or len(encoded) != len(prompts):
            raise RefusedError(400, f"'images' must be a list of {len(prompts)} pictures, one a prompt")
        if not isinstance(metadata, list) or len(metadata) != len(prompts) or not all(map(_is_object, metadata)):
            raise RefusedError(400, f"'metadata' must be a list of {len(prompts)} objects, one a prompt")
        scores: list[float | None] = []
        for first in range(0, len(prompts), self.batch):
            part = slice(first, first + self.batch)
            images = _pictures(encoded[part])
            with self._lock, torch.no_grad(), _user_errors_refused():
                found = score_images({self.name: self.reward}, images, prompts[part], metadata[part])[self.name]
                finite = found.isfinite().tolist()
                self.scored, self.failed = self.scored + sum(finite), self.failed + len(finite) - sum(finite)
            scores += [score if good else None for score, good in zip(found.tolist(), finite, strict=True)]
        return {"scores": scores}


@contextmanager
def _user_errors_refused() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise RefusedError(422, str(error)) from error


def _version() -> str:
    try:
        return version("vmpo")
    except PackageNotFoundError:  # run from a source tree
        return "from source"


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _texts(request: dict[str, Any]) -> list[str]:
    prompts = request.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise RefusedError(400, "'prompts' must be a list of texts")
    return prompts


def _pictures(encoded: list[Any]) -> torch.Tensor:
    pictures = []
    for index, text in enumerate(encoded):
        try:
            pictures.append(decode_png(text))
        except (ValueError, TypeError) as error:
            raise RefusedError(400, f"picture {index} is no base64 of a PNG file: {error}") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise RefusedError(400, "the pictures of a request must have one size")
    return torch.stack(pictures)
