"""The adapters in a run folder, and the temperature each was trained at."""

from __future__ import annotations

import json
from pathlib import Path

from vmpo.errors import UserError
from vmpo.policies.adapters import FILE


def adapter_folder(run: Path, name: str | None) -> Path:
    """Where an adapter of a run lies: 'adapter' (None too), 'best' of its Pareto front, or any folder in the run.

    Raises:
        UserError: if there is none of that name, with those there are.
    """
    folder = run / (name or "adapter")
    if name == "best":
        front = run / "pareto" / "front.json"
        best = json.loads(front.read_text())["best"] if front.is_file() else None
        folder = run / "pareto" / (best or "best")
    if name is not None and not (folder / FILE).is_file():
        found = sorted(str(p.parent.relative_to(run)) for p in run.rglob(FILE))
        raise UserError(f"run '{run}' has no adapter '{name}'; it has {', '.join(found) or 'none yet'}")
    return folder


def adapter_beta(folder: Path, otherwise: float) -> float:
    """The beta an adapter was trained at, as its point.json says; `otherwise` where there is no such file."""
    file = folder / "point.json"
    return float(json.loads(file.read_text())["beta"]) if file.is_file() else otherwise
