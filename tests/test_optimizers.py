import dataclasses
import itertools
import math

import numpy as np
import numpy_twin
import pytest
import tensorflow as tf

from trainer.config import PRESETS
from trainer.gradients import make_gradients
from trainer.model import MLP
from trainer.optimizers import (
    RULES,
    UpdateState,
    adam,
    adamw,
    clip_by_global_norm,
    make_update,
    moving_average,
    rmsprop,
    sgd,
)

SHAPES = [(3, 4), (4,), ()]
STEPS = 100
STEPS_PER_EPOCH = 10


def settings(**changed):
    usual = {"hidden_units": (7,), "schedule": "constant"}
    return dataclasses.replace(PRESETS["core"], **usual | changed)


def new_update(weights, **changed):
    return make_update(settings(**changed), weights, STEPS_PER_EPOCH)


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


def apply(update, weights, gradients):
    """One step on variables."""
    values = [tf.identity(w) for w in weights]
    gradients = list(map(tf.convert_to_tensor, gradients))
    values, state = update.update(values, gradients, update.state)
    for w, value in zip(weights, values, strict=True):
        w.assign(value)
    update.assign(state)


def assert_close(got, expected, step, learning_rate=1e-3):
    """Tolerates what float32 rounds off the weights in each step, and a 1e-5th of their way.

    The latter because float32(0.999) is off by 1.3e-8, which is a 1e-5th of 1 - 0.999.
    """
    way = learning_rate * (step + 1)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = (1e-6 + 6e-8 * step) * max(1, np.abs(b).max()) + 1e-5 * way
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance, err_msg=f"weight {i} diverged at step {step}"
        )


def assert_slots_close(got, expected, step, rtol=2e-5):
    """To the same 1e-5th, of the largest element of each slot."""
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            np.testing.assert_allclose(
                a,
                b,
                rtol=rtol,
                atol=rtol * np.abs(b).max(),
                err_msg=f"slot {j} of weight {i} diverged at step {step}",
            )


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(state):
    return [value.numpy() for value in tf.nest.flatten(tuple(state))]


# By hand


def check_by_hand(steps, num_slots, **changed):
    """Runs (gradient, slots, move) one after another from a weight of 10."""
    w = [tf.Variable([10.0])]
    update = new_update(w, **changed)
    expected = 10.0
    for t, (gradient, *slots, move) in enumerate(steps, 1):
        apply(update, w, [np.float32([gradient])])
        expected += move(expected) if callable(move) else move
        assert update.iterations.numpy() == t
        assert len(update.slots[0]) == len(slots) == num_slots
        np.testing.assert_allclose([slot[0] for slot in update.slots[0]], slots, rtol=1e-6)
        np.testing.assert_allclose(w[0], [expected], rtol=1e-6)


def test_sgd_by_hand():
    steps = [(2, -1, -1), (2, -1, -1), (-4, 2, 2)]
    check_by_hand(steps, 1, optimizer="sgd", learning_rate=0.5)


def test_momentum_by_hand():
    """Rate 1/2, momentum 1/4: v = v / 4 - g / 2."""
    steps = [(2, -1, -1), (2, -5 / 4, -5 / 4), (-4, 27 / 16, 27 / 16)]
    check_by_hand(steps, 1, optimizer="sgd", learning_rate=0.5, momentum=0.25)


def test_rmsprop_by_hand():
    """rho = 3/4, epsilon 1: v = 3/4 v + 1/4 g * g, the step g / sqrt(v + 1)."""
    moves = [-2 / math.sqrt(2), -2 / math.sqrt(11 / 4), 4 / math.sqrt(101 / 16)]
    means = [1, 7 / 4, 85 / 16]
    steps = [(g, v, m, m) for g, v, m in zip([2, 2, -4], means, moves, strict=True)]
    check_by_hand(steps, 2, optimizer="rmsprop", learning_rate=1.0, rho=0.75, epsilon=1.0)
    # With momentum, each move takes half of the last one along.
    first, second, third = moves
    moves = [first, second + first / 2, third + second / 2 + first / 4]
    steps = [(g, v, m, m) for g, v, m in zip([2, 2, -4], means, moves, strict=True)]
    check_by_hand(
        steps, 2, optimizer="rmsprop", learning_rate=1.0, rho=0.75, epsilon=1.0, momentum=0.5
    )


ADAM_STEPS = [
    (2, 1, 1, 2 / 3),
    (2, 3 / 2, 7 / 4, 2 / 3),
    (-4, -5 / 4, 85 / 16, -10 / 7 / (math.sqrt(340 / 37) + 1)),
]
ADAM_BY_HAND = {"learning_rate": 1.0, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 1.0}


