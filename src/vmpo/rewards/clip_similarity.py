"""The cosine between a picture and its prompt in the space of a CLIP network: what CLIPScore, PickScore, HPS share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from vmpo.features.clip import embed_images, embed_texts, load_clip
from vmpo.features.clip_tokens import clean_prompt, load_clip_tokenizer
from vmpo.features.preprocessing import Preprocessing
from vmpo.rewards.frozen_network import FrozenNetworkReward


@dataclass(frozen=True, kw_only=True)
class CLIPSimilarity(FrozenNetworkReward):
    """cos(picture, prompt) with the unit vectors of a CLIP network.

    Attributes:
        weights: a folder in transformers' format or a hub repository.
        tokenizer: a folder or a hub repository with CLIP's vocabulary.
    """

    weights: str
    tokenizer: str
    preprocessing: ClassVar[Preprocessing] = Preprocessing()
    cleaned: ClassVar[bool] = True  # whether prompts are cleaned as open_clip and OpenAI's code do

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.vocabulary

    @cached_property
    def network(self) -> Any:
        return load_clip(self.weights, self.dtype, self.device)

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer."""
        return load_clip_tokenizer(self.tokenizer)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos (B,) of pictures (B, 3, H, W) in [0, 1] and their prompts; NaN for a non-finite picture."""
        preprocessing = dataclasses.replace(self.preprocessing, size=self.network.config.vision_config.image_size)
        pictures = embed_images(self.network, images, preprocessing, self.batch, self.device)
        texts = [clean_prompt(prompt) for prompt in prompts] if self.cleaned else prompts
        return (pictures * embed_texts(self.network, self.vocabulary, texts, images.device, self.batch)).sum(-1)
