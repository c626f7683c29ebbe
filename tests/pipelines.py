"""Untrained pipelines of the real classes, a few hundred thousand parameters each, for tests to save and load.

Scaling factors, shifts and schedules are not neutral, so that a dropped one shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from vmpo.pretraining.captions import build_tokenizer, text_config

HEIGHT, WIDTH = 16, 32  # pixels
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def autoencoder(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """Factor 2, latents of an eighth of unit variance or so."""
    torch.manual_seed(3)
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=shift,
    ).eval()


def unet(**more: object) -> UNet2DConditionModel:
    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,  # type: ignore[arg-type]
    ).eval()


def text_encoder(tokenizer: CLIPTokenizer, seed: int, *, projection: bool) -> CLIPTextModel:
    torch.manual_seed(seed)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(text_config(tokenizer, 32)).eval()


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, *((chr(i), -3.0) for i in range(33, 127))], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=20
    )


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    torch.manual_seed(8)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def sd1(prediction: str = "epsilon") -> StableDiffusionPipeline:
    """Stable Diffusion 1.x with the scheduler its published weights name."""
    tokenizer = build_tokenizer()
    scheduler = PNDMScheduler(
        **LEVELS, prediction_type=prediction, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(tokenizer, 5, projection=False),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=32),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, size conditioning."""
    tokenizers = build_tokenizer(), build_tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(tokenizers[0], 5, projection=False),
        text_encoder_2=text_encoder(tokenizers[1], 6, projection=True),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet(cross_attention_dim=64, projection_class_embeddings_input_dim=32 + 6 * 8, **added),
        scheduler=EulerDiscreteScheduler(**LEVELS, steps_offset=1, timestep_spacing="leading"),
    )


def sd3(*, t5: bool = False) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with or without T5."""
    tokenizers = build_tokenizer(), build_tokenizer()
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).eval()
    tokenizer_3 = t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=autoencoder(shift=0.1),
        text_encoder=text_encoder(tokenizers[0], 5, projection=True),
        text_encoder_2=text_encoder(tokenizers[1], 6, projection=True),
        text_encoder_3=t5_encoder(tokenizer_3) if tokenizer_3 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizer_3,
    )


BUILD: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": sd1,
    "sd1-v": lambda: sd1("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-t5": lambda: sd3(t5=True),
}


def with_ddim(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with plain DDIM in the place of its own multi-step or Euler sampler, for comparisons."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe
