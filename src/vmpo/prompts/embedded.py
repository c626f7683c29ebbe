"""The prompts of the embedded task."""

from __future__ import annotations

import random

from vmpo.pretraining.words import caption, word_list
from vmpo.prompts.prompt_set import PromptSet

EMBEDDED = ("glyphs/train", "glyphs/test")


def embedded_prompts(split: str) -> PromptSet:
    """Sentences with one embedded word each in double quotes; the sentence's frame is drawn once, by word."""
    rng = random.Random(0)
    words = list(word_list(split))
    rng.shuffle(words)
    return PromptSet([caption(word, rng) for word in words], [{"word": word} for word in words])
