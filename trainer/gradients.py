"""The loss of a share of a global batch, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from trainer.losses import is_correct, softmax_cross_entropy
from trainer.model import MLP


class Totals(NamedTuple):
    """Sums over examples, to be added over batches and replicas and divided once.

    Attributes:
        loss: float32 [], sum of the losses.
        correct: float32 [], number of right answers.
    """

    loss: tf.Tensor
    correct: tf.Tensor


def totals(labels: tf.Tensor, logits: tf.Tensor, mask: tf.Tensor) -> Totals:
    """Sums over the rows whose mask is 1; rows of mask 0 pad a batch to its full shape.

    Args:
        labels: int64 [n].
        logits: float32 [n, C].
        mask: float32 [n].
    """
    loss = tf.reduce_sum(softmax_cross_entropy(labels, logits) * mask)
    return Totals(loss, tf.reduce_sum(is_correct(labels, logits) * mask))


def tape_gradients(
    model: MLP,
    weights: Sequence[tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    mask: tf.Tensor,
    global_count: tf.Tensor,
) -> tuple[list[tf.Tensor], Totals]:
    """The gradients of (sum of losses) / (examples in the global batch), through the tape.

    Dividing by the count of the whole batch, not of this share, makes the sum over replicas
    the gradient of the batch's mean, however the batch is cut.

    Args:
        model: gives the function; its own variables are not read.
        weights: values in the order of ``model.weights``.
        images: float32 [n, 784].
        labels: int64 [n].
        mask: float32 [n].
        global_count: float32 [], rows of mask 1 over all replicas.
    """
    with tf.GradientTape() as tape:
        tape.watch(weights)
        sums = totals(labels, model.apply(weights, images), mask)
        loss = sums.loss / global_count
    return tape.gradient(loss, weights), sums
