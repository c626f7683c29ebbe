"""What is installed, what is in the caches, what can run here, and what to do about the rest."""

from __future__ import annotations

from vmpo.doctor.examine import examine
from vmpo.doctor.findings import Finding, Section

__all__ = ["Finding", "Section", "examine"]
