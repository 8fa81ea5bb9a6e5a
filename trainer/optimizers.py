"""Optimizers: a pure update rule, and a module that holds its state in variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class AdamState(NamedTuple):
    """Adam's state as values, one of each list per weight.

    Attributes:
        m: running means of gradients.
        v: running means of squared gradients.
        t: int64 [], updates made so far.
    """

    m: list[tf.Tensor]
    v: list[tf.Tensor]
    t: tf.Tensor


class Adam(tf.Module):
    """Adam, every part of its state a variable.

    The step count is a variable too, and the bias correction is computed from it in the graph:
    a Python number would be frozen into the graph as it stood when the step was traced.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.

    Attributes:
        iterations: int64 [], updates made so far.
        m: slots, the running means of gradients.
        v: slots, the running means of squared gradients.
    """

    def __init__(
        self,
        weights: Sequence[tf.Variable],
        *,
        learning_rate: float = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(name="adam")
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.iterations = tf.Variable(0, dtype=tf.int64, name="iterations", trainable=False)
        self.m = [tf.Variable(tf.zeros(w.shape), name="m", trainable=False) for w in weights]
        self.v = [tf.Variable(tf.zeros(w.shape), name="v", trainable=False) for w in weights]

    @property
    def state(self) -> AdamState:
        """The state as it stands."""
        return AdamState(
            list(map(tf.identity, self.m)),
            list(map(tf.identity, self.v)),
            tf.identity(self.iterations),
        )

    def assign(self, state: AdamState) -> None:
        """Takes over a state."""
        for slot, value in zip(self.m + self.v, state.m + state.v, strict=True):
            slot.assign(value)
        self.iterations.assign(state.t)

    def update(
        self, weights: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor], state: AdamState
    ) -> tuple[list[tf.Tensor], AdamState]:
        """One step, as a pure function of values.

        Returns:
            The new weights and the new state.
        """
        t = state.t + 1
        new_w, new_m, new_v = [], [], []
        for w, g, m, v in zip(weights, gradients, state.m, state.v, strict=True):
            w, m, v = adam_update(
                w,
                g,
                m,
                v,
                tf.cast(t, tf.float32),
                self.learning_rate,
                self.beta_1,
                self.beta_2,
                self.epsilon,
            )
            new_w.append(w)
            new_m.append(m)
            new_v.append(v)
        return new_w, AdamState(new_m, new_v, t)

    def apply_gradients(
        self, weights: Sequence[tf.Variable], gradients: Sequence[tf.Tensor]
    ) -> None:
        """One step on variables."""
        values, state = self.update([tf.identity(w) for w in weights], gradients, self.state)
        for w, value in zip(weights, values, strict=True):
            w.assign(value)
        self.assign(state)


def adam_update(
    w: tf.Tensor,
    g: tf.Tensor,
    m: tf.Tensor,
    v: tf.Tensor,
    t: tf.Tensor,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Algorithm 1 of the paper for one weight; `t` is float32 and counts from 1."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g * g
    m_hat = m / (1 - beta_1**t)
    v_hat = v / (1 - beta_2**t)
    return w - learning_rate * m_hat / (tf.sqrt(v_hat) + epsilon), m, v
