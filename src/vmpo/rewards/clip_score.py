"""CLIPScore: how well a picture fits its prompt, for a CLIP network that was never trained on preferences.

References:
    CLIPScore (Hessel et al., 2021, arXiv:2104.08718).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vmpo.errors import UserError
from vmpo.rewards.clip_similarity import CLIPSimilarity

Convention = Literal["cosine", "percent", "hessel"]
_RANGE = {"cosine": "about 0.15 to 0.4", "percent": "about 15 to 40", "hessel": "about 0.4 to 1"}


@dataclass(frozen=True, kw_only=True)
class CLIPScore(CLIPSimilarity):
    """Cosine of picture and prompt under CLIP, r = cos, 100 cos or 2.5 max(cos, 0).

    Options: `weights`, any CLIP in transformers' format (default OpenAI's ViT-L/14); `tokenizer`; `convention`,
    'cosine', 'percent' or 'hessel'; `prefix` before every prompt ("A photo depicts " in Hessel et al.); `dtype`,
    `device`, `batch`.

    Raises:
        UserError: if the weights are not there, or for an unknown convention.

    References:
        CLIPScore (Hessel et al., 2021, arXiv:2104.08718): 2.5 max(cos, 0), ViT-B/32.
    """

    weights: str = "openai/clip-vit-large-patch14"
    tokenizer: str = "openai/clip-vit-large-patch14"
    convention: Convention = "cosine"
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise UserError(
                f"convention of CLIPScore is '{self.convention}'; it can be {', '.join(get_args(Convention))}"
            )
        super().__post_init__()

    @property
    def range(self) -> str:
        return _RANGE[self.convention]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        cosine = self.cosine(images, [self.prefix + prompt for prompt in prompts])
        if self.convention == "hessel":
            return 2.5 * cosine.clamp_min(0)
        return 100 * cosine if self.convention == "percent" else cosine
