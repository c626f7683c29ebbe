"""Pictures as text: base64 of PNG, which loses nothing of the 8 bits a channel."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 2**26  # 8192 x 8192: a small file may otherwise unpack to gigabytes
FAST = 1  # of zlib's levels: a tenth of the time for a tenth more bytes


def encode_png(picture: Image.Image) -> str:
    """Base64 of a picture's PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=FAST)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_png(text: str) -> Tensor:
    """The picture (3, H, W) in [0, 1] of base64 of a PNG file.

    Raises:
        ValueError: if it is no base64, no PNG, or has more than 2^26 pixels.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64") from error
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels; at most {MAX_PIXELS} are taken")
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("not a PNG file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
