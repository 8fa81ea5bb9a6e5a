import hashlib
import math

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from pipeline.records import SCALE_TABLE
from trainer import deform
from trainer.checks import configure
from trainer.threefry import random_words

FULL = {
    "rotate": 12.0,
    "scale": 0.12,
    "shear": 0.12,
    "shift": 2.0,
    "elastic_alpha": 36.0,
    "elastic_sigma": 5.5,
}
EXTREME = {
    "rotate": 180.0,
    "scale": 0.9,
    "shear": 1.0,
    "shift": 28.0,
    "elastic_alpha": 1120.0,
    "elastic_sigma": 28.0,
}
LARGEST_BUMPS = {**EXTREME, "elastic_alpha": 40.0, "elastic_sigma": 1.0}


def config(**fields):
    return configure("core", fields)


def random_images(count, seed=0):
    return SCALE_TABLE[np.random.default_rng(seed).integers(0, 256, (count, 784))]


def deformed(fields, images, epoch=3, examples=None, seed=22, jit_compile=None):
    """Deforms in a graph, compiled or not, or eagerly where `jit_compile` is None."""
    apply = deform.make_deform(config(**fields))

    def function(*given):
        return apply(*given, seed)

    if jit_compile is not None:
        function = tf.function(function, jit_compile=jit_compile)
    rows = np.arange(len(images)) if examples is None else np.asarray(examples)
    return function(tf.constant(images), tf.constant(epoch), tf.constant(rows, tf.int32)).numpy()


def words_of(count, words, seed=22, epoch=3):
    examples = tf.range(count)
    return random_words(seed, tf.constant(epoch), examples, words).numpy()


# Without amplitudes


def test_without_amplitudes_there_is_no_function():
    assert deform.make_deform(config()) is None


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_map_that_moves_nothing_gives_the_image_bit_for_bit(jit_compile):
    images = SCALE_TABLE[np.arange(4 * 784).reshape(4, 784) % 256]  # every byte
    vanishing = {"rotate": 1e-9, "elastic_alpha": 1e-9, "elastic_sigma": 5.0}
    result = deformed(vanishing, images, jit_compile=jit_compile)
    assert result.dtype == np.float32
    assert result.tobytes() == images.tobytes()


# The same numbers everywhere


@pytest.mark.parametrize("fields", [FULL, EXTREME, {"shift": 3.0}, LARGEST_BUMPS])
def test_eager_and_compiled_agree_bit_for_bit(fields):
    images = random_images(64)
    eager = deformed(fields, images)
    for jit_compile in (False, True):
        assert deformed(fields, images, jit_compile=jit_compile).tobytes() == eager.tobytes()
    assert np.isfinite(eager).all()
    assert eager.min() >= 0
    assert eager.max() <= 1


def test_compiled_into_a_larger_function_the_numbers_stay():
    images = random_images(32)
    apply = deform.make_deform(config(**FULL))

    @tf.function(jit_compile=True)
    def gathered(rows):
        moved = apply(tf.gather(images, rows), tf.constant(3), rows, 22)
        return moved, tf.reduce_sum(tf.nn.relu(moved * 3 - 1) @ tf.ones([784, 5]))

    rows = np.random.default_rng(1).permutation(32).astype(np.int32)
    np.testing.assert_array_equal(gathered(rows)[0], deformed(FULL, images)[rows])


@pytest.mark.parametrize("size", [1, 7, 128])
def test_a_batch_or_its_order_changes_nothing(size):
    images = random_images(150)
    whole = deformed(FULL, images)
    rows = np.random.default_rng(size).permutation(150)[:size]
    part = deformed(FULL, images[rows], examples=rows, jit_compile=True)
    assert part.tobytes() == whole[rows].tobytes()


def test_epochs_seeds_and_examples_differ():
    images = np.repeat(random_images(1), 50, axis=0)
    results = [
        deformed(FULL, images, epoch, seed=seed) for epoch, seed in [(0, 22), (1, 22), (0, 23)]
    ]
    assert len({row.tobytes() for result in results for row in result}) == 150


