"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: 'missing' is what may be wanted and is not there; a 'problem' breaks something.
        text: what was found.
        remedies: commands, or what else to do.
    """

    name: str
    state: State
    text: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Findings of one kind."""

    title: str
    findings: list[Finding]
