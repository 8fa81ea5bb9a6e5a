import dataclasses
import itertools

import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.config import PRESETS
from trainer.gradients import dense_gradients, make_gradients, totals
from trainer.losses import LOSSES
from trainer.model import ACTIVATIONS, MLP, dropout_noise

ROWS, INPUTS, CLASSES = 12, 5, 4
WAYS = ["tape", "manual"]
KEY = (3, 1)  # step, share
LOSS_SETTINGS = list(itertools.product(LOSSES, ["integer", "one_hot"], [0.0, 0.2]))


def settings(hidden=(6, 5), **changed):
    return dataclasses.replace(PRESETS["core"], hidden_units=hidden, seed=7, **changed)


def network(config, classes=CLASSES):
    """A tiny model with biases away from zero, so that no ReLU stands at its corner."""
    model = MLP(INPUTS, config.hidden_units, classes, activation=config.activation, seed=7)
    random = np.random.default_rng(7)
    for b in model.weights[1::2]:
        b.assign(random.uniform(0.05, 0.2, b.shape))
    return model


def rows(count=ROWS, seed=0):
    random = np.random.default_rng(seed)
    images = random.uniform(0, 1, (count, INPUTS)).astype(np.float32)
    return images, random.integers(0, CLASSES, count)


def gradients(config, images, labels, mask=None, count=None, key=KEY, model=None):
    model = model or network(config)
    mask = np.ones(len(labels), np.float32) if mask is None else np.float32(mask)
    return make_gradients(config, model)(
        [tf.identity(weight) for weight in model.weights],
        tf.constant(images),
        tf.constant(labels),
        tf.constant(mask),
        tf.constant(mask.sum() if count is None else count, tf.float32),
        tf.constant(key),
    )


def doubles(model):
    return [weight.numpy().astype(np.float64) for weight in model.weights]


def twin_settings(config, count=ROWS, key=KEY):
    """The same for `numpy_twin`, dropout's noise drawn."""
    noise = dropout_noise(config.dropout, config.seed, tf.constant(key))
    return {
        "activation": config.activation,
        "loss": config.loss,
        "smoothing": config.label_smoothing,
        "noise": noise
        and [
            noise(i, tf.zeros((count, width))).numpy()
            for i, width in enumerate(config.hidden_units)
        ],
    }


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


