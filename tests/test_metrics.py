import dataclasses
import functools
import math

import numpy as np
import pytest

from pipeline import metrics
from pipeline.metrics import NUM_BINS, count, zero_counts
from pipeline.shown import NUM_MISTAKES, NUM_UNCERTAIN, SAMPLES_PER_CLASS

# label, probabilities; predicted 0, 0, 2, 1, 1, 2
ROWS = [
    (0, [0.5, 0.25, 0.25]),
    (1, [0.5, 0.25, 0.25]),
    (2, [0, 0, 1]),
    (2, [0.25, 0.5, 0.25]),
    (1, [0.25, 0.75, 0]),
    (0, [0, 0, 1]),
]
TINY = float(np.finfo(np.float32).tiny)


def scored(labels, probabilities, ids=None):
    labels = np.array(labels, np.int64)
    ids = [f"{i:04d}" for i in range(len(labels))] if ids is None else ids
    pixels = np.array([[int(name[:4], 16) % 251] * 784 for name in ids], np.uint8).reshape(-1, 784)
    return count(labels, np.array(probabilities, np.float32), ids, pixels)


@pytest.fixture
def counts():
    return scored(*zip(*ROWS, strict=True))


def state(counts):
    """Everything in the counts, as values that can be compared."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(counts).items()
    }


def test_confusion(counts):
    assert counts.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 1, 1]]
    assert counts.support.tolist() == [2, 2, 2]
    assert (counts.num_classes, counts.num_examples, counts.correct) == (3, 6, 3)
    assert counts.accuracy == 0.5


def test_log_loss(counts):
    losses = [math.log(2), math.log(4), 0, math.log(4), -math.log(0.75), -math.log(TINY)]
    assert counts.log_loss == pytest.approx(sum(losses) / 6, abs=1e-9)


def test_log_loss_of_each_class(counts):
    unit = metrics.FIXED_POINT
    of_0, of_1, of_2 = (total / unit for total in counts.log_loss_sums)
    assert of_0 == pytest.approx(math.log(2) - math.log(TINY), abs=1e-9)
    assert of_1 == pytest.approx(math.log(4) - math.log(0.75), abs=1e-9)
    assert of_2 == pytest.approx(0 + math.log(4), abs=1e-9)


def test_calibration_error(counts):
    # Confidence 0.5: 1 of 3 right; 0.75: 1 of 1; 1: 1 of 2.
    assert counts.calibration_error == pytest.approx((0.5 + 0.25 + 1) / 6, abs=1e-12)
    bins = counts.bins.sum(axis=0)
    assert {i: int(n) for i, n in enumerate(bins[:, 0]) if n} == {7: 3, 11: 1, 14: 2}
    assert bins[[7, 11, 14], 1].tolist() == [1, 1, 1]
    assert bins[[7, 11, 14], 2].tolist() == [1.5 * 2**32, 0.75 * 2**32, 2 * 2**32]


def test_calibration_error_of_each_class(counts):
    # Answered 0: right and wrong at 0.5; 1: wrong at 0.5, right at 0.75; 2: right and wrong at 1
    errors = [metrics.calibration_error(bins) for bins in counts.bins]
    assert errors == [0, (0.5 + 0.25) / 2, 0.5]
    assert counts.bins[:, :, 0].sum(axis=1).tolist() == counts.confusion.sum(axis=0).tolist()
    assert metrics.calibration_error(np.zeros((NUM_BINS, 3), np.int64)) is None


def test_rows_by_level_of_ink_and_stroke_width():
    pixels = np.zeros((4, 784), np.uint8)
    pixels[0] = 255
    pixels[1:3] = 130
    probabilities = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    ink, stroke_width = count(np.array([0, 0, 0, 1]), probabilities, list("abcd"), pixels).levels
    assert {i: row.tolist() for i, row in enumerate(ink) if row.any()} == {
        0: [1, 1],
        130: [2, 1],
        255: [1, 1],
    }
    assert {i: row.tolist() for i, row in enumerate(stroke_width) if row.any()} == {
        0: [1, 1],
        224: [3, 2],
    }


def test_who_of_two_is_right():
    labels = np.array([0, 0, 0, 0, 2, 2])
    one, other = (
        np.eye(3, dtype=np.float32)[rows] for rows in ([0, 0, 1, 1, 2, 0], [0, 1, 0, 1, 2, 1])
    )
    assert metrics.pair(labels, one, other).tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert metrics.pair(labels, other, one).tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]
    # both, only the first, only the second, neither
    assert metrics.pair(labels[:2], one[:2], other[:2])[0].tolist() == [1, 1, 0, 0]
    assert metrics.pair(labels[:0], one[:0], other[:0]).tolist() == [[0] * 4] * 3


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [(1.0, 14), (0.9375, 14), (0.93, 13), (0.5, 7), (0.46875, 7), (0.0625, 0), (0.07, 1)],
)
def test_bins(confidence, expected):
    rest = np.full(16, (1 - confidence) / 16)
    counted = scored([0], [[confidence, *rest]])
    assert counted.bins[0, :, 0].tolist() == [int(i == expected) for i in range(NUM_BINS)]
    assert not counted.bins[1:].any()


def test_calibration_is_perfect_where_confidence_is_the_share_of_right_answers():
    counted = scored([0, 0, 0, 1], [[0.75, 0.25]] * 4)
    assert counted.calibration_error == 0
    assert counted.accuracy == 0.75
    assert [metrics.calibration_error(bins) for bins in counted.bins] == [0, None]


def test_calibration_of_each_class_where_labels_are_drawn_as_the_model_says():
    """A calibrated model: what is left is chance, of about sqrt(15 bins * p(1 - p) / rows)."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), 30_000).astype(np.float32)
    draws = random.random(30_000)[:, None]
    labels = (draws > probabilities.cumsum(axis=1)[:, :2]).sum(axis=1)
    pixels = np.zeros((30_000, 784), np.uint8)
    counted = count(labels, probabilities, [""] * 30_000, pixels, with_images=False)
    errors = [metrics.calibration_error(bins) for bins in counted.bins]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    for label, error in enumerate(errors):
        sure = confidence[predicted == label].astype(np.float64)
        right = labels[predicted == label] == label
        edges = np.ceil(sure * NUM_BINS)
        gaps = [abs((right - sure)[edges == edge].sum()) for edge in np.unique(edges)]
        assert error == pytest.approx(sum(gaps) / len(sure), abs=1e-9)
    assert max(errors) < 0.02