def test_the_bytes_of_a_fixed_case():
    result = deformed(FULL, random_images(16))
    digest = hashlib.sha256(result.tobytes()).hexdigest()
    assert digest == "b9569c7248962866ccd1b7deeab580255dd45e75b6e74c691285a996a92647b4"


@pytest.mark.parametrize("fields", [EXTREME, LARGEST_BUMPS])
def test_no_sum_of_integers_leaves_what_float32_holds(fields):
    amplitudes = [fields[name] for name in ("rotate", "scale", "shear", "shift")]
    tables = deform.affine_tables(*amplitudes).astype(np.int64)
    cosine, sine = np.abs(tables[:2])
    scale, slant = tables[2].max(), tables[2].max() * tables[3].max() // 2**14
    along = (cosine * scale + sine * slant + sine * scale).max() // 2**18 + 3  # three roundings
    affine = np.array([0, along, tables[4].max()])
    bumps = deform.elastic_fields(fields["elastic_alpha"], fields["elastic_sigma"])
    stacked = np.abs(np.vstack([deform.affine_fields(), bumps])).astype(np.float64)
    np.testing.assert_array_equal(stacked, np.rint(stacked))
    # `along` bounds the sum over y and x, which are largest in the same corner.
    most = affine[1:] @ stacked[1:3] + 510 * stacked[3:].sum(axis=0)
    assert most.max() + 14 * deform.FINE < 2**24


# The last epochs


def test_calm_epochs_come_last_with_half_the_amplitudes():
    affine = {"rotate": 12.0, "scale": 0.12, "shear": 0.12, "shift": 2.0, "epochs": 7}
    half = {name: value / 2 for name, value in affine.items()} | {"epochs": 7}
    images = random_images(8)
    for epoch in range(7):
        expected = deformed(affine if epoch < 4 else half, images, epoch)
        result = deformed({**affine, "calm_epochs": 3}, images, epoch)
        assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_calm_epochs_halve_displacements(jit_compile):
    images = random_images(8)
    calm = {**FULL, "epochs": 1, "calm_epochs": 1}
    half = {name: value if name == "elastic_sigma" else value / 2 for name, value in FULL.items()}
    result = deformed(calm, images, 0, jit_compile=jit_compile)
    assert result.tobytes() == deformed(calm, images, 0).tobytes()
    # The halves of rounded fields and the rounded halves differ by at most one unit of a point.
    assert np.abs(result - deformed(half, images, 0)).max() < 3 / 256


# Sampling


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (3, 0), (0, -5), (-2, 7), (27, -27), (28, 0)])
def test_a_shift_by_whole_pixels_moves_bytes(dy, dx):
    images = random_images(3)
    rows, columns = np.mgrid[:28, :28].reshape(2, 784).astype(np.float32)
    y, x = (np.tile(line * 256, (3, 1)) for line in (rows + dy, columns + dx))
    moved = np.roll(images.reshape(3, 28, 28), (-dy, -dx), axis=(1, 2))
    outside = (rows + dy < 0) | (rows + dy > 27) | (columns + dx < 0) | (columns + dx > 27)
    moved[:, outside.reshape(28, 28)] = 0
    assert deform.sample(images, y, x).numpy().tobytes() == moved.reshape(3, 784).tobytes()


def test_sampling_by_hand():
    image = np.zeros((1, 784), np.float32)
    image[0, [0, 1, 28, 29]] = SCALE_TABLE[[100, 200, 40, 80]]
    y = np.full((1, 784), 5e6, np.float32)
    x = np.full((1, 784), -5e6, np.float32)
    y[0, :6], x[0, :6] = [0, 128, 128, -64, -256, 0], [64, 0, 128, 0, 0, -192]
    expected = [125, 70, 105, 75, 0, 25]
    result = deform.sample(image, y, x).numpy()[0]
    np.testing.assert_allclose(result[:6] * 255, expected, rtol=1e-6)
    np.testing.assert_array_equal(result[6:], 0)


