"""PickScore: which of two pictures the users of a web application would have picked for a prompt.

References:
    Pick-a-Pic (Kirstain et al., 2023, arXiv:2305.01569).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import Preprocessing
from vmpo.rewards.clip_similarity import CLIPSimilarity


@dataclass(frozen=True, kw_only=True)
class PickScore(CLIPSimilarity):
    """Preference of Pick-a-Pic's users, r = e^s cos(picture, prompt) / scale with the network's own logit scale s.

    Options: `scale`, 1 by default, 26 in the code of Flow-GRPO and DiffusionNFT; `weights`; `tokenizer`; `dtype`,
    `device`, `batch`.

    Raises:
        UserError: if the weights are not there, or the scale is not positive.

    References:
        Pick-a-Pic (Kirstain et al., 2023, arXiv:2305.01569).
    """

    weights: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    scale: float = 1.0
    preprocessing: ClassVar[Preprocessing] = Preprocessing(floor=True)  # transformers' CLIPProcessor
    cleaned: ClassVar[bool] = False
    range: ClassVar[str] = "about 17 to 24, divided by scale"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"scale of PickScore is {self.scale}; it divides the score and must be above 0")
        super().__post_init__()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        cosine = self.cosine(images, prompts)
        return cosine * self.network.logit_scale.exp().to(cosine) / self.scale
