"""Stable Diffusion 3 as a policy (Esser et al. 2024, arXiv 2403.03206): a velocity network on flow-matching states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from vmpo.policies.policy import Conditioning

LORA_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


class StableDiffusion3Policy:
    """The transformer of a `StableDiffusion3Pipeline`; its network is told 1000·sigma and returns v = x_1 − x_0."""

    pipeline_class = StableDiffusion3Pipeline
    lora_targets = LORA_TARGETS

    def __init__(
        self,
        pipe: StableDiffusion3Pipeline,
        height: int,
        width: int,
        guidance: float = 1.0,
        max_sequence_length: int = 256,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.pipe, self.guidance, self.max_sequence_length = pipe, guidance, max_sequence_length
        self.denoiser = pipe.transformer
        self.autocast = autocast
        self._is_reference = False
        channels, factor = pipe.transformer.config.in_channels, pipe.vae_scale_factor
        self.state_shape: tuple[int, ...] = (channels, height // factor, width // factor)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        distinct = list(dict.fromkeys(prompts))
        guided = self.guidance > 1.0
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            distinct,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_sequence_length,
        )
        rows = torch.tensor([distinct.index(p) for p in prompts], device=self.device)
        one = Conditioning(
            {"encoder_hidden_states": embeds, "pooled_projections": pooled},
            {"encoder_hidden_states": negative, "pooled_projections": negative_pooled} if guided else None,
        )
        return one[rows]

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = conditioning.positive
        if conditioning.negative is not None:
            inputs = {k: torch.cat([conditioning.negative[k], v]) for k, v in inputs.items()}
            x_t, time = torch.cat([x_t, x_t]), torch.cat([time, time])
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled):
            dtype = x_t.dtype if enabled else self.denoiser.dtype
            output = self.denoiser(hidden_states=x_t.to(dtype), timestep=time, return_dict=False, **inputs)[0].float()
        if conditioning.negative is None:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def decode(self, x_0: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = x_0 / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._is_reference or not getattr(self.denoiser, "peft_config", None):
            yield  # already off (an outer context turns it on again), or there is none
            return
        self.denoiser.disable_adapters()
        self._is_reference = True
        try:
            yield
        finally:
            self.denoiser.enable_adapters()
            self._is_reference = False
