"""Which models are in the cache, whole or in part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from vmpo.doctor.findings import Finding
from vmpo.doctor.hub_cache import cached_file, download_command, has_weights

WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
GIGABYTE = 1e9
PARTS = "--include '*/*' --include model_index.json --exclude '*.bin' --exclude '*fp16*'"  # not the single-file copies


def models(paths: Iterable[str]) -> list[Finding]:
    """Of each model, a hub name or a local folder; embedded ones ship with vmpo."""
    return [_model(path) for path in dict.fromkeys(paths)]


def _model(path: str) -> Finding:
    if resources.files("vmpo").joinpath(f"assets/{path}/model_index.json").is_file():
        return Finding(path, "ok", "ships with vmpo")
    local = Path(path)
    index = local / "model_index.json" if local.is_dir() else cached_file(path, ["model_index.json"])
    command = (download_command(path, PARTS),)
    if index is None or not index.is_file():
        if local.is_dir():
            return Finding(path, "problem", "a folder without model_index.json")
        return Finding(path, "missing", "not there", command)
    absent = [part for part in _networks(index) if not has_weights(index.parent / part)]
    if absent:
        return Finding(path, "missing", f"in part: no weights of {', '.join(absent)}", command)
    return Finding(path, "ok", f"whole, {_size(index.parent) / GIGABYTE:.1f} GB")


def _networks(index: Path) -> list[str]:
    parts = json.loads(index.read_text())
    there = [name for name, kind in parts.items() if isinstance(kind, list) and kind[0] is not None]
    return [name for name in there if not name.startswith(WITHOUT_WEIGHTS)]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
