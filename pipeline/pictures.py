"""The images of the report page, as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def ink_is_bright(pixels: Sequence[bytes]) -> bool:
    """Whether images are bright strokes on a dark ground, as MNIST's are."""
    return bool(np.frombuffer(b"".join(pixels), np.uint8).mean() < 128) if pixels else False


def strip(pixels: Sequence[bytes], *, invert: bool, gap: int = 2) -> str:
    """Sets images side by side, parted by `gap` white columns, as a PNG data URI.

    Args:
        pixels: for each image 784 bytes.
        invert: swap dark and bright.
        gap: in pixels of the image.
    """
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, 28, 28)
    tiles = np.pad(
        255 - images if invert else images, ((0, 0), (0, 0), (0, gap)), constant_values=255
    )
    row = np.concatenate(list(tiles), axis=1)[:, : len(images) * (28 + gap) - gap]
    out = io.BytesIO()
    Image.fromarray(row).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
