"""Stable Diffusion XL as a policy (Podell et al. 2023, arXiv 2307.01952): a UNet that is told the picture's size."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from vmpo.policies.pipeline import PipelinePolicy
from vmpo.policies.policy import Conditioning


class StableDiffusionXLPolicy(PipelinePolicy):
    """The UNet of a `StableDiffusionXLPipeline`; size conditioning asks for an uncropped picture of the size drawn."""

    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    encoder_names = ("text_encoder", "text_encoder_2")
    unused_components = ("feature_extractor", "image_encoder")
    usual_guidance = 5.0
    upcasts_vae = True

    def _encode(self, prompt: str, guided: bool) -> Conditioning:
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt, device=self.encoder_device, do_classifier_free_guidance=guided
        )
        size = [side * self.pipe.vae_scale_factor for side in self.state_shape[1:]]
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device)
        return Conditioning(
            {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids},
            {"encoder_hidden_states": negative, "text_embeds": negative_pooled, "time_ids": time_ids}
            if guided
            else None,
        )

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        text = self.pipe.text_encoder_2.config
        states = (text.max_position_embeddings, self.denoiser.config.cross_attention_dim)
        return {"encoder_hidden_states": states, "text_embeds": (text.projection_dim,), "time_ids": (6,)}

    def _denoise(self, x_t: Tensor, time: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
        states = inputs["encoder_hidden_states"]
        return self.denoiser(x_t, time, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]

    def _latents(self, x_0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super()._latents(x_0)
        mean, std = (x_0.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return x_0 * std / config.scaling_factor + mean
