"""Trains the embedded pipeline `glyphs-ddim`: a small StableDiffusionPipeline on the words and captions of `glyphs`.

It has what Stable Diffusion 1.x has: a UNet that predicts the noise, the scaled-linear schedule of 1000 steps, DDIM,
one CLIP text encoder and classifier-free guidance. `glyphs` is its teacher: the noise that one draws is a poor target,
since most of it cannot be known from the noisy picture; the teacher's guess is its mean, and learnt in far fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel

from vmpo.pretraining.captions import build_tokenizer, text_config
from vmpo.pretraining.glyphs import Glyphs
from vmpo.pretraining.run import Log, pretrain
from vmpo.pretraining.settings import Cycle, Pretraining

MIN_SNR = 5.0


def autoencoder_without_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder for pipelines that know of no shift: 1 × 1 convolutions on the latents' side take it over.

    `quant_conv` subtracts the shift from the mean it passes on, `post_quant_conv` adds it before decoding.
    """
    shift, channels = vae.config.shift_factor, vae.config.latent_channels
    changed = {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    same: AutoencoderKL = AutoencoderKL.from_config({**vae.config, **changed})
    same.load_state_dict(vae.state_dict(), strict=False)
    for conv, sign in ((same.quant_conv, -1.0), (same.post_quant_conv, 1.0)):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
        with torch.no_grad():
            conv.bias[:channels] = sign * shift  # beyond are the log-variances
    return same.eval()


def build_pipeline(
    vae: AutoencoderKL, seed: int = 0, widths: tuple[int, int, int] = (48, 128, 128)
) -> StableDiffusionPipeline:
    """An untrained pipeline: a UNet of 6.5 M parameters on latents of 6 × 16, text attended to at 3 × 8 and 2 × 4.

    At 2 × 4 a convolution sees the whole picture, hence where it is: attention in a UNet has no other sense of place.
    The text also joins the time embedding, attention-pooled.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=widths[1] // 32,  # of this class, the number of heads
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 128)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class GlyphsDDIM:
    """The teacher's noise regressed at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε, weighted by min(SNR_t, 5)/SNR_t.

    SNR_t = ᾱ_t/(1−ᾱ_t). The teacher knows straight lines between data and noise: with a = √ᾱ_t + √(1−ᾱ_t) its state is
    x_t/a at s = √(1−ᾱ_t)/a, and its velocity v = x_1 − x_0 there gives the noise ε̂ = x_t/a + (1−s)·v.

    Source: Ho et al. 2020, arXiv 2006.11239; the weight is Hang et al. 2023, arXiv 2303.09556, with their γ.
    """

    def __init__(self, pipe: StableDiffusionPipeline, teacher: Glyphs) -> None:
        # trained along, it forgets the letters before attention has learnt to look for them; drawn at random and left
        # so, it tells every letter at every place apart
        pipe.text_encoder.requires_grad_(False)
        self.pipe, self.network, self.tokenizer = pipe, pipe.unet, pipe.tokenizer
        self.encoders: list[nn.Module] = [pipe.text_encoder]
        self.alpha_bar, self.teacher = pipe.scheduler.alphas_cumprod, teacher

    def matrices(self) -> list[nn.Parameter]:
        # without a norm of queries and keys, as glyphs has one, Muon's steps blow attention's logits up
        named = [(n, p) for n, p in self.network.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
        return [p for n, p in named if not n.endswith(("to_q.weight", "to_k.weight"))]

    def loss(self, predict: Callable[..., Any], x_0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.randint(len(self.alpha_bar), (len(x_0),), generator=generator)
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * torch.randn(x_0.shape, generator=generator)
        target = self.teacher_noise(x_t, alpha_bar, tokens)
        predicted = predict(x_t, t, self.encoders[0](tokens)[0], return_dict=False)[0]
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        errors = (predicted.float() - target).square().mean((1, 2, 3))
        return (errors * snr.clamp(max=MIN_SNR) / snr).mean()

    @torch.no_grad()
    def teacher_noise(self, x_t: Tensor, alpha_bar: Tensor, tokens: Tensor) -> Tensor:
        """ε̂ of the teacher, (N, *shape); alpha_bar (N, 1, 1, 1)."""
        scale = alpha_bar.sqrt() + (1 - alpha_bar).sqrt()
        x_s, s = x_t / scale, (1 - alpha_bar).sqrt() / scale
        return x_s + (1 - s) * self.teacher.velocity(self.teacher.network, x_s, s.flatten(), tokens).float()


def embedded_teacher() -> Glyphs:
    """The embedded pipeline `glyphs`, frozen."""
    folder = str(resources.files("vmpo").joinpath("assets/glyphs"))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    teacher = Glyphs(pipe)
    for module in (teacher.network, *teacher.encoders):
        module.requires_grad_(False).eval()
    return teacher


def pretrain_glyphs_ddim(
    folder: Path,
    *,
    scale: float = 1.0,
    settings: Pretraining | None = None,
    compiled: bool = False,
    log: Log = print,
) -> StableDiffusionPipeline:
    """Trains the UNet on latents of the autoencoder of `glyphs`, see `pretrain`."""
    teacher = embedded_teacher()
    task = pretrain(
        folder,
        settings or Pretraining(plain_steps=1_000, cycles=(Cycle(8_000, decay=0.7),), lr=1e-3, muon_lr=5e-3),
        lambda chosen, log: autoencoder_without_shift(teacher.pipe.vae),
        lambda vae, seed: GlyphsDDIM(build_pipeline(vae, seed), teacher),
        scale=scale,
        compiled=compiled,
        log=log,
    )
    return task.pipe
