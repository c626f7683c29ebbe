"""HPS v2: a CLIP ViT-H-14 trained on which of several pictures of a prompt people preferred.

References:
    Human Preference Score v2 (Wu et al., 2023, arXiv:2306.09341).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.open_clip import clip_from_open_clip
from vmpo.features.preprocessing import Preprocessing
from vmpo.features.weights import hub_file, network_dtype, read_state_dict
from vmpo.rewards.clip_similarity import CLIPSimilarity

REPOSITORY = "xswu/HPSv2"
CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
VISION_HEAD_WIDTH = 80  # of ViT-H-14


@cache  # one network for all who ask for the same
def _load(checkpoint: Path, dtype: str, device: str | None) -> Any:
    state = read_state_dict(checkpoint)
    return clip_from_open_clip(state, str(checkpoint), network_dtype(dtype), VISION_HEAD_WIDTH)


@dataclass(frozen=True, kw_only=True)
class HPSv2(CLIPSimilarity):
    """Human preference score, r = cos(picture, prompt) of the ViT-H-14 of HPS v2.1 or v2.0.

    The longer side of the picture becomes 224 and black fills the rest, as in the published code. v2.0 and v2.1 are
    two networks; their scores cannot be compared. Options: `version`, 'v2.1' or 'v2.0'; `weights`, the open_clip
    checkpoint or a folder in transformers' format (default: the version's checkpoint on the hub); `tokenizer`;
    `dtype`, `device`, `batch`.

    Raises:
        UserError: if the weights are not there, or for an unknown version.

    References:
        Human Preference Score v2 (Wu et al., 2023, arXiv:2306.09341).
    """

    weights: str = ""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    version: str = "v2.1"
    preprocessing: ClassVar[Preprocessing] = Preprocessing(pad=True, resize_floats=True)
    range: ClassVar[str] = "about 0.15 to 0.4"

    def __post_init__(self) -> None:
        if self.version not in CHECKPOINTS:
            raise UserError(f"version of HPSv2 is '{self.version}'; it can be {', '.join(CHECKPOINTS)}")
        super().__post_init__()

    @cached_property
    def network(self) -> Any:
        if self.weights and not Path(self.weights).is_file():
            return super().network
        checkpoint = Path(self.weights or hub_file(REPOSITORY, CHECKPOINTS[self.version], "weights"))
        return _load(checkpoint, self.dtype, self.device)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.cosine(images, prompts)
