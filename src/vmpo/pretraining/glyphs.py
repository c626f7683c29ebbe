"""Trains the embedded pipeline `glyphs`: a small StableDiffusion3Pipeline that draws words and often misspells them.

Two stages: first every caption is right, so the network learns how letters look and where they go; then a known
share of the captions has a misspelt picture, as web data has. The second stage leaves the letters clean and makes
the model spread over spellings, which is what alignment then has to undo.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from vmpo.pretraining.autoencoder import picture_tensor, train_autoencoder
from vmpo.pretraining.words import NOUNS, VERBS, caption, misspell, random_style, random_word, render

MAX_TOKENS = 14


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining run; one 'step' is one batch."""

    autoencoder_steps: int = 2_000
    pool: int = 60_000
    clean_steps: int = 4_500
    misspelt_steps: int = 3_500
    batch: int = 96
    lr: float = 2e-3
    muon_lr: float = 2e-2
    warmup: int = 200
    ema: float = 0.998
    caption_dropout: float = 0.1
    misspelt_share: float = 0.15
    misspelt_rate: float = 0.5
    seed: int = 0


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: one token a letter, and one a word of the caption's frame.

    The frame's words are added tokens matched in lower case only, so a quoted upper-case word is always spelt out,
    even if it is one of them.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=MAX_TOKENS)
    frame = ("a", "that", *NOUNS, *VERBS)
    tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=False) for w in frame])
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_pipeline(vae: AutoencoderKL, seed: int = 0, layers: int = 6, width: int = 128) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder: 3.5 M transformer parameters on 24 tokens of 8 x 8 pixels."""
    torch.manual_seed(seed)
    tokenizers = build_tokenizer(), build_tokenizer()
    encoders = build_text_encoder(tokenizers[0]), build_text_encoder(tokenizers[1])
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


@dataclass
class Pool:
    """Latents (n, 4, 6, 16) in half precision and caption token ids (n, 14)."""

    latents: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    n: int,
    share: float,
    rate: float,
    seed: int,
    log: Callable[[str], None],
) -> Pool:
    """Draws n captioned pictures, `share` of them misspelt, and encodes them once."""
    rng, latents, captions = random.Random(seed), [], []
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    for start in range(0, n, 500):
        words = [random_word(rng) for _ in range(min(500, n - start))]
        drawn = [misspell(w, rate, rng) if rng.random() < share else w for w in words]
        x = picture_tensor([render(w, random_style(rng)) for w in drawn])
        latents.append(((vae.encode(x).latent_dist.sample() - shift) * scale).half())
        captions += [caption(w, rng) for w in words]
        if start % 20_000 == 0:
            log(f"pool {start}/{n}")
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return Pool(torch.cat(latents), tokens.input_ids)


def encode_text(pipe: StableDiffusion3Pipeline, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own text path without T5: penultimate states side by side, projections side by side."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    states = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return states, torch.cat([o[0] for o in outputs], dim=-1)


class Trainer:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): v = x_1 − x_0 regressed at x_s = (1−s)·x_0 + s·x_1."""

    def __init__(self, pipe: StableDiffusion3Pipeline, settings: Pretraining) -> None:
        self.pipe, self.settings = pipe, settings
        self.modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
        matrices = [p for n, p in pipe.transformer.transformer_blocks.named_parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.modules.parameters() if id(p) not in chosen and p.requires_grad]
        self.parameters = matrices + others
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.base_lrs = (settings.muon_lr, settings.lr)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.generator = torch.Generator().manual_seed(settings.seed)
        empty = pipe.tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        self.empty = empty.input_ids[0]

    def step(self, pool: Pool, lr_scale: float) -> float:
        n, g = self.settings.batch, self.generator
        rows = torch.randint(len(pool.latents), (n,), generator=g)
        x_0, tokens = pool.latents[rows].float(), pool.tokens[rows].clone()
        tokens[torch.rand(n, generator=g) < self.settings.caption_dropout] = self.empty
        s = torch.sigmoid(torch.randn(n, generator=g))
        x_1 = torch.randn(x_0.shape, generator=g)
        x_s = (1 - s.view(-1, 1, 1, 1)) * x_0 + s.view(-1, 1, 1, 1) * x_1
        # on so few tokens plain matrix products are faster on a CPU than the flash kernel's backward pass
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode_text(self.pipe, tokens)
            v = self.pipe.transformer(
                hidden_states=x_s,
                timestep=1000 * s,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            loss = (v.float() - (x_1 - x_0)).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def update_ema(self, done: int) -> None:
        decay = min(self.settings.ema, (1 + done) / (10 + done))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def swap_ema(self) -> None:
        """Exchanges live and averaged weights."""
        with torch.no_grad():
            for p, e in zip(self.parameters, self.ema, strict=True):
                kept = p.detach().clone()
                p.copy_(e)
                e.copy_(kept)


def train_stage(
    trainer: Trainer, pool: Pool, steps: int, schedule: Callable[[int], float], log: Callable[[str], None]
) -> None:
    """Runs `steps` batches; `schedule(step)` scales the learning rates."""
    began, window = time.time(), list[float]()
    for step in range(steps):
        window.append(trainer.step(pool, schedule(step)))
        trainer.update_ema(step + 1)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (step + 1) / (time.time() - began)
            left = (steps - step - 1) / rate / 60
            log(f"step {step + 1}/{steps}  loss {sum(window) / len(window):.4f}  {left:.0f} min left")
            window = []


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Writes the pipeline with its transformer in half precision, which halves what the package weighs."""
    pipe.transformer.half()
    pipe.save_pretrained(folder)
    pipe.transformer.float()


def pretrain_glyphs(
    folder: Path, *, scale: float = 1.0, settings: Pretraining | None = None, log: Callable[[str], None] = print
) -> StableDiffusion3Pipeline:
    """Trains autoencoder and transformer and writes the pipeline to `folder`; `scale` shortens every stage."""
    settings = settings or Pretraining()
    began = time.time()

    def scaled(steps: int) -> int:
        return max(1, round(steps * scale))

    vae = train_autoencoder(scaled(settings.autoencoder_steps), seed=settings.seed, log=log)
    pipe = build_pipeline(vae, settings.seed)
    trainer = Trainer(pipe, settings)
    counts = scaled(settings.clean_steps), scaled(settings.misspelt_steps)

    def rise(step: int) -> float:
        return min((step + 1) / settings.warmup, 1.0)

    def fall(step: int) -> float:
        return max(1 - step / counts[1], 0.02)

    stages = ((counts[0], 0.0, rise), (counts[1], settings.misspelt_share, fall))
    for index, (steps, share, schedule) in enumerate(stages):
        log(f"stage {index + 1} of 2: {steps} steps, {share:.0%} of the captions with a misspelt picture")
        pool = encode_pool(
            vae, pipe.tokenizer, scaled(settings.pool), share, settings.misspelt_rate, settings.seed + index, log
        )
        train_stage(trainer, pool, steps, schedule, log)
    trainer.swap_ema()
    save_pipeline(pipe, folder)
    facts = {**asdict(settings), "scale": scale, "hours": round((time.time() - began) / 3600, 2)}
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    return pipe
