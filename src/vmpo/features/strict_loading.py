"""Weights into a module, every tensor of it and no other."""

from __future__ import annotations

from torch import Tensor, nn

from vmpo.errors import UserError


def load_strictly(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads the weights of `source` and freezes the module, in evaluation mode.

    Raises:
        UserError: in one line, for a missing, unknown or misshapen tensor.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"'{source}' does not hold the weights of a {type(module).__name__}: {reason}") from error
    module.requires_grad_(False).eval()
