"""The style of rendered pictures, whose style is known, is read off them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from vmpo.evaluation.glyph_style import (
    UNREAD,
    StyleReading,
    entropy,
    marginals,
    marginals_of,
    read_style,
    read_styles,
    style_entropy,
)
from vmpo.pretraining.words import FONTS, INKS, Style, misspell, random_style, render, word_list


def as_images(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def rendered() -> tuple[list[str], list[Style], list[np.ndarray]]:
    rng = random.Random(17)
    words = [rng.choice(word_list("test")) for _ in range(400)]
    styles = [random_style(rng) for _ in words]
    return words, styles, [render(word, style) for word, style in zip(words, styles, strict=True)]


def accuracy(readings: Sequence[StyleReading], styles: Sequence[Style], name: str) -> float:
    return sum(getattr(r, name) == getattr(s, name) for r, s in zip(readings, styles, strict=True)) / len(styles)


def test_clean_pictures_are_read_right(rendered: tuple[list[str], list[Style], list[np.ndarray]]) -> None:
    words, styles, pictures = rendered
    readings = read_styles(as_images(pictures), words)
    assert accuracy(readings, styles, "ground") >= 0.99
    assert accuracy(readings, styles, "ink") >= 0.99
    assert accuracy(readings, styles, "font") >= 0.98


def test_noisy_blurred_pictures_are_read_right(rendered: tuple[list[str], list[Style], list[np.ndarray]]) -> None:
    words, styles, pictures = rendered
    images = as_images(pictures)
    images = 0.8 * images + 0.2 * torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images + 0.06 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    readings = read_styles(images, words)
    assert accuracy(readings, styles, "ground") >= 0.99
    assert accuracy(readings, styles, "ink") >= 0.97
    assert accuracy(readings, styles, "font") >= 0.95


def test_a_misspelt_word_keeps_its_style(rendered: tuple[list[str], list[Style], list[np.ndarray]]) -> None:
    words, styles, _ = rendered
    rng = random.Random(5)
    pictures = [render(misspell(word, 0.0, rng), style) for word, style in zip(words, styles, strict=True)]
    assert accuracy(read_styles(as_images(pictures), words), styles, "font") >= 0.85


def test_place_and_height_are_those_of_the_ink() -> None:
    picture = np.empty((24, 64, 3), np.uint8)
    picture[:] = (240, 236, 225)
    picture[5:15, 20:50] = INKS["red"]
    reading = read_style(picture, "ANY")
    assert (reading.height, reading.x, reading.y) == (10.0, 3.0, -2.0)
    assert (reading.ink, reading.ground) == ("red", "paper")
    for x, y in ((-1.0, 1.0), (1.0, -1.0)):
        drawn = read_style(render("SUN", Style(FONTS[1], 13, "white", "night", x, y)), "SUN")
        assert drawn.x == pytest.approx(5 * x, abs=1.0)
        assert drawn.y == pytest.approx(3 * y, abs=1.0)


def test_an_empty_picture_is_unread() -> None:
    reading = read_style(np.full((24, 64, 3), 40, np.uint8), "WORD")
    assert (reading.font, reading.ink, reading.ground) == (UNREAD, UNREAD, "night")
    assert math.isnan(reading.x)
    shares = marginals_of([reading, read_style(render("WORD", Style(FONTS[0], 15, "blue", "paper", 0, 0)), "WORD")])
    assert shares["font"][UNREAD] == 0.5
    assert sum(shares["x"]) == pytest.approx(1.0)


def test_marginals_are_the_shares_drawn(rendered: tuple[list[str], list[Style], list[np.ndarray]]) -> None:
    words, styles, pictures = rendered
    shares = marginals(as_images(pictures), words)
    assert set(shares) == {"font", "ink", "ground", "x", "y"}
    for name in ("font", "ink", "ground"):
        assert sum(shares[name].values()) == pytest.approx(1.0)
        for value, share in shares[name].items():
            assert share == pytest.approx(sum(getattr(s, name) == value for s in styles) / len(styles), abs=0.02)
    weights = torch.tensor([float(style.ink == "green") for style in styles])
    tilted = marginals(as_images(pictures), words, weights)
    assert tilted["ink"]["green"] == pytest.approx(1.0)
    assert tilted["ground"]["paper"] == pytest.approx(1.0)


def test_entropy_of_few_samples_is_nearly_unbiased() -> None:
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(6, (4000, 12), generator=generator)
    counts = torch.nn.functional.one_hot(draws, 6).sum(1)
    estimate = sum(entropy(c) for c in counts) / len(counts)
    assert estimate == pytest.approx(math.log(6), abs=0.02)
    naive = torch.special.entr(counts / 12).sum(1).mean().item()
    assert math.log(6) - naive > 0.1


def test_style_entropy_in_nats_a_prompt() -> None:
    rng = random.Random(3)
    readings, group = [], []
    for prompt in range(150):
        for _ in range(16):
            style = random_style(rng)
            readings.append(StyleReading(style.font, style.ink, style.ground, 10, 0, 0, 1))
            group.append(prompt)
    estimate = style_entropy(readings, group)
    assert estimate.n == 150
    assert abs(estimate.mean - math.log(3) - math.log(6)) < 0.05
    one = [StyleReading("a", "black", "paper", 10, 0, 0, 1)] * 16
    assert style_entropy(one, [0] * 16).mean == pytest.approx(0.0, abs=0.01)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        read_styles(torch.zeros(2, 3, 24, 64), ["ONE"])
