"""Reward for text anywhere in a picture: every line a detector finds is read, and the quoted text is looked for in it.

The engine is rapidocr, which ships its models (PP-OCR, Apache-2.0), or PaddleOCR where it is installed, which is what
Flow-GRPO's published figures were scored with and downloads its models on first use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.features.preprocessing import to_pil
from vmpo.rewards.ocr import spelling_score, target_text

Engine = Literal["rapidocr", "paddleocr"]
Reader = Callable[[np.ndarray], list[str]]


@cache
def load_reader(engine: str, language: str) -> Reader:
    """Reads the lines of one RGB picture (H, W, 3) uint8, in the detector's order.

    Raises:
        UserError: if the engine does not exist or is not installed.
    """
    if engine not in ("rapidocr", "paddleocr"):
        raise UserError(f"engine of the OCR reward is '{engine}'; it must be rapidocr or paddleocr")
    if importlib.util.find_spec(engine) is None:
        raise UserError(f"the OCR reward with engine={engine} needs that package: pip install {engine}")
    return _rapidocr() if engine == "rapidocr" else _paddleocr(language)


def _rapidocr() -> Reader:
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(picture: np.ndarray) -> list[str]:
        # upright text is asked for, so lines are not turned; the engine takes BGR as OpenCV does
        found = engine(np.ascontiguousarray(picture[:, :, ::-1]), use_cls=False)
        return list(found.txts or ())

    return read


def _paddleocr(language: str) -> Reader:
    paddleocr = importlib.import_module("paddleocr")
    if not hasattr(paddleocr.PaddleOCR, "predict"):  # 2.x
        old = paddleocr.PaddleOCR(use_angle_cls=False, lang=language, show_log=False)
        return lambda picture: [line[1][0] for line in (old.ocr(picture, cls=False) or [None])[0] or []]
    new = paddleocr.PaddleOCR(
        lang=language,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda picture: [text for page in new.predict(picture) for text in page["rec_texts"]]


@dataclass(frozen=True)
class SceneTextAccuracy:
    """Share of the quoted text that is spelled right among all lines, r = 1 − min(d, |target|) / |target|, in [0, 1].

    The lines are joined without a separator; d is 0 if the target is part of the result, else the Levenshtein
    distance. Spaces and case are ignored. A picture in which nothing is found scores 0; a non-finite picture is NaN.
    Options: `engine`, rapidocr or paddleocr; `language`, of PaddleOCR.

    Raises:
        UserError: for a prompt without double quotes, or an engine that is not installed.

    References:
        Flow-GRPO (Liu et al., 2025, arXiv:2505.05470) and its published code.
    """

    engine: Engine = "rapidocr"
    language: str = "en"
    _read: Reader = field(init=False, repr=False, compare=False)

    range: ClassVar[str] = "[0, 1]"
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_read", load_reader(self.engine, self.language))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError, with the prompt, unless every prompt quotes a text."""
        for prompt in prompts:
            target_text(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        finite = images.isfinite().flatten(1).all(1)
        pictures = to_pil(images.nan_to_num())
        scores = [
            spelling_score(target_text(prompt), "".join(self._read(np.asarray(picture))))
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        return torch.tensor(scores, device=images.device).masked_fill(~finite, torch.nan)
