"""Reads the style of a picture of the embedded task: font, ink, ground, height and position of the word.

The captions name none of these, so the reference spreads over all of them, and a faithful policy keeps the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmpo.evaluation.statistics import Estimate, clustered_mean
from vmpo.pretraining.words import FONTS, GROUNDS, HEIGHT, INKS, REACH_X, REACH_Y, SIZES, WIDTH, Style, render

UNREAD = "unread"
MIN_CONTRAST = 60.0
"""Distance in RGB (0-255) of ink from ground below which a picture counts as empty."""
MIN_CORRELATION = 0.3
"""Correlation with the best template below which no font is named."""
EDGES_X = np.linspace(-REACH_X - 1, REACH_X + 1, 7)
EDGES_Y = np.linspace(-REACH_Y - 1, REACH_Y + 1, 5)

_SMALLEST = 8  # `render` stops shrinking here

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StyleReading:
    """What was read off a picture: names, height in pixels, centre of the word off the middle in pixels (right, down).

    An empty picture is 'unread' in font and ink with NaN measures; `correlation` is that with the best template.
    """

    font: str
    ink: str
    ground: str
    height: float
    x: float
    y: float
    correlation: float


def _nearest(colour: Floats, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(colour - palette[name]).sum()))


def _box(coverage: Floats) -> tuple[int, int, int, int]:
    """Top, bottom, left, right (ends excluded) of what is covered by more than a third."""
    rows, columns = np.nonzero(coverage.max(axis=1) > 0.35)[0], np.nonzero(coverage.max(axis=0) > 0.35)[0]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@lru_cache(maxsize=4096)
def _templates(word: str) -> tuple[tuple[str, Floats], ...]:
    """Font and tight coverage of the word in every font and size it can be drawn in."""
    paper, black = (np.array(colour, float) for colour in (GROUNDS["paper"], INKS["black"]))
    found: dict[tuple[str, tuple[int, ...], bytes], tuple[str, Floats]] = {}
    for font in FONTS:
        for size in range(_SMALLEST, max(SIZES) + 1):
            picture = render(word, Style(font, size, "black", "paper", 0.0, 0.0)).astype(float)
            coverage = ((paper - picture) @ (paper - black)) / np.square(paper - black).sum()
            if not (coverage > 0.35).any():
                continue
            top, bottom, left, right = _box(coverage)
            tight = coverage[top:bottom, left:right]
            found.setdefault((font, tight.shape, tight.round(3).tobytes()), (font, tight))
    return tuple(found.values())


def _font(coverage: Floats, box: tuple[int, int, int, int], word: str) -> tuple[str, float]:
    """Font of the template that correlates best near the box, and that correlation; sizes far off are not tried."""
    top, bottom, left, right = box
    templates = _templates(word)
    misfit = [abs(t.shape[0] - (bottom - top)) + abs(t.shape[1] - (right - left)) for _, t in templates]
    allowed = max(4, min(misfit, default=0) + 2)
    canvas = coverage - coverage.mean()
    norm = np.linalg.norm(canvas)
    best = (UNREAD, 0.0)
    for (font, template), off in zip(templates, misfit, strict=True):
        if off > allowed:
            continue
        # a template may be smaller than the box (a stray pixel) or larger (a lost serif): try every fit by one pixel
        height, width = template.shape
        slack_y, slack_x = bottom - top - height, right - left - width
        for y in range(top + min(0, slack_y) - 1, top + max(0, slack_y) + 2):
            for x in range(left + min(0, slack_x) - 1, left + max(0, slack_x) + 2):
                if y < 0 or x < 0 or y + height > canvas.shape[0] or x + width > canvas.shape[1]:
                    continue
                overlap = float((canvas[y : y + height, x : x + width] * template).sum())
                mass = template.sum()
                spread = math.sqrt(float(np.square(template).sum() - mass**2 / canvas.size))
                correlation = float(overlap / (norm * spread))
                if correlation > best[1]:
                    best = (font, correlation)
    return best if best[1] >= MIN_CORRELATION else (UNREAD, best[1])


def read_style(picture: NDArray[Any], word: str) -> StyleReading:
    """Reads the style of one picture.

    Ground: the named colour nearest to the median of the border. Ink: that nearest to the pixels farthest from the
    ground. Coverage is the projection of each pixel on the line from ground to ink; its bounding box gives height and
    place, and the best-correlating drawing of the word the font.

    Arguments:
        picture: (H, W, 3) uint8, or numbers in [0, 255].
        word: The word to compare with: what the picture is meant to show or, better, what a recogniser read.
    """
    pixels = np.asarray(picture, dtype=float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground_colour = np.median(border, axis=0)
    ground = _nearest(ground_colour, GROUNDS)
    away = np.linalg.norm(pixels - ground_colour, axis=-1)
    contrast = float(away.max())
    if contrast < MIN_CONTRAST:
        return StyleReading(UNREAD, UNREAD, ground, math.nan, math.nan, math.nan, 0.0)
    ink_colour = np.median(pixels[away >= 0.85 * contrast], axis=0)
    direction = ink_colour - ground_colour
    coverage = np.clip((pixels - ground_colour) @ direction / np.square(direction).sum(), 0.0, 1.0)
    box = top, bottom, left, right = _box(coverage)
    font, correlation = _font(coverage, box, word.upper())
    height, width = coverage.shape
    return StyleReading(
        font=font,
        ink=_nearest(ink_colour, INKS),
        ground=ground,
        height=float(bottom - top),
        x=(left + right - width) / 2,
        y=(top + bottom - height) / 2,
        correlation=correlation,
    )


def read_styles(images: Tensor, words: Sequence[str]) -> list[StyleReading]:
    """`read_style` of each picture.

    Arguments:
        images: (B, 3, 24, 64) in [0, 1], as rewards get them.
        words: B words.

    Raises:
        ValueError: for another shape or number of words.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, HEIGHT, WIDTH) or len(words) != images.shape[0]:
        raise ValueError(
            f"images have shape {tuple(images.shape)} with {len(words)} words; "
            f"they must be (B, 3, {HEIGHT}, {WIDTH}) with B words"
        )
    pixels = (images.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
    return [read_style(picture, word) for picture, word in zip(pixels, words, strict=True)]


def _shares(names: Sequence[str], weights: Floats, known: Sequence[str]) -> dict[str, float]:
    shares = {name: 0.0 for name in known}
    for name, weight in zip(names, weights, strict=True):
        shares[name] = shares.get(name, 0.0) + float(weight)
    return shares


def _histogram(values: Sequence[float], weights: Floats, edges: Floats) -> list[float]:
    x = np.array(values)
    seen = ~np.isnan(x)
    counts, _ = np.histogram(np.clip(x[seen], edges[0], edges[-1]), bins=edges, weights=weights[seen])
    return [float(v) for v in counts / max(float(counts.sum()), 1e-300)]


def marginals_of(readings: Sequence[StyleReading], weights: Tensor | None = None) -> dict[str, Any]:
    """Shares of each font, ink and ground, and of each place (histograms over `EDGES_X`, `EDGES_Y`, in pixels).

    Arguments:
        readings: One a picture.
        weights: (B,) not negative, e.g. those of base samples under the tilted distribution; equal by default.
            Empty pictures count under 'unread', which is listed only where there are any.

    Raises:
        ValueError: if there is nothing to share out.
    """
    w = np.ones(len(readings)) if weights is None else weights.detach().cpu().double().numpy().ravel()
    if len(w) != len(readings) or not w.sum() > 0:
        raise ValueError(f"{len(readings)} readings with weights of length {len(w)} and sum {w.sum():g}")
    w = w / w.sum()
    return {
        "font": _shares([r.font for r in readings], w, FONTS),
        "ink": _shares([r.ink for r in readings], w, tuple(INKS)),
        "ground": _shares([r.ground for r in readings], w, tuple(GROUNDS)),
        "x": _histogram([r.x for r in readings], w, EDGES_X),
        "y": _histogram([r.y for r in readings], w, EDGES_Y),
    }


def marginals(images: Tensor, words: Sequence[str], weights: Tensor | None = None) -> dict[str, Any]:
    """`marginals_of` the styles read off the pictures, (B, 3, 24, 64) in [0, 1]."""
    return marginals_of(read_styles(images, words), weights)


def entropy(counts: Tensor) -> float:
    """Entropy in nats of the distribution behind counts, nearly unbiased for few samples.

    H = ψ(n) − (1/n) Σ n_i G(n_i),  G(n) = ψ(n) + ½(−1)ⁿ (ψ((n+1)/2) − ψ(n/2)); clipped at 0.
    Source: Grassberger (2003), arXiv:physics/0307138; for a fixed n Schürmann (2004), arXiv:cond-mat/0403192.
    """
    n = counts[counts > 0].double()
    sign = 1 - 2 * (n % 2)
    g = torch.digamma(n) + 0.5 * sign * (torch.digamma((n + 1) / 2) - torch.digamma(n / 2))
    total = n.sum()
    return max(float(torch.digamma(total) - (n * g).sum() / total), 0.0)


def style_entropy(readings: Sequence[StyleReading], group: Sequence[int]) -> Estimate:
    """Entropy of font plus entropy of colour (ink on ground) of the pictures of a prompt, nats, averaged over prompts.

    The two are added rather than taken jointly because a handful of pictures a prompt cannot fill the joint table; the
    data has log 3 + log 6 = 2.89 nats. Unread pictures are left out, and prompts with fewer than two others.

    Arguments:
        readings: One a picture.
        group: The prompt of each.
    """
    by_prompt: dict[int, list[StyleReading]] = {}
    for reading, prompt in zip(readings, group, strict=True):
        styles = by_prompt.setdefault(int(prompt), [])
        if UNREAD not in (reading.font, reading.ink):
            styles.append(reading)
    entropies = [
        entropy(_counts([r.font for r in styles])) + entropy(_counts([f"{r.ink} {r.ground}" for r in styles]))
        if len(styles) > 1
        else math.nan
        for styles in by_prompt.values()
    ]
    return clustered_mean(torch.tensor(entropies, dtype=torch.float64))


def _counts(names: Sequence[str]) -> Tensor:
    return torch.tensor([names.count(name) for name in sorted(set(names))])
