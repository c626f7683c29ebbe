"""Scores of the published implementations, written to JSON for the golden tests.

    python tests/golden/upstream/scores.py NAME OUT.json [--full] [--pictures FILE.npz]

NAME is hpsv2, pick_score, clip_score, aesthetic or image_reward. OUT.json gets or replaces the entry NAME. Networks are
small, or of published size with --full. Python 3.11, torch 2.13.0, torchvision 0.28.0 and

    hpsv2            hpsv2/src of https://github.com/tgxs002/HPSv2 at 866735e on PYTHONPATH, ftfy, regex, timm
    pick_score       transformers 4.36.2: the recipe of the model's card
    clip_score       openai-clip 1.0.1
    aesthetic        openai-clip 1.0.1 and image-reward 1.5, whose head is the predictor's
    image_reward     image-reward 1.5, transformers 4.36.2, timm 0.6.13, fairscale 0.4.13
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scorer_inputs as inputs

CLIP_L = {"embed_dim": 768, "vision": (24, 1024), "patch": 14, "text": (12, 768), "vocab": 49408}
CLIP_TINY = {"embed_dim": 24, "vision": (2, 128), "patch": 14, "text": (2, 64), "vocab": len(inputs.clip_vocabulary())}
Shapes = dict[str, list[int]]
Scores = tuple[list[float], dict[str, Shapes]]  # and the shapes of the network and of what else has weights
PACKAGES = [
    "torch",
    "torchvision",
    "pillow",
    "transformers",
    "timm",
    "fairscale",
    "openai-clip",
    "image-reward",
    "ftfy",
]


def load(model: torch.nn.Module) -> Shapes:
    """Puts the drawn weights into a published network."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.load_state_dict(inputs.drawn(shapes), strict=False)  # buffers of indices are left as they are
    model.eval()
    return {name: list(shape) for name, shape in shapes.items()}


def bpe_file() -> str:
    return str(inputs.write_bpe_file(Path(tempfile.mkdtemp()) / "bpe.txt.gz"))


def hpsv2(pictures: list[Image.Image], full: bool) -> Scores:
    from open_clip import CLIP, image_transform, tokenizer

    head = {"image_size": 224, "patch_size": 14, "head_width": 80}
    vision = {"layers": 32, "width": 1280, **head} if full else {"layers": 2, "width": 160, **head}
    vocab = 49408 if full else len(inputs.clip_vocabulary())
    text = {"width": 1024, "heads": 16, "layers": 24} if full else {"width": 128, "heads": 2, "layers": 2}
    model = CLIP(1024 if full else 24, vision, {"vocab_size": vocab, **text}, output_dict=True)
    shapes = {"network": load(model)}
    tokenizer._tokenizer = tokenizer.SimpleTokenizer() if full else tokenizer.SimpleTokenizer(bpe_file())
    preprocess = image_transform(224, is_train=False, resize_longest_max=True)
    scores = []
    for picture, prompt in zip(pictures, inputs.PROMPTS, strict=True):
        output = model(preprocess(picture).unsqueeze(0), tokenizer.tokenize([prompt]))
        scores.append(torch.diagonal(output["image_features"] @ output["text_features"].T).item())
    return scores, shapes


def pick_score(pictures: list[Image.Image], full: bool) -> Scores:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = Path(tempfile.mkdtemp())
    vocabulary = inputs.clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in inputs.merges())]))
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    vocab = len(vocabulary)
    text = {"vocab_size": vocab, "eos_token_id": vocab - 1, "bos_token_id": vocab - 2, "hidden_act": "gelu"}
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "patch_size": 14, "hidden_act": "gelu"}
    text |= sizes
    if full:
        large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        vision |= large
        text |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024 if full else 24))
    shapes = {"network": load(model)}
    processor = CLIPImageProcessor()
    scores = []
    for picture, prompt in zip(pictures, inputs.PROMPTS, strict=True):
        image = model.get_image_features(processor(picture, return_tensors="pt").pixel_values)
        tokens = tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        words = model.get_text_features(**tokens)
        image, words = (x / torch.norm(x, dim=-1, keepdim=True) for x in (image, words))
        scores.append((model.logit_scale.exp() * (words @ image.T))[0].item())
    return scores, shapes


