"""LPIPS 0.1: the distance of two pictures in the layers of a classifier, with weights fitted to human judgements.

References:
    Zhang, Isola, Efros, Shechtman and Wang (2018), arXiv:1801.03924, Eq. 1; version 0.1 of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.features.extractor import Distance
from vmpo.features.published_file import PublishedFile
from vmpo.features.strict_loading import load_strictly
from vmpo.features.weights import read_state_dict

# ImageNet's mean and deviation, as published for inputs in [-1, 1]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
_HOME = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"


@dataclass(frozen=True)
class _Net:
    layers: list[nn.Module]
    taps: tuple[int, ...]  # the layers that are compared, each behind a ReLU
    smallest: int  # side of a picture, pixels
    backbone: PublishedFile
    heads: PublishedFile


def _conv(channels_in: int, channels: int, size: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, size, stride, padding), nn.ReLU()]


def _alex() -> _Net:
    layers = [
        *_conv(3, 64, 11, 4, 2),
        nn.MaxPool2d(3, 2),
        *_conv(64, 192, 5, 1, 2),
        nn.MaxPool2d(3, 2),
        *_conv(192, 384, 3),
        *_conv(384, 256, 3),
        *_conv(256, 256, 3),
    ]
    return _Net(
        layers,
        taps=(1, 4, 7, 9, 11),
        smallest=31,
        backbone=PublishedFile(
            "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
        ),
        heads=PublishedFile(
            "lpips_v0.1_alex.pth",
            f"{_HOME}/alex.pth",
            "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        ),
    )


def _vgg() -> _Net:
    layers: list[nn.Module] = []
    before = 3
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += _conv(before, channels, 3)
            before = channels
    return _Net(
        layers,
        taps=(3, 8, 15, 22, 29),
        smallest=16,
        backbone=PublishedFile(
            "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"
        ),
        heads=PublishedFile(
            "lpips_v0.1_vgg.pth",
            f"{_HOME}/vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        ),
    )


_NETS = {"alex": _alex, "vgg": _vgg}


class LPIPS(nn.Module):
    """Features φ whose squared Euclidean distance is LPIPS.

        d(x, y) = Σ_l 1/(H_l W_l) Σ_hw Σ_c w_lc (f̂_lhwc(x) − f̂_lhwc(y))² = |φ(x) − φ(y)|²,
        φ_lhwc = √(w_lc / (H_l W_l)) f̂_lhwc,

    with f̂ the activations of layer l divided by their length over channels. Pictures are taken as they are, without
    a resize, as published; so a distance depends on the size of the pictures. F grows with it: at 512 × 512 pixels
    2.7 million numbers a picture for AlexNet and 32 million for VGG-16. Differentiable.

    Arguments:
        net: 'alex' (what the authors recommend for comparisons) or 'vgg'.
        backbone: file of the classifier in torchvision's format; fetched from there where None.
        heads: file of the weights w; fetched from the authors' repository where None.
        batch: pictures at once.

    Raises:
        UserError: for another net, missing weights, or pictures smaller than 31 (alex) or 16 (vgg) pixels.

    References:
        Zhang et al. (2018), arXiv:1801.03924, Eq. 1. Licences: BSD-2-Clause (w), BSD-3-Clause (torchvision).
    """

    distance: Distance = "squared_euclidean"

    def __init__(
        self,
        net: Literal["alex", "vgg"] = "alex",
        backbone: str | Path | None = None,
        heads: str | Path | None = None,
        batch: int = 8,
    ) -> None:
        super().__init__()
        if net not in _NETS:
            raise UserError(f"net of LPIPS is '{net}'; it must be one of {', '.join(_NETS)}")
        made = _NETS[net]()
        self.name = "lpips" if net == "alex" else f"lpips_{net}"
        self.taps, self.smallest, self.batch = made.taps, made.smallest, batch
        self.layers = nn.Sequential(*made.layers)
        file = Path(backbone) if backbone else made.backbone.fetch("LPIPS", ", or give a file as 'backbone'")
        self._load_backbone(file)
        self._load_heads(Path(heads) if heads else made.heads.fetch("LPIPS", ", or give a file as 'heads'"))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def _load_backbone(self, file: Path) -> None:
        prefix = "features."  # the classifier's last layers are not compared
        weights = {n.removeprefix(prefix): w for n, w in read_state_dict(file).items() if n.startswith(prefix)}
        load_strictly(self.layers, weights, str(file))

    def _load_heads(self, file: Path) -> None:
        found = read_state_dict(file)
        for k, tap in enumerate(self.taps):
            channels = next(m.out_channels for m in reversed(self.layers[: tap + 1]) if isinstance(m, nn.Conv2d))
            head = found.get(f"lin{k}.model.1.weight", torch.empty(0))
            if head.shape != (1, channels, 1, 1) or (head < 0).any():
                raise UserError(f"'{file}' does not hold {channels} weights >= 0 as 'lin{k}.model.1.weight'")
            self.register_buffer(f"root_{k}", head.float().sqrt())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, F)."""
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest:
            raise UserError(
                f"LPIPS was given pictures of {height} x {width} pixels; this network needs {self.smallest} a side"
            )
        self.to(images.device)
        return torch.cat([self._features(part.float()) for part in images.split(self.batch)])

    def _features(self, images: Tensor) -> Tensor:
        x = (2 * images - 1 - self.shift) / self.scale
        parts: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                # the clamp keeps the gradient finite where all channels are silent
                length = x.square().sum(dim=1, keepdim=True).clamp_min(1e-30).sqrt()
                root = self.get_buffer(f"root_{len(parts)}") / (x.shape[-2] * x.shape[-1]) ** 0.5
                parts.append((root * x / (length + EPSILON)).flatten(1))
        return torch.cat(parts, dim=1)
