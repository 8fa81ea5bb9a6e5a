"""What images of digits differ in beside their class: ink and stroke width, and slices by them.

Both are whole numbers from 0 to 255 (levels), so that any number of images merge exactly, as
counts of images by level, and their quartiles are found from those counts in one pass.

Synopsis::

    counts = np.bincount(levels(pixels)["ink"], minlength=LEVELS)
    for first, last in quartiles(counts): ...
"""

from __future__ import annotations

import numpy as np

LEVELS = 256
BINS = 64  # of a histogram that is kept with a dataset: its levels in fours
SIDE = 28
MEASURES = ("ink", "stroke_width")
# What one level is: a step of intensity, and a sixteenth of a pixel.
STEPS = {"ink": 1.0, "stroke_width": 1 / 16}
INK_FROM = 128


def ink_levels(pixels: np.ndarray) -> np.ndarray:
    """The mean of each image's bytes, rounded down.

    Args:
        pixels: uint8 [n, 784].

    Returns:
        uint8 [n].
    """
    return (pixels.sum(axis=1, dtype=np.uint32) // pixels.shape[1]).astype(np.uint8)


def stroke_levels(pixels: np.ndarray) -> np.ndarray:
    """The width of each image's strokes in sixteenths of a pixel, rounded down; 0 without any.

    It is 2 A / P, with A the pixels of at least `INK_FROM` and P the unit edges between such a
    pixel and one that is not, as everything beyond the border is not. A line along an axis, w
    wide and l long, has 2 w l / (2 w + 2 l): w itself, but for its ends. The most there can be
    is 14 pixels, of an image that is all ink.

    Args:
        pixels: uint8 [n, 784].

    Returns:
        uint8 [n].
    """
    # A row of an image as the bits of one number, its first pixel the highest. Filled up to 32
    # first: bits of rows that end within a byte are packed five times as slowly.
    ink = np.zeros((len(pixels), SIDE, 32), bool)
    ink[:, :, :SIDE] = (pixels >= INK_FROM).reshape(-1, SIDE, SIDE)
    rows = np.packbits(ink).view(">u4").astype(np.uint32).reshape(-1, SIDE)
    above = np.zeros_like(rows)
    above[:, 1:] = rows[:, :-1]
    area = np.bitwise_count(rows).sum(axis=1, dtype=np.int64)
    # Each run of ink has an edge where it begins, and as many where runs end.
    left = np.bitwise_count(rows & ~(rows >> 1)).sum(axis=1, dtype=np.int64)
    top = np.bitwise_count(rows & ~above).sum(axis=1, dtype=np.int64)
    return (16 * area // np.maximum(left + top, 1)).astype(np.uint8)


def levels(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Of each of `MEASURES` the level of each image: uint8 [n, 784] -> {name: uint8 [n]}."""
    return {"ink": ink_levels(pixels), "stroke_width": stroke_levels(pixels)}


# Of each of `MEASURES` the images by level, in fours: `BINS` counts.
Histograms = dict[str, list[int]]


def histograms(pixels: np.ndarray) -> Histograms:
    """The histograms of some images, uint8 [n, 784]."""
    return {
        name: np.bincount(found // (LEVELS // BINS), minlength=BINS).tolist()
        for name, found in levels(pixels).items()
    }


def no_rows() -> Histograms:
    """The histograms of no images."""
    return {name: [0] * BINS for name in MEASURES}


def added(one: Histograms, other: Histograms) -> Histograms:
    """The histograms of the images of both."""
    return {name: [a + b for a, b in zip(one[name], other[name], strict=True)] for name in MEASURES}


def quartiles(counts: np.ndarray) -> list[tuple[int, int]]:
    """Cuts rows into four slices of about one size; equal values stay in one, so it may be fewer.

    A slice ends with the level at which a quarter, a half, three quarters or all of the rows
    are reached.

    Args:
        counts: int64 [`LEVELS`], rows by level.

    Returns:
        Of each slice its lowest and its highest level, both of them with rows.
    """
    reached = np.cumsum(counts)
    total = int(reached[-1])
    if not total:
        return []
    ends = sorted({int(np.argmax(4 * reached >= part * total)) for part in (1, 2, 3, 4)})
    filled = np.flatnonzero(counts)
    starts = [int(filled[0]), *(int(filled[filled > end][0]) for end in ends[:-1])]
    return list(zip(starts, ends, strict=True))
