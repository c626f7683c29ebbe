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


def to_bytes(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as uint8, rounded to the nearest of 256 levels."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit pictures of (B, 3, H, W) in [0, 1], rounded to the nearest of 256 levels."""
    return [Image.fromarray(picture) for picture in to_bytes(images).cpu().permute(0, 2, 3, 1).numpy()]


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
        pad: the longer side becomes `size` instead, and black fills the rest.
        interpolation: the filter of the resize.
        floor: the middle of an odd margin is rounded down, as in transformers; else to the even, as in torchvision.
        resize_floats: 8-bit pictures are resized as float tensors too, without clamping the filter's overshoot.
    """

    size: int = 224
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    keep_aspect: bool = True
    interpolation: Interpolation = "bicubic"
    pad: bool = False
    floor: bool = False
    resize_floats: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            resized = self._tensors(images if images.dtype == torch.float64 else images.float())
        elif self.resize_floats:
            resized = self._tensors(to_bytes(images).float() / 255)
        else:
            resized = self._pictures(to_pil(images)).to(images.device)
        mean, std = (torch.tensor(list(v), device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (resized - mean) / std

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        if self.pad:
            scale = self.size / max(height, width)
            return round(height * scale), round(width * scale)
        if not self.keep_aspect:
            return self.size, self.size
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        margins = height - self.size, width - self.size
        top, left = (margin // 2 if self.floor else round(margin / 2) for margin in margins)
        return top, left

    def _pictures(self, pictures: list[Image.Image]) -> Tensor:
        rows = []
        for picture in pictures:
            height, width = self._shape(picture.height, picture.width)
            resized = picture.resize((width, height), _PIL[self.interpolation])
            rows.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255)
        return self._frame(torch.stack(rows))

    def _tensors(self, images: Tensor) -> Tensor:
        height, width = self._shape(*images.shape[-2:])
        if self.resize_floats:
            return self._frame(self._resize(images, height, width))
        wide = self._resize(images, images.shape[-2], width).clamp(0, 1)  # PIL too clamps between its two passes
        return self._frame(self._resize(wide, height, width).clamp(0, 1))

    def _resize(self, images: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(images, (height, width), mode=self.interpolation, antialias=True, align_corners=False)

    def _frame(self, resized: Tensor) -> Tensor:
        height, width = resized.shape[-2:]
        if self.pad:
            bottom, right = self.size - height, self.size - width
            return F.pad(resized, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        top, left = self._corner(height, width)
        return resized[..., top : top + self.size, left : left + self.size]
