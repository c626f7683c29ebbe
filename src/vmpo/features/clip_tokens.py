"""Prompts as tokens of CLIP: the cleaning of the text, 77 tokens and no more."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vmpo.features.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_PLAIN = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}  # full-width forms
)


def load_clip_tokenizer(source: str) -> CLIPTokenizer:
    """The tokenizer of a local folder or a hub repository.

    Raises:
        UserError: if there is none.
    """
    from transformers import CLIPTokenizer

    return load_tokenizer(CLIPTokenizer, source)


def clean_prompt(prompt: str) -> str:
    """The text as open_clip and OpenAI's CLIP clean it: plain quotes and widths, no HTML entities, single spaces.

    They call ftfy, which also mends text in a wrong encoding; that is left as it is here.
    """
    text = html.unescape(html.unescape(prompt.translate(_PLAIN)))
    return re.sub(r"\s+", " ", text).strip()


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], max_length: int) -> Tensor:
    """Token ids (B, L), L ≤ max_length; a longer prompt is cut and still ends with the end-of-text token."""
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return tokens.input_ids