def test_sampling_is_bilinear_interpolation_with_zeros_outside():
    images = random_images(20)
    random = np.random.default_rng(2)
    y, x = random.integers(-3 * 256, 31 * 256, (2, 20, 784)).astype(np.float32)
    result = deform.sample(images, y, x).numpy()
    for i in range(20):
        expected = scipy.ndimage.map_coordinates(
            images[i].reshape(28, 28).astype(np.float64),
            [y[i] / 256, x[i] / 256],
            order=1,
            mode="grid-constant",
        )
        np.testing.assert_allclose(result[i], expected, rtol=1e-6, atol=1e-7)


# Affine maps


def matrices(words, rotate, scale, shear, shift):
    """The maps in float64 from the same draws: [n, 2, 2] and [n, 2] in (y, x)."""
    draws = (words >> 22) / 1023 * 2 - 1
    angle = np.radians(rotate * draws[:, 0])
    identity = np.tile(np.eye(2), (len(words), 1, 1))
    stretch, slant, turn = identity.copy(), identity.copy(), identity.copy()
    stretch[:, 0, 0], stretch[:, 1, 1] = 1 + scale * draws[:, 1], 1 + scale * draws[:, 2]
    slant[:, 1, 0] = shear * draws[:, 3]
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(angle)
    turn[:, 0, 1], turn[:, 1, 0] = -np.sin(angle), np.sin(angle)
    return turn @ slant @ stretch, shift * draws[:, 4:6]


@pytest.mark.parametrize(
    "amplitudes",
    [(12.0, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 0.3, 0), (0, 0, 0, 3.5), (15.0, 0.15, 0.2, 2.0)],
)
def test_affine_maps_against_scipy(amplitudes):
    side = np.arange(28)
    smooth = np.sin(side[:, None] * 0.35) * np.cos(side * 0.3) * 0.5 + 0.5
    images = np.repeat(SCALE_TABLE[np.rint(smooth * 255).astype(int)].reshape(1, 784), 40, axis=0)
    fields = dict(zip(("rotate", "scale", "shear", "shift"), amplitudes, strict=True))
    result = deformed(fields, images)
    for i, (matrix, shift) in enumerate(zip(*matrices(words_of(40, 6), *amplitudes), strict=True)):
        offset = 13.5 - matrix @ [13.5, 13.5] + shift
        expected = scipy.ndimage.affine_transform(
            images[i].reshape(28, 28).astype(np.float64),
            matrix,
            offset,
            order=1,
            mode="grid-constant",
        )
        # A point is off by at most 1/512 pixel, and what 27/2 rows of 1/2048 add up to.
        np.testing.assert_allclose(result[i].reshape(28, 28), expected, atol=0.02)


def test_affine_points_stay_close_to_the_map():
    amplitudes = (15.0, 0.15, 0.2, 2.0)
    words = words_of(200, 6)
    coefficients = deform.affine_coefficients(tf.constant(words), deform.affine_tables(*amplitudes))
    matrix, shift = matrices(words, *amplitudes)
    grid = np.mgrid[:28, :28].reshape(2, 784) - 13.5
    expected = matrix @ grid + shift[:, :, None] + 13.5
    for axis in range(2):
        points = deform.points(coefficients[axis], deform.affine_fields())
        assert np.abs(points / 256 - expected[:, axis]).max() < 1 / 512 * 2 + 27 / 2048


