"""From pictures in [0, 1] to what a vision network was trained on: resized, cropped, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bicubic", "bilinear"]
_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit pictures of (B, 3, H, W) in [0, 1], rounded to the nearest of 256 levels."""
    pixels = (images.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


@dataclass(frozen=True)
class Preprocessing:
    """Resizes, crops and normalises, (B, 3, H, W) in [0, 1] → (B, 3, size, size).

    Pictures go through 8-bit PIL pictures, as the published networks were trained and scored. Where a gradient is
    wanted (`images.requires_grad`) they stay float tensors, and the antialiased resize of PyTorch stands in for
    PIL's: the same filter without the rounding to 256 levels.

    Attributes:
        size: of the network's input, pixels.
        mean, std: of each channel; (x − mean) / std is what the network sees.
        keep_aspect: the shorter side becomes `size` and the middle is cut out; else both sides are squeezed.
        interpolation: the filter of the resize.
    """

    size: int = 224
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    keep_aspect: bool = True
    interpolation: Interpolation = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        resized = self._tensors(images) if images.requires_grad else self._pictures(to_pil(images)).to(images.device)
        mean, std = (torch.tensor(list(v), device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (resized - mean) / std

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        if not self.keep_aspect:
            return self.size, self.size
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        return round((height - self.size) / 2), round((width - self.size) / 2)

    def _pictures(self, pictures: list[Image.Image]) -> Tensor:
        rows = []
        for picture in pictures:
            height, width = self._shape(picture.height, picture.width)
            resized = picture.resize((width, height), _PIL[self.interpolation])
            top, left = self._corner(height, width)
            cut = resized.crop((left, top, left + self.size, top + self.size))
            rows.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255)
        return torch.stack(rows)

    def _tensors(self, images: Tensor) -> Tensor:
        height, width = self._shape(*images.shape[-2:])
        resized = F.interpolate(
            images.float(), (height, width), mode=self.interpolation, antialias=True, align_corners=False
        ).clamp(0, 1)
        top, left = self._corner(height, width)
        return resized[..., top : top + self.size, left : left + self.size]
