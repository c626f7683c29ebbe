"""Rewards for how well a picture compresses: the size of its JPEG file.

References:
    DDPO (Black et al., 2023, arXiv:2305.13301), section 5.1: quality 95, size in kilobytes of 1000 bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import to_pil

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size (B,) in kB (1000 bytes) of the JPEG files of pictures (B, 3, H, W) in [0, 1]; NaN for a non-finite one."""
    sizes = []
    for picture in images.detach().float().cpu():
        if not picture.isfinite().all():
            sizes.append(math.nan)
            continue
        buffer = io.BytesIO()
        to_pil(picture[None])[0].save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, device=images.device)


@dataclass(frozen=True)
class _JPEG:
    scale: float = 1.0
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"scale of the JPEG reward is {self.scale}; it divides the kilobytes and must be above 0")


@dataclass(frozen=True)
class JPEGIncompressibility(_JPEG):
    """Size of the JPEG file, r = kB / scale; `scale` is 1 by default.

    Raises:
        UserError: if the scale is not positive.

    References:
        DDPO (Black et al., 2023, arXiv:2305.13301), section 5.1.
    """

    range: ClassVar[str] = "> 0, kB / scale"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return jpeg_kilobytes(images) / self.scale


@dataclass(frozen=True)
class JPEGCompressibility(_JPEG):
    """Minus the size of the JPEG file, r = -kB / scale; `scale` is 1 by default, Flow-GRPO's code has 500.

    Raises:
        UserError: if the scale is not positive.

    References:
        DDPO (Black et al., 2023, arXiv:2305.13301), section 5.1.
    """

    range: ClassVar[str] = "< 0, -kB / scale"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return -jpeg_kilobytes(images) / self.scale
