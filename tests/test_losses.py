import math

import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from trainer.losses import (
    LOSS_SLOPES,
    LOSSES,
    is_correct,
    sigmoid_cross_entropy,
    sigmoid_targets,
    softmax,
    softmax_cross_entropy,
    softmax_targets,
)


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


# A question for each class


@pytest.mark.parametrize(
    ("logits", "answers", "expected"),
    [
        ([0], [1], math.log(2)),
        ([0], [0], math.log(2)),
        ([math.log(3)], [1], math.log(4 / 3)),
        ([math.log(3)], [0], math.log(4)),
        ([-math.log(3)], [1], math.log(4)),
        ([0], [0.3], math.log(2)),
        ([math.log(3)], [0.5], math.log(4) / 2 + math.log(4 / 3) / 2),
        ([0, 0, 0], [0, 1, 0], 3 * math.log(2)),  # summed over the outputs
        ([math.log(3), -math.log(3)], [1, 0], 2 * math.log(4 / 3)),
    ],
)
def test_sigmoid_by_hand(logits, answers, expected):
    found = sigmoid_cross_entropy(
        tf.constant([answers], tf.float32), tf.constant([logits], tf.float32)
    )
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_sigmoid_of_extreme_logits_stays_finite(jit_compile):
    @tf.function(jit_compile=jit_compile)
    def value_and_gradient(answers, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = sigmoid_cross_entropy(answers, logits)
        return value, tape.gradient(value, logits)

    logits = tf.constant([[1e4], [-1e4], [1e4], [-1e4], [3e38], [-3e38], [0.0], [0.0]])
    answers = tf.constant([[1.0], [0.0], [0.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    values, gradient = value_and_gradient(answers, logits)
    expected = [0, 0, 1e4, 1e4, 3e38, 3e38, math.log(2), math.log(2)]
    np.testing.assert_allclose(values, np.float32(expected), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], [0, 0, 1, -1, 1, -1, 0.5, -0.5], atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("scale", [0.01, 1, 30, 1000])
def test_sigmoid_agrees_with_scipy_and_keras(scale, smoothing):
    logits, labels = logits_and_labels(scale, seed=3)
    wide = logits.astype(np.float64)
    wanted = np.eye(10)[labels] * (1 - smoothing) + smoothing / 2
    yes, no = scipy.special.log_expit(wide), scipy.special.log_expit(-wide)
    expected = -(wanted * yes + (1 - wanted) * no).sum(axis=-1)
    found = sigmoid_cross_entropy(tf.constant(labels), tf.constant(logits), smoothing)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * max(1, scale))
    keras = tf.keras.losses.BinaryCrossentropy(
        from_logits=True, label_smoothing=smoothing, reduction=None
    )
    theirs = keras(np.eye(10, dtype=np.float32)[labels], logits) * 10  # a mean over the outputs
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5 * max(1, scale))


# Forms of labels, and smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_both_forms_of_labels_give_the_same_bits(name, smoothing):
    logits, labels = logits_and_labels(seed=4)
    number, one_hot = tf.constant(labels), tf.one_hot(labels, 10)
    for functions in (LOSSES, LOSS_SLOPES):
        function = functions[name]
        np.testing.assert_array_equal(
            function(number, tf.constant(logits), smoothing),
            function(one_hot, tf.constant(logits), smoothing),
        )


@pytest.mark.parametrize(
    ("targets", "label", "classes", "smoothing", "expected"),
    [
        (softmax_targets, 1, 4, 0.0, [0, 1, 0, 0]),
        (softmax_targets, 1, 4, 0.4, [0.1, 0.7, 0.1, 0.1]),
        (softmax_targets, 0, 2, 0.5, [0.75, 0.25]),
        (softmax_targets, 0, 1, 0.5, [1]),
        (sigmoid_targets, 1, 4, 0.0, [0, 1, 0, 0]),
        (sigmoid_targets, 1, 4, 0.4, [0.2, 0.8, 0.2, 0.2]),
        (sigmoid_targets, 0, 1, 0.4, [0.8]),
    ],
)
def test_targets_by_hand(targets, label, classes, smoothing, expected):
    found = targets(tf.constant([label], tf.int64), classes, smoothing)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_smoothed_softmax_agrees_with_keras(scale, smoothing):
    logits, labels = logits_and_labels(scale, seed=5)
    keras = tf.keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing, reduction=None
    )
    one_hot = np.eye(10, dtype=np.float32)[labels]
    np.testing.assert_allclose(
        softmax_cross_entropy(tf.constant(labels), tf.constant(logits), smoothing),
        keras(one_hot, logits),
        rtol=1e-5,
        atol=1e-6 * max(1, scale),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [0.01, 1, 30, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_slopes_by_hand_agree_with_the_tape(name, scale, smoothing):
    logits, labels = logits_and_labels(scale, seed=6)
    values, labels = tf.constant(logits), tf.constant(labels)
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(LOSSES[name](labels, values, smoothing))
    by_hand = LOSS_SLOPES[name](labels, values, smoothing)
    np.testing.assert_allclose(by_hand, tape.gradient(total, values), rtol=0, atol=5e-7)


@pytest.mark.parametrize("logits", [[0, 0], [1, 2, 3], [-1e4, 1e4], [3e38, 0], [-3e38, -3e38]])
def test_softmax_agrees_with_scipy(logits):
    found = softmax(tf.constant([logits], tf.float32))
    expected = scipy.special.softmax(np.float64(np.float32([logits])), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert float(tf.reduce_sum(found)) == pytest.approx(1, abs=1e-6)


# What counts as right


@pytest.mark.parametrize(
    ("logits", "answers", "expected"),
    [
        ([1, 2, 3], [0, 0, 1], 1),
        ([1, 2, 3], [0, 1, 0], 0),
        ([3, 3, 1], [1, 0, 0], 1),
        ([1, 2, 3], [0.1, 0.2, 0.7], 1),
        ([0.1], [1], 1),  # a single output is a question
        ([0.1], [0], 0),
        ([-0.1], [1], 0),
        ([-0.1], [0], 1),
        ([0.0], [1], 0),  # undecided: no
        ([0.0], [0], 1),
    ],
)
def test_is_correct_of_wanted_answers(logits, answers, expected):
    found = is_correct(tf.constant([answers], tf.float32), tf.constant([logits], tf.float32))
    np.testing.assert_array_equal(found, [expected])


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