def test_of_equal_probabilities_the_lowest_class_is_the_answer():
    counted = scored([0, 1, 2], [[1 / 3] * 3] * 3)
    assert counted.confusion.tolist() == [[1, 0, 0]] * 3


def test_no_rows():
    none = zero_counts(4)
    assert none.confusion.tolist() == [[0] * 4] * 4
    assert (none.num_classes, none.num_examples, none.correct) == (4, 0, 0)
    assert none.log_loss_sums == (0, 0, 0, 0)
    assert (none.accuracy, none.log_loss, none.calibration_error) == (None, None, None)
    assert (none.mistakes, none.uncertain, none.samples) == ((), (), ())


def test_no_rows_change_nothing(counts):
    assert state(zero_counts(3) + counts) == state(counts) == state(counts + zero_counts(3))


def random_rows(size, classes=4, seed=0):
    random = np.random.default_rng(seed)
    # Few different values, so that equal confidences are common.
    weights = random.integers(1, 4, (size, classes)).astype(np.float32)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    ids = [f"{i:04x}" for i in random.permutation(size)]
    return random.integers(0, classes, size), probabilities, ids


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_and_any_order_of_merging_give_the_same(seed):
    labels, probabilities, ids = random_rows(400)
    whole = scored(labels, probabilities, ids)
    assert (len(whole.mistakes), len(whole.uncertain)) == (NUM_MISTAKES, NUM_UNCERTAIN)
    assert len(whole.samples) == 4 * SAMPLES_PER_CLASS
    random = np.random.default_rng(seed)
    order = random.permutation(400)
    cuts = np.sort(random.integers(0, 401, random.integers(1, 40)))
    parts = [
        scored(labels[rows], probabilities[rows], [ids[i] for i in rows])
        for rows in np.split(order, cuts)
    ]
    while len(parts) > 1:  # as a tree of random shape
        i, j = random.choice(len(parts), 2, replace=False)
        merged = parts[i] + parts[j]
        parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [merged]
    assert state(parts[0]) == state(whole)


def test_one_row_at_a_time_gives_the_same():
    labels, probabilities, ids = random_rows(100)
    parts = [scored(labels[i : i + 1], probabilities[i : i + 1], [ids[i]]) for i in range(100)]
    merged = functools.reduce(lambda a, b: a + b, parts)
    assert state(merged) == state(scored(labels, probabilities, ids))


