"""Where each setting of a recipe comes from: the comment behind it in the YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from vmpo.training.config import Section
from vmpo.training.recipes import SECTIONS, load_config, recipe_text

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """A setting as it is resolved.

    Attributes:
        key: with dots, as in an override.
        value: after validation.
        source: the comment behind it, 'default' if no file of the recipe sets it, empty if none is given.
    """

    key: str
    value: Any
    source: str

    @property
    def text(self) -> str:
        """The value as YAML on one line."""
        return yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def recipe_settings(name: str, *, defaults: bool = False) -> list[Setting]:
    """The settings of a recipe through all it extends; the most derived file wins. Its name is left out.

    Args:
        name: a shipped recipe, or a YAML file.
        defaults: whether settings that no file of the recipe names are listed too.

    Raises:
        UserError: as `load_config` does.
    """
    config = load_config(name, [])
    sources: dict[str, str] = {}
    base: str | None = name
    while base is not None:
        found, base = _file_sources(recipe_text(base))
        sources = found | sources
    settings = [Setting(key, value, sources.get(key, DEFAULT)) for key, value in _leaves(config) if key != "name"]
    return [setting for setting in settings if defaults or setting.key in sources]


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    plain = section.model_dump(mode="json")
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, plain[key]


def _file_sources(text: str) -> tuple[dict[str, str], str | None]:
    """{key: comment} of one file, and what it extends."""
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)  # `load_config` has read it
    sources = dict(_comments(root, text))
    base = next((value.value for key, value in root.value if key.value == "extends"), None)
    sources.pop("extends", None)
    return sources, base


def _comments(section: yaml.MappingNode, text: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.value:
        if key.value in SECTIONS and isinstance(value, yaml.MappingNode):
            yield from _comments(value, text, f"{prefix}{key.value}.")
        else:
            # a comment behind the closing brace is that of all within
            node = section if section.flow_style else value
            yield prefix + key.value, _behind(text, node.end_mark.index)


def _behind(text: str, end: int) -> str:
    rest = text[end:].partition("\n")[0].strip()
    return rest.removeprefix("#").strip() if rest.startswith("#") else ""


def markdown_table(settings: list[Setting]) -> str:
    """The settings as a table of Markdown."""
    rows = [(f"`{s.key}`", f"`{s.text}`", s.source) for s in settings]
    lines = ["| setting | value | source |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row).replace("  ", " ") + " |" for row in rows]
    return "\n".join(lines) + "\n"
