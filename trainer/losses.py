"""The loss and what counts as right, per example, from logits."""

from __future__ import annotations

import tensorflow as tf


def softmax_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The cross-entropy of softmax(logits) against the true classes, in nats.

    ``-ln softmax(z)[y] = ln(sum_k exp(z_k - max z)) - (z_y - max z)``: with the maximum taken
    off, no exponential overflows and the logarithm is of a number of at least 1.

    Args:
        labels: int64 [n].
        logits: float32 [n, C].

    Returns:
        float32 [n].
    """
    # The shift cancels out of the value, so its gradient is exactly zero.
    shifted = logits - tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))
    log_sum = tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1))
    of_label = tf.reduce_sum(shifted * tf.one_hot(labels, logits.shape[-1]), axis=-1)
    return log_sum - of_label


def is_correct(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """1 where the largest logit (the first of several) is the label's, else 0; float32 [n]."""
    return tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float32)
