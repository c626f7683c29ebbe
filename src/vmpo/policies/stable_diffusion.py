"""Stable Diffusion 1.x and 2.x as a policy (Rombach et al. 2022, arXiv 2112.10752): a UNet that predicts ε or v."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline
from torch import Tensor

from vmpo.policies.pipeline import PipelinePolicy
from vmpo.policies.policy import Conditioning


class StableDiffusionPolicy(PipelinePolicy):
    """The UNet of a `StableDiffusionPipeline`; what it predicts is read from the scheduler's configuration."""

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    encoder_names = ("text_encoder",)

    def _encode(self, prompt: str, guided: bool) -> Conditioning:
        embeds, negative = self.pipe.encode_prompt(prompt, self.encoder_device, 1, guided)
        return Conditioning({"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative} if guided else None)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.pipe.text_encoder.config.max_position_embeddings
        return {"encoder_hidden_states": (tokens, self.denoiser.config.cross_attention_dim)}

    def _denoise(self, x_t: Tensor, time: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.denoiser(x_t, time, return_dict=False, **inputs)[0]
