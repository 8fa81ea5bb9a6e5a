import itertools

import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.checkpoints import Checkpoints, Progress
from trainer.model import MLP
from trainer.optimizers import Adam, AdamState, adam_update

SHAPES = [(3, 4), (4,), ()]
STEPS = 100


def initial_weights(seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def random_gradients(step, seed=0, smallest=0.0):
    """Gradients of one step; every element at least `smallest` away from zero."""
    random = np.random.default_rng([seed, step])
    drawn = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    return [np.float32(g + np.copysign(smallest, g)) for g in drawn]


def variables(values):
    return [tf.Variable(value) for value in values]


def assert_close(got, expected, step, learning_rate=1e-3):
    """Tolerates what float32 rounds off the weights, and a 1e-5th of the way they have gone.

    The latter because float32(0.999) is off by 1.3e-8, which is a 1e-5th of 1 - 0.999.
    """
    way = learning_rate * (step + 1)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = 1e-6 * max(1, np.abs(b).max()) + 1e-5 * way
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance, err_msg=f"weight {i} diverged at step {step}"
        )


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# By hand


def test_three_steps_by_hand():
    """beta_1 = 1/2, beta_2 = 3/4, learning rate 1, epsilon 1, so that every number is a fraction.

    g = 2:   m = 1,    v = 1;     corrected by 1/2 and 1/4:   2,   4;       step 2 / (2 + 1)
    g = 2:   m = 3/2,  v = 7/4;   corrected by 3/4 and 7/16:  2,   4;       step 2 / (2 + 1)
    g = -4:  m = -5/4, v = 85/16; corrected by 7/8 and 37/64: -10/7, 340/37
    """
    w = [tf.Variable([10.0])]
    adam = Adam(w, learning_rate=1.0, beta_1=0.5, beta_2=0.75, epsilon=1.0)
    expected = 10.0
    for t, (gradient, m, v, move) in enumerate(
        [
            (2, 1, 1, 2 / 3),
            (2, 3 / 2, 7 / 4, 2 / 3),
            (-4, -5 / 4, 85 / 16, -10 / 7 / (np.sqrt(340 / 37) + 1)),
        ],
        1,
    ):
        adam.apply_gradients(w, [tf.constant([float(gradient)])])
        expected -= move
        assert adam.iterations.numpy() == t
        np.testing.assert_array_equal(adam.m[0], [m])
        np.testing.assert_array_equal(adam.v[0], [v])
        np.testing.assert_allclose(w[0], [expected], rtol=1e-6)


def test_first_step_is_the_learning_rate_whatever_the_gradient():
    w = [tf.Variable([0.0, 0.0, 0.0, 0.0])]
    Adam(w, learning_rate=0.01).apply_gradients(w, [tf.constant([1e-3, -0.5, 7.0, 1e4])])
    # 1e-7 of epsilon beside 1e-3, and beta_2 as float32, make up to 1e-4.
    np.testing.assert_allclose(w[0], [-0.01, 0.01, -0.01, -0.01], rtol=2e-4)


def test_no_gradient_no_step():
    w = variables(initial_weights())
    adam = Adam(w)
    adam.apply_gradients(w, [tf.zeros(shape) for shape in SHAPES])
    assert_same_bits(w, initial_weights())


def test_epsilon_is_added_to_the_root():
    w, _, _ = adam_update(
        tf.constant(0.0), tf.constant(3.0), 0.0, 0.0, tf.constant(1.0), 1.0, 0.5, 0.5, 9.0
    )
    assert w.numpy() == pytest.approx(-3 / (3 + 9))


# Against other implementations

GRID = list(itertools.product([1e-3, 0.1], [0.0, 0.9], [0.9, 0.999]))


@pytest.mark.parametrize(("learning_rate", "beta_1", "beta_2"), GRID)
@pytest.mark.parametrize("epsilon", [1e-7, 1e-2])
def test_100_steps_agree_with_numpy(learning_rate, beta_1, beta_2, epsilon):
    settings = {
        "learning_rate": learning_rate,
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": epsilon,
    }
    expected = initial_weights()
    w = variables(expected)
    ours, twin = Adam(w, **settings), numpy_twin.Adam(expected, **settings)
    apply = tf.function(lambda *gradients: ours.apply_gradients(w, gradients))
    for step in range(STEPS):
        gradients = random_gradients(step)
        apply(*map(tf.constant, gradients))
        expected = twin.step(expected, [g.astype(np.float64) for g in gradients])
        assert_close(w, expected, step, learning_rate)


@pytest.mark.parametrize(("learning_rate", "beta_1", "beta_2"), GRID)
def test_100_steps_agree_with_keras(learning_rate, beta_1, beta_2):
    """Keras adds epsilon to sqrt(v), before the correction, and so divides by other numbers.

    The gradients stay away from zero: at 1/2 and more, sqrt(v) is at least 0.015, and an
    epsilon of 1e-7 moves a step by less than a 1e-5th of it, in either place.
    """
    w, theirs = variables(initial_weights()), variables(initial_weights())
    ours = Adam(w, learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=1e-7)
    keras = tf.keras.optimizers.Adam(
        learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=1e-7
    )
    keras.build(theirs)

    @tf.function
    def apply(*gradients):
        ours.apply_gradients(w, gradients)
        keras.apply_gradients(zip(gradients, theirs, strict=True))

    for step in range(STEPS):
        apply(*map(tf.constant, random_gradients(step, smallest=0.5)))
        assert_close(w, [v.numpy() for v in theirs], step, learning_rate)


