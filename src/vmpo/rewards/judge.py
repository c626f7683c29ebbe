"""A vision-language model as a judge, behind any OpenAI-compatible chat-completions endpoint (vLLM, SGLang, ...)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import to_pil
from vmpo.rewards.http_request import RequestError
from vmpo.rewards.http_reward import HTTPReward, Job
from vmpo.rewards.png import encode_png
from vmpo.rewards.rating import by_json, by_pattern, expected_rating
from vmpo.rewards.remote import finite_rows, reachable

TEMPLATE = """\
This picture was made for the caption: {prompt}
Judge how well it shows what the caption says and how well it is made, by a whole number from 1 (bad) to 5 (excellent).
Answer with nothing but a line of the form
Score: NUMBER"""
TOP = 20  # log-probabilities a token; what OpenAI-compatible servers allow at most


@dataclass(frozen=True, kw_only=True)
class VLMJudge(HTTPReward):
    """The rating that a vision-language model gives a picture of its prompt, r = rating / scale.

    Decoded greedily (temperature 0). A reply without a rating, or one outside [low, high], is NaN, not 0. Options
    besides those of `HTTPReward`, whose endpoints are base addresses such as http://127.0.0.1:8000/v1:

    Attributes:
        model: its name at the server.
        template: the question; {prompt} and {key} of the metadata are filled in. template_file: a file that holds it.
        pattern: regular expression whose first group is the rating; json_key: key of a JSON object that holds it.
        ratings: {word: value}; the rating is then E[value] over the likeliest tokens where the pattern finds it.
        low, high: what a rating may be. scale: what it is divided by.
        size: pictures are resized to size × size pixels; None: as they are.
        max_tokens: longest reply.

    Raises:
        UserError: for options that cannot be, and, before a run, if no server answers.
    """

    model: str
    template: str = TEMPLATE
    template_file: str | None = None
    pattern: str | None = r"Score:\s*(-?\d+(?:\.\d+)?)"
    json_key: str | None = None
    ratings: Mapping[str, float] | None = None
    low: float = 1.0
    high: float = 5.0
    scale: float = 1.0
    size: int | None = None
    max_tokens: int = 512

    @property
    def range(self) -> str:
        return f"[{self.low / self.scale:g}, {self.high / self.scale:g}]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"scale={self.scale} of a judge; it divides the rating and must be above 0")
        if not self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high} of a judge; low must be below high")
        if self.ratings is not None and self.json_key is not None:
            raise UserError("a judge's 'ratings' need a pattern that finds the rating, not json_key; leave one out")
        if self.ratings is not None and not self.ratings:
            raise UserError("a judge's 'ratings' are empty; give words and their values, e.g. {good: 1, bad: 0}")
        if self.pattern is None and self.json_key is None:
            raise UserError("a judge needs 'pattern' or 'json_key' to find the rating in its reply")
        _ = self._compiled, self._question  # their mistakes too are found now

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        try:
            compiled = re.compile(self.pattern or "()")
        except re.error as error:
            raise UserError(f"a judge's pattern '{self.pattern}' is no regular expression: {error}") from error
        if compiled.groups < 1:
            raise UserError(f"a judge's pattern '{self.pattern}' needs a group (...) around the rating")
        return compiled

    @cached_property
    def _question(self) -> str:
        if self.template_file is None:
            return self.template
        try:
            return Path(self.template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"a judge's template_file '{self.template_file}' cannot be read: {error}") from error

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError if no server answers, or one does not let us in."""
        reachable(self.probe("/models"))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        rows = finite_rows(images).tolist()
        jobs = [Job(1, partial(self._body, images[r], prompts[r], metadata[r]), self._read) for r in rows]
        scores = torch.full((len(images),), torch.nan)
        for row, found in zip(rows, self.ask("/chat/completions", jobs), strict=True):
            scores[row] = found[0]
        return scores.to(images.device)

    def _body(self, image: Tensor, prompt: str, metadata: dict[str, Any]) -> dict[str, Any]:
        picture = to_pil(image[None])[0]
        if self.size is not None:
            picture = picture.resize((self.size, self.size))
        fields = metadata | {"prompt": prompt}
        # not str.format: a template may show JSON
        text = re.sub(r"\{(\w+)\}", lambda match: str(fields.get(match[1], match[0])), self._question)
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(picture)}"}},
            {"type": "text", "text": text},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return body | ({"logprobs": True, "top_logprobs": TOP} if self.ratings is not None else {})

    def _read(self, reply: Any) -> list[float]:
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            rating = self._rating(text, choice)
        except (KeyError, IndexError, TypeError) as error:
            raise RequestError(f"the reply is no chat completion with what was asked for: {error!r}") from error
        except ValueError as error:  # another try would bring the same: it is decoded greedily
            raise RequestError(f"{error} in the judge's reply: {' '.join(text.split())[:100]}", retry=False) from error
        if not self.low <= rating <= self.high:
            raise RequestError(f"a rating is outside [{self.low:g}, {self.high:g}]", retry=False)
        return [rating / self.scale]

    def _rating(self, text: str, choice: dict[str, Any]) -> float:
        if self.json_key is not None:
            return by_json(text, self.json_key)
        if self.ratings is None:
            return by_pattern(text, self._compiled)[0]
        match = self._compiled.search(text)
        if match is None:
            raise ValueError(f"nothing matches {self.pattern}")
        return expected_rating(choice["logprobs"]["content"], match.start(1), self.ratings)