def openai_clip(full: bool) -> tuple[Any, dict[str, Shapes], Callable[[Image.Image], torch.Tensor]]:
    import clip.clip
    from clip.model import CLIP
    from clip.simple_tokenizer import SimpleTokenizer

    size = CLIP_L if full else CLIP_TINY
    (depth, width), (text_depth, text_width) = size["vision"], size["text"]
    model = CLIP(
        size["embed_dim"], 224, depth, width, size["patch"], 77, size["vocab"], text_width, text_width // 64, text_depth
    )
    shapes = {"network": load(model)}
    clip.clip._tokenizer = SimpleTokenizer() if full else SimpleTokenizer(bpe_file())
    return model, shapes, clip.clip._transform(224)


def clip_score(pictures: list[Image.Image], full: bool) -> Scores:
    import clip

    model, shapes, preprocess = openai_clip(full)
    scores = []
    for picture, prompt in zip(pictures, inputs.PROMPTS, strict=True):
        image = model.encode_image(preprocess(picture).unsqueeze(0))
        words = model.encode_text(clip.tokenize(prompt, truncate=True))
        scores.append(torch.nn.functional.cosine_similarity(image, words).item())
    return scores, shapes


def aesthetic(pictures: list[Image.Image], full: bool) -> Scores:
    without_training()
    from ImageReward.models.AestheticScore import MLP

    model, shapes, preprocess = openai_clip(full)
    head = MLP(model.text_projection.shape[1])
    shapes["head"] = load(head)
    features = [model.encode_image(preprocess(picture).unsqueeze(0)) for picture in pictures]
    return [head(torch.nn.functional.normalize(feature)).item() for feature in features], shapes


def without_training() -> None:
    """Imports image-reward without its training code, which wants diffusers and datasets of its time."""
    sys.modules["ImageReward.ReFL"] = types.ModuleType("ReFL")


def image_reward(pictures: list[Image.Image], full: bool) -> Scores:
    without_training()
    from ImageReward.models.AestheticScore import MLP
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    module = importlib.import_module("ImageReward.ImageReward")  # the package's own name is the class
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.txt").write_text("\n".join(inputs.bert_vocabulary()))
    blip_pretrain.init_tokenizer = lambda: BertTokenizer(str(folder / "vocab.txt"))
    med = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if not full:
        med = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
        tiny = VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, drop_path_rate=0.1)
        blip_pretrain.create_vit = lambda *_: (tiny, 128)
        module.MLP = lambda _: MLP(64)
    med |= {"vocab_size": 30524 if full else len(inputs.bert_vocabulary()), "max_position_embeddings": 512}
    med |= {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    med |= {"add_cross_attention": True, "encoder_width": 768, "model_type": "bert"}
    (folder / "med_config.json").write_text(json.dumps(med))
    model = module.ImageReward(med_config=str(folder / "med_config.json"))
    shapes = {"network": load(model)}
    return [model.score(prompt, picture) for picture, prompt in zip(pictures, inputs.PROMPTS, strict=True)], shapes


SCORERS = {f.__name__: f for f in (hpsv2, pick_score, clip_score, aesthetic, image_reward)}


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SCORERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    arrays = list(np.load(given.pictures).values()) if given.pictures else inputs.pictures()
    torch.manual_seed(0)
    scores, shapes = SCORERS[given.name]([Image.fromarray(array) for array in arrays], given.full)
    entries = json.loads(given.out.read_text()) if given.out.exists() else {}
    entries[given.name] = {
        "command": f"python tests/golden/upstream/scores.py {given.name} tests/golden/scores.json",
        "versions": versions(),
        "scores": scores,
        "shapes": shapes,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
    given.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
