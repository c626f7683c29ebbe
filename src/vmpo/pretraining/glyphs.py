"""Trains the embedded pipeline `glyphs`: a small StableDiffusion3Pipeline that draws words and often misspells them.

The data comes from a careful and a careless source, and part of the captions say which (`words`). So the network learns
how letters look and what good spelling is, and spreads over right and wrong when the caption leaves the source open,
which is what alignment then has to undo.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from vmpo.errors import UserError
from vmpo.pretraining.autoencoder import picture_tensor, train_autoencoder
from vmpo.pretraining.words import (
    MISSPELT_SHARE,
    NOUNS,
    VERBS,
    caption,
    misspell,
    random_style,
    random_word,
    render,
)

MAX_TOKENS = 14
STATE = "state.pt"


@dataclass(frozen=True)
class Cycle:
    """`steps` batches; the learning rates rise to `peak` of the full ones and fall to 0 over the last `decay` share."""

    steps: int
    peak: float = 1.0
    decay: float = 0.5


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining run; one 'step' is one batch."""

    autoencoder_steps: int = 2_000
    pool: int = 80_000
    cycles: tuple[Cycle, ...] = (Cycle(14_000), Cycle(5_000, peak=0.5, decay=0.9))
    batch: int = 96
    lr: float = 2e-3
    muon_lr: float = 2e-2
    warmup: int = 200
    ema: float = 0.998
    caption_dropout: float = 0.1
    handmade_share: float = 0.5
    named_share: float = 0.6  # of the captions say the source
    misspelt_rate: float = 0.7
    seed: int = 0

    @property
    def steps(self) -> int:
        """Batches of all cycles."""
        return sum(cycle.steps for cycle in self.cycles)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: one token a letter, and one a word of the caption's frame.

    The frame's words are added tokens matched in lower case only, so a quoted upper-case word is always spelt out,
    even if it is one of them.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=MAX_TOKENS)
    frame = ("a", *MISSPELT_SHARE, "that", *NOUNS, *VERBS)
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


def captioned(settings: Pretraining, rng: random.Random) -> tuple[str, str]:
    """A caption and the word its picture shows."""
    word = random_word(rng)
    source = "handmade" if rng.random() < settings.handmade_share else "printed"
    drawn = misspell(word, settings.misspelt_rate, rng) if rng.random() < MISSPELT_SHARE[source] else word
    return caption(word, rng, source if rng.random() < settings.named_share else "a"), drawn


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, settings: Pretraining, log: Callable[[str], None]
) -> Pool:
    """Draws `settings.pool` captioned pictures and encodes them once."""
    rng, latents, captions = random.Random(settings.seed), list[torch.Tensor](), list[str]()
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    while len(captions) < settings.pool:
        chunk = [captioned(settings, rng) for _ in range(min(500, settings.pool - len(captions)))]
        x = picture_tensor([render(drawn, random_style(rng)) for _, drawn in chunk])
        latents.append(((vae.encode(x).latent_dist.sample() - shift) * scale).half())
        captions += [text for text, _ in chunk]
        if len(captions) % 20_000 == 0:
            log(f"pictures {len(captions)}/{settings.pool}")
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return Pool(torch.cat(latents), tokens.input_ids)