def test_merging_leaves_its_parts_alone(counts):
    before = state(counts)
    _ = counts + counts
    assert state(counts) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        counts.log_loss_sums = ()


def test_mistakes_are_the_most_confident_wrong_answers():
    size = NUM_MISTAKES + 6
    confidence = [0.9] * 3 + [0.6] * (size - 3)
    ids = [f"{size - i:04x}" for i in range(size)]
    counted = scored([1] * size + [0], [[c, 1 - c] for c in confidence] + [[1, 0]], [*ids, "0000"])
    assert [image.id for image in counted.mistakes] == [
        *sorted(ids[:3]),
        *sorted(ids[3:])[: NUM_MISTAKES - 3],
    ]
    first = counted.mistakes[0]
    assert (first.label, first.predicted) == (1, 0)
    assert first.confidence == float(np.float32(0.9))
    assert first.pixels == bytes([int(first.id, 16) % 251]) * 784
    assert np.frombuffer(first.probabilities, np.float32).tolist() == [
        float(np.float32(0.9)),
        float(np.float32(1 - 0.9)),
    ]


def test_uncertain_are_the_least_confident_right_answers():
    size = NUM_UNCERTAIN + 6
    confidence = [0.6] * 3 + [0.9] * (size - 3)
    ids = [f"{size - i:04x}" for i in range(size)]
    wrong = [[0.55, 0.45]]
    counted = scored([0] * size + [1], [[c, 1 - c] for c in confidence] + wrong, [*ids, "0000"])
    assert [image.id for image in counted.uncertain] == [
        *sorted(ids[:3]),
        *sorted(ids[3:])[: NUM_UNCERTAIN - 3],
    ]
    assert all(image.right for image in counted.uncertain)
    assert [image.id for image in counted.mistakes] == ["0000"]


def test_counts_without_images_are_the_same_but_for_them():
    labels, probabilities, ids = random_rows(100)
    pixels = np.zeros((100, 784), np.uint8)
    with_images = count(labels, probabilities, ids, pixels)
    without = count(labels, probabilities, ids, pixels, with_images=False)
    nothing = {"mistakes": (), "uncertain": (), "samples": ()}
    assert state(without) == state(with_images) | nothing


def test_samples_are_the_lowest_ids_of_each_class():
    size = SAMPLES_PER_CLASS + 3
    ids = [f"{(7 * i) % 97:04x}" for i in range(2 * size)]
    counted = scored([0] * size + [1] * size, [[0.4, 0.6]] * 2 * size, ids)
    assert [(image.label, image.id) for image in counted.samples] == [
        *[(0, name) for name in sorted(ids[:size])[:SAMPLES_PER_CLASS]],
        *[(1, name) for name in sorted(ids[size:])[:SAMPLES_PER_CLASS]],
    ]


def test_large_sums_are_exact():
    one = scored([1], [[1, 0]])  # the largest loss there is
    total = functools.reduce(lambda a, b: a + b, [one] * 64)
    for _ in range(30):  # 64 * 2**30 rows: beyond 64 bits in fixed point
        total = total + dataclasses.replace(total, mistakes=(), samples=())
    assert total.log_loss_sums[1] == one.log_loss_sums[1] * 64 * 2**30 > 2**63
    assert total.log_loss == one.log_loss


@pytest.mark.parametrize(
    ("part", "whole", "expected"), [(1, 4, 0.25), (0, 4, 0), (0, 0, None), (2**80, 2**81, 0.5)]
)
def test_ratio(part, whole, expected):
    assert metrics.ratio(part, whole) == expected


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0000)),
    ],
)
def test_wilson_interval(correct, total, expected):
    assert metrics.wilson_interval(correct, total) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_solves_its_equation():
    for correct, total in ((1, 2), (3, 7), (980, 1000), (9_990, 10_000)):
        for bound in metrics.wilson_interval(correct, total, z=1.5):
            distance = abs(correct / total - bound)
            assert distance == pytest.approx(1.5 * math.sqrt(bound * (1 - bound) / total))


def test_wilson_interval_stays_between_0_and_1():
    for total in (1, 3, 7, 10_000, 10**9):
        low, high = metrics.wilson_interval(0, total)
        assert 0 <= low < 1e-12 < high < 1
        low, high = metrics.wilson_interval(total, total)
        assert 0 < low < 1 - 1e-12 < high <= 1
    assert metrics.wilson_interval(0, 0) is None
