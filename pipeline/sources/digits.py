"""``digits``: the 1,797 handwritten digits that come with scikit-learn. Needs no network.

They are 8x8 images with 17 levels of grey (the test part of the UCI set "Optical Recognition
of Handwritten Digits"), scaled to 0-255 and resized to 28x28. They have no test part of their
own, so a fifth of them, by the hash of their pixels, is set aside as one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.dataset import NUM_PIXELS
from pipeline.records import id_bits, image_ids
from pipeline.sources import Block, NumberedRows, RawRows, ranges

TITLE = "the 1,797 8x8 digits that come with scikit-learn (not MNIST)"
ROWS_PER_BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """The digits of scikit-learn; see `pipeline.sources.Source`."""

    specs: tuple[str, ...] = ("digits",)
    default_split_by: str = "hash"
    has_order: bool = True
    class_names: tuple[str, ...] = tuple("0123456789")

    @property
    def part_sizes(self) -> dict[str, int]:
        """Rows of each part."""
        return {part: len(labels) for part, (_, labels) in _load().items()}

    def describe(self) -> dict[str, Any]:
        """Says that this is not MNIST."""
        return {"kind": "digits", "title": TITLE}

    def fingerprint(self) -> list[Any]:
        """Nothing: the digits are the same everywhere."""
        return []

    def blocks(self) -> list[Block]:
        """Ranges of rows."""
        return ranges(self.part_sizes, ROWS_PER_BLOCK)

    def read(self, block: Block) -> Iterator[RawRows]:
        """Yields the rows of a block."""
        pixels, labels = _load()[block.part]
        positions = np.arange(block.first, block.first + block.size)
        origins = NumberedRows(f"digits/{block.part}", positions)
        yield RawRows(block.part, positions, pixels[positions], labels[positions], origins)


def open_source(_: str) -> DigitsSource:
    """Opens the digits."""
    return DigitsSource()


@functools.cache
def _load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads, resizes and parts the digits: uint8 [n, 784] and int64 [n] of each part."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    levels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    pixels = np.stack([resize(image) for image in levels]).reshape(-1, NUM_PIXELS)
    is_test = np.array([id_bits(name, 32, 32) < 2**32 / 5 for name in image_ids(pixels)])
    return {
        "train": (pixels[~is_test], labels[~is_test].astype(np.int64)),
        "test": (pixels[is_test], labels[is_test].astype(np.int64)),
    }


def resize(image: np.ndarray) -> np.ndarray:
    """Resizes a uint8 image [h, w] to [28, 28] by bicubic interpolation, in integer arithmetic."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC))
