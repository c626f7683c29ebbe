"""What of a run's settings may be published: not the paths, addresses and secrets of a machine."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

from vmpo.training.config import Config

SECRET = re.compile(r"(token|secret|password|api_?key)$", re.IGNORECASE)


def is_hub_name(path: str) -> bool:
    """Whether a model's path is 'owner/name' on the hub and no local folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".") and not Path(path).exists()


def public_settings(config: Config) -> dict[str, Any]:
    """The configuration with local paths cut to their last name, addresses and secrets left out."""
    return {key: _public(key, value) for key, value in config.model_dump(mode="json").items()}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _public(str(k), v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public(key, v) for v in value]
    if not isinstance(value, str):
        return value
    return "(left out)" if SECRET.search(key) else public_text(value)


def public_text(value: str) -> str:
    """A setting, or a union 'a+b' of prompt sets, without the address or the folders in it."""
    if re.search(r"\w+://", value):
        return "(an address, left out)"
    return "+".join(_last_name(part) for part in value.split("+"))


def _last_name(value: str) -> str:
    if value.startswith(("/", "~", "..")) or PureWindowsPath(value).drive:
        return PureWindowsPath(value).name  # takes / and \ alike
    return value
