"""Rewards by name: the built-in ones, and anybody's function or class as 'module:name'."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from vmpo.errors import UserError
from vmpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from vmpo.rewards.ocr import OCRAccuracy, OCRLogLikelihood
from vmpo.rewards.scoring import Reward

BUILT_IN: dict[str, Callable[..., Reward]] = {
    "ocr": OCRAccuracy,
    "ocr_log_likelihood": OCRLogLikelihood,
    "jpeg_compressibility": JPEGCompressibility,
    "jpeg_incompressibility": JPEGIncompressibility,
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
    found = _import(name) if ":" in name else _built_in(name)
    if inspect.isclass(found):
        found, options = _construct(name, found, options), {}
    _check_callable(name, found, options)
    return _with_facts(functools.partial(found, **options) if options else found)


def _built_in(name: str) -> Any:
    if name in BUILT_IN:
        return BUILT_IN[name]
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(
        f"unknown reward '{name}'; {hint}Built in are {', '.join(BUILT_IN)}; give your own as 'module:function'"
    )


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if "/" in module_name or module_name.endswith(".py") or not module_name or not attribute:
        raise UserError(f"reward '{name}' is not of the form 'module:function', e.g. 'my_rewards:brightness'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # stays there: the module may import its neighbours later
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"reward '{name}': there is no module '{error.name}' in {os.getcwd()} or among the installed packages"
            ) from error
        raise UserError(f"reward '{name}': '{module_name}' needs the missing package '{error.name}'") from error
    except Exception as error:  # whatever the user's module does at import
        message = " ".join(str(error).split())
        raise UserError(
            f"reward '{name}': importing '{module_name}' failed: {type(error).__name__}: {message}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"reward '{name}': module '{module_name}' has no '{attribute}'{hint}") from None


def _construct(name: str, cls: type, options: dict[str, Any]) -> Any:
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(cls).parameters) or "none"
        raise UserError(f"reward '{name}': {error}; its options are: {accepted}") from error
    return cls(**options)


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
