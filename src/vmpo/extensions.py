"""Anybody's functions and classes by name: 'module:name', searched in the current directory first."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any

from vmpo.errors import UserError


def import_extension(kind: str, name: str) -> Any:
    """What 'module:name' names; `kind` is what it is to be, for errors, e.g. 'reward'.

    Raises:
        UserError: in one line, for another form, a failed import or a missing name.
    """
    module_name, _, attribute = name.partition(":")
    if "/" in module_name or module_name.endswith(".py") or not module_name or not attribute:
        raise UserError(f"{kind} '{name}' is not of the form 'module:function', e.g. 'my_{kind}s:mine'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # stays there: the module may import its neighbours later
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"{kind} '{name}': there is no module '{error.name}' in {os.getcwd()} or among the installed packages"
            ) from error
        raise UserError(f"{kind} '{name}': '{module_name}' needs the missing package '{error.name}'") from error
    except Exception as error:  # whatever the user's module does at import
        message = " ".join(str(error).split())
        raise UserError(
            f"{kind} '{name}': importing '{module_name}' failed: {type(error).__name__}: {message}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{kind} '{name}': module '{module_name}' has no '{attribute}'{hint}") from None


def construct(kind: str, name: str, cls: type, options: dict[str, Any]) -> Any:
    """An instance of a class.

    Raises:
        UserError: for options that the class does not take.
    """
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(cls).parameters) or "none"
        raise UserError(f"{kind} '{name}': {error}; its options are: {accepted}") from error
    return cls(**options)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the known ones; suggests the nearest."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UserError(
        f"unknown {kind} '{name}'; {hint}Built in are {', '.join(names)}; give your own as 'module:function'"
    )
