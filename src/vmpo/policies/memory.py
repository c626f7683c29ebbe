"""How much memory a policy needs, found without any: its networks are run on tensors that have shapes and no data."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vmpo.policies.adapters import lora_config
from vmpo.policies.pipeline import PipelinePolicy
from vmpo.policies.policy import Conditioning


def weight_bytes(module: nn.Module | None) -> int:
    """Of a network's parameters and buffers."""
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def update_bytes(policy: PipelinePolicy, rank: int, targets: list[str] | None) -> int:
    """Peak of what one row of an update adds: activations, temporaries and gradients of its forward and backward."""
    twin = _without_data(policy)
    twin.denoiser.add_adapter(lora_config(type(policy), rank, rank, targets))
    for name, parameter in twin.denoiser.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def row(count: int) -> None:
        output = twin.predict(*_inputs(twin, count))
        output.square().sum().backward()
        twin.denoiser.zero_grad()

    return _slope(row)


def decode_bytes(policy: PipelinePolicy) -> int:
    """Peak of what decoding one more picture adds."""
    twin = _without_data(policy)

    @torch.no_grad()
    def picture(count: int) -> None:
        twin.decode(torch.empty((count, *twin.state_shape), device="meta"))

    return _slope(picture)


def _slope(run: Callable[[int], None]) -> int:
    peaks = []
    for count in (1, 2):
        with _fused_attention(), LiveBytes() as live:
            run(count)
        peaks.append(live.peak)
    return peaks[1] - peaks[0]


def _without_data(policy: PipelinePolicy) -> PipelinePolicy:
    twin = copy.copy(policy)
    twin.call = replace(policy.call, autocast=None)
    twin.pipe = copy.copy(policy.pipe)
    with torch.device("meta"):
        twin.denoiser = type(policy.denoiser).from_config(policy.denoiser.config)
        vae = type(policy.pipe.vae).from_config(policy.pipe.vae.config)
    twin.denoiser.to(policy.call.autocast or policy.denoiser.dtype).eval().requires_grad_(False)
    twin.pipe.vae = vae.to(policy.pipe.vae.dtype).eval().requires_grad_(False)
    if policy.denoiser.is_gradient_checkpointing:
        twin.denoiser.enable_gradient_checkpointing()
    if policy.pipe.vae.use_slicing:
        twin.pipe.vae.enable_slicing()
    return twin


def _inputs(policy: PipelinePolicy, count: int) -> tuple[Tensor, Tensor, Conditioning]:
    dtype = policy.denoiser.dtype

    def empty() -> dict[str, Tensor]:
        return {k: torch.empty((count, *s), dtype=dtype, device="meta") for k, s in policy.conditioning_shapes.items()}

    guided = policy.call.guidance > 1
    x_t = torch.empty((count, *policy.state_shape), device="meta")
    return x_t, torch.empty(count, device="meta"), Conditioning(empty(), empty() if guided else None)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._track, out)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self.live -= count


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    # without data PyTorch takes the plain kernel, whose matrix of all pairs no GPU kernel keeps
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *args, **kwargs: _Fused.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
