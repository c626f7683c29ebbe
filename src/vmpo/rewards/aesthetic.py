"""LAION's aesthetic predictor: how much people liked a picture, whatever its prompt.

References:
    LAION-Aesthetics V2 (Schuhmann, 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.clip import embed_images, load_clip, place
from vmpo.features.preprocessing import Preprocessing
from vmpo.features.weights import hub_file, read_state_dict
from vmpo.rewards.frozen_network import FrozenNetworkReward
from vmpo.rewards.score_head import ScoreHead, load_score_head

HEAD_FILE = "aesthetic-model.pth"  # on the hub; 'sac+logos+ava1-l14-linearMSE.pth' at its first home


@dataclass(frozen=True, kw_only=True)
class Aesthetic(FrozenNetworkReward):
    """Aesthetic score, r = head(CLIP ViT-L/14 unit vector of the picture); prompts are not looked at.

    Options: `weights`, the head's file, or a hub repository with aesthetic-model.pth; `clip`, its CLIP in
    transformers' format; `dtype` of CLIP (the head is float32), `device`, `batch`.

    Raises:
        UserError: if the weights are not there, or do not fit together.

    References:
        LAION-Aesthetics V2 (Schuhmann, 2022), sac+logos+ava1-l14-linearMSE; as a reward in DDPO (Black et al.,
        2023, arXiv:2305.13301).
    """

    weights: str = "trl-lib/ddpo-aesthetic-predictor"
    clip: str = "openai/clip-vit-large-patch14"
    preprocessing: ClassVar[Preprocessing] = Preprocessing()
    range: ClassVar[str] = "about 1 to 10, mostly 4 to 7"

    def __post_init__(self) -> None:
        super().__post_init__()
        width, expected = self.network.config.projection_dim, self.head.layers[0].in_features
        if width != expected:
            raise UserError(
                f"the aesthetic head '{self.weights}' takes {expected} features, but '{self.clip}' has {width}"
            )

    @cached_property
    def network(self) -> Any:
        return load_clip(self.clip, self.dtype, self.device, option="clip")

    @cached_property
    def head(self) -> ScoreHead:
        """The head on top of CLIP."""
        is_file = Path(self.weights).is_file()
        path = Path(self.weights) if is_file else hub_file(self.weights, HEAD_FILE, "weights")
        return load_score_head(read_state_dict(path), str(path))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        preprocessing = dataclasses.replace(self.preprocessing, size=self.network.config.vision_config.image_size)
        features = embed_images(self.network, images, preprocessing, self.batch, self.device)
        place(self.head, images, None)
        return self.head(features)
