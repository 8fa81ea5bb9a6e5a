"""From gradients to new weights: pure update rules, and a module that holds all their state.

A rule takes a weight `w`, its gradient `g`, the number of this update `t` (float32, from 1), the
learning rate, and its slots: what it remembers of each weight, zero at first, in the weight's
shape. It returns the new weight and the new slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from trainer.config import TrainConfig
from trainer.schedules import Schedule, make_schedule

Rule = Callable[..., tuple[tf.Tensor, ...]]


def sgd(
    w: tf.Tensor, g: tf.Tensor, t: tf.Tensor, rate: tf.Tensor, velocity: tf.Tensor,
    *, momentum: float,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """Stochastic gradient descent, of which momentum keeps a share of the last step.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", equations 1 and 2.
    """
    velocity = momentum * velocity - rate * g
    return w + velocity, velocity


def rmsprop(
    w: tf.Tensor, g: tf.Tensor, t: tf.Tensor, rate: tf.Tensor, v: tf.Tensor, velocity: tf.Tensor,
    *, rho: float, momentum: float, epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:  # fmt: skip
    """Gradients divided by the root of the running mean of their squares.

    Source: Tieleman and Hinton 2012, "Neural Networks for Machine Learning", lecture 6e; with
    epsilon under the root and momentum on the step, as TensorFlow has them.
    """
    v = rho * v + (1 - rho) * g * g
    velocity = momentum * velocity - rate * g / tf.sqrt(v + epsilon)
    return w + velocity, v, velocity


def adam(
    w: tf.Tensor, g: tf.Tensor, t: tf.Tensor, rate: tf.Tensor, m: tf.Tensor, v: tf.Tensor,
    *, beta_1: float, beta_2: float, epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:  # fmt: skip
    """The mean of gradients over the root of the mean of squares, both corrected for their start.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1. Its
    corrections, 1 / (1 - beta ** t), are taken as factors of scalars, which spares two divisions
    for every weight.
    """
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g * g
    corrected_rate = rate / (1 - beta_1**t)
    root_correction = tf.math.rsqrt(1 - beta_2**t)
    return w - corrected_rate * m / (root_correction * tf.sqrt(v) + epsilon), m, v


def adamw(
    w: tf.Tensor, g: tf.Tensor, t: tf.Tensor, rate: tf.Tensor, m: tf.Tensor, v: tf.Tensor,
    *, beta_1: float, beta_2: float, epsilon: float, weight_decay: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:  # fmt: skip
    """Adam, and a share of each weight taken off beside it, whatever the gradient's size.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2,
    with the share times the learning rate.
    """
    decayed = w - rate * weight_decay * w
    return adam(decayed, g, t, rate, m, v, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)


class RuleOf(NamedTuple):
    """A rule, how many slots it has, and the settings it takes by name."""

    rule: Rule
    num_slots: int
    settings: tuple[str, ...]


RULES = {
    "sgd": RuleOf(sgd, 1, ("momentum",)),
    "rmsprop": RuleOf(rmsprop, 2, ("rho", "momentum", "epsilon")),
    "adam": RuleOf(adam, 2, ("beta_1", "beta_2", "epsilon")),
    "adamw": RuleOf(adamw, 2, ("beta_1", "beta_2", "epsilon", "weight_decay")),
}


def clip_by_global_norm(gradients: Sequence[tf.Tensor], longest: float) -> list[tf.Tensor]:
    """Shortens the vector of all gradients to `longest` where it is longer; the way stays.

    The norm is taken of gradients divided by their largest element, whose squares cannot
    overflow. An infinite gradient makes all of them NaN, so that the run stops.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1.
    """
    largest = tf.reduce_max([tf.reduce_max(tf.abs(g)) for g in gradients])
    unit = tf.where(largest > 0.0, largest, 1.0)
    norm = unit * tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(g / unit)) for g in gradients]))
    return [g * (longest / tf.maximum(norm, longest)) for g in gradients]


def moving_average(average: tf.Tensor, w: tf.Tensor, t: tf.Tensor, decay: float) -> tf.Tensor:
    """The mean of w after updates 1 to t, weighted by decay ** (updates since).

    ``a_t = a_(t-1) + (1 - decay) / (1 - decay**t) * (w_t - a_(t-1))``: the weights add up to 1
    from the first update, and what stood in `average` before it counts for nothing.
    """
    # In float32, 1 - decay**t would lose most of its digits.
    share = (1 - decay) / -tf.math.expm1(t * math.log(decay))
    return average + share * (w - average)


class UpdateState(NamedTuple):
    """The state of an `Update` as values.

    Attributes:
        t: int64 [], updates made so far.
        slots: for each weight, the rule's slots.
        averages: for each weight, its moving average; empty where there is none.
    """

    t: tf.Tensor
    slots: list[list[tf.Tensor]]
    averages: list[tf.Tensor]


class Update(tf.Module):
    """Clipping, schedule, update rule and moving average, every part of their state a variable.

    The step count is a variable too, and what follows from it is computed in the graph: a Python
    number would be frozen into the graph as it stood when the step was traced.

    Attributes:
        iterations: int64 [], updates made so far.
        slots: for each weight, the rule's slots.
        averages: for each weight, its moving average; empty where there is none.
    """

    def __init__(
        self,
        weights: Sequence[tf.Variable],
        *,
        rule: Rule,
        num_slots: int,
        schedule: Schedule,
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__(name="update")
        self._rule = rule
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._ema_decay = ema_decay
        self.iterations = tf.Variable(0, dtype=tf.int64, name="iterations", trainable=False)
        self.slots = [
            [tf.Variable(tf.zeros(w.shape), name="slot", trainable=False) for _ in range(num_slots)]
            for w in weights
        ]
        self.averages = [
            tf.Variable(tf.identity(w), name="average", trainable=False)
            for w in (weights if ema_decay else ())
        ]

    @property
    def state(self) -> UpdateState:
        """The state as it stands."""
        return UpdateState(
            tf.identity(self.iterations),
            [list(map(tf.identity, slots)) for slots in self.slots],
            list(map(tf.identity, self.averages)),
        )

    def assign(self, state: UpdateState) -> None:
        """Takes over a state."""
        held = [self.iterations, *self.slots, *self.averages]
        given = [state.t, *state.slots, *state.averages]
        for variable, value in zip(tf.nest.flatten(held), tf.nest.flatten(given), strict=True):
            variable.assign(value)

    def update(
        self, weights: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor], state: UpdateState
    ) -> tuple[list[tf.Tensor], UpdateState]:
        """One step, as a pure function of values.

        Returns:
            The new weights and the new state.
        """
        rate = self._schedule(state.t)
        count = state.t + 1
        t = tf.cast(count, tf.float32)
        if self._clip_norm:
            gradients = clip_by_global_norm(gradients, self._clip_norm)
        new_weights, new_slots = [], []
        for w, g, slots in zip(weights, gradients, state.slots, strict=True):
            w, *slots = self._rule(w, g, t, rate, *slots)
            new_weights.append(w)
            new_slots.append(slots)
        averages = [
            moving_average(average, w, t, self._ema_decay)
            for average, w in zip(state.averages, new_weights, strict=bool(self._ema_decay))
        ]
        return new_weights, UpdateState(count, new_slots, averages)

    def evaluated(self, weights: Sequence[tf.Variable]) -> list[tf.Variable]:
        """The variables to evaluate and export: the moving average, else the weights themselves."""
        return self.averages or list(weights)


def make_update(
    config: TrainConfig, weights: Sequence[tf.Variable], steps_per_epoch: int
) -> Update:
    """Makes the update of a run; its variables belong in the strategy's scope."""
    rule, num_slots, settings = RULES[config.optimizer]
    return Update(
        weights,
        rule=functools.partial(rule, **{name: getattr(config, name) for name in settings}),
        num_slots=num_slots,
        schedule=make_schedule(config, steps_per_epoch),
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
    )
