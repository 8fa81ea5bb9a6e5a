"""Random affine and elastic deformations of images, drawn afresh for every epoch.

What is drawn depends on (seed, epoch, example) alone, and everything is computed in whole numbers:
on integers, or on float32 that holds integers below 2^24. Such sums and products are exact, in
whatever order and with whatever instructions a backend takes them, so an image comes out the same
bit for bit eager or compiled, in any batch, on any replica or device.

A deformation is a point of the image for each pixel of the result. Both coordinates of all points
come from one matrix product each: (random coefficients) @ (fixed fields), the affine part being
the fields y, x and 1, the elastic part Gaussian bumps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from pipeline.dataset import IMAGE_SHAPE, NUM_PIXELS
from trainer.config import TrainConfig
from trainer.threefry import random_words, shift_right

# (images float32 [n, 784], epoch int32 [], examples int32 [n], seed) -> float32 [n, 784]
Deform = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, int], tf.Tensor]

SIDE = IMAGE_SHAPE[0]
UNIT = 256  # of coordinates, in a pixel
FINE = 2**16  # of the fields' sums, in a pixel
ONE = 2**14  # 1.0, in a table of affine parameters
STEPS = 1024  # values that an affine parameter can take
AFFINE_WORDS = 6  # random words that an affine map takes
KNOT_SPACING = 1.5  # in sigmas: the variance of the displacements ripples by 2.5 %
NOISE_DEVIATION = math.sqrt(4 * (2**16 - 1) / 12)  # of a sum of four uniform bytes


def make_deform(config: TrainConfig) -> Deform | None:
    """Builds the function that deforms a batch, or None where every amplitude is 0.

    The bounds in `trainer.checks` keep every sum below 2^24. In the last `config.calm_epochs` all
    amplitudes are halved: what is learned last is closer to what will be seen.
    """
    amplitudes = (config.rotate, config.scale, config.shear, config.shift, config.elastic_alpha)
    if not any(amplitudes):
        return None
    tables = np.stack(
        [affine_tables(*(share * value for value in amplitudes[:4])) for share in (1, 0.5)]
    )
    bumps = elastic_fields(config.elastic_alpha, config.elastic_sigma)
    fields = np.vstack([affine_fields(), bumps])
    knots = len(bumps)

    def deform(images: tf.Tensor, epoch: tf.Tensor, examples: tf.Tensor, seed: int) -> tf.Tensor:
        calm = epoch >= config.epochs - config.calm_epochs
        words = random_words(seed, epoch, examples, AFFINE_WORDS + 2 * knots)
        table = tf.gather(tables, tf.cast(calm, tf.int32))
        affine = affine_coefficients(words[:, :AFFINE_WORDS], table)
        noise = bell(words[:, AFFINE_WORDS:]) * tf.where(calm, 0.5, 1.0)  # halves are exact too
        y = points(tf.concat([affine[0], noise[:, :knots]], axis=1), fields)
        x = points(tf.concat([affine[1], noise[:, knots:]], axis=1), fields)
        return sample(images, y, x)

    return deform


def points(coefficients: tf.Tensor, fields: np.ndarray) -> tf.Tensor:
    """One coordinate of the points that the pixels of the result show.

    Args:
        coefficients: float32 [n, k], integers.
        fields: float32 [k, 784], integers; sums are in 1/`FINE` pixel from the image's middle.

    Returns:
        float32 [n, 784], integers in 1/256 pixel; 0 is the first row or column.
    """
    middle = (SIDE - 1) * FINE // 2
    half = FINE // UNIT // 2
    return tf.floor((coefficients @ fields + (middle + half)) * (UNIT / FINE))


# Affine maps: from a pixel of the result to the point of the image that it shows


def affine_tables(rotate: float, scale: float, shear: float, shift: float) -> np.ndarray:
    """The values that each parameter of an affine map can take, evenly spaced.

    A parameter is drawn as a place in its table: no cosine is computed in the graph, where it
    would depend on the backend.

    Args:
        rotate: largest angle, in degrees.
        scale: largest difference of a scale from 1.
        shear: largest shear, in pixels along a row for each row.
        shift: largest shift, in pixels.

    Returns:
        int32 [5, 1024]: cosines, sines, scales, shears in units of 1/`ONE`; shifts in 1/256 pixel.
    """
    grid = np.linspace(-1, 1, STEPS)
    angles = np.radians(rotate) * grid
    ratios = np.stack([np.cos(angles), np.sin(angles), 1 + scale * grid, shear * grid])
    return np.rint(np.vstack([ONE * ratios, UNIT * shift * grid])).astype(np.int32)


def affine_coefficients(words: tf.Tensor, tables: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws maps: scales along both axes, then a shear, a rotation and a shift.

    Args:
        words: uint32 [n, 6], random.
        tables: of `affine_tables`.

    Returns:
        Coefficients of `affine_fields` for y and for x: float32 [n, 3] each, integers.
    """
    places = tf.cast(shift_right(words, 22), tf.int32)
    cosine, sine = (tf.gather(tables[i], places[:, 0]) for i in (0, 1))
    scale_y, scale_x = (tf.gather(tables[2], places[:, i]) for i in (1, 2))
    shear = tf.gather(tables[3], places[:, 3])
    shift_y, shift_x = (tf.gather(tables[4], places[:, i]) for i in (4, 5))
    slant = _product(shear, scale_y)
    y = [
        _round(_product(cosine, scale_y) - _product(sine, slant), 4),
        _round(-_product(sine, scale_x), 4),
        shift_y,
    ]
    x = [
        _round(_product(sine, scale_y) + _product(cosine, slant), 4),
        _round(_product(cosine, scale_x), 4),
        shift_x,
    ]
    return tf.cast(tf.stack(y, axis=1), tf.float32), tf.cast(tf.stack(x, axis=1), tf.float32)


