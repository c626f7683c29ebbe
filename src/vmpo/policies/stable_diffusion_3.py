"""Stable Diffusion 3 as a policy (Esser et al. 2024, arXiv 2403.03206): a velocity network on flow-matching states."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from vmpo.policies.pipeline import PipelinePolicy
from vmpo.policies.policy import Conditioning


class StableDiffusion3Policy(PipelinePolicy):
    """The transformer of a `StableDiffusion3Pipeline`; its network is told 1000·sigma and returns v = x_1 − x_0.

    Works with T5 and without it.
    """

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    unused_components = ("feature_extractor", "image_encoder")
    usual_guidance = 7.0
    flow = True
    # both streams of the joint attention, as in Flow-GRPO's code
    lora_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def _encode(self, prompt: str, guided: bool) -> Conditioning:
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.encoder_device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.call.max_sequence_length,
        )
        return Conditioning(
            {"encoder_hidden_states": embeds, "pooled_projections": pooled},
            {"encoder_hidden_states": negative, "pooled_projections": negative_pooled} if guided else None,
        )

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        tokens = self.pipe.text_encoder.config.max_position_embeddings + self.call.max_sequence_length
        return {
            "encoder_hidden_states": (tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def _denoise(self, x_t: Tensor, time: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.denoiser(hidden_states=x_t, timestep=time, return_dict=False, **inputs)[0]
