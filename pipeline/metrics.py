"""Mergeable counts of a classifier's answers: one algebra for the Beam graph and the report.

`count` turns a block of scored rows into `Counts`; ``a + b`` merges two of them. Everything in
`Counts` is an integer or a set chosen by a total order, so a merge is exact: any cut of the
rows into blocks, merged in any order, gives the same value to the last bit.

Synopsis::

    total = count(labels, probabilities, ids, pixels) + count(...)
    total.accuracy, wilson_interval(total.correct, total.num_examples)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 15
FIXED_POINT = 2**32  # sums of reals are kept as integers in this unit
NUM_MISTAKES = 24
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """What is known of a set of scored rows.

    Attributes:
        confusion: int64 [C, C]; rows are true classes, columns predicted ones.
        log_loss_sum: sum of -ln p(true class), in units of 1 / `FIXED_POINT`.
        bin_counts: int64 [`NUM_BINS`]; rows by confidence, bins of equal width over [0, 1].
        bin_correct: int64 [`NUM_BINS`]; how many of them are right.
        bin_confidence: int64 [`NUM_BINS`]; sum of confidences, in units of 1 / `FIXED_POINT`.
        mistakes: the most confident wrong answers, at most `NUM_MISTAKES`.
        samples: for each class the rows of lowest id, at most `SAMPLES_PER_CLASS`.
    """

    confusion: np.ndarray
    log_loss_sum: int
    bin_counts: np.ndarray
    bin_correct: np.ndarray
    bin_confidence: np.ndarray
    mistakes: tuple[ScoredImage, ...]
    samples: tuple[ScoredImage, ...]

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            confusion=self.confusion + other.confusion,
            log_loss_sum=self.log_loss_sum + other.log_loss_sum,
            bin_counts=self.bin_counts + other.bin_counts,
            bin_correct=self.bin_correct + other.bin_correct,
            bin_confidence=self.bin_confidence + other.bin_confidence,
            mistakes=_most_confident(self.mistakes + other.mistakes),
            samples=_lowest_ids(self.samples + other.samples),
        )

    @property
    def num_classes(self) -> int:
        """Classes counted."""
        return len(self.confusion)

    @property
    def num_examples(self) -> int:
        """Rows counted."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Rows whose prediction is their label."""
        return int(self.confusion.trace())

    @property
    def support(self) -> np.ndarray:
        """int64 [C]: rows of each true class."""
        return self.confusion.sum(axis=1)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None of no rows."""
        return ratio(self.correct, self.num_examples)

    @property
    def log_loss(self) -> float | None:
        """The mean of -ln p(true class), in nats; None of no rows."""
        return ratio(self.log_loss_sum, self.num_examples * FIXED_POINT)

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error: the rows' mean of |accuracy - confidence| of their bin.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
        """
        gaps = np.abs(self.bin_correct * FIXED_POINT - self.bin_confidence)
        return ratio(int(gaps.sum()), self.num_examples * FIXED_POINT)


def zero_counts(num_classes: int) -> Counts:
    """The counts of no rows."""
    return count(
        np.zeros(0, np.int64),
        np.zeros((0, num_classes), np.float32),
        [],
        np.zeros((0, 784), np.uint8),
    )


def count(
    labels: np.ndarray, probabilities: np.ndarray, ids: Sequence[str], pixels: np.ndarray
) -> Counts:
    """Counts a block of scored rows.

    Args:
        labels: int64 [n], the true classes.
        probabilities: float32 [n, C].
        ids: n record ids.
        pixels: uint8 [n, 784].
    """
    num_classes = probabilities.shape[1]
    rows = np.arange(len(labels))
    predicted = probabilities.argmax(axis=1) if len(labels) else np.zeros(0, np.int64)
    right = predicted == labels
    confidence = probabilities[rows, predicted].astype(np.float64)
    # Float32's smallest normal number bounds the loss of a probability that rounded to zero.
    truth = np.maximum(probabilities[rows, labels], np.finfo(np.float32).tiny).astype(np.float64)
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    images = [
        ScoredImage(
            ids[i],
            int(labels[i]),
            int(predicted[i]),
            probabilities[i].tobytes(),
            pixels[i].tobytes(),
        )
        for i in _rows_to_keep(labels, right, confidence, ids)
    ]
    return Counts(
        confusion=confusion.reshape(num_classes, num_classes).astype(np.int64),
        log_loss_sum=int(_fixed(-np.log(truth)).sum()),
        bin_counts=np.bincount(bins, minlength=NUM_BINS).astype(np.int64),
        bin_correct=np.bincount(bins[right], minlength=NUM_BINS).astype(np.int64),
        bin_confidence=_sum_by_bin(bins, _fixed(confidence)),
        mistakes=_most_confident(image for image in images if image.label != image.predicted),
        samples=_lowest_ids(images),
    )


def _fixed(values: np.ndarray) -> np.ndarray:
    """Rounds reals to integers in units of 1 / `FIXED_POINT`; int64."""
    return np.rint(values * FIXED_POINT).astype(np.int64)


def _sum_by_bin(bins: np.ndarray, values: np.ndarray) -> np.ndarray:
    sums = np.zeros(NUM_BINS, np.int64)
    np.add.at(sums, bins, values)
    return sums


def _rows_to_keep(
    labels: np.ndarray, right: np.ndarray, confidence: np.ndarray, ids: Sequence[str]
) -> list[int]:
    """The rows of a block that may be shown: a few, so that the rest need not become objects."""
    wrong = sorted(np.flatnonzero(~right).tolist(), key=lambda i: (-confidence[i], ids[i]))
    keep = set(wrong[:NUM_MISTAKES])
    for label in np.unique(labels):
        keep |= set(
            sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: ids[i])[
                :SAMPLES_PER_CLASS
            ]
        )
    return sorted(keep)


def _most_confident(images: Iterable[ScoredImage]) -> tuple[ScoredImage, ...]:
    return tuple(sorted(images, key=lambda image: (-image.confidence, image.id))[:NUM_MISTAKES])


def _lowest_ids(images: Iterable[ScoredImage]) -> tuple[ScoredImage, ...]:
    kept: list[ScoredImage] = []
    taken: dict[int, int] = {}
    for image in sorted(images, key=lambda image: (image.label, image.id)):
        taken[image.label] = taken.get(image.label, 0) + 1
        if taken[image.label] <= SAMPLES_PER_CLASS:
            kept.append(image)
    return tuple(kept)


def ratio(part: int, whole: int) -> float | None:
    """Part / whole; None where there is nothing to divide by."""
    return part / whole if whole else None


def wilson_interval(
    correct: int, total: int, z: float = 1.959963984540054
) -> tuple[float, float] | None:
    """The Wilson score interval of a proportion; None of nothing.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference":
    ``(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    Args:
        correct: successes.
        total: trials.
        z: the normal quantile; the default is that of 95 %.
    """
    if not total:
        return None
    p = correct / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
