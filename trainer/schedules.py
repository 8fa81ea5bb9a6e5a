"""Learning rates: pure functions of the step, as factors of the highest rate.

A step is the number of updates made before it, so that the first is step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from trainer.config import TrainConfig

Schedule = Callable[[tf.Tensor], tf.Tensor]


def warm_up(step: tf.Tensor, steps: int) -> tf.Tensor:
    """(step + 1) / steps, then 1: no step is lost to a rate of 0, and the first of 1 is step - 1.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2.

    Args:
        step: float32 [].
        steps: how many it takes; 0: it is 1 at once.
    """
    return tf.minimum((step + 1.0) / max(steps, 1), 1.0)


def step_decay(step: tf.Tensor, every: int, factor: float) -> tf.Tensor:
    """1 for the first `every` steps, then `factor` for as many, then its square, and so on.

    The drops are counted in whole numbers: compiled, a float division by a constant is a product
    with its reciprocal, which can fall short of the next drop.

    Args:
        step: int64 [].
        every: steps from one drop to the next, at least 1.
        factor: what a drop multiplies by.
    """
    return tf.pow(factor, tf.cast(step // every, tf.float32))


def cosine_decay(step: tf.Tensor, start: int, end: int) -> tf.Tensor:
    """1 until `start`, then half a cosine wave down to 0 at `end`, and 0 from there on.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    equation 5, without the restarts.
    """
    way = tf.clip_by_value((step - start) / max(end - start, 1), 0.0, 1.0)
    return (1.0 + tf.cos(math.pi * way)) / 2.0


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """Makes the function from a step, int64 [], to its learning rate, float32 [].

    The warm-up multiplies what the schedule gives. Cosine sets out where the warm-up ends and
    reaches 0 after the last step; drops of schedule step are counted from the first step.
    """
    warm = round(config.warmup_epochs * steps_per_epoch)
    every = max(round(config.decay_epochs * steps_per_epoch), 1)

    def schedule(step: tf.Tensor) -> tf.Tensor:
        rate = tf.constant(config.learning_rate)
        if config.schedule == "step":
            rate *= step_decay(step, every, config.decay_factor)
        step = tf.cast(step, tf.float32)
        if config.schedule == "cosine":
            rate *= cosine_decay(step, warm, config.epochs * steps_per_epoch)
        return rate * warm_up(step, warm) if warm else rate

    return schedule
