import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.gradients import tape_gradients, totals
from trainer.model import MLP

ROWS, INPUTS, CLASSES = 12, 5, 4


def network(hidden=(6, 5)):
    """A tiny model with biases away from zero, so that no ReLU stands at its corner."""
    model = MLP(INPUTS, hidden, CLASSES, seed=7)
    random = np.random.default_rng(7)
    for b in model.weights[1::2]:
        b.assign(random.uniform(0.05, 0.2, b.shape))
    return model


def rows(count=ROWS, seed=0):
    random = np.random.default_rng(seed)
    images = random.uniform(0, 1, (count, INPUTS)).astype(np.float32)
    return images, random.integers(0, CLASSES, count)


def gradients(model, images, labels, mask=None, count=None):
    mask = np.ones(len(labels), np.float32) if mask is None else np.float32(mask)
    return tape_gradients(
        model,
        [tf.identity(weight) for weight in model.weights],
        tf.constant(images),
        tf.constant(labels, tf.int64),
        tf.constant(mask),
        tf.constant(mask.sum() if count is None else count, tf.float32),
    )


def doubles(model):
    return [weight.numpy().astype(np.float64) for weight in model.weights]


def central_differences(weights, function, h=1e-6):
    """The gradient of a float64 function, one element at a time."""
    found = []
    for weight in weights:
        gradient = np.empty_like(weight)
        for at in np.ndindex(weight.shape):
            kept = weight[at]
            weight[at] = kept + h
            above = function()
            weight[at] = kept - h
            gradient[at] = (above - function()) / (2 * h)
            weight[at] = kept
        found.append(gradient)
    return found


def assert_all_close(got, expected, atol):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=f"weight {i}")


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5)])
def test_agree_with_central_differences(hidden):
    model, (images, labels) = network(hidden), rows()
    weights = doubles(model)
    expected = central_differences(
        weights, lambda: numpy_twin.losses(weights, images, labels).mean()
    )
    found, _ = gradients(model, images, labels)
    assert max(np.abs(g).max() for g in expected) > 0.05
    assert_all_close(found, expected, atol=1e-6)  # float32 on one side, h**2 on the other
    # And so does the twin, which the tests of whole training runs rely on.
    assert_all_close(numpy_twin.gradients(weights, images, labels), expected, atol=1e-8)


def test_sums_agree_with_numpy():
    model, (images, labels) = network(), rows(200)
    _, sums = gradients(model, images, labels)
    weights = doubles(model)
    assert float(sums.loss) == pytest.approx(
        numpy_twin.losses(weights, images, labels).sum(), rel=1e-6
    )
    assert int(sums.correct) == numpy_twin.correct(weights, images, labels)
    assert 0 < int(sums.correct) < 200


def test_padding_rows_change_nothing():
    model, (images, labels) = network(), rows()
    alone, alone_sums = gradients(model, images, labels)
    junk, junk_labels = rows(5, seed=1)
    padded, padded_sums = gradients(
        model,
        np.concatenate([images, 100 * junk]),
        np.concatenate([labels, junk_labels]),
        mask=[1] * ROWS + [0] * 5,
    )
    assert_all_close(padded, alone, atol=1e-7)
    assert float(padded_sums.loss) == pytest.approx(float(alone_sums.loss), rel=1e-6)
    assert float(padded_sums.correct) == float(alone_sums.correct)


def test_a_share_of_nothing_but_padding_has_no_gradient():
    model, (images, labels) = network(), rows()
    found, sums = gradients(model, images, labels, mask=[0] * ROWS, count=3)
    assert not any(np.any(g) for g in found)
    assert float(sums.loss) == float(sums.correct) == 0


@pytest.mark.parametrize("cuts", [[6], [3, 6, 9], [1, 2, 11], [10]])
def test_sum_over_shares_is_the_gradient_of_the_whole_batch(cuts):
    """Also where shares differ in size, as the last batch's do: a mean of means would be off."""
    model, (images, labels) = network(), rows()
    whole, whole_sums = gradients(model, images, labels)
    parts = [
        gradients(model, x, y, count=ROWS)
        for x, y in zip(np.split(images, cuts), np.split(labels, cuts), strict=True)
    ]
    summed = [sum(arrays) for arrays in zip(*(found for found, _ in parts), strict=True)]
    assert_all_close(summed, whole, atol=1e-7)
    assert sum(float(sums.loss) for _, sums in parts) == pytest.approx(
        float(whole_sums.loss), rel=1e-6
    )
    assert sum(float(sums.correct) for _, sums in parts) == float(whole_sums.correct)


def test_compiled_agree_with_eager():
    model, (images, labels) = network(), rows()
    eager, _ = gradients(model, images, labels)
    compiled, _ = tf.function(lambda: gradients(model, images, labels), jit_compile=True)()
    assert_all_close(compiled, eager, atol=1e-7)


def test_weights_are_the_values_given_not_the_models_own():
    model, other, (images, labels) = network(), network(), rows()
    expected, _ = gradients(model, images, labels)
    for weight in other.weights:
        weight.assign(tf.zeros_like(weight))
    found, _ = tape_gradients(
        other,
        [tf.identity(weight) for weight in model.weights],
        tf.constant(images),
        tf.constant(labels),
        tf.ones(ROWS),
        tf.constant(float(ROWS)),
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_totals_by_hand():
    logits = tf.constant([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    sums = totals(tf.constant([0, 0, 0, 1], tf.int64), logits, tf.constant([1.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(
        sums.loss, np.log(2) + np.log1p(np.exp(-5)) + np.log1p(np.exp(5)), rtol=1e-6
    )
    assert float(sums.correct) == 2
