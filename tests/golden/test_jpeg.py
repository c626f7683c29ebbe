"""JPEG file sizes against files written by PIL itself."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vmpo.errors import UserError
from vmpo.rewards import JPEGCompressibility, JPEGIncompressibility, jpeg_kilobytes


def noise_and_ramp() -> np.ndarray:
    noise = np.random.default_rng(7).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 96, 3))
    return np.stack([noise, ramp])


def file_size(pixels: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue())


def as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255


def test_size_is_that_of_a_file_of_quality_95() -> None:
    pixels = noise_and_ramp()
    expected = torch.tensor([file_size(picture, 95) / 1000 for picture in pixels])
    torch.testing.assert_close(jpeg_kilobytes(as_images(pixels)), expected)
    assert abs(file_size(pixels[0], 75) / 1000 - expected[0]) > 1  # the quality matters at this tolerance


def test_golden_sizes() -> None:
    # written by Pillow 13 with libjpeg-turbo
    torch.testing.assert_close(
        jpeg_kilobytes(as_images(noise_and_ramp())), torch.tensor([7.803, 1.263]), rtol=0.02, atol=0
    )


def test_signs_and_scale() -> None:
    images = as_images(noise_and_ramp())
    size, prompts = jpeg_kilobytes(images), [""] * 2
    metadata: list[dict[str, Any]] = [{}, {}]
    torch.testing.assert_close(JPEGIncompressibility()(images, prompts, metadata), size)
    torch.testing.assert_close(JPEGIncompressibility(scale=4)(images, prompts, metadata), size / 4)
    torch.testing.assert_close(JPEGCompressibility()(images, prompts, metadata), -size)
    torch.testing.assert_close(JPEGCompressibility(scale=500)(images, prompts, metadata), -size / 500)


def test_values_are_rounded_and_clamped() -> None:
    pixels = noise_and_ramp()
    images = as_images(pixels)
    nudged = torch.where(images == 1, 1.7, torch.where(images == 0, -0.3, images - 0.3 / 255))
    assert torch.equal(jpeg_kilobytes(nudged), jpeg_kilobytes(images))


def test_a_non_finite_picture_is_nan() -> None:
    images = as_images(noise_and_ramp())
    images[1, 0, 0, 0] = torch.inf
    assert jpeg_kilobytes(images).isnan().tolist() == [False, True]


@pytest.mark.parametrize("scale", [0.0, -500.0, float("nan")])
def test_a_scale_that_is_not_positive_is_a_user_error(scale: float) -> None:
    with pytest.raises(UserError, match="scale of the JPEG reward"):
        JPEGCompressibility(scale=scale)
