import numpy as np
import pytest

from pipeline import slices


def image(*strokes):
    """An image with these rectangles (top, left, height, width) of full ink; uint8 [1, 784]."""
    pixels = np.zeros((28, 28), np.uint8)
    for top, left, height, width in strokes:
        pixels[top : top + height, left : left + width] = 255
    return pixels.reshape(1, 784)


@pytest.mark.parametrize(
    ("strokes", "level"),
    [
        ([], 0),
        ([(5, 5, 1, 1)], 8),  # 2 * 1 / 4 of a pixel, in sixteenths
        ([(3, 3, 20, 2)], 29),  # 2 * 40 / 44 = 1.818
        ([(3, 3, 2, 20)], 29),
        ([(0, 0, 28, 3)], 43),  # touches three borders: 2 * 84 / 62 = 2.709
        ([(2, 2, 10, 2), (2, 20, 10, 2)], 26),  # two strokes: 2 * 40 / 48 = 1.667
        ([(0, 0, 28, 28)], 224),  # 2 * 784 / 112 = 14
        ([(2, 2, 9, 9)], 72),
    ],
)
def test_stroke_width_by_hand(strokes, level):
    assert slices.stroke_levels(image(*strokes)).tolist() == [level]


def test_stroke_width_of_a_ring():
    ring = image((4, 4, 10, 10)).reshape(28, 28)
    ring[6:12, 6:12] = 0
    # 100 - 36 pixels; 40 edges outside and 24 inside
    assert slices.stroke_levels(ring.reshape(1, 784)).tolist() == [16 * 2 * 64 // 64]


def test_stroke_width_equals_a_plain_loop():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20, 784), np.uint8)
    for number, size in enumerate((2, 4, 7, 14, 28), start=10):  # of ever larger squares
        squares = pixels[number].reshape(28, 28)[: 28 // size, : 28 // size]
        pixels[number] = np.kron(squares, np.ones((size, size), np.uint8)).ravel()
    pixels[15:] = np.where(random.random((5, 784)) < 0.9, 0, pixels[15:])
    expected = []
    for row in pixels.reshape(-1, 28, 28):
        ink = np.pad(row >= slices.INK_FROM, 1)
        edges = sum(
            int(ink[i, j] != ink[i + down, j + right])
            for i in range(29)
            for j in range(29)
            for down, right in ((0, 1), (1, 0))
        )
        expected.append(32 * int(ink.sum()) // edges)
    assert slices.stroke_levels(pixels).tolist() == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize(("value", "level"), [(127, 0), (128, 224)])
def test_ink_begins_at_half_of_the_scale(value, level):
    assert slices.stroke_levels(np.full((1, 784), value, np.uint8)).tolist() == [level]


def test_ink_is_the_mean_rounded_down():
    pixels = np.zeros((3, 784), np.uint8)
    pixels[0, :783] = 1  # 0.9987
    pixels[1] = 255
    pixels[2, :196] = 201  # 50.25
    assert slices.ink_levels(pixels).tolist() == [0, 255, 50]


def test_levels_do_not_depend_on_how_an_array_lies_in_memory():
    rows = np.zeros(5, [("label", "u1"), ("pixels", "u1", 784)])
    rows["pixels"] = np.random.default_rng(1).integers(0, 256, (5, 784))
    for measure, found in slices.levels(rows["pixels"]).items():
        assert (found == slices.levels(rows["pixels"].copy())[measure]).all()


def test_no_images():
    none = np.zeros((0, 784), np.uint8)
    assert [found.tolist() for found in slices.levels(none).values()] == [[], []]
    assert (
        slices.histograms(none) == slices.no_rows() == {"ink": [0] * 64, "stroke_width": [0] * 64}
    )


def test_histograms_are_the_levels_in_fours_and_add_up():
    pixels = np.random.default_rng(2).integers(0, 256, (50, 784)).astype(np.uint8)
    pixels *= np.arange(50, dtype=np.uint8)[:, None] > 20
    whole = slices.histograms(pixels)
    for measure, found in slices.levels(pixels).items():
        assert whole[measure] == [int((found // 4 == i).sum()) for i in range(64)]
        assert sum(whole[measure]) == 50
    assert slices.added(slices.histograms(pixels[:7]), slices.histograms(pixels[7:])) == whole


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({}, []),
        ({7: 10}, [(7, 7)]),
        ({1: 1, 2: 1, 3: 1, 4: 1}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ({0: 2, 10: 3, 20: 3, 255: 2}, [(0, 10), (20, 20), (255, 255)]),
        ({5: 90, 6: 4, 9: 6}, [(5, 5), (6, 9)]),
        ({5: 6, 6: 4, 9: 90}, [(5, 9)]),
        ({0: 1, 255: 1}, [(0, 0), (255, 255)]),
    ],
)
def test_quartiles(rows, expected):
    counts = np.zeros(slices.LEVELS, np.int64)
    for level, number in rows.items():
        counts[level] = number
    assert slices.quartiles(counts) == expected


@pytest.mark.parametrize("seed", range(5))
def test_quartiles_hold_every_row_once_and_are_numpys(seed):
    values = np.random.default_rng(seed).normal(100, 25, 1001).clip(0, 255).astype(np.uint8)
    found = slices.quartiles(np.bincount(values, minlength=slices.LEVELS))
    assert len(found) == 4
    assert sum(((values >= low) & (values <= high)).sum() for low, high in found) == 1001
    quantiles = np.quantile(values, [0.25, 0.5, 0.75, 1], method="inverted_cdf")
    assert [high for _, high in found] == quantiles.tolist()
    assert all(low in values and high in values for low, high in found)
