"""Log-potentials Δφ of the denoising steps: how the reward of the clean sample is spread over a trajectory."""

from __future__ import annotations

from vmpo.potentials.difference import difference, initial_log_potential
from vmpo.potentials.return_to_go import return_to_go
from vmpo.potentials.terminal import terminal

__all__ = ["difference", "initial_log_potential", "return_to_go", "terminal"]
