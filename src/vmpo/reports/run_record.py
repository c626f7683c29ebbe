"""Reads a run folder as far as it is there: a run still going, or a damaged file, gives notes instead of errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vmpo.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """What a run left on disk; `notes` says in plain words what is missing or unreadable."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    provenance: dict[str, Any]
    samples: list[Path]
    front: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def finite(value: object) -> float | None:
    """The value as a float, or None where it is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def section(mapping: object, *keys: str) -> dict[str, Any]:
    """The mapping found under `keys`, or an empty one where anything on the way is missing or of another kind."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return dict(mapping) if isinstance(mapping, Mapping) else {}


def _mapping(path: Path, missing: str | None, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.extend([missing] if missing else [])
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        notes.append(f"{path.name} cannot be read; what it holds is left out.")
        return {}
    if not isinstance(loaded, dict):
        notes.append(f"{path.name} holds no mapping; what it holds is left out.")
        return {}
    return loaded


def _metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("No metrics.jsonl yet: training has not finished an epoch.")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append("metrics.jsonl cannot be read; the curves are left out.")
        return []
    epochs: dict[float, dict[str, Any]] = {}
    damaged = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            damaged += number < len(lines) - 1  # the last line of a running job may be half written
            continue
        epoch = finite(row.get("epoch")) if isinstance(row, dict) else None
        if epoch is None:
            damaged += 1
        else:
            epochs[epoch] = row  # a resumed run repeats epochs; the later line counts
    if damaged:
        notes.append(f"{damaged} line{'s' if damaged > 1 else ''} of metrics.jsonl cannot be read.")
    if not epochs:
        notes.append("No epoch is recorded in metrics.jsonl yet.")
    return [epochs[epoch] for epoch in sorted(epochs)]


def read_run(folder: Path) -> RunRecord:
    """Reads config, metrics, evaluation, provenance and the list of sample pictures of a run folder.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"run folder '{folder}' does not exist; give the folder of a run (it holds config.yaml)")
    notes: list[str] = []
    config = _mapping(folder / "config.yaml", "No config.yaml: the settings of the run are unknown.", notes)
    metrics = _metrics(folder / "metrics.jsonl", notes)
    evaluation = _mapping(
        folder / "evaluation.json", "Not evaluated yet: run vmpo evaluate for held-out figures and the frontier.", notes
    )
    provenance = _mapping(folder / "provenance.json", "No provenance.json: versions and hardware are unknown.", notes)
    pictures = folder / "samples"
    samples = sorted(pictures.rglob("*.png")) if pictures.is_dir() else []
    front = _mapping(folder / "pareto" / "front.json", None, notes)
    return RunRecord(folder, config, metrics, evaluation, provenance, samples, front, notes)
