"""The losses and what counts as right, per example, from logits.

Labels come in two forms: int64 [n], the number of the class, or float32 [n, C], the wanted answer
of every output (one-hot, or for a single output 0 or 1).
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from trainer.model import sigmoid

# (labels, logits float32 [n, C], label smoothing) -> loss float32 [n]
Loss = Callable[[tf.Tensor, tf.Tensor, float], tf.Tensor]


def softmax(logits: tf.Tensor) -> tf.Tensor:
    """exp(z_k) / sum_j exp(z_j): logits [..., C] to probabilities that add up to 1.

    With the maximum taken off, no exponential overflows.
    """
    exponentials = tf.exp(logits - tf.reduce_max(logits, axis=-1, keepdims=True))
    return exponentials / tf.reduce_sum(exponentials, axis=-1, keepdims=True)


def softmax_targets(labels: tf.Tensor, num_classes: int, smoothing: float = 0.0) -> tf.Tensor:
    """The wanted distribution over the classes: (1 - smoothing) of the label, the rest for all.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
    """
    return _smoothed(labels, num_classes, smoothing, smoothing / num_classes)


def sigmoid_targets(labels: tf.Tensor, num_classes: int, smoothing: float = 0.0) -> tf.Tensor:
    """The wanted probability of each output: (1 - smoothing) of the label, the rest an even bet.

    Each output is a choice between two answers, so what is spread falls half to either.
    """
    return _smoothed(labels, num_classes, smoothing, smoothing / 2)


def _smoothed(labels: tf.Tensor, num_classes: int, smoothing: float, floor: float) -> tf.Tensor:
    one_hot = tf.one_hot(labels, num_classes) if labels.dtype.is_integer else labels
    return one_hot * (1.0 - smoothing) + floor if smoothing else one_hot


def softmax_cross_entropy(
    labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0
) -> tf.Tensor:
    """The cross-entropy of softmax(logits) against the true classes, in nats.

    ``-sum_k t_k ln softmax(z)_k = ln(sum_k exp(z_k - max z)) - sum_k t_k (z_k - max z)``, where
    the targets t add up to 1: with the maximum taken off, no exponential overflows and the
    logarithm is of a number of at least 1.

    Args:
        labels: int64 [n], or float32 [n, C] with rows that add up to 1.
        logits: float32 [n, C].
        smoothing: see `softmax_targets`.

    Returns:
        float32 [n].
    """
    # The shift cancels out of the value, so its gradient is exactly zero.
    shifted = logits - tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))
    log_sum = tf.math.log(tf.reduce_sum(tf.exp(shifted), axis=-1))
    targets = softmax_targets(labels, logits.shape[-1], smoothing)
    return log_sum - tf.reduce_sum(shifted * targets, axis=-1)


def sigmoid_cross_entropy(
    labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0
) -> tf.Tensor:
    """The cross-entropies of sigmoid(logits), each output a yes or no, summed over them; nats.

    ``-t ln s(z) - (1 - t) ln(1 - s(z)) = max(z, 0) - z t + ln(1 + exp(-|z|))``, in which no
    exponential overflows.

    Args:
        labels: int64 [n], or float32 [n, C] from 0 to 1.
        logits: float32 [n, C].
        smoothing: see `sigmoid_targets`.

    Returns:
        float32 [n].
    """
    targets = sigmoid_targets(labels, logits.shape[-1], smoothing)
    positive = logits >= 0.0  # chosen with `where`, which has its right slope at 0
    rest = tf.math.log1p(tf.exp(tf.where(positive, -logits, logits)))
    return tf.reduce_sum(tf.where(positive, logits, 0.0) - logits * targets + rest, axis=-1)


def softmax_slope(labels: tf.Tensor, logits: tf.Tensor, smoothing: float) -> tf.Tensor:
    """The derivative of `softmax_cross_entropy` by the logits, softmax(z) - t: float32 [n, C]."""
    return softmax(logits) - softmax_targets(labels, logits.shape[-1], smoothing)


def sigmoid_slope(labels: tf.Tensor, logits: tf.Tensor, smoothing: float) -> tf.Tensor:
    """The derivative of `sigmoid_cross_entropy` by the logits, s(z) - t: float32 [n, C]."""
    return sigmoid(logits) - sigmoid_targets(labels, logits.shape[-1], smoothing)


LOSSES: dict[str, Loss] = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
LOSS_SLOPES: dict[str, Loss] = {"softmax": softmax_slope, "sigmoid": sigmoid_slope}


def is_correct(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """1 where the largest logit (the first of several) is the label's, else 0; float32 [n].

    A single output is right where it is above 0 and 1 is wanted, or neither.
    """
    if labels.dtype.is_integer:
        right = tf.argmax(logits, axis=-1) == labels
    elif logits.shape[-1] == 1:
        right = (logits[:, 0] > 0.0) == (labels[:, 0] > 0.5)
    else:
        right = tf.argmax(logits, axis=-1) == tf.argmax(labels, axis=-1)
    return tf.cast(right, tf.float32)
