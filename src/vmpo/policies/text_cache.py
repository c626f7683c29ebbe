"""Encoded prompts kept in memory, so that each is encoded once in a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vmpo.policies.policy import Conditioning

LIMIT = 8 << 30  # bytes; 3,000 prompts of Stable Diffusion 3 with T5 in bf16


class TextCache:
    """Conditioning by prompt, on the CPU; the oldest go first once `limit` bytes are passed.

    Every prompt is encoded alone. A batch would give it other last bits from company to company, and a resumed run
    could not follow the first one exactly.
    """

    def __init__(self, encode: Callable[[str, bool], Conditioning], limit: int = LIMIT) -> None:
        self._encode, self.limit, self.bytes = encode, limit, 0
        self._kept: dict[str, Conditioning] = {}

    def missing(self, prompts: list[str]) -> list[str]:
        """The distinct prompts that are yet to be encoded."""
        return [p for p in dict.fromkeys(prompts) if p not in self._kept]

    def add(self, prompts: list[str], guided: bool) -> None:
        """Encodes prompts; older ones make room, but none of these does."""
        for prompt in prompts:
            encoded = self._encode(prompt, guided).to(torch.device("cpu"))
            self._kept[prompt] = encoded
            self.bytes += _size(encoded)
        fresh = set(prompts)
        for prompt in list(self._kept):
            if self.bytes <= self.limit:
                return
            if prompt not in fresh:
                self.bytes -= _size(self._kept.pop(prompt))

    def rows(self, prompts: list[str], device: torch.device) -> Conditioning:
        """One row a prompt, repeated prompts included."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[p] for p in prompts])
        return Conditioning.cat([self._kept[p] for p in distinct]).to(device)[index.to(device)]


def _size(encoded: Conditioning) -> int:
    tensors = [*encoded.positive.values(), *(encoded.negative or {}).values()]
    return sum(t.numel() * t.element_size() for t in tensors)
