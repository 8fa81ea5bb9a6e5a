import math

import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.model import MLP, DenseLayer, identity, relu, xavier_uniform


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Xavier's initial weights


@pytest.mark.parametrize("shape", [(784, 700), (700, 500), (500, 10), (1, 1)])
def test_xavier_stays_within_its_bound(shape):
    w = xavier_uniform(shape, (22, 0)).numpy()
    bound = math.sqrt(6 / sum(shape))
    assert w.dtype == np.float32
    assert w.shape == shape
    assert np.abs(w).max() <= bound
    if w.size > 1000:
        assert w.min() < -0.99 * bound and w.max() > 0.99 * bound  # and fills it


def test_xavier_has_the_moments_of_the_paper():
    w = xavier_uniform((784, 700), (22, 0)).numpy().astype(np.float64)
    # Of 548,800 draws, the mean is within 5 standard errors, the variance within 1 %.
    variance = 2 / (784 + 700)
    assert abs(w.mean()) < 5 * math.sqrt(variance / w.size)
    assert w.var() == pytest.approx(variance, rel=0.01)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    drawn = [
        xavier_uniform((40, 30), seed).numpy().tobytes()
        for seed in [(22, 0), (22, 0), (22, 1), (23, 0), (0, 22)]
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def test_xavier_is_equal_eager_in_a_graph_and_compiled():
    def draw():
        return xavier_uniform((40, 30), (22, 1))

    eager = draw().numpy()
    np.testing.assert_array_equal(eager, tf.function(draw)().numpy())
    np.testing.assert_array_equal(eager, tf.function(draw, jit_compile=True)().numpy())


def test_xavier_has_not_changed():
    """Another generator would silently change what every seed stands for."""
    expected = [[1.00459015, -0.71669221], [-0.74051166, 0.51376486]]
    np.testing.assert_allclose(xavier_uniform((2, 2), (22, 0)), expected, rtol=1e-6)


# One layer


@pytest.mark.parametrize("activation", [identity, relu])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (5, 7, 3), (0, 4, 2)])
def test_dense_layer_is_the_product_of_numpy(rows, inputs, outputs, activation):
    layer = DenseLayer(inputs, outputs, activation=activation, seed=(1, 2))
    layer.b.assign(random(outputs, seed=1))
    x = random(rows, inputs, seed=2)
    expected = x.astype(np.float64) @ layer.w.numpy().astype(np.float64) + layer.b.numpy()
    if activation is relu:
        expected = np.where(expected > 0, expected, 0)
        assert rows * outputs < 10 or (expected == 0).any()  # both branches are met
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_dense_layer_of_given_weights_ignores_its_own():
    layer = DenseLayer(2, 2, activation=identity, seed=(1, 2))
    got = layer.apply(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([10.0, 20.0]), [[1.0, 1]])
    np.testing.assert_array_equal(got, [[14, 26]])


def test_dense_layer_begins_with_a_bias_of_zero():
    assert not DenseLayer(3, 5, activation=identity, seed=(1, 2)).b.numpy().any()


def test_relu_by_hand():
    np.testing.assert_array_equal(relu(tf.constant([-2.0, -0.0, 0.0, 3.0])), [0, 0, 0, 3])


# The network


def test_the_tutorials_network_has_905_010_weights_in_order():
    model = MLP(784, (700, 500), 10, seed=22)
    shapes = [tuple(weight.shape) for weight in model.weights]
    assert shapes == [(784, 700), (700,), (700, 500), (500,), (500, 10), (10,)]
    assert sum(math.prod(shape) for shape in shapes) == 905_010
    assert len(model.trainable_variables) == 6


@pytest.mark.parametrize("hidden", [(), (5,), (7, 5, 3)])
def test_any_depth_agrees_with_numpy(hidden):
    model = MLP(6, hidden, 4, seed=3)
    for i, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=i))
    x = random(9, 6, seed=99)
    _, expected = numpy_twin.forward([w.numpy().astype(np.float64) for w in model.weights], x)
    logits = model(x)
    assert logits.shape == (9, 4)
    assert (logits.numpy() < 0).any()  # no ReLU after the last layer
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_equal_shape_begin_different():
    model = MLP(8, (8, 8), 8, seed=22)
    drawn = {layer.w.numpy().tobytes() for layer in model.layers}
    assert len(drawn) == 3


def test_equal_seeds_give_equal_networks():
    a, b, c = ([w.numpy().tobytes() for w in MLP(8, (6,), 4, seed=s).weights] for s in (22, 22, 23))
    assert a == b
    assert a != c


def test_apply_equals_call_and_reads_only_what_it_is_given():
    model, other = MLP(6, (5, 4), 3, seed=1), MLP(6, (5, 4), 3, seed=2)
    x = random(7, 6)
    values = [tf.identity(weight) for weight in model.weights]
    np.testing.assert_array_equal(model(x), model.apply(values, x))
    np.testing.assert_array_equal(model(x), other.apply(values, x))
    assert not np.array_equal(model(x), other(x))


def test_apply_refuses_another_number_of_weights():
    model = MLP(6, (5,), 3, seed=1)
    with pytest.raises(ValueError, match="shorter"):
        model.apply(model.weights[:-2], random(1, 6))
