"""Trains the embedded pipeline `glyphs`: a small StableDiffusion3Pipeline that draws words and often misspells them.

The data comes from a careful and a careless source, and part of the captions say which (`words`). So the network learns
how letters look and what good spelling is, and spreads over right and wrong when the caption leaves the source open,
which is what alignment then has to undo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from vmpo.pretraining.autoencoder import train_autoencoder
from vmpo.pretraining.captions import build_tokenizer, text_config
from vmpo.pretraining.run import Log, pretrain
from vmpo.pretraining.settings import Pretraining


def build_pipeline(vae: AutoencoderKL, seed: int = 0, layers: int = 6, width: int = 128) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder: 3.5 M transformer parameters on 24 tokens of 8 x 8 pixels."""
    torch.manual_seed(seed)
    tokenizers = build_tokenizer(), build_tokenizer()
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, 64)) for tokenizer in tokenizers]
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=128,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


class Glyphs:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): v = x_1 − x_0 regressed at x_s = (1−s)·x_0 + s·x_1."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        self.pipe, self.network, self.tokenizer = pipe, pipe.transformer, pipe.tokenizer
        self.encoders: list[nn.Module] = [pipe.text_encoder, pipe.text_encoder_2]

    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.network.transformer_blocks.parameters() if p.ndim == 2]

    def loss(self, predict: Callable[..., Any], x_0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        s = torch.sigmoid(torch.randn(len(x_0), generator=generator))
        x_1 = torch.randn(x_0.shape, generator=generator)
        x_s = (1 - s.view(-1, 1, 1, 1)) * x_0 + s.view(-1, 1, 1, 1) * x_1
        v = self.velocity(predict, x_s, s, tokens)
        return (v.float() - (x_1 - x_0)).square().mean()

    def velocity(self, predict: Callable[..., Any], x_s: Tensor, s: Tensor, tokens: Tensor) -> Tensor:
        """The network's guess of v at states (N, *shape) and times s in [0, 1], (N,)."""
        states, pooled = self._encode(tokens)
        output: Tensor = predict(
            hidden_states=x_s,
            timestep=1000 * s,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return output

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # the pipeline's own text path without T5: penultimate states side by side, projections side by side
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        states = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        return states, torch.cat([o[0] for o in outputs], dim=-1)


def pretrain_glyphs(
    folder: Path,
    *,
    scale: float = 1.0,
    settings: Pretraining | None = None,
    compiled: bool = False,
    log: Log = print,
) -> StableDiffusion3Pipeline:
    """Trains autoencoder and transformer, see `pretrain`."""
    task = pretrain(
        folder,
        settings or Pretraining(),
        lambda chosen, log: train_autoencoder(chosen.autoencoder_steps, seed=chosen.seed, log=log),
        lambda vae, seed: Glyphs(build_pipeline(vae, seed)),
        scale=scale,
        compiled=compiled,
        log=log,
    )
    return task.pipe
