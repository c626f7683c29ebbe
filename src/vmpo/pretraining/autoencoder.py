"""The autoencoder of the embedded pipeline: a 4-channel, factor-4 AutoencoderKL."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from vmpo.pretraining.words import random_style, random_word, render


def picture_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (24, 64, 3) as one tensor in [-1, 1], shape (n, 3, 24, 64)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_batch(n: int, rng: random.Random) -> torch.Tensor:
    """Pictures of random words in random styles, in [-1, 1], shape (n, 3, 24, 64)."""
    return picture_tensor([render(random_word(rng), random_style(rng)) for _ in range(n)])


def build_autoencoder(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder with 0.65 M parameters; latents of a picture are (4, 6, 16)."""
    torch.manual_seed(seed)
    widths = (16, 32, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def train_autoencoder(
    steps: int, batch: int = 32, lr: float = 2e-3, seed: int = 0, log: Callable[[str], None] = print
) -> AutoencoderKL:
    """Trains on L1 + squared error + 1e-5 x KL, then sets the latents' shift and scale to mean 0, deviation 1."""
    vae, rng = build_autoencoder(seed), random.Random(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x = picture_batch(batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = F.l1_loss(y, x) + F.mse_loss(y, x)
        loss = error + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"autoencoder {step + 1}/{steps}  L1+L2 {error.item():.4f}")
    with torch.no_grad():
        z = vae.encode(picture_batch(512, rng)).latent_dist.sample()
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
    return vae.eval()
