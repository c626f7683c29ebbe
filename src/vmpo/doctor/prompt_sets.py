"""Which prompt sets are in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmpo.doctor.findings import Finding
from vmpo.prompts.embedded import EMBEDDED
from vmpo.prompts.published import PUBLISHED


def prompt_sets(names: Iterable[str] | None = None) -> list[Finding]:
    """All published sets in two lines, or each of those that a recipe names, unions 'a+b' taken apart."""
    if names is not None:
        parts = [part.strip() for name in names for part in ([name] if Path(name).is_file() else name.split("+"))]
        return [_prompt_set(part) for part in dict.fromkeys(parts)]
    there = [name for name, published in PUBLISHED.items() if published.file.is_file()]
    absent = [name for name in PUBLISHED if name not in there]
    found = [Finding("embedded", "ok", ", ".join(EMBEDDED))]
    if there:
        found.append(Finding("cached", "ok", ", ".join(there)))
    if absent:
        found.append(Finding("not cached", "missing", ", ".join(absent), ("vmpo prompts --all",)))
    return found


def _prompt_set(name: str) -> Finding:
    if name in EMBEDDED:
        return Finding(name, "ok", "ships with vmpo")
    if name in PUBLISHED:
        if PUBLISHED[name].file.is_file():
            return Finding(name, "ok", "in the cache")
        return Finding(name, "missing", "not in the cache", (f"vmpo prompts {name}",))
    if Path(name).is_file():
        return Finding(name, "ok", "a file")
    return Finding(name, "problem", "no such file or set", ("vmpo prompts   # lists the sets",))
