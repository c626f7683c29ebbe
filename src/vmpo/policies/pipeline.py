"""A diffusers pipeline as a policy: what Stable Diffusion 1.x, XL and 3 have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from vmpo.policies.policy import Conditioning
from vmpo.policies.text_cache import TextCache


@dataclass(frozen=True)
class Call:
    """How the networks of a pipeline are called.

    Attributes:
        height, width: of pictures, pixels; None: the size the model was trained on.
        guidance: w of classifier-free guidance; at most 1 is off.
        max_sequence_length: T5 tokens.
        autocast: the precision of the denoiser's matrix products; None: that of its weights.
        offload_encoders: text encoders are on the device only while they encode.
    """

    height: int | None = None
    width: int | None = None
    guidance: float = 1.0
    max_sequence_length: int = 256
    autocast: torch.dtype | None = None
    offload_encoders: bool = False


class PipelinePolicy(ABC):
    """The denoiser of a pipeline; a subclass says how prompts are encoded and how the denoiser is called.

    Guidance is that of Ho & Salimans 2022, arXiv 2207.12598: out = out(∅) + w·(out(c) − out(∅)). The unconditional
    and the conditional half are one batch. Everything the caller sees is float32.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]]
    unused_components: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # self- and cross-attention
    usual_guidance: ClassVar[float] = 7.5  # of the plain pipeline
    flow: ClassVar[bool] = False
    upcasts_vae: ClassVar[bool] = False

    def __init__(self, pipe: DiffusionPipeline, call: Call) -> None:
        self.pipe, self.call = pipe, call
        self.denoiser: nn.Module = getattr(pipe, self.denoiser_name)
        self.encoders = [m for name in self.encoder_names if (m := getattr(pipe, name, None)) is not None]
        self._is_reference = False
        self._texts = TextCache(self._encode)
        size, factor = self.denoiser.config.sample_size, pipe.vae_scale_factor
        trained = size if isinstance(size, list | tuple) else (size, size)
        asked = (call.height and call.height // factor, call.width and call.width // factor)
        height, width = (a or t for a, t in zip(asked, trained, strict=True))
        self.state_shape: tuple[int, ...] = (self.denoiser.config.in_channels, height, width)

    @abstractmethod
    def _encode(self, prompt: str, guided: bool) -> Conditioning:
        """One encoded prompt, and its unconditional twin where asked for."""

    @abstractmethod
    def _denoise(self, x_t: Tensor, time: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The denoiser's output for encoded prompts."""

    @property
    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one encoded prompt's tensors, without the batch."""

    @property
    def schedule(self) -> Mapping[str, Any]:
        """What a kernel has to know of the noise the model was trained with, as arguments of `build_kernel`.

        Empty for flow models, whose states lie between data and noise in one way.
        """
        if self.flow:
            return {}
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        return {
            "alphas_cumprod": scheduler.alphas_cumprod.double(),
            "prediction": scheduler.config.prediction_type,
            "spacing": scheduler.config.timestep_spacing,
            "steps_offset": scheduler.config.steps_offset,
            "final_alpha_bar": float(scheduler.final_alpha_cumprod),
        }

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def prompts_from(self, encode: Callable[[str, bool], Conditioning]) -> None:
        """Takes encoded prompts from somewhere else than the pipeline's text encoders."""
        self._texts = TextCache(encode)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        if missing := self._texts.missing(prompts):
            if self.call.offload_encoders:
                self._move_encoders(self.device)
            self._texts.add(missing, guided=self.call.guidance > 1.0)
            if self.call.offload_encoders:
                self._move_encoders(torch.device("cpu"))
        return self._texts.rows(prompts, self.device)

    def _move_encoders(self, device: torch.device) -> None:
        for encoder in self.encoders:
            encoder.to(device)

    @property
    def encoder_device(self) -> torch.device:
        """Where prompts are encoded."""
        return self.encoders[0].device

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = conditioning.positive
        if conditioning.negative is not None:
            inputs = {k: torch.cat([conditioning.negative[k], v]) for k, v in inputs.items()}
            x_t, time = torch.cat([x_t, x_t]), torch.cat([time, time])
        autocast = self.call.autocast
        with torch.autocast(self.device.type, autocast) if autocast else nullcontext():
            output = self._denoise(x_t.to(x_t.dtype if autocast else self.denoiser.dtype), time, inputs).float()
        if conditioning.negative is None:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.call.guidance * (conditional - unconditional)

    def decode(self, x_0: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = self._latents(x_0).to(vae.dtype)
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def _latents(self, x_0: Tensor) -> Tensor:
        # states have unit variance, the autoencoder's latents their own
        config = self.pipe.vae.config
        return x_0 / config.scaling_factor + (config.shift_factor or 0.0)

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
