"""Which prompts an epoch draws."""

from __future__ import annotations

import torch


def epoch_prompts(total: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """Rows of the prompts of an epoch: successive slices of seeded permutations of the whole set.

    A function of (seed, epoch) alone, so a resumed run needs no position but the epoch.
    """
    rows: list[int] = []
    position = epoch * per_epoch
    while len(rows) < per_epoch:
        lap, offset = divmod(position + len(rows), total)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + lap)
        order = torch.randperm(total, generator=generator).tolist()
        fresh = [r for r in order[offset:] if r not in rows]
        rows += fresh[: per_epoch - len(rows)] or order[: per_epoch - len(rows)]
    return rows