def test_adam_by_hand():
    """beta_1 = 1/2, beta_2 = 3/4, learning rate 1, epsilon 1, so that every number is a fraction.

    g = 2:   m = 1,    v = 1;     corrected by 1/2 and 1/4:   2,   4;       step 2 / (2 + 1)
    g = 2:   m = 3/2,  v = 7/4;   corrected by 3/4 and 7/16:  2,   4;       step 2 / (2 + 1)
    g = -4:  m = -5/4, v = 85/16; corrected by 7/8 and 37/64: -10/7, 340/37
    """
    steps = [(g, m, v, -move) for g, m, v, move in ADAM_STEPS]
    check_by_hand(steps, 2, optimizer="adam", **ADAM_BY_HAND)


def test_adamw_by_hand():
    """The same, and an eighth of the weight as it was before the step."""
    steps = [(g, m, v, lambda w, move=move: -move - w / 8) for g, m, v, move in ADAM_STEPS]
    check_by_hand(steps, 2, optimizer="adamw", weight_decay=0.125, **ADAM_BY_HAND)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_first_step_is_the_learning_rate_whatever_the_gradient(optimizer):
    w = [tf.Variable([0.0, 0.0, 0.0, 0.0])]
    update = new_update(w, optimizer=optimizer, learning_rate=0.01)
    apply(update, w, [np.float32([1e-3, -0.5, 7.0, 1e4])])
    # 1e-7 of epsilon beside 1e-3, and beta_2 as float32, make up to 1e-4.
    np.testing.assert_allclose(w[0], [-0.01, 0.01, -0.01, -0.01], rtol=2e-4)


@pytest.mark.parametrize("optimizer", RULES)
def test_no_gradient_no_step(optimizer):
    w = variables(initial_weights())
    update = new_update(w, optimizer=optimizer, clip_norm=1.0)
    apply(update, w, [np.zeros(shape, np.float32) for shape in SHAPES])
    assert_same_bits(w, initial_weights())


def test_where_epsilon_stands():
    w, g, zero, one = (tf.constant(x) for x in (0.0, 3.0, 0.0, 1.0))
    moved, *_ = adam(w, g, one, one, zero, zero, beta_1=0.5, beta_2=0.5, epsilon=9.0)
    assert moved.numpy() == pytest.approx(-3 / (3 + 9))  # beside the root
    moved, *_ = rmsprop(w, g, one, one, zero, zero, rho=0.0, momentum=0.0, epsilon=7.0)
    assert moved.numpy() == pytest.approx(-3 / 4)  # under it


def test_weight_decay_does_not_pass_through_the_slots():
    w, g, zero, one = (tf.constant(x) for x in (4.0, 3.0, 0.0, 1.0))
    betas = {"beta_1": 0.5, "beta_2": 0.5, "epsilon": 1e-7}
    plain = adam(w, g, one, one, zero, zero, **betas)
    decayed = adamw(w, g, one, one, zero, zero, weight_decay=0.25, **betas)
    assert_same_bits(decayed[1:], plain[1:])
    assert decayed[0].numpy() == pytest.approx(plain[0].numpy() - 1)


def test_the_rate_scales_velocity_as_it_grows_and_not_later():
    """So that a rate that falls does not shrink steps already taken up."""
    w, g, zero, one = (tf.constant(x) for x in (0.0, 1.0, 0.0, 1.0))
    moved, velocity = sgd(w, g, one, one, zero, momentum=0.5)
    moved, velocity = sgd(moved, g, one, tf.constant(0.1), velocity, momentum=0.5)
    assert velocity.numpy() == pytest.approx(-0.6)
    assert moved.numpy() == pytest.approx(-1.6)


# A hundred steps of given gradients

GRID = {
    "sgd": [{}, {"momentum": 0.9}],
    "rmsprop": [
        {"rho": rho, "momentum": momentum, "epsilon": epsilon}
        for rho, momentum, epsilon in itertools.product([0.9, 0.99], [0.0, 0.5], [1e-7, 1e-2])
    ],
    "adam": [
        {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon}
        for beta_1, beta_2, epsilon in itertools.product([0.0, 0.9], [0.9, 0.999], [1e-7, 1e-2])
    ],
    "adamw": [{"weight_decay": 0.004}, {"weight_decay": 0.5, "beta_1": 0.5}],
}
CASES = [
    (optimizer, {"learning_rate": rate} | one)
    for optimizer, several in GRID.items()
    for one in several
    for rate in (1e-3, 0.1)
]


