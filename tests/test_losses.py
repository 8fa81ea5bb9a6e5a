import math

import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from trainer.losses import is_correct, softmax_cross_entropy


def logits_and_labels(scale=1.0, rows=200, classes=10, seed=0):
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((rows, classes)) * scale).astype(np.float32)
    return logits, random.integers(0, classes, rows)


def loss(labels, logits):
    return softmax_cross_entropy(tf.constant(labels, tf.int64), tf.constant(logits, tf.float32))


@pytest.mark.parametrize(
    ("logits", "label", "expected"),
    [
        ([0, 0], 0, math.log(2)),
        ([0] * 10, 7, math.log(10)),
        ([5, 5, 5, 5], 3, math.log(4)),  # a shift changes nothing
        ([math.log(1), math.log(2), math.log(3)], 0, math.log(6)),
        ([math.log(1), math.log(2), math.log(3)], 1, math.log(3)),
        ([math.log(1), math.log(2), math.log(3)], 2, math.log(2)),
        ([1, 0], 1, math.log(1 + math.e)),
        ([-3], 0, 0),
    ],
)
def test_by_hand(logits, label, expected):
    np.testing.assert_allclose(loss([label], [logits]), [expected], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1e4, -1e4], [0, 2e4]),
        ([-1e4, 1e4], [2e4, 0]),
        ([1e4, 1e4], [math.log(2)] * 2),
        ([-1e4, -1e4], [math.log(2)] * 2),
        ([1e38, 0], [0, 1e38]),
    ],
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_extreme_logits_stay_finite(logits, expected, jit_compile):
    @tf.function(jit_compile=jit_compile)
    def value_and_gradient(labels, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = softmax_cross_entropy(labels, logits)
        return value, tape.gradient(value, logits)

    values, gradient = value_and_gradient(
        tf.constant([0, 1], tf.int64), tf.constant([logits] * 2, tf.float32)
    )
    np.testing.assert_allclose(values, np.float32(expected), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() <= 1


@pytest.mark.parametrize("scale", [0.01, 1, 30, 1000])
def test_agrees_with_scipy(scale):
    logits, labels = logits_and_labels(scale)
    expected = -scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = expected[np.arange(len(labels)), labels]
    # Float32 rounds logits of this size by about 1e-7 of the largest.
    np.testing.assert_allclose(loss(labels, logits), expected, rtol=1e-6, atol=1e-6 * max(1, scale))


@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_agrees_with_keras(scale):
    logits, labels = logits_and_labels(scale, seed=1)
    keras = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    np.testing.assert_allclose(
        loss(labels, logits), keras(labels, logits), rtol=1e-5, atol=1e-6 * max(1, scale)
    )


@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_gradient_is_softmax_minus_onehot(scale):
    logits, labels = logits_and_labels(scale, seed=2)
    values = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(softmax_cross_entropy(tf.constant(labels), values))
    expected = scipy.special.softmax(logits.astype(np.float64), axis=-1) - np.eye(10)[labels]
    np.testing.assert_allclose(tape.gradient(total, values), expected, atol=2e-6)


def test_gradient_is_exact_where_logits_tie():
    values = tf.constant([[1.0, 1.0, 1.0, 1.0]])
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = softmax_cross_entropy(tf.constant([2], tf.int64), values)
    np.testing.assert_array_equal(tape.gradient(total, values), [[0.25, 0.25, -0.75, 0.25]])


@pytest.mark.parametrize(
    ("logits", "label", "expected"),
    [
        ([1, 2, 3], 2, 1),
        ([1, 2, 3], 1, 0),
        ([3, 3, 1], 0, 1),  # of several, the first counts
        ([3, 3, 1], 1, 0),
        ([0, 0, 0], 0, 1),
        ([0, 0, 0], 2, 0),
        ([-1e4, 1e4], 1, 1),
    ],
)
def test_is_correct(logits, label, expected):
    got = is_correct(tf.constant([label], tf.int64), tf.constant([logits], tf.float32))
    assert got.dtype == tf.float32
    np.testing.assert_array_equal(got, [expected])


def test_each_row_is_on_its_own():
    logits, labels = logits_and_labels(rows=7)
    whole = loss(labels, logits).numpy()
    assert whole.shape == (7,)
    one_by_one = [loss([y], [z]).numpy()[0] for y, z in zip(labels, logits, strict=True)]
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-6)
