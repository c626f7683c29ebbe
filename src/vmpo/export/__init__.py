"""A run's adapter in the formats that other programs read."""

from __future__ import annotations

from vmpo.export.formats import FORMATS, export

__all__ = ["FORMATS", "export"]
