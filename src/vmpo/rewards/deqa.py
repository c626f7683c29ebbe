"""DeQA-Score: how good a picture looks, whatever its prompt, as a language model's expected level.

Weights: zhiyuanyou/DeQA-Score-Mix3 on the Hugging Face hub, an mPLUG-Owl2 (7B, 16 GB in fp16) that brings its own code,
published for transformers 4.36.1: docs/remote-rewards.md has how to run it in an environment of its own.

References:
    You et al., 2025, Teaching Large Language Models to Regress Accurate Image Quality Scores using Score Distribution
    (arXiv:2501.11561). The read-out is Q-Align's (Wu et al., 2023, arXiv:2312.17090), Eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import to_pil
from vmpo.features.weights import DTYPES

LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
QUESTION = "How would you rate the quality of this image?"
ANSWER = "The quality of the image is"


def expected_level(logits: Tensor) -> Tensor:
    """E[level] = Σ_k k softmax(l)_k, (B,) in [1, 5], of the logits l of the words of `LEVELS`, (B, 5)."""
    values = torch.tensor(list(LEVELS.values()), device=logits.device)
    return logits.float().softmax(-1) @ values


@dataclass(frozen=True)
class DeQA:
    """DeQA's expected quality level, r = E[level] / scale, level from 1 (bad) to 5 (excellent); Flow-GRPO has scale 5.

    A model with code of its own is asked through its method `score`, as the published one is. Any other is one of
    transformers' image-text models: it answers "How would you rate the quality of this image?", and the next word after
    "The quality of the image is" is read.

    Attributes:
        model: hub name or local folder.
        trust_remote_code: whether the code that comes with the model may be run here.
        scale: what the level is divided by. batch: pictures a forward pass. weights: their precision.
        device: of the model; None: the first GPU, else the CPU.

    Raises:
        UserError: if the model cannot be loaded.

    References:
        You et al., 2025 (arXiv:2501.11561).
    """

    model: str = "zhiyuanyou/DeQA-Score-Mix3"
    trust_remote_code: bool = False
    scale: float = 1.0
    batch: int = 8
    weights: Literal["fp32", "bf16", "fp16"] = "fp16"
    device: str | None = None
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"scale of the DeQA reward is {self.scale}; it divides the level and must be above 0")
        if self.weights not in DTYPES:
            raise UserError(f"weights='{self.weights}' of the DeQA reward; it must be one of {', '.join(DTYPES)}")
        _ = self._score  # so that missing weights are found before the run

    @property
    def range(self) -> str:
        return f"[{1 / self.scale:g}, {5 / self.scale:g}]"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        finite = images.isfinite().flatten(1).all(1).cpu()
        levels = [self._score(to_pil(part)).float().cpu() for part in images.split(self.batch)]
        return (torch.cat(levels) / self.scale).masked_fill(~finite, torch.nan).to(images.device)

    @cached_property
    def _score(self) -> Callable[[list[Image.Image]], Tensor]:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            if self.trust_remote_code:
                return published_scorer(self.model, DTYPES[self.weights], device)
            return LevelReader(self.model, DTYPES[self.weights], device)
        except UserError:
            raise
        except Exception as error:  # the hub, the files and the model's own code each fail in their way
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the DeQA model '{self.model}' cannot be loaded: {reason}; zhiyuanyou/DeQA-Score-Mix3 needs "
                f"trust_remote_code=true and transformers 4.36.1: serve it as docs/remote-rewards.md says, or give a "
                f"local folder of such a model"
            ) from error


def published_scorer(model: str, dtype: torch.dtype, device: str) -> Callable[[list[Image.Image]], Tensor]:
    """The method `score` of a model with code of its own: levels (B,) of B pictures."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        model,
        trust_remote_code=True,
        attn_implementation="eager",
        torch_dtype=dtype,  # its name in the versions that the published code is for
    )
    if not callable(getattr(network, "score", None)):
        raise UserError(
            f"the DeQA model '{model}' has no method 'score'; without trust_remote_code its levels are read"
        )
    return network.to(device).requires_grad_(False).eval().score


class LevelReader:
    """Levels (B,) of B pictures from an image-text model of transformers, by the next word of its answer."""

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, trust_remote_code=False)
        self.network = network.to(device).requires_grad_(False).eval()
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        self.text = self.processor.apply_chat_template([question], add_generation_prompt=True) + ANSWER
        encode = self.processor.tokenizer
        stem = encode(ANSWER, add_special_tokens=False).input_ids
        # the word's first token where it follows the answer: a leading space is written differently by tokenizers
        full = [encode(f"{ANSWER} {word}", add_special_tokens=False).input_ids for word in LEVELS]
        self.words = [ids[len(stem)] for ids in full]
        if len(set(self.words)) < len(LEVELS) or any(ids[: len(stem)] != stem for ids in full):
            raise UserError(f"the tokenizer of '{model}' does not tell {', '.join(LEVELS)} apart by their first token")

    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        inputs = self.processor(text=[self.text] * len(pictures), images=pictures, return_tensors="pt")
        inputs = inputs.to(self.network.device, self.network.dtype)  # floats alone change their type
        return expected_level(self.network(**inputs).logits[:, -1, self.words])
