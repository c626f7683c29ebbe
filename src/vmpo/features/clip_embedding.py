"""CLIP's embedding of pictures, whose cosine distance says how much they differ in what they show."""

from __future__ import annotations

from torch import Tensor

from vmpo.features.clip import embed_images, load_clip
from vmpo.features.extractor import Distance
from vmpo.features.preprocessing import Preprocessing


class CLIPEmbedding:
    """Projected embeddings e of unit length of a CLIP image tower; the distance is 1 − e(x)·e(y), in [0, 2].

    Differentiable (see `Preprocessing`).

    Arguments:
        weights: folder in transformers' format, or name on the hub.
        batch: pictures at once.

    Raises:
        UserError: if the weights are not there or are of another network.

    References:
        Radford et al. (2021), arXiv:2103.00020. Licence of OpenAI's weights: MIT.
    """

    name = "clip"
    distance: Distance = "cosine"

    def __init__(self, weights: str = "openai/clip-vit-large-patch14", batch: int = 32) -> None:
        self.batch = batch
        self.model = load_clip(weights)
        self.preprocessing = Preprocessing(self.model.config.vision_config.image_size, floor=True)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, F)."""
        return embed_images(self.model, images, self.preprocessing, self.batch)
