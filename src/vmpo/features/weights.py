"""Weights of frozen networks: from a local file or folder, or from a repository of the Hugging Face hub."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmpo.errors import UserError

Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def network_dtype(name: str) -> torch.dtype:
    """The dtype called 'fp32', 'bf16' or 'fp16'.

    Raises:
        UserError: for any other name.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is '{name}'; a scorer's network can be {', '.join(DTYPES)}")
    return DTYPES[name]


def missing(repo: str, option: str, filename: str = "") -> UserError:
    """What to tell about weights that are not there: where they live and how to get them."""
    fetch = " ".join(part for part in ("hf download", repo, filename, "--local-dir DIR") if part)
    path = f"DIR/{filename}" if filename else "DIR"
    return UserError(
        f"no weights '{repo}': there is no such file or folder here, and no hub repository of that name can be "
        f"reached; '{fetch}' fetches them where there is a network, then give the reward {option}={path}"
    )


def hub_file(repo: str, filename: str, option: str) -> Path:
    """A file of a hub repository, from the cache or downloaded.

    Raises:
        UserError: if it cannot be had, with the way to get it.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, filename))
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        raise missing(repo, option, filename) from error


def hub_folder(repo: str, patterns: list[str], option: str) -> Path:
    """A folder with the files of a hub repository that match the patterns, from the cache or downloaded.

    Raises:
        UserError: if it cannot be had, with the way to get it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise missing(repo, option) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch checkpoint, in which they may lie under 'state_dict'.

    A checkpoint is read without running code from it.

    Raises:
        UserError: if the file cannot be read so.
    """
    if not path.is_file():
        raise UserError(f"no weights at '{path}': there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"'{path}' is not a file of weights: {str(error).splitlines()[0]}") from error
    content = content.get("state_dict", content)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def load_pretrained(cls: type[Module], weights: str, dtype: torch.dtype, option: str = "weights") -> Module:
    """A transformers network of class `cls` from a local folder or a hub repository, frozen, in evaluation mode.

    Raises:
        UserError: if the weights are not there, or belong to another network.
    """
    if not Path(weights).is_dir():
        if Path(weights).exists() or weights.count("/") > 1:
            raise UserError(f"no folder '{weights}'; {option} must be a folder with a config.json, or a hub name")
        hub_folder(weights, ["config.json"], option)  # one question to the hub instead of a dozen with retries
    try:
        model, report = cls.from_pretrained(weights, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"'{weights}' cannot be loaded as a {cls.__name__}: {str(error).splitlines()[0]}") from error
    return _complete(model, report, weights)


def from_state_dict(
    cls: type[Module], config: Any, state: dict[str, Tensor], dtype: torch.dtype, source: str, **options: Any
) -> Module:
    """A transformers network of class `cls` from tensors in its own names, frozen, in evaluation mode.

    Raises:
        UserError: if tensors are missing or of another shape.
    """
    try:
        model, report = cls.from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise UserError(f"'{source}' does not fit a {cls.__name__}: {str(error).splitlines()[0]}") from error
    return _complete(model, report, source)


def _complete(model: Module, report: dict[str, Any], source: str) -> Module:
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(f"'{source}' lacks {len(absent)} tensors of a {type(model).__name__}, such as {absent[0]}")
    return model.requires_grad_(False).eval()
