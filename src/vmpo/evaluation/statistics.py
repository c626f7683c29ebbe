"""Means and standard errors over prompts.

Pictures of one prompt share the prompt's difficulty, so they are not independent; the prompts are. Every error here
is therefore taken between prompt means, which covers both what differs between prompts and the noise of the pictures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (NaN where fewer than two prompts were measured) and the number of prompts n."""

    mean: float
    se: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """The entry of `evaluation.json`: {"mean", "se", "n"}."""
        return asdict(self)


def prompt_means(values: Tensor) -> Tensor:
    """Mean over the pictures of each prompt, (P, M) or (P,) -> (P,) float64; NaN entries (failed scores) are left out.

    A prompt all of whose entries are NaN stays NaN.

    Raises:
        ValueError: if `values` has another number of dimensions.
    """
    values = values.detach().to(torch.float64)
    if values.ndim == 1:
        return values
    if values.ndim != 2:
        raise ValueError(f"values have shape {tuple(values.shape)}; they must be (prompts, pictures) or (prompts,)")
    return values.nanmean(dim=1)


def clustered_mean(values: Tensor) -> Estimate:
    """Mean of prompt means with its clustered standard error: se = std over prompts (ddof 1) / sqrt(n).

    Arguments:
        values: (P, M) one value a picture, or (P,) one a prompt. NaN entries are left out.

    Returns:
        The estimate; n counts the prompts with at least one value.
    """
    means = prompt_means(values)
    means = means[~means.isnan()]
    n = means.numel()
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    se = (means.std(correction=1) / math.sqrt(n)).item() if n > 1 else math.nan
    return Estimate(means.mean().item(), se, n)


def paired_difference(base: Tensor, aligned: Tensor) -> Estimate:
    """Mean of aligned minus base over the prompts both were measured on, with the standard error of the pairs.

    Arguments:
        base: (P, M) or (P,).
        aligned: (P, M') or (P,); row p is the same prompt as in `base`.

    Raises:
        ValueError: if the numbers of prompts differ.
    """
    if base.shape[0] != aligned.shape[0]:
        raise ValueError(
            f"base has {base.shape[0]} prompts and aligned {aligned.shape[0]}; a paired difference needs the same ones"
        )
    return clustered_mean(prompt_means(aligned) - prompt_means(base))
