"""Which rewards can run: packages, weights and tokens, without loading a network."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from vmpo.doctor.findings import Finding
from vmpo.doctor.hub_cache import Need
from vmpo.rewards.aesthetic import HEAD_FILE, Aesthetic
from vmpo.rewards.clip_similarity import CLIPSimilarity
from vmpo.rewards.deqa import DeQA
from vmpo.rewards.hps import CHECKPOINTS, REPOSITORY, HPSv2
from vmpo.rewards.http_reward import HTTPReward
from vmpo.rewards.image_reward import CHECKPOINT, ImageReward
from vmpo.rewards.loading import BUILT_IN
from vmpo.rewards.ocr import OCRAccuracy, OCRLogLikelihood
from vmpo.rewards.scene_text import SceneTextAccuracy

PACKAGES: dict[Any, tuple[str, ...]] = {
    OCRAccuracy: ("rapidocr", "onnxruntime", "rapidfuzz"),
    OCRLogLikelihood: ("rapidocr", "onnxruntime"),
}


def rewards(sources: Mapping[str, tuple[str, dict[str, Any]]] | None = None) -> list[Finding]:
    """Of each built-in reward, or of those of a recipe, as `Reward.sources` gives them."""
    chosen = sources if sources is not None else {name: (name, {}) for name in BUILT_IN}
    return [_reward(label, use, options) for label, (use, options) in chosen.items()]


def _reward(label: str, use: str, options: dict[str, Any]) -> Finding:
    if use not in BUILT_IN:
        return Finding(label, "ok", f"{use}: your own, not looked at")
    cls = BUILT_IN[use]
    given = _defaults(cls) | options
    absent = [package for package in _packages(cls, given) if importlib.util.find_spec(package) is None]
    if absent:
        return Finding(label, "missing", f"needs {', '.join(absent)}", (f"pip install {' '.join(absent)}",))
    if inspect.isclass(cls) and issubclass(cls, HTTPReward):
        return _served(label, given)
    if cls is DeQA and not given["trust_remote_code"]:
        return _deqa(label, Need.network(given["model"]))
    unmet = [need for need in _needs(cls, given) if not need.met]
    if not unmet:
        return Finding(label, "ok", "can run")
    whole = {need.source for need in unmet if not need.pattern}
    commands = [need.command for need in unmet if not need.pattern or need.source not in whole]
    text = "not there: " + ", ".join(dict.fromkeys(need.source for need in unmet))
    return Finding(label, "missing", text, tuple(commands))


def _defaults(cls: Any) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING} if is_dataclass(cls) else {}


def _packages(cls: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    return (given["engine"], "rapidfuzz") if cls is SceneTextAccuracy else PACKAGES.get(cls, ())


def _needs(cls: Any, given: Mapping[str, Any]) -> list[Need]:
    if cls is HPSv2:
        weights = Need.file(given["weights"] or REPOSITORY, CHECKPOINTS[given["version"]])
        return [weights, Need.vocabulary(given["tokenizer"])]
    if cls is ImageReward:
        return [Need.file(given["weights"], CHECKPOINT), Need.vocabulary(given["tokenizer"])]
    if cls is Aesthetic:
        return [Need.file(given["weights"], HEAD_FILE), Need.network(given["clip"])]
    if cls is DeQA:
        return [Need.network(given["model"])]
    if inspect.isclass(cls) and issubclass(cls, CLIPSimilarity):
        return [Need.network(given["weights"]), Need.vocabulary(given["tokenizer"])]
    return []


def _deqa(label: str, need: Need) -> Finding:
    if need.met and need.source != DeQA.model:
        return Finding(label, "ok", "can run")
    return Finding(
        label,
        "missing",
        "the published model needs transformers 4.36.1: a server of its own",
        ("deqa: docs/remote-rewards.md has how to serve it",),
    )


def _served(label: str, given: Mapping[str, Any]) -> Finding:
    if not given.get("endpoints"):
        return Finding(
            label,
            "missing",
            "needs a server and its address",
            (f"{label}: set reward.options.{label}.endpoints (docs/remote-rewards.md)",),
        )
    variable = given.get("key_env")
    if variable and not os.environ.get(variable):
        return Finding(label, "missing", f"{variable} is not set", (f"export {variable}=TOKEN",))
    return Finding(label, "ok", f"at {given['endpoints']}, not asked")
