"""Prompts with what rewards may want to know of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what rewards may want to know of each."""

    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: list[int]) -> PromptSet:
        """The prompts at `rows`."""
        return PromptSet([self.prompts[r] for r in rows], [self.metadata[r] for r in rows])

    @classmethod
    def distinct(cls, records: Iterable[tuple[str, dict[str, Any]]]) -> PromptSet:
        """Keeps the first of repeated prompts, so that a prompt is never two groups in one epoch."""
        found: dict[str, dict[str, Any]] = {}
        for prompt, metadata in records:
            found.setdefault(prompt, metadata)
        return cls(list(found), list(found.values()))
