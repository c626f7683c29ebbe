"""Text anywhere in a picture, read by the engine that ships with its models."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from vmpo.errors import UserError
from vmpo.rewards import load_reward
from vmpo.rewards.scene_text import SceneTextAccuracy, load_reader

PROMPT = 'A shop window with "Hello World Open Late" on a sign'


def scene(lines: list[str]) -> torch.Tensor:
    """Dark words on a light board in a coloured scene, 384 x 384."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), 44)
    picture = Image.new("RGB", (384, 384), (90, 140, 200))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((20, 110, 364, 270), fill=(240, 240, 220))
    for number, line in enumerate(lines):
        draw.text((40, 125 + 65 * number), line, font=font, fill=(20, 20, 20))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def test_lines_are_found_read_and_joined() -> None:
    reward = load_reward("ocr_scene")
    images = torch.stack([scene(["Hello World", "Open Late"]), scene(["Hello World"]), scene([])])
    scores = reward(images, [PROMPT] * 3, [{}] * 3)
    length = len("helloworldopenlate")
    assert scores.tolist() == pytest.approx([1.0, 1 - len("openlate") / length, 0.0])
    images[0, 0, 0, 0] = torch.nan
    assert reward(images[:1], [PROMPT], [{}]).isnan().all()


def test_a_prompt_without_a_quoted_text_is_refused() -> None:
    with pytest.raises(UserError, match="double quotes"):
        SceneTextAccuracy().check_prompts(["a sign"])
    with pytest.raises(UserError, match="rapidocr or paddleocr"):
        SceneTextAccuracy(engine="tesseract")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install paddleocr"):
        SceneTextAccuracy(engine="paddleocr")


class OldEngine:
    """PaddleOCR 2.x: one page; a line is [box, (text, confidence)]; None where there is no text."""

    def __init__(self, **options: object) -> None:
        assert options["use_angle_cls"] is False

    def ocr(self, picture: np.ndarray, cls: bool) -> list[object]:
        return [None] if picture.max() == 0 else [[[[0], ("Hello", 0.9)], [[0], ("World", 0.8)]]]


class NewEngine:
    """PaddleOCR 3.x: a mapping a page."""

    def __init__(self, **options: object) -> None:
        assert options["use_textline_orientation"] is False

    def predict(self, picture: np.ndarray) -> list[dict[str, list[str]]]:
        return [{"rec_texts": [] if picture.max() == 0 else ["Hello", "World"]}]


@pytest.mark.parametrize("engine", [OldEngine, NewEngine])
def test_both_interfaces_of_paddleocr(engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models cannot be fetched in a test, so the engine is a stand-in with its interface."""
    module = types.ModuleType("paddleocr")
    module.PaddleOCR = engine  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    load_reader.cache_clear()
    try:
        reward = SceneTextAccuracy(engine="paddleocr")
        images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
        assert reward(images, ['"Hello World"', '"Hello"'], [{}, {}]).tolist() == [1.0, 0.0]
    finally:
        load_reader.cache_clear()