def encode_text(pipe: StableDiffusion3Pipeline, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own text path without T5: penultimate states side by side, projections side by side."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    states = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return states, torch.cat([o[0] for o in outputs], dim=-1)


class Trainer:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): v = x_1 − x_0 regressed at x_s = (1−s)·x_0 + s·x_1."""

    def __init__(self, pipe: StableDiffusion3Pipeline, settings: Pretraining, compiled: bool = False) -> None:
        self.pipe, self.settings = pipe, settings
        # the pipeline keeps the plain module, so that what is saved does not know of the compiler
        self.predict = torch.compile(pipe.transformer.forward) if compiled else pipe.transformer
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
        self.done = 0
        empty = pipe.tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        self.empty = empty.input_ids[0]

    def lr_scale(self) -> float:
        """The present share of the full learning rates."""
        done = self.done
        for cycle in self.settings.cycles:
            if done < cycle.steps:
                rise = min((done + 1) / self.settings.warmup, 1.0)
                return cycle.peak * min(rise, (cycle.steps - done) / (cycle.decay * cycle.steps))
            done -= cycle.steps
        return 0.0

    def step(self, pool: Pool) -> float:
        """One batch; returns its loss."""
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
            v = self.predict(
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
                group["lr"] = lr * self.lr_scale()
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        self.update_ema()
        return loss.item()

    def update_ema(self) -> None:
        decay = min(self.settings.ema, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def swap_ema(self) -> None:
        """Exchanges live and averaged weights."""
        with torch.no_grad():
            for p, e in zip(self.parameters, self.ema, strict=True):
                kept = p.detach().clone()
                p.copy_(e)
                e.copy_(kept)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly where this is."""
        return {
            "settings": asdict(self.settings),
            "done": self.done,
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.done = state["done"]
        with torch.no_grad():
            for mine, kept in zip([*self.parameters, *self.ema], [*state["parameters"], *state["ema"]], strict=True):
                mine.copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])


def train(trainer: Trainer, pool: Pool, folder: Path, log: Callable[[str], None]) -> None:
    """Runs the steps that are left; keeps the whole state every 1,000 of them and at the end."""
    began, first, window = time.time(), trainer.done, list[float]()
    total = trainer.settings.steps
    while trainer.done < total:
        window.append(trainer.step(pool))
        if trainer.done % 50 == 0 or trainer.done == total:
            left = (total - trainer.done) * (time.time() - began) / (trainer.done - first) / 60
            log(f"step {trainer.done}/{total}  loss {sum(window) / len(window):.4f}  {left:.0f} min left")
            window = []
        if trainer.done % 1_000 == 0 or trainer.done == total:
            partial = folder / "state.partial"
            torch.save(trainer.state(), partial)
            partial.replace(folder / STATE)


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Writes the pipeline with its transformer in half precision, which halves what the package weighs."""
    pipe.transformer.half()
    pipe.save_pretrained(folder)
    pipe.transformer.float()


def pretrain_glyphs(
    folder: Path,
    *,
    scale: float = 1.0,
    settings: Pretraining | None = None,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> StableDiffusion3Pipeline:
    """Trains autoencoder and transformer and writes the pipeline to `folder`, or goes on with what was begun there.

    Args:
        scale: shortens everything, for trials.
        compiled: compiles the transformer (a minute, needs a C++ compiler), which takes a third off each step.

    Raises:
        UserError: if the folder holds a run with other settings.
    """
    settings = scaled(settings or Pretraining(), scale)
    folder.mkdir(parents=True, exist_ok=True)
    began, vae_folder, state_file = time.time(), folder / "vae", folder / STATE
    state = torch.load(state_file, weights_only=True) if state_file.is_file() else None
    if state is not None and state["settings"] != asdict(settings):
        raise UserError(f"'{folder}' holds a pretraining run with other settings; pass another --out")
    if state is not None:
        vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    else:
        vae = train_autoencoder(settings.autoencoder_steps, seed=settings.seed, log=log)
        vae.save_pretrained(vae_folder)
    torch.manual_seed(settings.seed)  # the pool samples the autoencoder's posterior
    pipe = build_pipeline(vae, settings.seed)
    trainer = Trainer(pipe, settings, compiled)
    if state is not None:
        trainer.load_state(state)
        log(f"goes on at step {trainer.done}")
    train(trainer, encode_pool(vae, pipe.tokenizer, settings, log), folder, log)
    trainer.swap_ema()
    save_pipeline(pipe, folder)
    facts = {**asdict(settings), "hours": round((time.time() - began) / 3600, 2)}
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    return pipe


def scaled(settings: Pretraining, scale: float) -> Pretraining:
    """The settings with every count shortened."""

    def shorter(count: int) -> int:
        return max(1, round(count * scale))

    return replace(
        settings,
        autoencoder_steps=shorter(settings.autoencoder_steps),
        pool=shorter(settings.pool),
        cycles=tuple(replace(cycle, steps=shorter(cycle.steps)) for cycle in settings.cycles),
    )