def test_affine_parameters_are_uniform_within_their_bounds():
    words = words_of(20_000, 6)
    places = words >> 22
    assert places.min() == 0
    assert places.max() == deform.STEPS - 1
    for column in places.T:
        counts = np.bincount(column // 64, minlength=16)
        # Chi-squared with 15 degrees of freedom: above 44.3 once in 10,000.
        assert ((counts - 1250) ** 2 / 1250).sum() < 44.3
    assert np.abs(np.corrcoef(places.T) - np.eye(6)).max() < 4 / math.sqrt(20_000)
    tables = deform.affine_tables(12, 0.15, 0.2, 2)
    assert tables[:, [0, -1]].tolist() == [
        [round(2**14 * math.cos(math.radians(12)))] * 2,
        [round(2**14 * math.sin(math.radians(angle))) for angle in (-12, 12)],
        [round(2**14 * 0.85), round(2**14 * 1.15)],
        [round(2**14 * -0.2), round(2**14 * 0.2)],
        [-512, 512],
    ]
    assert (np.diff(tables[1:]) >= 0).all()


# Elastic displacements


def test_noise_is_a_sum_of_four_bytes():
    words = np.array([0, 2**32 - 1, 0x01020304, 0xFF000080], np.uint32)
    assert deform.bell(tf.constant(words)).numpy().tolist() == [-510, 510, -500, 127 + 256 - 510]
    noise = deform.bell(tf.constant(words_of(20_000, 6))).numpy()
    assert abs(noise.mean()) < 4 * deform.NOISE_DEVIATION / math.sqrt(noise.size)
    assert noise.std() == pytest.approx(deform.NOISE_DEVIATION, rel=0.01)


@pytest.mark.parametrize(("alpha", "sigma"), [(36.0, 5.5), (8.0, 2.0), (60.0, 10.0)])
def test_elastic_displacements_against_numpy(alpha, sigma):
    across = math.ceil((27 + 2 * sigma) / (1.5 * sigma)) + 1
    knots = 13.5 + 1.5 * sigma * np.linspace(-(across - 1) / 2, (across - 1) / 2, across)
    words = words_of(10, 6 + 2 * across**2)
    noise = np.stack([(words[:, 6:] >> bits & 255) - 127.5 for bits in (0, 8, 16, 24)]).sum(axis=0)
    noise = noise.reshape(10, 2, across, across) / math.sqrt((2**16 - 1) / 3)
    line = np.exp(-((knots[:, None] - np.arange(28)) ** 2) / 2 / sigma**2)
    field = np.einsum("nakl,ky,lx->nayx", noise, line, line)
    length = math.sqrt(np.mean(np.einsum("ky,lx->yx", line**2, line**2)))
    field *= deform.elastic_deviation(alpha, sigma) / length
    images = random_images(10)
    result = deformed({"elastic_alpha": alpha, "elastic_sigma": sigma}, images)
    y, x = np.rint((np.mgrid[:28, :28] + field).swapaxes(0, 1) * 256).reshape(2, 10, 784)
    expected = deform.sample(images, y.astype(np.float32), x.astype(np.float32))
    assert np.abs(result - expected).max() < 3 / 256  # points one unit off, where they round
    assert np.abs(result - images).mean() > 0.1


@pytest.mark.parametrize(("alpha", "sigma"), [(36.0, 5.5), (20.0, 4.0)])
def test_displacements_spread_like_blurred_noise(alpha, sigma):
    fields = deform.elastic_fields(alpha, sigma)
    noise = deform.bell(tf.constant(words_of(4000, 2 * len(fields)))).numpy()
    moved = (noise[:, : len(fields)] @ fields / deform.FINE).reshape(-1, 28, 28)
    plane = np.random.default_rng(3).uniform(-1, 1, (1000, 1000))
    blurred = alpha * scipy.ndimage.gaussian_filter(plane, sigma, mode="wrap")
    assert deform.elastic_deviation(alpha, sigma) == pytest.approx(blurred.std(), rel=0.05)
    assert moved.std() == pytest.approx(blurred.std(), rel=0.05)
    for lag in (2, 5, 8):
        expected = (blurred[:, lag:] * blurred[:, :-lag]).mean() / blurred.var()
        for values in (moved, moved.swapaxes(1, 2)):
            measured = (values[:, :, lag:] * values[:, :, :-lag]).mean() / values.var()
            assert measured == pytest.approx(expected, abs=0.04)
    margins = np.concatenate([moved[:, 0], moved[:, -1], moved[:, :, 0], moved[:, :, -1]])
    assert margins.std() == pytest.approx(moved[:, 10:18, 10:18].std(), rel=0.05)
