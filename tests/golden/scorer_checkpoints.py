"""Small checkpoints in the published formats, with the weights and vocabularies of the golden scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPTokenizer

from tests.golden import scorer_inputs as inputs
from vmpo.features.open_clip import clip_from_open_clip

GOLDEN = json.loads((Path(__file__).parent / "scores.json").read_text())
SCORERS = ["hpsv2", "pick_score", "clip_score", "aesthetic", "image_reward"]
CLIP_SCORERS = SCORERS[:-1]


def as_images(picture: np.ndarray) -> Tensor:
    """Picture (H, W, 3) of bytes as a batch (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None] / 255


def weights_of(scorer: str, part: str = "network", golden: dict[str, Any] = GOLDEN) -> dict[str, Tensor]:
    """The state dict of a published network, or of the aesthetic predictor's head."""
    return inputs.drawn({name: tuple(shape) for name, shape in golden[scorer]["shapes"][part].items()})


def clip_vocabulary(folder: Path) -> str:
    CLIPTokenizer(vocab=inputs.clip_vocabulary(), merges=inputs.merges()).save_pretrained(folder)
    return str(folder)


def _openai_clip(state: dict[str, Tensor], folder: Path) -> str:
    clip_from_open_clip(state, "a state dict", activation="quick_gelu").save_pretrained(folder)
    return str(folder)


def hpsv2(folder: Path) -> dict[str, Any]:
    torch.save({"epoch": 1, "state_dict": weights_of("hpsv2")}, folder / "HPS_v2.1_compressed.pt")
    return {"weights": str(folder / "HPS_v2.1_compressed.pt"), "tokenizer": clip_vocabulary(folder / "tokenizer")}


def pick_score(folder: Path) -> dict[str, Any]:
    vocab = len(inputs.clip_vocabulary())
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"hidden_act": "gelu"}
    text = {**tower, "vocab_size": vocab, "eos_token_id": vocab - 1, "bos_token_id": vocab - 2}
    CLIPConfig(text_config=text, vision_config={**tower, "patch_size": 14}, projection_dim=24).save_pretrained(folder)
    save_file(weights_of("pick_score"), folder / "model.safetensors", metadata={"format": "pt"})
    return {"weights": str(folder), "tokenizer": clip_vocabulary(folder / "tokenizer")}


def clip_score(folder: Path) -> dict[str, Any]:
    return {"weights": _openai_clip(weights_of("clip_score"), folder), "tokenizer": clip_vocabulary(folder)}


def aesthetic(folder: Path) -> dict[str, Any]:
    head = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(weights_of("aesthetic", "head"), head)
    return {"weights": str(head), "clip": _openai_clip(weights_of("aesthetic"), folder / "clip")}


def image_reward(folder: Path) -> dict[str, Any]:
    torch.save(weights_of("image_reward"), folder / "ImageReward.pt")
    vocabulary = {token: i for i, token in enumerate(inputs.bert_vocabulary())}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder / "tokenizer")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "tokenizer")}


WRITERS = {f.__name__: f for f in (hpsv2, pick_score, clip_score, aesthetic, image_reward)}


def write_checkpoint(scorer: str, folder: Path) -> dict[str, Any]:
    """Writes the small checkpoint; returns the options of the reward that reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[scorer](folder)
