"""Tokenizers of text encoders, from a local folder or from a repository of the Hugging Face hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from vmpo.errors import UserError
from vmpo.features.weights import hub_folder

VOCABULARIES = ["tokenizer.json", "vocab.json", "vocab.txt"]
FILES = [*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]


@cache
def load_tokenizer(cls: type, source: str) -> Any:
    """A transformers tokenizer of class `cls`.

    The files are looked for first: without them transformers makes a tokenizer of five tokens and says nothing.

    Raises:
        UserError: if there is no vocabulary.
    """
    folder = Path(source) if Path(source).is_dir() else hub_folder(source, FILES, "tokenizer")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"no vocabulary ({', '.join(VOCABULARIES)}) in '{folder}'; give the reward tokenizer=DIR with one"
        )
    return cls.from_pretrained(folder)  # type: ignore[attr-defined]