# As a part of compiled programs


@pytest.mark.parametrize("jit_compile", [False, True])
def test_bias_correction_is_not_frozen_at_trace_time(jit_compile):
    eager, traced = variables(initial_weights()), variables(initial_weights())
    adam_eager, adam_traced = Adam(eager), Adam(traced)
    traces = []

    @tf.function(jit_compile=jit_compile)
    def step(*gradients):
        traces.append(1)
        adam_traced.apply_gradients(traced, gradients)

    for i in range(30):
        gradients = list(map(tf.constant, random_gradients(i)))
        adam_eager.apply_gradients(eager, gradients)
        step(*gradients)
        assert_close(traced, [w.numpy() for w in eager], i)
    assert len(traces) == 1  # or a count kept in Python would have gone unnoticed
    assert adam_traced.iterations.numpy() == 30


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: tf.function(f, jit_compile=True)])
def test_update_is_pure(wrap):
    w = variables(initial_weights())
    adam = Adam(w)
    adam.apply_gradients(w, list(map(tf.constant, random_gradients(0))))
    weights_before = [v.numpy() for v in w]
    state_before = [v.numpy() for v in [*adam.m, *adam.v, adam.iterations]]
    values = [tf.identity(v) for v in w]
    gradients = list(map(tf.constant, random_gradients(1)))

    update = wrap(adam.update)
    new_w, new_state = update(values, gradients, adam.state)
    again_w, again_state = update(values, gradients, adam.state)

    assert_same_bits([v.numpy() for v in w], weights_before)
    assert_same_bits([v.numpy() for v in [*adam.m, *adam.v, adam.iterations]], state_before)
    assert_same_bits(values, weights_before)
    assert_same_bits(new_w, again_w)
    assert_same_bits([*new_state.m, *new_state.v], [*again_state.m, *again_state.v])
    assert new_state.t.numpy() == state_before[-1] + 1
    assert not np.array_equal(new_w[0], weights_before[0])


def test_compiled_update_agrees_with_numpy():
    expected = initial_weights()
    adam, twin = Adam(variables(expected)), numpy_twin.Adam(expected, learning_rate=1e-3)
    update = tf.function(adam.update, jit_compile=True)
    values, state = list(map(tf.constant, expected)), adam.state
    for step in range(30):
        gradients = random_gradients(step)
        values, state = update(values, list(map(tf.constant, gradients)), AdamState(*state))
        expected = twin.step(expected, [g.astype(np.float64) for g in gradients])
        assert_close(values, expected, step)


# Its state


def test_a_restored_state_goes_on_identically(tmp_path):
    def new():
        model = MLP(5, (4,), 3, seed=1)
        adam = Adam(model.weights)
        return model, adam, Checkpoints(tmp_path, model, adam)

    def step(model, adam, i):
        random = np.random.default_rng(i)
        adam.apply_gradients(
            model.weights,
            [tf.constant(random.standard_normal(w.shape), tf.float32) for w in model.weights],
        )

    model, adam, checkpoints = new()
    for i in range(5):
        step(model, adam, i)
    saved = Progress(epoch=2, step_in_epoch=3, loss_sum=0.1 + 0.2, correct=7, seconds=1.25)
    checkpoints.save(saved, 5)
    for i in range(5, 9):
        step(model, adam, i)

    other, other_adam, other_checkpoints = new()
    assert other_checkpoints.restore() == saved
    assert other_adam.iterations.numpy() == 5
    for i in range(5, 9):
        step(other, other_adam, i)
    assert_same_bits(other.weights, model.weights)
    assert_same_bits(other_adam.m + other_adam.v, adam.m + adam.v)


def test_without_a_checkpoint_a_run_stands_at_its_start(tmp_path):
    model = MLP(5, (4,), 3, seed=1)
    assert Checkpoints(tmp_path, model, Adam(model.weights)).restore() == Progress()


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    model = MLP(5, (4,), 3, seed=1)
    checkpoints = Checkpoints(tmp_path, model, Adam(model.weights))
    for step in (10, 20, 30):
        checkpoints.save(Progress(epoch=step // 10), step)
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [
        "ckpt-20.index",
        "ckpt-30.index",
    ]
    assert checkpoints.restore() == Progress(epoch=3)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    model = MLP(5, (4,), 3, seed=1)
    Checkpoints(tmp_path, model, Adam(model.weights)).save(Progress(), 1)
    other = MLP(5, (4, 4), 3, seed=1)
    with pytest.raises((AssertionError, ValueError)):
        Checkpoints(tmp_path, other, Adam(other.weights)).restore()


def test_slots_begin_at_zero_in_the_shapes_of_the_weights():
    w = variables(initial_weights())
    adam = Adam(w)
    for slot, weight in zip(adam.m + adam.v, w + w, strict=True):
        assert slot.shape == weight.shape
        assert not np.any(slot)
    assert adam.iterations.dtype == tf.int64
    assert adam.trainable_variables == ()


def test_every_weight_needs_its_gradient():
    w = variables(initial_weights())
    with pytest.raises(ValueError, match="shorter"):
        Adam(w).apply_gradients(w, list(map(tf.constant, random_gradients(0)))[:-1])
