"""Which scored images are shown: few of each kind, chosen by total orders.

What is chosen of two sets, merged, is what would be chosen of both at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

NUM_MISTAKES = 24
NUM_UNCERTAIN = 24
SAMPLES_PER_CLASS = 8


class ScoredImage(NamedTuple):
    """One image with the model's answer.

    Attributes:
        id: the record's id.
        label: the true class.
        predicted: the class of highest probability, the lowest of several.
        probabilities: float32 [C] as bytes.
        pixels: 784 bytes.
    """

    id: str
    label: int
    predicted: int
    probabilities: bytes
    pixels: bytes

    @property
    def confidence(self) -> float:
        """The probability of the predicted class."""
        return float(np.frombuffer(self.probabilities, np.float32)[self.predicted])

    @property
    def right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.predicted == self.label


def rows_to_keep(
    labels: np.ndarray, right: np.ndarray, confidence: np.ndarray, ids: Sequence[str]
) -> list[int]:
    """The rows of a block that may be shown: a few, so that the rest need not become objects."""

    def first(chosen: np.ndarray, keys: np.ndarray, most: int) -> set[int]:
        rows = np.flatnonzero(chosen)
        if len(rows) > most:  # of equal keys, all that may come first
            rows = rows[keys[rows] <= np.partition(keys[rows], most - 1)[most - 1]]
        return set(sorted(rows.tolist(), key=lambda i: (keys[i], ids[i]))[:most])

    keep = first(~right, -confidence, NUM_MISTAKES) | first(right, confidence, NUM_UNCERTAIN)
    names = np.array(ids)
    for label in np.unique(labels):
        keep |= first(labels == label, names, SAMPLES_PER_CLASS)
    return sorted(keep)


def most_confident(images: Iterable[ScoredImage]) -> tuple[ScoredImage, ...]:
    """The images of highest confidence, at most `NUM_MISTAKES`."""
    return tuple(sorted(images, key=lambda image: (-image.confidence, image.id))[:NUM_MISTAKES])


def least_confident(images: Iterable[ScoredImage]) -> tuple[ScoredImage, ...]:
    """The images of lowest confidence, at most `NUM_UNCERTAIN`."""
    return tuple(sorted(images, key=lambda image: (image.confidence, image.id))[:NUM_UNCERTAIN])


def lowest_ids(images: Iterable[ScoredImage]) -> tuple[ScoredImage, ...]:
    """Of each class the images of lowest id, at most `SAMPLES_PER_CLASS`."""
    kept: list[ScoredImage] = []
    taken: dict[int, int] = {}
    for image in sorted(images, key=lambda image: (image.label, image.id)):
        taken[image.label] = taken.get(image.label, 0) + 1
        if taken[image.label] <= SAMPLES_PER_CLASS:
            kept.append(image)
    return tuple(kept)
