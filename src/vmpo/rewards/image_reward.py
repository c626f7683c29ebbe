"""ImageReward: a BLIP whose text encoder looks at the picture, trained on people's rankings.

References:
    ImageReward (Xu et al., 2023, arXiv:2304.05977).
    BLIP (Li et al., 2022, arXiv:2201.12086): the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vmpo.features.clip import mark_broken, place
from vmpo.features.preprocessing import Preprocessing
from vmpo.features.tokenizers import load_tokenizer
from vmpo.features.weights import hub_file, network_dtype, read_state_dict
from vmpo.rewards.frozen_network import FrozenNetworkReward
from vmpo.rewards.image_reward_network import ImageRewardNetwork, image_reward_network

CHECKPOINT = "ImageReward.pt"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the authors' data


@cache  # one network for all who ask for the same
def _load(checkpoint: Path, dtype: str, device: str | None) -> ImageRewardNetwork:
    return image_reward_network(read_state_dict(checkpoint), str(checkpoint), network_dtype(dtype))


@dataclass(frozen=True, kw_only=True)
class ImageReward(FrozenNetworkReward):
    """Human preference, r = (head(text encoder's first token, having attended to the picture) − 0.167) / 1.033.

    Prompts are cut at 35 tokens, as published. Options: `weights`, the file ImageReward.pt or a hub repository with
    it (default v1.0); `tokenizer`, a folder or hub repository with BERT's uncased vocabulary; `dtype` of the
    encoders (the head is float32), `device`, `batch`.

    Raises:
        UserError: if the weights are not there.

    References:
        ImageReward (Xu et al., 2023, arXiv:2304.05977).
    """

    weights: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"
    preprocessing: ClassVar[Preprocessing] = Preprocessing()
    range: ClassVar[str] = "about -2.3 to 2, mean 0 and std 1 over the authors' data"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.vocabulary

    @cached_property
    def network(self) -> ImageRewardNetwork:
        is_file = Path(self.weights).is_file()
        checkpoint = Path(self.weights) if is_file else hub_file(self.weights, CHECKPOINT, "weights")
        return _load(checkpoint, self.dtype, self.device)

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer."""
        from transformers import BertTokenizer

        return load_tokenizer(BertTokenizer, self.tokenizer)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        target = place(self.network, images, self.device)
        tokens = self.vocabulary(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(target), tokens.attention_mask.to(target)
        scores = [
            self.network(self.preprocessing(picture).to(target), text, text_mask)
            for picture, text, text_mask in zip(*(x.split(self.batch) for x in (images, ids, mask)), strict=True)
        ]
        return mark_broken((torch.cat(scores) - MEAN) / STD, images)
