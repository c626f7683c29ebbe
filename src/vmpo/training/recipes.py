"""Recipes: settings in YAML, shipped or of one's own, with `key.path=value` overrides."""

from __future__ import annotations

from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vmpo.errors import UserError
from vmpo.training.config import Config, Section, nearest, validate_config

RECIPES = resources.files("vmpo").joinpath("recipes")
SECTIONS = {"lora", *(name for name, field in Config.model_fields.items() if isinstance(field.default, Section))}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A shipped recipe by name, or a YAML file by path; one that `extends` another changes only what it names.

    Raises:
        UserError: if there is no such recipe or file, it is no YAML mapping, or it extends itself.
    """
    chain = [_read_file(name)]
    seen = [name]
    while (base := chain[-1].pop("extends", None)) is not None:
        if base in seen:
            raise UserError(f"recipe '{name}' extends itself: {' → '.join([*seen, str(base)])}")
        seen.append(str(base))
        chain.append(_read_file(str(base)))
    values = chain.pop()
    while chain:
        values = _merged(values, chain.pop())
    return values


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    # sections are merged; a mapping that is a value, such as the rewards' weights, is replaced
    merged = dict(base)
    for key, value in changes.items():
        inside = key in SECTIONS and isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if inside else value
    return merged


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, or of a file by path, as it is written.

    Raises:
        UserError: if there is none.
    """
    if name in recipe_names():
        return RECIPES.joinpath(f"{name}.yaml").read_text()
    if name.endswith((".yaml", ".yml")):
        try:
            return Path(name).read_text()
        except OSError as error:
            raise UserError(f"recipe file '{name}' cannot be read: {error.strerror}") from error
    raise UserError(f"no recipe '{name}'{nearest(name, recipe_names())} 'vmpo recipes' lists them")


def _read_file(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{name}' is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe '{name}' holds no settings; it must be a mapping of sections")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets `key.path=value` in nested settings; the value is read as YAML.

    Raises:
        UserError: if there is no '=' or the path leads through a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override '{override}' is not of the form key.path=value")
    *parents, last = path.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is no valid YAML") from error
    if isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        with suppress(ValueError):
            value = float(value)
    node[last] = value


def load_config(recipe: str, overrides: list[str]) -> Config:
    """Reads a recipe, applies overrides and validates the whole.

    Raises:
        UserError: naming the key, the value and what would be right.
    """
    values = read_recipe(recipe)
    for override in overrides:
        apply_override(values, override)
    return validate_config(values, where=f"recipe '{recipe}'")
