import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import PRESETS
from trainer.schedules import cosine_decay, make_schedule, step_decay, warm_up


def rates(steps, steps_per_epoch=10, **changed):
    """The learning rates of these steps."""
    settings = {"learning_rate": 2.0, "epochs": 4} | changed
    config = dataclasses.replace(PRESETS["core"], **{"schedule": "constant"} | settings)
    schedule = make_schedule(config, steps_per_epoch)
    return [float(schedule(tf.constant(step, tf.int64))) for step in steps]


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [
        (0, 0, 1),
        (9, 0, 1),
        (0, 1, 1),
        (0, 4, 1 / 4),
        (2, 4, 3 / 4),
        (3, 4, 1),
        (4, 4, 1),
        (99, 4, 1),
    ],
)
def test_warm_up_at_its_edges(step, steps, expected):
    assert float(warm_up(tf.constant(float(step)), steps)) == expected


@pytest.mark.parametrize(
    ("step", "every", "factor", "expected"),
    [
        (0, 10, 0.5, 1),
        (9, 10, 0.5, 1),
        (10, 10, 0.5, 1 / 2),
        (19, 10, 0.5, 1 / 2),
        (20, 10, 0.5, 1 / 4),
        (3, 1, 0.5, 1 / 8),
        (35, 10, 1.0, 1),
    ],
)
def test_step_decay_at_its_edges(step, every, factor, expected):
    assert float(step_decay(tf.constant(step, tf.int64), every, factor)) == expected


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("every", [141, 218, 235])  # their float32 reciprocals are too small
def test_drops_come_at_their_step_compiled_or_not(every, jit):
    config = dataclasses.replace(
        PRESETS["core"], schedule="step", learning_rate=1.0, decay_epochs=1.0, decay_factor=0.5
    )
    schedule = make_schedule(config, every)
    rate = tf.function(
        lambda steps: tf.map_fn(schedule, steps, fn_output_signature=tf.float32), jit_compile=jit
    )
    steps = np.arange(20 * every + 1)
    np.testing.assert_array_equal(rate(steps), 0.5 ** (steps // every))


@pytest.mark.parametrize(
    ("step", "start", "end", "expected"),
    [
        (0, 0, 12, 1),
        (2, 0, 12, (1 + math.sqrt(3) / 2) / 2),
        (4, 0, 12, 3 / 4),
        (6, 0, 12, 1 / 2),
        (8, 0, 12, 1 / 4),
        (12, 0, 12, 0),
        (99, 0, 12, 0),
        (0, 4, 16, 1),
        (4, 4, 16, 1),
        (10, 4, 16, 1 / 2),
        (15, 4, 16, (1 - math.cos(math.pi / 12)) / 2),
        (16, 4, 16, 0),
        (7, 8, 8, 1),  # nothing but warm-up
        (8, 8, 8, 1),
        (9, 8, 8, 0),
    ],
)
def test_cosine_decay_at_its_edges(step, start, end, expected):
    found = float(cosine_decay(tf.constant(float(step)), start, end))
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("changed", "steps", "expected"),
    [
        ({}, [0, 1, 39, 40, 10**9], [2] * 5),
        ({"warmup_epochs": 0.5}, [0, 1, 4, 5, 39], [0.4, 0.8, 2, 2, 2]),
        ({"warmup_epochs": 0.01}, [0, 1], [2, 2]),  # less than a step
        (
            {"schedule": "step", "decay_epochs": 1.5, "decay_factor": 0.5},
            [0, 14, 15, 29, 30, 39],
            [2, 2, 1, 1, 0.5, 0.5],
        ),
        (
            {"schedule": "step", "decay_epochs": 0.01, "decay_factor": 0.5},  # less than a step
            [0, 1, 2],
            [2, 1, 0.5],
        ),
        (
            {"schedule": "step", "warmup_epochs": 2.0, "decay_epochs": 1.0, "decay_factor": 0.5},
            [0, 9, 10, 19, 20],
            [0.1, 1, 0.55, 1, 0.5],
        ),
        ({"schedule": "cosine"}, [0, 20, 40, 41], [2, 1, 0, 0]),
        (
            {"schedule": "cosine", "warmup_epochs": 2.0},
            [0, 9, 19, 20, 30, 40],
            [0.1, 1, 2, 2, 1, 0],
        ),
        ({"schedule": "cosine", "warmup_epochs": 4.0}, [0, 38, 39], [0.05, 1.95, 2]),
        ({"schedule": "cosine", "epochs": 1}, [0, 5, 10], [2, 1, 0]),
    ],
)
def test_rates_at_the_edges_of_a_run(changed, steps, expected):
    np.testing.assert_allclose(rates(steps, **changed), expected, rtol=1e-6, atol=1e-6)


def test_the_last_step_of_a_cosine_still_moves():
    assert rates([39], schedule="cosine")[0] == pytest.approx(1 - math.cos(math.pi / 40), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_compiled_agrees_with_a_plain_loop(schedule):
    """Every step of a run, the last partial epoch and what comes after it included."""
    config = dataclasses.replace(
        PRESETS["core"], schedule=schedule, learning_rate=1e-3, epochs=3, warmup_epochs=0.7
    )
    compiled = tf.function(
        lambda steps: tf.map_fn(make_schedule(config, 7), steps, fn_output_signature=tf.float32),
        jit_compile=True,
    )
    steps = np.arange(25)
    way = np.clip((steps - 5) / (21 - 5), 0, 1)
    factor = {
        "constant": 1.0,
        "step": 0.1 ** (steps // 70),
        "cosine": (1 + np.cos(np.pi * way)) / 2,
    }[schedule]
    expected = 1e-3 * factor * np.minimum((steps + 1) / 5, 1)
    np.testing.assert_allclose(compiled(steps), expected, rtol=1e-5, atol=1e-10)


def test_a_step_far_out_is_not_rounded_away():
    """Float32 counts every step up to 16,777,216: 40,000 epochs of MNIST; drops count on."""
    step = 2**24
    found = rates([step - 1, step], step, schedule="step", decay_epochs=1.0, decay_factor=0.5)
    assert found == [2.0, 1.0]