@pytest.mark.parametrize(("optimizer", "values"), CASES)
def test_100_steps_agree_with_numpy(optimizer, values):
    expected = initial_weights()
    w = variables(expected)
    update = new_update(w, optimizer=optimizer, **values)
    twin = numpy_twin.OPTIMIZERS[optimizer](expected, **values)
    step_once = tf.function(lambda *gradients: apply(update, w, gradients))
    for step in range(STEPS):
        gradients = random_gradients(step)
        step_once(*map(tf.constant, gradients))
        expected = twin.step(expected, [g.astype(np.float64) for g in gradients])
        assert_close(w, expected, step, values["learning_rate"])
        assert_slots_close(update.slots, numpy_twin.slots(twin), step)


def keras_optimizer(optimizer, values):
    kind = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}[optimizer]
    return getattr(tf.keras.optimizers, kind)(**values)


def keras_slots(optimizer, weights):
    """For each weight, the slots of a Keras optimizer in the order of ours: no momentum of 0."""
    names = {
        "SGD": ["momentums"],
        "RMSprop": ["_velocities", "_momentums"],
        "Adam": ["_momentums", "_velocities"],
        "AdamW": ["_momentums", "_velocities"],
    }[type(optimizer).__name__]
    lists = [slots for name in names if (slots := getattr(optimizer, name))]
    return [[slots[i].numpy() for slots in lists] for i in range(len(weights))]


@pytest.mark.parametrize(("optimizer", "values"), CASES[1::2])  # those of the larger rate
def test_100_steps_agree_with_keras(optimizer, values):
    """Keras's Adam adds epsilon to sqrt(v), before the correction: other numbers at first.

    The gradients stay away from zero: at 1/2 and more, sqrt(v) is at least 0.015, and an
    epsilon of 1e-7 moves a step by less than a 1e-5th of it, in either place.
    """
    if optimizer.startswith("adam"):
        values = values | {"epsilon": 1e-7}
    w, theirs = variables(initial_weights()), variables(initial_weights())
    update = new_update(w, optimizer=optimizer, **values)
    keras = keras_optimizer(optimizer, values)
    keras.build(theirs)

    @tf.function
    def step_once(*gradients):
        apply(update, w, gradients)
        keras.apply_gradients(zip(gradients, theirs, strict=True))

    for step in range(STEPS):
        step_once(*map(tf.constant, random_gradients(step, smallest=0.5)))
        assert_close(w, [v.numpy() for v in theirs], step, values["learning_rate"])
    found = keras_slots(keras, theirs)
    has_momentum = "momentum" in RULES[optimizer].settings
    count = RULES[optimizer].num_slots - (has_momentum and not values.get("momentum"))
    assert [len(slots) for slots in found] == [count] * len(theirs)
    # Keras counts the momentum of rmsprop upwards.
    signs = [1, -1] if optimizer == "rmsprop" else [1, 1]
    ours = [[x * y for x, y in zip(slots, signs, strict=False)] for slots in update.slots]
    assert_slots_close([slots[:count] for slots in ours], found, step)


# A hundred steps of a training

TRAININGS = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.9},
    "rmsprop": {"learning_rate": 3e-3, "momentum": 0.5, "epsilon": 1e-4},
    "adam": {"learning_rate": 1e-2, "epsilon": 1e-7},
    "adamw": {"learning_rate": 1e-2, "epsilon": 1e-7, "weight_decay": 0.1},
}


def problem():
    """60 rows that a net can learn, and their labels."""
    random = np.random.default_rng(5)
    images = random.standard_normal((60, 6)).astype(np.float32)
    return images, (images @ random.standard_normal((6, 3))).argmax(axis=-1)


