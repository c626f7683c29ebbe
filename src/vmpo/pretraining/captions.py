"""Captioned pictures for the embedded pipelines: the tokenizer, the two sources and the pool of latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTokenizer

from vmpo.pretraining.autoencoder import picture_tensor
from vmpo.pretraining.settings import Pretraining
from vmpo.pretraining.words import (
    LETTERS,
    MISSPELT_SHARE,
    NOUNS,
    PLAIN,
    VERBS,
    caption,
    misspell,
    random_style,
    random_word,
    render,
)

MAX_TOKENS = 14


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


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextConfig:
    """A text encoder of that width, heads of 16."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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


def plain(rng: random.Random) -> tuple[str, str]:
    """As `captioned`, but five letters, spelt right: every letter has its place, once the style is one."""
    word = "".join(rng.choice(LETTERS) for _ in range(5))
    return caption(word, rng, "printed"), word


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    settings: Pretraining,
    log: Callable[[str], None],
    *,
    plainly: bool = False,
) -> Pool:
    """Draws `settings.pool` captioned pictures (a tenth of them if plain, in one style) and encodes them once."""
    count = max(1, settings.pool // 10) if plainly else settings.pool
    rng, latents, captions = random.Random(settings.seed), list[torch.Tensor](), list[str]()
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    while len(captions) < count:
        number = min(500, count - len(captions))
        chunk = [plain(rng) if plainly else captioned(settings, rng) for _ in range(number)]
        x = picture_tensor([render(drawn, PLAIN if plainly else random_style(rng)) for _, drawn in chunk])
        latents.append(((vae.encode(x).latent_dist.sample() - shift) * scale).half())
        captions += [text for text, _ in chunk]
        if len(captions) % 20_000 == 0:
            log(f"pictures {len(captions)}/{count}")
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return Pool(torch.cat(latents), tokens.input_ids)
