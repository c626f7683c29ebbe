"""Rewards by name: the built-in ones, and anybody's function or class as 'module:name'."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from vmpo.errors import UserError
from vmpo.extensions import construct, import_extension, unknown_name
from vmpo.rewards.aesthetic import Aesthetic
from vmpo.rewards.clip_score import CLIPScore
from vmpo.rewards.deqa import DeQA
from vmpo.rewards.hps import HPSv2
from vmpo.rewards.image_reward import ImageReward
from vmpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from vmpo.rewards.judge import VLMJudge
from vmpo.rewards.ocr import OCRAccuracy, OCRLogLikelihood
from vmpo.rewards.pick_score import PickScore
from vmpo.rewards.remote import RemoteReward
from vmpo.rewards.scene_text import SceneTextAccuracy
from vmpo.rewards.scoring import Reward
from vmpo.rewards.unified_reward import UnifiedReward

BUILT_IN: dict[str, Callable[..., Reward]] = {
    "ocr": OCRAccuracy,
    "ocr_log_likelihood": OCRLogLikelihood,
    "ocr_scene": SceneTextAccuracy,
    "jpeg_compressibility": JPEGCompressibility,
    "jpeg_incompressibility": JPEGIncompressibility,
    "hpsv2": HPSv2,
    "pick_score": PickScore,
    "clip_score": CLIPScore,
    "aesthetic": Aesthetic,
    "image_reward": ImageReward,
    "deqa": DeQA,
    "remote": RemoteReward,
    "vlm_judge": VLMJudge,
    "unified_reward": UnifiedReward,
}


def load_reward(name: str, kwargs: Mapping[str, Any] | None = None) -> Reward:
    """The reward of a name: a built-in one, or 'module:function', 'module:Class' or 'module:instance'.

    The current directory is searched first. `kwargs` go to the constructor of a class, or are fixed arguments of
    a function. The result always has `range` ('unknown' if not given) and `differentiable` (False if not given).

    Raises:
        UserError: in one line, for an unknown name, a failed import, something that is not callable as
            (images, prompts, metadata), or an option that does not exist.
    """
    options = dict(kwargs or {})
    found = import_extension("reward", name) if ":" in name else _built_in(name)
    if inspect.isclass(found):
        found, options = construct("reward", name, found, options), {}
    _check_callable(name, found, options)
    return _with_facts(functools.partial(found, **options) if options else found)


def _built_in(name: str) -> Any:
    if name not in BUILT_IN:
        raise unknown_name("reward", name, BUILT_IN)
    return BUILT_IN[name]


def _check_callable(name: str, reward: Any, options: dict[str, Any]) -> None:
    if not callable(reward):
        raise UserError(f"reward '{name}' is a {type(reward).__name__}; it must be a function or a class")
    try:
        inspect.signature(reward).bind(None, None, None, **options)
    except TypeError as error:
        called = ", ".join(["images", "prompts", "metadata", *(f"{option}=..." for option in options)])
        raise UserError(f"reward '{name}' cannot be called as ({called}): {error}") from error
    except ValueError:  # no signature to see, e.g. of a compiled function
        pass


def _with_facts(reward: Any) -> Reward:
    facts = {"range": "unknown", "differentiable": False}
    if all(hasattr(reward, fact) for fact in facts):
        return cast(Reward, reward)
    source = reward.func if isinstance(reward, functools.partial) else reward
    wrapped = functools.partial(reward)  # takes attributes; the user's own object is left as it is
    for fact, default in facts.items():
        setattr(wrapped, fact, getattr(source, fact, default))
    if hasattr(source, "check_prompts"):
        wrapped.check_prompts = source.check_prompts  # type: ignore[attr-defined]
    return cast(Reward, wrapped)