def _product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The product a * b, where `ONE` stands for 1."""
    return _round(a * b, 14)


def _round(value: tf.Tensor, bits: int) -> tf.Tensor:
    """Divides by 2^bits, to the nearest integer, halves up."""
    return shift_right(value + 2 ** (bits - 1), bits)


def affine_fields() -> np.ndarray:
    """y, x (from the middle, for coefficients in units of 1/1024) and 1 (for 1/256 pixel).

    Returns:
        float32 [3, 784], integers: in 1/`FINE` pixel for a coefficient of 1.
    """
    middle = (SIDE - 1) / 2
    y, x = np.mgrid[:SIDE, :SIDE].reshape(2, NUM_PIXELS) - middle
    return np.stack([y * (FINE // 1024), x * (FINE // 1024), y * 0 + FINE // UNIT]).astype(
        np.float32
    )


# Elastic displacements


def elastic_deviation(alpha: float, sigma: float) -> float:
    """Standard deviation, in pixels, of alpha * (uniform noise on [-1, 1] blurred by sigma).

    Source: Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
    document analysis"; a Gaussian's square sums to 1 / (4 pi sigma^2) over the plane.
    """
    return alpha / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma)


def elastic_fields(alpha: float, sigma: float) -> np.ndarray:
    """Gaussians on a square grid of knots: noise at every knot, spread by them, is blurred noise.

    Knots 1.5 sigma apart give the covariance of noise at every pixel with a fraction of the draws.
    They reach at least one sigma beyond the image, so that the margins move like the middle.

    Args:
        alpha: strength of the displacements.
        sigma: standard deviation of the blur, in pixels.

    Returns:
        float32 [knots, 784], integers: in 1/`FINE` pixel for noise of 1; none where alpha is 0.
    """
    if not alpha:
        return np.empty((0, NUM_PIXELS), np.float32)
    deviation = elastic_deviation(alpha, sigma)
    spacing = KNOT_SPACING * sigma
    across = math.ceil((SIDE - 1 + 2 * sigma) / spacing) + 1
    knots = (SIDE - 1) / 2 + spacing * (np.arange(across) - (across - 1) / 2)
    line = np.exp(-((knots[:, np.newaxis] - np.arange(SIDE)) ** 2) / (2 * sigma**2))
    bumps = np.kron(line, line)
    length = math.sqrt(np.square(bumps).sum(axis=0).mean())
    return np.rint(bumps * (FINE * deviation / NOISE_DEVIATION / length)).astype(np.float32)


def bell(words: tf.Tensor) -> tf.Tensor:
    """Sums of the four bytes of words, less their mean: nearly normal.

    Args:
        words: uint32.

    Returns:
        float32 of the same shape, integers from -510 to 510.
    """
    low = tf.constant(0x00FF00FF, tf.uint32)
    pairs = (words & low) + (shift_right(words, 8) & low)
    total = (pairs & 0xFFFF) + shift_right(pairs, 16)
    return tf.cast(tf.bitcast(total, tf.int32) - 510, tf.float32)


# Sampling


def sample(images: tf.Tensor, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Bilinear interpolation, zero outside of the image.

    Args:
        images: float32 [n, 784], bytes / 255.
        y: float32 [n, 784], rows as integers in 1/256 pixel.
        x: the same for columns.

    Returns:
        float32 [n, 784]; at whole pixels the values of the image, bit for bit.
    """
    # A row ends where the next begins: one column of zeros stands on both sides.
    above, below, width = 2, 3, SIDE + 1
    square = tf.reshape(images, [-1, SIDE, SIDE])
    wide = tf.round(tf.pad(square, [[0, 0], [above, below], [0, 1]]) * 255)
    pixels = tf.reshape(wide, [-1])

    y, x = (tf.clip_by_value(value, -UNIT, SIDE * UNIT) for value in (y, x))
    row, column = tf.floor(y * (1 / UNIT)), tf.floor(x * (1 / UNIT))
    down, right = y - row * UNIT, x - column * UNIT
    first = tf.range(tf.shape(images)[0]) * ((above + SIDE + below) * width) + above * width
    at = tf.cast(row * width + column, tf.int32) + first[:, tf.newaxis]

    upper = tf.gather(pixels, at) * (UNIT - right) + tf.gather(pixels, at + 1) * right
    at += width
    lower = tf.gather(pixels, at) * (UNIT - right) + tf.gather(pixels, at + 1) * right
    value = upper * (UNIT - down) + lower * down  # an integer below 2^24
    # In float64 even the product with a reciprocal gives what float32 division gives.
    return tf.cast(tf.cast(value, tf.float64) * (1 / (255 * UNIT**2)), tf.float32)
