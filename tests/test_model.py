import math

import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.model import (
    ACTIVATIONS,
    INITIALIZERS,
    MLP,
    DenseLayer,
    dropout_noise,
    he_normal,
    identity,
    plain_normal,
    sigmoid,
    xavier_uniform,
)


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


@pytest.mark.parametrize(
    ("draw", "shape", "deviation"),
    [
        (he_normal, (784, 700), math.sqrt(2 / 784)),
        (he_normal, (50, 8000), math.sqrt(2 / 50)),
        (plain_normal, (784, 700), 0.05),
        (plain_normal, (50, 8000), 0.05),
    ],
)
def test_normal_weights_have_the_moments_of_the_papers(draw, shape, deviation):
    w = draw(shape, (22, 0)).numpy()
    assert w.dtype == np.float32
    assert w.shape == shape
    w = w.astype(np.float64) / deviation
    assert abs(w.mean()) < 5 / math.sqrt(w.size)
    assert w.var() == pytest.approx(1, rel=0.01)
    # Of a normal distribution 31.73 % lie beyond one deviation and 0.27 % beyond three.
    assert (np.abs(w) > 1).mean() == pytest.approx(0.3173, abs=0.005)
    assert (np.abs(w) > 3).mean() == pytest.approx(0.0027, abs=0.0006)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_equal_seeds_give_equal_weights_and_others_do_not(name):
    drawn = [
        INITIALIZERS[name]((40, 30), seed).numpy().tobytes()
        for seed in [(22, 0), (22, 0), (22, 1), (23, 0), (0, 22)]
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("name", INITIALIZERS)
def test_weights_are_equal_eager_and_in_a_graph(name):
    def draw():
        return INITIALIZERS[name]((40, 30), (22, 1))

    np.testing.assert_array_equal(draw(), tf.function(draw)())


def test_xavier_has_not_changed():
    """Another generator would silently change what every seed stands for."""
    expected = [[1.00459015, -0.71669221], [-0.74051166, 0.51376486]]
    np.testing.assert_allclose(xavier_uniform((2, 2), (22, 0)), expected, rtol=1e-6)


# One layer


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (5, 7, 3), (0, 4, 2)])
def test_dense_layer_is_the_product_of_numpy(rows, inputs, outputs, name):
    layer = DenseLayer(inputs, outputs, activation=ACTIVATIONS[name], seed=(1, 2))
    layer.b.assign(random(outputs, seed=1))
    x = random(rows, inputs, seed=2)
    expected = x.astype(np.float64) @ layer.w.numpy().astype(np.float64) + layer.b.numpy()
    expected = numpy_twin.ACTIVATIONS[name][0](expected)
    if name == "relu":
        assert rows * outputs < 10 or (expected == 0).any()  # both branches are met
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_dense_layer_of_given_weights_ignores_its_own():
    layer = DenseLayer(2, 2, activation=identity, seed=(1, 2))
    got = layer.apply(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([10.0, 20.0]), [[1.0, 1]])
    np.testing.assert_array_equal(got, [[14, 26]])


def test_dense_layer_begins_with_a_bias_of_zero():
    assert not DenseLayer(3, 5, activation=identity, seed=(1, 2)).b.numpy().any()


# Activations


