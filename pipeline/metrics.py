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
from collections.abc import Sequence

import numpy as np

from pipeline import slices
from pipeline.shown import (
    ScoredImage,
    least_confident,
    lowest_ids,
    most_confident,
    rows_to_keep,
)

NUM_BINS = 15
FIXED_POINT = 2**32  # sums of reals are kept as integers in this unit
PAIRED = ("both", "only_model", "only_baseline", "neither")  # who of two is right


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """What is known of a set of scored rows.

    Attributes:
        confusion: int64 [C, C]; rows are true classes, columns predicted ones.
        log_loss_sums: of each true class the sum of -ln p(true class), in units of
            1 / `FIXED_POINT`.
        bins: int64 [C, `NUM_BINS`, 3]; of each predicted class, by confidence, in bins of equal
            width over [0, 1]: rows, how many of them are right, and the sum of their
            confidences, in units of 1 / `FIXED_POINT`.
        levels: int64 [`slices.MEASURES`, `slices.LEVELS`, 2]; by level of ink and of stroke
            width: rows, and how many of them are right.
        mistakes: the most confident wrong answers, at most `shown.NUM_MISTAKES`.
        uncertain: the least confident right answers, at most `shown.NUM_UNCERTAIN`.
        samples: for each class the rows of lowest id, at most `shown.SAMPLES_PER_CLASS`.
    """

    confusion: np.ndarray
    log_loss_sums: tuple[int, ...]
    bins: np.ndarray
    levels: np.ndarray
    mistakes: tuple[ScoredImage, ...]
    uncertain: tuple[ScoredImage, ...]
    samples: tuple[ScoredImage, ...]

    def __add__(self, other: Counts) -> Counts:
        sums = zip(self.log_loss_sums, other.log_loss_sums, strict=True)
        return Counts(
            confusion=self.confusion + other.confusion,
            log_loss_sums=tuple(one + two for one, two in sums),
            bins=self.bins + other.bins,
            levels=self.levels + other.levels,
            mistakes=most_confident(self.mistakes + other.mistakes),
            uncertain=least_confident(self.uncertain + other.uncertain),
            samples=lowest_ids(self.samples + other.samples),
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
        return mean(sum(self.log_loss_sums), self.num_examples)

    @property
    def calibration_error(self) -> float | None:
        """`calibration_error` of all rows."""
        return calibration_error(self.bins.sum(axis=0))


def calibration_error(bins: np.ndarray) -> float | None:
    """Expected calibration error: the rows' mean of |accuracy - confidence| of their bin.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3. Of a class it
    is that of the rows predicted as it: "sure to 90 %" is a claim about answers. Of the rows that
    truly are of a class, even a perfectly calibrated model has another share right.

    Args:
        bins: int64 [`NUM_BINS`, 3], as one class of `Counts.bins`.
    """
    gaps = np.abs(bins[:, 1] * FIXED_POINT - bins[:, 2])
    return mean(int(gaps.sum()), int(bins[:, 0].sum()))


def zero_counts(num_classes: int) -> Counts:
    """The counts of no rows."""
    return count(
        np.zeros(0, np.int64),
        np.zeros((0, num_classes), np.float32),
        [],
        np.zeros((0, 784), np.uint8),
    )


def count(
    labels: np.ndarray,
    probabilities: np.ndarray,
    ids: Sequence[str],
    pixels: np.ndarray,
    *,
    with_images: bool = True,
) -> Counts:
    """Counts a block of scored rows.

    Args:
        labels: int64 [n], the true classes.
        probabilities: float32 [n, C].
        ids: n record ids.
        pixels: uint8 [n, 784].
        with_images: whether some of the rows are kept, to be shown.
    """
    num_classes = probabilities.shape[1]
    rows = np.arange(len(labels))
    predicted = predict(probabilities)
    right = predicted == labels
    confidence = probabilities[rows, predicted].astype(np.float64)
    # Float32's smallest normal number bounds the loss of a probability that rounded to zero.
    truth = np.maximum(probabilities[rows, labels], np.finfo(np.float32).tiny).astype(np.float64)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    losses = np.zeros(num_classes, np.int64)
    np.add.at(losses, labels, _fixed(-np.log(truth)))
    images = [
        ScoredImage(
            ids[i],
            int(labels[i]),
            int(predicted[i]),
            probabilities[i].tobytes(),
            pixels[i].tobytes(),
        )
        for i in (rows_to_keep(labels, right, confidence, ids) if with_images else ())
    ]
    return Counts(
        confusion=confusion.reshape(num_classes, num_classes).astype(np.int64),
        log_loss_sums=tuple(losses.tolist()),
        bins=_count_bins(predicted, right, confidence, num_classes),
        levels=_count_levels(pixels, right),
        mistakes=most_confident(image for image in images if not image.right),
        uncertain=least_confident(image for image in images if image.right),
        samples=lowest_ids(images),
    )


def predict(probabilities: np.ndarray) -> np.ndarray:
    """The class of highest probability of each row, the lowest of several: int64 [n]."""
    return probabilities.argmax(axis=1) if len(probabilities) else np.zeros(0, np.int64)


def pair(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Counts which of two models are right on the same rows.

    Args:
        labels: int64 [n], the true classes.
        one: float32 [n, C], a model's probabilities.
        other: float32 [n, C], another's.

    Returns:
        int64 [C, 4]: rows of each true class by who is right, as `PAIRED` names them.
    """
    num_classes = one.shape[1]
    outcome = 2 * (predict(one) != labels) + (predict(other) != labels)
    table = np.bincount(labels * len(PAIRED) + outcome, minlength=num_classes * len(PAIRED))
    return table.reshape(num_classes, len(PAIRED)).astype(np.int64)


def _count_bins(
    predicted: np.ndarray, right: np.ndarray, confidence: np.ndarray, num_classes: int
) -> np.ndarray:
    found = np.zeros((num_classes, NUM_BINS, 3), np.int64)
    numbers = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    columns = (np.ones(len(predicted), np.int64), right.astype(np.int64), _fixed(confidence))
    np.add.at(found, (predicted, numbers), np.stack(columns, axis=-1))
    return found


def _count_levels(pixels: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = slices.levels(pixels)
    tables = [
        np.stack(
            [np.bincount(rows, minlength=slices.LEVELS) for rows in (levels, levels[right])], axis=1
        )
        for levels in (found[name] for name in slices.MEASURES)
    ]
    return np.stack(tables).astype(np.int64)


def _fixed(values: np.ndarray) -> np.ndarray:
    """Rounds reals to integers in units of 1 / `FIXED_POINT`; int64."""
    return np.rint(values * FIXED_POINT).astype(np.int64)


def ratio(part: int, whole: int) -> float | None:
    """Part / whole; None where there is nothing to divide by."""
    return part / whole if whole else None


def mean(fixed_sum: int, total: int) -> float | None:
    """The mean of reals whose sum is kept in units of 1 / `FIXED_POINT`; None of nothing."""
    return ratio(fixed_sum, total * FIXED_POINT)


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
