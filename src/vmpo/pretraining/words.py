"""Pictures of words: the data the embedded pipeline `glyphs` is trained on.

A picture shows one upper-case word in one of three fonts, on a plain ground, at a random size,
colour and position. None of these is named by the caption, so a model of this data must spread
over all of them; only the spelling is asked for.

Pictures come from two sources, as web data does: printed ones are almost all spelt right, handmade
ones mostly not. Some captions name the source, most do not, so a model of this data knows what good
spelling is and yet misspells about half of the time when nothing is said of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 24, 64
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
SIZES = (13, 15, 17)
REACH_X, REACH_Y = 5, 3  # pixels a word may sit off the middle
INKS = {
    "black": (25, 25, 25),
    "red": (200, 30, 30),
    "green": (20, 120, 40),
    "blue": (30, 60, 190),
    "white": (245, 245, 245),
    "yellow": (250, 215, 60),
}
GROUNDS = {
    "paper": (240, 236, 225),
    "night": (35, 38, 52),
}
INKS_ON = {"paper": ("black", "red", "green", "blue"), "night": ("white", "yellow")}

MISSPELT_SHARE = {"printed": 0.03, "handmade": 0.9}
"""Share of a source's pictures in which the word is misspelt."""
KEYBOARD = ("QWERTYUIOP", "ASDFGHJKL", "ZXCVBNM")

NOUNS = ("sign", "label", "poster", "banner", "sticker")
VERBS = ("says", "reads", "shows", "spells")


@dataclass(frozen=True)
class Style:
    """How a word is drawn: font, size in pixels, ink and ground by name, shift from the middle in [-1, 1]."""

    font: str
    size: int
    ink: str
    ground: str
    x: float
    y: float


PLAIN = Style("DejaVuSansMono-Bold", 15, "black", "paper", 0.0, 0.0)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # ships the DejaVu fonts (Bitstream Vera licence), so the project need not

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def random_style(rng: random.Random) -> Style:
    """Draws font, size, colours and position independently and uniformly."""
    ground = rng.choice(("paper", "paper", "night"))
    return Style(
        font=rng.choice(FONTS),
        size=rng.choice(SIZES),
        ink=rng.choice(INKS_ON[ground]),
        ground=ground,
        x=rng.uniform(-1, 1),
        y=rng.uniform(-1, 1),
    )


def render(word: str, style: Style) -> np.ndarray:
    """Draws `word` (upper case) as a (24, 64, 3) uint8 picture; shrinks the font until the word fits."""
    size = style.size
    while True:
        font = _font(style.font, size)
        left, top, right, bottom = font.getbbox(word)
        width, height = right - left, bottom - top
        if width <= WIDTH - 4 or size <= 8:
            break
        size -= 1
    picture = Image.new("RGB", (WIDTH, HEIGHT), GROUNDS[style.ground])
    free_x, free_y = max(WIDTH - 2 - width, 0) / 2, max(HEIGHT - 2 - height, 0) / 2
    x = round(1 + free_x + style.x * min(free_x, REACH_X))
    y = round(1 + free_y + style.y * min(free_y, REACH_Y))
    ImageDraw.Draw(picture).text((x - left, y - top), word, font=font, fill=INKS[style.ink])
    return np.asarray(picture)


def caption(word: str, rng: random.Random, source: str = "a") -> str:
    """A sentence with the word in double quotes, e.g. ``a sign that says "HELLO"``; a source takes the place of "a"."""
    return f'{source} {rng.choice(NOUNS)} that {rng.choice(VERBS)} "{word}"'


@cache
def neighbours(letter: str) -> str:
    """The keys beside a letter's on a keyboard: one or two."""
    row = next(row for row in KEYBOARD if letter in row)
    place = row.index(letter)
    return row[max(place - 1, 0) : place] + row[place + 1 : place + 2]


def misspell(word: str, rate: float, rng: random.Random) -> str:
    """Slips of the hand: replaces each letter with probability `rate` by a neighbour's key, at least one in all."""
    forced = rng.randrange(len(word))
    return "".join(
        rng.choice(neighbours(letter)) if i == forced or rng.random() < rate else letter
        for i, letter in enumerate(word)
    )


@cache
def word_list(split: str) -> tuple[str, ...]:
    """The words of a split, 'train' or 'test'; the two are disjoint.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    text = resources.files("vmpo").joinpath(f"assets/prompts/words_{split}.txt").read_text()
    return tuple(text.split())


def random_word(rng: random.Random) -> str:
    """A training word: half of the time from the list, else 3 to 5 random letters that are no test word."""
    if rng.random() < 0.5:
        return rng.choice(word_list("train"))
    while True:
        word = "".join(rng.choice(LETTERS) for _ in range(rng.choice((3, 4, 4, 5, 5))))
        if word not in word_list("test"):
            return word