@pytest.mark.parametrize("gradients", ["tape", "manual"])
@pytest.mark.parametrize("optimizer", TRAININGS)
def test_100_steps_of_training_agree_with_numpy_and_keras(optimizer, gradients):
    """Weights, slots and losses, as compiled for a run."""
    values, (images, labels) = TRAININGS[optimizer], problem()
    config = settings(optimizer=optimizer, gradients=gradients, activation="tanh", **values)
    model = MLP(6, config.hidden_units, 3, activation="tanh", seed=1)
    update, gradient = make_update(config, model.weights, 1), make_gradients(config, model)

    @tf.function(jit_compile=True)
    def step_once(weights, state):
        ones, count = tf.ones(len(labels)), tf.constant(float(len(labels)))
        found, sums = gradient(weights, images, tf.constant(labels), ones, count, tf.zeros(2))
        return *update.update(weights, found, state), sums.loss / count

    expected = [w.numpy().astype(np.float64) for w in model.weights]
    twin = numpy_twin.OPTIMIZERS[optimizer](expected, **values)
    layers = [tf.keras.layers.Dense(7, activation="tanh"), tf.keras.layers.Dense(3)]
    keras = tf.keras.Sequential([tf.keras.Input([6]), *layers])
    keras.set_weights([w.numpy() for w in model.weights])
    keras.compile(
        keras_optimizer(optimizer, values),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    weights, state = [tf.identity(w) for w in model.weights], update.state
    for step in range(STEPS):
        weights, state, loss = step_once(weights, state)
        of_twin = numpy_twin.losses(expected, images, labels, activation="tanh").mean()
        found = numpy_twin.gradients(expected, images, labels, activation="tanh")
        expected = twin.step(expected, found)
        of_keras = keras.train_on_batch(images, labels)
        assert float(loss) == pytest.approx(of_twin, rel=1e-4), step
        assert float(loss) == pytest.approx(float(of_keras), rel=1e-3), step
        for ours, theirs, kerases in zip(weights, expected, keras.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=f"step {step}")
            np.testing.assert_allclose(ours, kerases, rtol=0, atol=1e-3, err_msg=f"step {step}")
        assert_slots_close(state.slots, numpy_twin.slots(twin), step, rtol=1e-3)
    assert of_twin < 0.35  # it learned: the steps are long enough to matter


# Clipping, schedule and moving average


@pytest.mark.parametrize(
    ("values", "longest", "expected"),
    [
        ([[3.0], [4.0]], 10.0, [[3], [4]]),  # shorter: as they are
        ([[3.0], [4.0]], 5.0, [[3], [4]]),  # just as long
        ([[3.0], [4.0]], 2.5, [[1.5], [2]]),
        ([[3.0, 0.0], [-4.0]], 1.0, [[0.6, 0], [-0.8]]),
        ([[0.0], [0.0]], 1.0, [[0], [0]]),
        ([[3e30], [4e30]], 1.0, [[0.6], [0.8]]),  # whose squares overflow
        ([[3e-30], [4e-30]], 1.0, [[3e-30], [4e-30]]),
        ([[math.inf], [1.0]], 1.0, [[math.nan], [math.nan]]),
        ([[math.nan], [1.0]], 1.0, [[math.nan], [math.nan]]),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: tf.function(f, jit_compile=True)])
def test_clipping_by_hand(values, longest, expected, wrap):
    found = wrap(lambda *gradients: clip_by_global_norm(gradients, longest))(
        *map(tf.constant, values)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, np.float32(b), rtol=1e-6)


@pytest.mark.parametrize("longest", [0.01, 1.0, 3.0, 100.0])
def test_clipping_agrees_with_numpy_and_tensorflow(longest):
    gradients = random_gradients(0)
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
    assert 3 < norm < 100
    found = clip_by_global_norm(list(map(tf.constant, gradients)), longest)
    theirs, _ = tf.clip_by_global_norm(gradients, longest)
    for ours, g, other in zip(found, gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, g * min(1, longest / norm), rtol=1e-6)
        np.testing.assert_allclose(ours, other, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: tf.function(f, jit_compile=True)])
def test_the_moving_average_is_the_weighted_mean_of_what_it_saw(decay, wrap):
    values = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32) + 10
    average = tf.constant([-10.0] * 4)  # what stood there before counts for nothing
    step = wrap(lambda average, w, t: moving_average(average, w, t, decay))
    for t, value in enumerate(values, 1):
        average = step(average, tf.constant(value), tf.constant(float(t)))
        shares = decay ** np.arange(t - 1, -1, -1)
        expected = (shares[:, None] * values[:t]).sum(axis=0) / shares.sum()
        np.testing.assert_allclose(average, expected, rtol=3e-5, err_msg=f"update {t}")


def test_one_update_clips_then_schedules_then_moves_then_averages():
    """SGD of gradients 3 and 4, cut to length 1, at rates 1/2 (warm-up) and 1."""
    w = variables(np.float32([[10.0], [20.0]]))
    update = make_update(
        settings(
            optimizer="sgd", learning_rate=1.0, warmup_epochs=0.5, clip_norm=1.0, ema_decay=0.5
        ),
        w,
        4,
    )
    assert_same_bits(update.evaluated(w), w)
    for _ in range(2):
        apply(update, w, [np.float32([3.0]), np.float32([4.0])])
    np.testing.assert_allclose(np.concatenate(w), [10 - 0.3 - 0.6, 20 - 0.4 - 0.8], rtol=1e-6)
    # (0.5 * first + second) / 1.5
    np.testing.assert_allclose(
        np.concatenate(update.evaluated(w)), [9.7 / 3 + 9.1 * 2 / 3, 19.6 / 3 + 18.8 * 2 / 3]
    )


