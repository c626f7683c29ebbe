"""Prompt sets: embedded words, files of one's own, and the published sets of the field, by name."""

from __future__ import annotations

from vmpo.prompts.loading import load_prompts
from vmpo.prompts.prompt_set import PromptSet

__all__ = ["PromptSet", "load_prompts"]
