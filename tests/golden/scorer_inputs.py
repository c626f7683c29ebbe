"""Pictures, prompts, vocabularies and weights of the golden scores, all made here: only the scores are stored.

Read by the tests and by `tests/golden/upstream/`, which runs with the published packages and without vmpo.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# height, width: square, tall, wide, smaller and larger than a network's input; 227 and 231 leave odd margins to cut
SIZES = [(224, 224), (512, 512), (64, 64), (48, 120), (301, 157), (157, 301), (225, 227), (640, 360)]
SIZES += [(360, 640), (100, 333), (333, 100), (24, 64), (227, 224), (224, 231), (384, 512), (30, 30)]

PROMPTS = [
    "a photo of a cat",
    "",
    "A painting of a FOX in the snow, in the style of an old master",
    'a sign that says "HELLO World 2024"',
    "two red apples on a table & one green pear &amp; a blue cup",
    "the king’s “golden” crown",
    "cat cat cat " * 40,
    "a  photo \n of   a tower",
    "naïve café, 東京の夜, \U0001f98a",
    "it's what we've always said: don't!!! (really?)",
    "1234567890 one two three",
    "a photo of the sea. " * 6,
    "x",
    "<b>bold</b> #tag @name $5 50%",
    "a cat on a red table in the snow with a cup of tea and a fox by the sea at night",
    "tower",
]

WORDS = [
    "photo",
    "cat",
    "of",
    "the",
    "in",
    "painting",
    "snow",
    "fox",
    "red",
    "table",
    "tower",
    "sea",
    "on",
    "tea",
    "and",
]


def _text(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    canvas = Image.new("RGB", (width, height), (235, 230, 210))
    font = ImageFont.load_default_imagefont()  # a bitmap: the same pixels everywhere
    for line in range(max(1, height // 14)):
        word = "".join(rng.choice(list("ABCDEFGHIJKLMNOP "), 12))
        ImageDraw.Draw(canvas).text((3, 2 + 14 * line), word, fill=(20, 20, 90), font=font)
    return np.asarray(canvas) / 255


def picture(index: int) -> np.ndarray:
    """Picture (H, W, 3), uint8: noise, ramps, checks, text, discs, waves, walks or stripes."""
    height, width = SIZES[index]
    rng = np.random.default_rng(100 + index)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    radius = np.hypot(x - width * rng.random(), y - height * rng.random()) / min(height, width)
    content = [
        lambda: rng.random((height, width, 3)),
        lambda: np.stack([x / width, y / height, 1 - x / width], -1),
        lambda: ((x // 8 + y // 8) % 2)[..., None] * np.array([1.0, 0.6, 0.2]),
        lambda: _text(height, width, rng),
        lambda: np.stack([radius < r for r in (0.2, 0.3, 0.45)], -1) * 0.9,
        lambda: np.stack([0.5 + 0.5 * np.sin(x / k + y / (k + 3)) for k in (3, 7, 19)], -1),
        lambda: (rng.random((height, width, 3)) - 0.5).cumsum(0).cumsum(1) / 20 % 1.0,
        lambda: np.stack([x % 16 < 4, y % 24 < 5, (x + y) % 10 < 3], -1).astype(float),
    ][index % 8]()
    return np.round(255 * np.clip(content, 0, 1)).astype(np.uint8)


def pictures() -> list[np.ndarray]:
    return [picture(index) for index in range(len(SIZES))]


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights of published names and shapes; each tensor's numbers depend on its name and shape alone."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("logit_scale"):
            values = np.full(shape, np.log(100), np.float32)
        elif "norm" in name.lower() or "ln_" in name:
            values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
        elif len(shape) >= 2 and "embed" not in name:
            values = 1.5 * values / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("bias"):
            values = 0.2 * values
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


# vocabularies


def _bytes_as_characters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]


def merges() -> list[tuple[str, str]]:
    """Merges that build each of the words from the left."""
    pairs = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        pairs += [("".join(pieces[:k]), pieces[k]) for k in range(1, len(pieces))]
    return list(dict.fromkeys(pairs))


def clip_vocabulary() -> dict[str, int]:
    characters = _bytes_as_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges())]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_bpe_file(path: Path) -> Path:
    """The merges in the format of OpenAI's and open_clip's vocabulary file."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def bert_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"!\"#$%&'(),-.:;<>?@",
        *letters,
        *("##" + c for c in letters),
        *WORDS,
    ]
