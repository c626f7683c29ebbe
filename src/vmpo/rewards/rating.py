"""A number out of what a judge writes: by pattern, from JSON, or as an expectation over its rating tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MIN_MASS = 0.5  # below it the judge would sooner have written something that is no rating


def by_pattern(text: str, pattern: re.Pattern[str]) -> tuple[float, int]:
    """The number of a pattern's first group at its first match, and where in the text it stands.

    Raises:
        ValueError: if nothing matches, or the group is no number.
    """
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"nothing matches {pattern.pattern}")
    return float(match[1]), match.start(1)


def by_json(text: str, key: str) -> float:
    """The number under `key` of the last JSON object with that key in a text.

    Raises:
        ValueError: if there is none, or it is no number.
    """
    decoder, found = json.JSONDecoder(), []
    for start in (i for i, char in enumerate(text) if char == "{"):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if key in value:
            found.append(value[key])
    if not found:
        raise ValueError(f"no JSON object with '{key}'")
    if isinstance(found[-1], bool):
        raise ValueError(f"'{key}' is no number")
    try:
        return float(found[-1])
    except TypeError as error:
        raise ValueError(f"'{key}' is no number") from error


def expected_rating(tokens: list[Mapping[str, Any]], position: int, ratings: Mapping[str, float]) -> float:
    """E[rating] = Σ_k v_k p_k / Σ_k p_k over the rating words among the likeliest tokens at one place of a reply.

    Spaces around a token and its case do not count: " Good" and "good" are one rating, their probabilities add.

    Args:
        tokens: the reply's tokens as an OpenAI-compatible server gives them: 'token' and 'top_logprobs', a list of
            'token' and 'logprob' (nats).
        position: the place of the rating in the text, in characters.
        ratings: the value v_k of each rating word.

    Raises:
        ValueError: if no token stands there, or the ratings have less than half of the probability.

    Source: Liu et al. 2023 (G-Eval, arXiv 2303.16634), section 2; Wu et al. 2023 (Q-Align, arXiv 2312.17090), Eq. 5.
    """
    end = 0
    for token in tokens:
        end += len(token["token"])
        if end > position:
            break
    else:
        raise ValueError("the reply has no token where its rating stands")
    values = {word.strip().lower(): value for word, value in ratings.items()}
    mass = weighted = 0.0
    for candidate in token["top_logprobs"]:
        value = values.get(candidate["token"].strip().lower())
        if value is not None:
            probability = math.exp(candidate["logprob"])
            mass += probability
            weighted += value * probability
    if not mass >= MIN_MASS:
        raise ValueError(f"only {mass:.0%} of the probability is on the ratings {', '.join(ratings)}")
    return weighted / mass