# Two ways of ours, and two of NumPy's


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("loss", "labels", "smoothing"), LOSS_SETTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_ways_agree_with_central_differences(activation, loss, labels, smoothing, dropout):
    config = settings(
        activation=activation, loss=loss, labels=labels, label_smoothing=smoothing, dropout=dropout
    )
    (images, numbers), twin = rows(), twin_settings(config)
    weights = doubles(network(config))
    expected = central_differences(
        weights, lambda: numpy_twin.losses(weights, images, numbers, **twin).mean()
    )
    assert max(np.abs(g).max() for g in expected) > 0.05
    found = {}
    for way in WAYS:
        one = dataclasses.replace(config, gradients=way)
        found[way], sums = gradients(one, images, numbers)
        assert_all_close(found[way], expected, atol=1e-6)  # float32 on one side, h**2 on the other
        losses = numpy_twin.losses(weights, images, numbers, **twin)
        assert float(sums.loss) == pytest.approx(losses.sum(), rel=1e-6)
    assert_all_close(found["manual"], found["tape"], atol=2e-7)
    # And so does the twin, which the tests of whole training runs rely on.
    assert_all_close(numpy_twin.gradients(weights, images, numbers, **twin), expected, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hidden", [(), (6,), (3, 4, 5)])
def test_any_depth_agrees_with_central_differences(hidden, way):
    config = settings(hidden, gradients=way, activation="tanh", dropout=0.4)
    (images, labels), twin = rows(), twin_settings(config)
    weights = doubles(network(config))
    expected = central_differences(
        weights, lambda: numpy_twin.losses(weights, images, labels, **twin).mean()
    )
    assert_all_close(gradients(config, images, labels)[0], expected, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_wanted_answers_between_0_and_1_agree_with_central_differences(loss, way):
    config = settings(gradients=way, loss=loss, labels="one_hot")
    images, _ = rows()
    answers = np.random.default_rng(4).dirichlet(np.ones(CLASSES), ROWS).astype(np.float32)
    weights = doubles(network(config))
    expected = central_differences(
        weights, lambda: numpy_twin.losses(weights, images, answers, loss=loss).mean()
    )
    assert_all_close(gradients(config, images, answers)[0], expected, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_both_ways_agree_where_everything_is_zero(activation, loss):
    """Ties: all logits equal, every ReLU at its corner, every sign undecided."""
    found = []
    for way in WAYS:
        config = settings(gradients=way, activation=activation, loss=loss)
        model = network(config)
        for weight in model.weights:
            weight.assign(tf.zeros_like(weight))
        found.append(gradients(config, *rows(), model=model)[0])
    assert_all_close(*found, atol=2e-7)
    wanted = numpy_twin.answers(rows()[1], CLASSES, loss, 0.0).mean(axis=0)
    even = 1 / CLASSES if loss == "softmax" else 1 / 2
    np.testing.assert_allclose(found[0][-1], even - wanted, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_extreme_inputs_give_finite_gradients(activation, loss, way):
    config = settings(gradients=way, activation=activation, loss=loss, label_smoothing=0.1)
    images, labels = rows()
    found, sums = gradients(config, 1e6 * (images - 0.5), labels)
    assert all(np.isfinite(g).all() for g in found)
    assert np.isfinite(sums.loss)


def test_dense_gradients_by_hand():
    x, w = tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([[5.0], [7.0]])
    by_w, by_b, by_x = dense_gradients(x, w, tf.constant([[1.0], [10.0]]))
    np.testing.assert_array_equal(by_w, [[31], [42]])
    np.testing.assert_array_equal(by_b, [11])
    np.testing.assert_array_equal(by_x, [[5, 7], [50, 70]])


# Dropout


@pytest.mark.parametrize("way", WAYS)
def test_the_key_decides_dropout_and_nothing_else(way):
    def found(dropout, key):
        return gradients(settings(gradients=way, dropout=dropout), *rows(), key=key)[0][0].numpy()

    assert found(0.4, (3, 1)).tobytes() == found(0.4, (3, 1)).tobytes()
    assert len({found(0.4, key).tobytes() for key in [(3, 1), (4, 1), (3, 0), (1, 3)]}) == 4
    assert found(0.0, (3, 1)).tobytes() == found(0.0, (4, 0)).tobytes()


# Shares of a batch, and padding


def test_sums_agree_with_numpy():
    config = settings()
    images, labels = rows(200)
    _, sums = gradients(config, images, labels)
    weights = doubles(network(config))
    assert float(sums.loss) == pytest.approx(
        numpy_twin.losses(weights, images, labels).sum(), rel=1e-6
    )
    assert int(sums.correct) == numpy_twin.correct(weights, images, labels)
    assert 0 < int(sums.correct) < 200


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_rows_change_nothing(way, loss):
    config = settings(gradients=way, loss=loss)
    images, labels = rows()
    alone, alone_sums = gradients(config, images, labels)
    junk, junk_labels = rows(5, seed=1)
    padded, padded_sums = gradients(
        config,
        np.concatenate([images, 100 * junk]),
        np.concatenate([labels, junk_labels]),
        mask=[1] * ROWS + [0] * 5,
    )
    assert_all_close(padded, alone, atol=1e-7)
    assert float(padded_sums.loss) == pytest.approx(float(alone_sums.loss), rel=1e-6)
    assert float(padded_sums.correct) == float(alone_sums.correct)


@pytest.mark.parametrize("way", WAYS)
def test_a_share_of_nothing_but_padding_has_no_gradient(way):
    found, sums = gradients(settings(gradients=way), *rows(), mask=[0] * ROWS, count=3)
    assert not any(np.any(g) for g in found)
    assert float(sums.loss) == float(sums.correct) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cuts", [[6], [3, 6, 9], [1, 2, 11], [10]])
def test_sum_over_shares_is_the_gradient_of_the_whole_batch(cuts, way):
    """Also where shares differ in size, as the last batch's do: a mean of means would be off."""
    config, (images, labels) = settings(gradients=way), rows()
    whole, whole_sums = gradients(config, images, labels)
    parts = [
        gradients(config, x, y, count=ROWS)
        for x, y in zip(np.split(images, cuts), np.split(labels, cuts), strict=True)
    ]
    summed = [sum(arrays) for arrays in zip(*(found for found, _ in parts), strict=True)]
    assert_all_close(summed, whole, atol=1e-7)
    assert sum(float(sums.loss) for _, sums in parts) == pytest.approx(
        float(whole_sums.loss), rel=1e-6
    )
    assert sum(float(sums.correct) for _, sums in parts) == float(whole_sums.correct)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_agree_with_eager(way, loss):
    config = settings(gradients=way, loss=loss, activation="sigmoid", labels="one_hot", dropout=0.3)
    images, labels = rows()
    model = network(config)
    eager, _ = gradients(config, images, labels, model=model)
    compiled, _ = tf.function(
        lambda: gradients(config, images, labels, model=model), jit_compile=True
    )()
    assert_all_close(compiled, eager, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_the_values_given_not_the_models_own(way):
    config = settings(gradients=way)
    (images, labels), model, other = rows(), network(config), network(config)
    expected, _ = gradients(config, images, labels)
    for weight in other.weights:
        weight.assign(tf.zeros_like(weight))
    found, _ = make_gradients(config, other)(
        [tf.identity(weight) for weight in model.weights],
        tf.constant(images),
        tf.constant(labels),
        tf.ones(ROWS),
        tf.constant(float(ROWS)),
        tf.constant(KEY),
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_totals_by_hand():
    logits = tf.constant([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    labels, mask = tf.constant([0, 0, 0, 1], tf.int64), tf.constant([1.0, 1.0, 1.0, 0.0])
    sums = totals(labels, logits, mask)
    wrong, right = np.log1p(np.exp(5)), np.log1p(np.exp(-5))
    np.testing.assert_allclose(sums.loss, np.log(2) + right + wrong, rtol=1e-6)
    assert float(sums.correct) == 2
    # As answers to a question for each class, of which every 0 logit is undecided.
    sums = totals(labels, logits, mask, loss="sigmoid")
    np.testing.assert_allclose(sums.loss, 4 * np.log(2) + right + wrong, rtol=1e-6)