def test_without_an_average_the_weights_themselves_are_evaluated():
    w = variables(initial_weights())
    update = new_update(w)
    assert update.averages == []
    assert all(a is b for a, b in zip(update.evaluated(w), w, strict=True))


def test_the_average_of_compiled_updates_agrees_with_numpy():
    expected, w = initial_weights(), variables(initial_weights())
    update = new_update(w, ema_decay=0.9, schedule="cosine", warmup_epochs=1.0, epochs=3)
    twin = numpy_twin.Adam(expected, learning_rate=1.0)
    step_once = tf.function(update.update, jit_compile=True)
    values, state, seen = [tf.identity(v) for v in w], update.state, []
    for step in range(30):
        twin.learning_rate = 1e-3 * min((step + 1) / 10, 1)
        twin.learning_rate *= (1 + math.cos(math.pi * max(step - 10, 0) / 20)) / 2
        gradients = random_gradients(step)
        values, state = step_once(values, list(map(tf.constant, gradients)), state)
        expected = twin.step(expected, [g.astype(np.float64) for g in gradients])
        seen.append(expected)
        assert_close(values, expected, step)
        shares = 0.9 ** np.arange(step, -1, -1)
        for i, average in enumerate(state.averages):
            mean = sum(share * past[i] for share, past in zip(shares, seen, strict=True))
            np.testing.assert_allclose(average, mean / shares.sum(), rtol=0, atol=5e-6)


# As a part of compiled programs


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_nothing_is_frozen_at_trace_time(jit_compile, optimizer):
    eager, traced = variables(initial_weights()), variables(initial_weights())
    changed = {"optimizer": optimizer, "warmup_epochs": 2.0, "schedule": "cosine"}
    update_eager, update_traced = new_update(eager, **changed), new_update(traced, **changed)
    traces = []

    @tf.function(jit_compile=jit_compile)
    def step(*gradients):
        traces.append(1)
        apply(update_traced, traced, gradients)

    for i in range(30):
        gradients = random_gradients(i)
        apply(update_eager, eager, gradients)
        step(*map(tf.constant, gradients))
        assert_close(traced, [w.numpy() for w in eager], i)
    assert len(traces) == 1  # or a count kept in Python would have gone unnoticed
    assert update_traced.iterations.numpy() == 30


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: tf.function(f, jit_compile=True)])
def test_update_is_pure(wrap, optimizer):
    w = variables(initial_weights())
    update = new_update(w, optimizer=optimizer, ema_decay=0.9)
    apply(update, w, random_gradients(0))
    weights_before = [v.numpy() for v in w]
    state_before = leaves(update.state)
    values = [tf.identity(v) for v in w]
    gradients = list(map(tf.constant, random_gradients(1)))

    function = wrap(update.update)
    new_w, new_state = function(values, gradients, update.state)
    again_w, again_state = function(values, gradients, update.state)

    assert_same_bits([v.numpy() for v in w], weights_before)
    assert_same_bits(leaves(update.state), state_before)
    assert_same_bits(values, weights_before)
    assert_same_bits(new_w, again_w)
    assert_same_bits(leaves(new_state), leaves(again_state))
    assert isinstance(new_state, UpdateState)
    assert new_state.t.numpy() == state_before[0] + 1
    assert not np.array_equal(new_w[0], weights_before[0])


# Its state


@pytest.mark.parametrize("optimizer", RULES)
def test_slots_begin_at_zero_and_averages_at_the_weights(optimizer):
    w = variables(initial_weights())
    update = new_update(w, optimizer=optimizer, ema_decay=0.5)
    for slots, weight in zip(update.slots, w, strict=True):
        assert len(slots) == RULES[optimizer].num_slots
        for slot in slots:
            assert slot.shape == weight.shape
            assert not np.any(slot)
    assert_same_bits(update.averages, w)
    assert update.iterations.dtype == tf.int64
    assert update.trainable_variables == ()
    assert len(update.variables) == 1 + len(w) * (RULES[optimizer].num_slots + 1)


def test_every_weight_needs_its_gradient():
    w = variables(initial_weights())
    with pytest.raises(ValueError, match="shorter"):
        apply(new_update(w), w, random_gradients(0)[:-1])