def value_and_slope(name, x):
    x = tf.constant(x, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ACTIVATIONS[name](x)
    return y.numpy(), tape.gradient(y, x).numpy()


@pytest.mark.parametrize(
    ("name", "x", "values", "slopes"),
    [
        ("relu", [-2, -0.0, 0, 3], [0, 0, 0, 3], [0, 0, 0, 1]),
        ("identity", [-2, 0, 3], [-2, 0, 3], [1, 1, 1]),
        (
            "sigmoid",
            [0, math.log(3), -math.log(3)],
            [1 / 2, 3 / 4, 1 / 4],
            [1 / 4, 3 / 16, 3 / 16],
        ),
        ("tanh", [0, math.log(2), -math.log(2)], [0, 3 / 5, -3 / 5], [1, 16 / 25, 16 / 25]),
        # Far out: nothing overflows, in the value or in its slope.
        ("relu", [-3e38, 3e38], [0, 3e38], [0, 1]),
        ("sigmoid", [-3e38, -1e4, -100, 100, 1e4, 3e38], [0, 0, 0, 1, 1, 1], [0] * 6),
        ("tanh", [-3e38, -100, 100, 3e38], [-1, -1, 1, 1], [0] * 4),
    ],
)
def test_activations_by_hand(name, x, values, slopes):
    found, slope = value_and_slope(name, x)
    np.testing.assert_allclose(found, np.float32(values), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slope, slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_agree_with_scipy(name):
    x = np.linspace(-20, 20, 401)
    function, slope = numpy_twin.ACTIVATIONS[name]
    found, found_slope = value_and_slope(name, x)
    np.testing.assert_allclose(found, function(x), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found_slope, slope(np.float32(x).astype(np.float64)), atol=1e-6)


def test_a_small_sigmoid_keeps_its_digits():
    assert float(sigmoid(tf.constant(-50.0))) == pytest.approx(math.exp(-50), rel=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    assert np.isnan(ACTIVATIONS[name](tf.constant([math.nan])).numpy()).all()


# Dropout


def noise(rate=0.3, seed=22, key=(5, 1), layer=0, shape=(200, 300), wrap=lambda f: f):
    def draw(key):
        return dropout_noise(rate, seed, key)(layer, tf.zeros(shape))

    return wrap(draw)(tf.constant(key)).numpy()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    drawn = noise(rate)
    kept = drawn != 0
    np.testing.assert_allclose(drawn[kept], 1 / (1 - rate), rtol=1e-6)
    error = 5 * math.sqrt(rate * (1 - rate) / drawn.size)
    assert (~kept).mean() == pytest.approx(rate, abs=error)
    assert drawn.mean() == pytest.approx(1, abs=error / (1 - rate))
    # As often in any column as in any other, up to chance.
    columns = 5.5 * math.sqrt(rate * (1 - rate) / len(drawn))
    assert np.abs((~kept).mean(axis=0) - rate).max() < columns


def test_no_dropout_no_noise():
    assert dropout_noise(0.0, 22, tf.constant((5, 1))) is None


def test_dropout_depends_on_its_arguments_alone():
    usual = noise()
    np.testing.assert_array_equal(usual, noise())
    np.testing.assert_array_equal(usual, noise(wrap=tf.function))
    compiled = noise(wrap=lambda f: tf.function(f, jit_compile=True))
    np.testing.assert_array_equal(usual, compiled)
    others = [
        noise(seed=23),
        noise(key=(6, 1)),
        noise(key=(5, 2)),
        noise(key=(1, 5)),
        noise(layer=1),
        noise(seed=2**31 - 1, key=(2**31 - 1, 2**31 - 1), layer=9),
    ]
    for i, drawn in enumerate([usual, *others]):
        for other in others[i:]:
            agree = ((drawn == 0) == (other == 0)).mean()
            assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.02)  # no more than by chance


# The network


def test_dropout_multiplies_what_hidden_layers_give_and_no_more():
    model = MLP(6, (5, 4), 3, activation="tanh", seed=1)
    x = random(7, 6)
    factors = [2 * random(7, 5, seed=1), 3 * random(7, 4, seed=2)]
    asked = []

    def given(layer, outputs):
        asked.append(layer)
        assert outputs.shape == factors[layer].shape
        return factors[layer]

    found = model.apply(model.weights, x, given)
    assert asked == [0, 1]
    weights = [w.numpy().astype(np.float64) for w in model.weights]
    _, expected = numpy_twin.forward(weights, x, activation="tanh", noise=factors)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_trace_holds_what_went_through_every_layer():
    model = MLP(6, (5,), 3, seed=1)
    x, factor = random(7, 6), random(7, 5, seed=1)
    first, last = model.trace(model.weights, x, lambda *_: factor)
    np.testing.assert_array_equal(first.inputs, x)
    np.testing.assert_array_equal(first.noise, factor)
    np.testing.assert_array_equal(last.inputs, first.outputs * factor)
    np.testing.assert_array_equal(last.outputs, model.apply(model.weights, x, lambda *_: factor))
    assert last.noise is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation_stands_after_hidden_layers_alone(activation):
    model = MLP(6, (7, 5), 4, activation=activation, seed=3)
    for i, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=i))
    x = random(9, 6, seed=99)
    weights = [w.numpy().astype(np.float64) for w in model.weights]
    _, expected = numpy_twin.forward(weights, x, activation=activation)
    assert np.abs(expected).max() > 1.5 and expected.min() < -0.1
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_network_takes_its_first_weights_from_its_initializer(name):
    model = MLP(6, (5,), 4, initializer=name, seed=3)
    for i, layer in enumerate(model.layers):
        expected = INITIALIZERS[name](tuple(layer.w.shape), (3, i))
        np.testing.assert_array_equal(layer.w, expected)
        assert not layer.b.numpy().any()


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
