"""DreamSim: a perceptual distance of pictures fitted to human judgements of similarity.

References:
    Fu, Tamir, Sundaram, Chai, Zhang, Dekel and Isola (2023), arXiv:2306.09344; variants of 2024: arXiv:2410.10817.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmpo.errors import UserError
from vmpo.features.clip import mark_broken
from vmpo.features.dreamsim_checkpoint import IMAGE_SIZE, VARIANTS, load_branches
from vmpo.features.extractor import Distance
from vmpo.features.preprocessing import Preprocessing


class DreamSim(nn.Module):
    """Embeddings e of unit length; DreamSim is d(x, y) = 1 − e(x)·e(y), in [0, 2].

    The outputs of the branches, one after the other, less their mean over the numbers of the embedding, divided by
    their length. The 'ensemble' has DINO, CLIP and OpenCLIP, all ViT-B/16 with LoRA (F = 768 + 512 + 512). Pictures
    are squeezed to 224 × 224, whatever their aspect. Differentiable (see `Preprocessing`).

    Arguments:
        variant: 'ensemble', 'dino_vitb16', 'clip_vitb32', 'open_clip_vitb32' or 'dinov2_vitb14'.
        weights: folder of the unpacked release; fetched from the authors' repository where None.
        batch: pictures at once.

    Raises:
        UserError: for another variant, or missing or wrong weights.

    References:
        Fu et al. (2023), arXiv:2306.09344. Licences: MIT (DreamSim, CLIP, OpenCLIP), Apache-2.0 (DINO, DINOv2).
    """

    distance: Distance = "cosine"

    def __init__(self, variant: str = "ensemble", weights: str | Path | None = None, batch: int = 32) -> None:
        super().__init__()
        if variant not in VARIANTS:
            near = difflib.get_close_matches(variant, VARIANTS, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"DreamSim has no variant '{variant}'; {hint}There are {', '.join(VARIANTS)}")
        self.name = "dreamsim" if variant == "ensemble" else f"dreamsim_{variant}"
        self.batch = batch
        self.resize = Preprocessing(IMAGE_SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, keep_aspect=False)
        self.branches = nn.ModuleList(load_branches(variant, Path(weights) if weights else None))
        for index, backbone in enumerate(VARIANTS[variant].branches):
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbone.normalisation)
            self.register_buffer(f"mean_{index}", mean)
            self.register_buffer(f"std_{index}", std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, F)."""
        self.to(images.device)
        return torch.cat([self._embed(part) for part in images.split(self.batch)])

    def _embed(self, images: Tensor) -> Tensor:
        pixels = self.resize(images)
        outputs = [
            branch(pixel_values=(pixels - self.get_buffer(f"mean_{k}")) / self.get_buffer(f"std_{k}")).image_embeds
            for k, branch in enumerate(self.branches)
        ]
        joint = torch.cat(outputs, dim=1)
        return mark_broken(F.normalize(joint - joint.mean(dim=1, keepdim=True), dim=1), images)
