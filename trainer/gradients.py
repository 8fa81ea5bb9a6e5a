"""The loss of a share of a global batch, and its gradients: through the tape, or by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from trainer.config import TrainConfig
from trainer.losses import LOSS_SLOPES, LOSSES, is_correct
from trainer.model import MLP, Noise, dropout_noise


class Totals(NamedTuple):
    """Sums over examples, to be added over batches and replicas and divided once.

    Attributes:
        loss: float32 [], sum of the losses.
        correct: float32 [], number of right answers.
    """

    loss: tf.Tensor
    correct: tf.Tensor


# (weights, images, labels, mask, global_count, key) -> gradients, sums; see `make_gradients`
Gradients = Callable[..., tuple[list[tf.Tensor], Totals]]


def totals(
    labels: tf.Tensor,
    logits: tf.Tensor,
    mask: tf.Tensor,
    *,
    loss: str = "softmax",
    smoothing: float = 0.0,
) -> Totals:
    """Sums over the rows whose mask is 1; rows of mask 0 pad a batch to its full shape.

    Args:
        labels: int64 [n], or float32 [n, C].
        logits: float32 [n, C].
        mask: float32 [n].
        loss: which of `LOSSES`.
        smoothing: of the labels, for training alone.
    """
    losses = LOSSES[loss](labels, logits, smoothing)
    return Totals(tf.reduce_sum(losses * mask), tf.reduce_sum(is_correct(labels, logits) * mask))


def make_gradients(config: TrainConfig, model: MLP) -> Gradients:
    """Makes the function that gives the gradients of (sum of losses) / (examples in the batch).

    Dividing by the count of the whole batch, not of this share, makes the sum over replicas
    the gradient of the batch's mean, however the batch is cut.

    Returns:
        A pure function, to be compiled by the caller, of
            weights: values in the order of ``model.weights``; the model's own are not read.
            images: float32 [n, inputs].
            labels: int64 [n], or float32 [n, C].
            mask: float32 [n], 0 for rows that do not count.
            global_count: float32 [], rows of mask 1 over all replicas.
            key: int32 [2], (step, share): decides the noise of dropout.
        It returns the gradients, in the order of the weights, and the sums over this share.
    """
    differentiate = {"tape": _by_tape, "manual": _by_hand}[config.gradients]

    def gradients(  # type: ignore[no-untyped-def]
        weights, images, labels, mask, global_count, key
    ) -> tuple[list[tf.Tensor], Totals]:
        if config.labels == "one_hot" and labels.dtype.is_integer:
            labels = tf.one_hot(labels, weights[-1].shape[0])
        noise = dropout_noise(config.dropout, config.seed, key)
        return differentiate(config, model, weights, images, labels, mask, global_count, noise)

    return gradients


def _by_tape(
    config: TrainConfig,
    model: MLP,
    weights: Sequence[tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    mask: tf.Tensor,
    global_count: tf.Tensor,
    noise: Noise | None,
) -> tuple[list[tf.Tensor], Totals]:
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = model.apply(weights, images, noise)
        sums = totals(labels, logits, mask, loss=config.loss, smoothing=config.label_smoothing)
        loss = sums.loss / global_count
    return tape.gradient(loss, weights), sums


# The slope of each activation, of its outputs y.
ACTIVATION_SLOPES: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "relu": lambda y: tf.cast(y > 0.0, y.dtype),
    "sigmoid": lambda y: y * (1.0 - y),
    "tanh": lambda y: 1.0 - y * y,
    "identity": tf.ones_like,
}


def dense_gradients(
    x: tf.Tensor, w: tf.Tensor, flow: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The chain rule through ``z = x @ w + b``, `flow` being the derivative by z.

    Args:
        x: float32 [n, inputs].
        w: float32 [inputs, outputs].
        flow: float32 [n, outputs].

    Returns:
        The derivatives by w, b and x, each in its shape.
    """
    by_w = tf.matmul(x, flow, transpose_a=True)
    return by_w, tf.reduce_sum(flow, axis=0), tf.matmul(flow, w, transpose_b=True)


def _by_hand(
    config: TrainConfig,
    model: MLP,
    weights: Sequence[tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    mask: tf.Tensor,
    global_count: tf.Tensor,
    noise: Noise | None,
) -> tuple[list[tf.Tensor], Totals]:
    """Backpropagation: forward with every layer's inputs kept, then back through the chain rule.

    Source: Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating
    errors".
    """
    passes = model.trace(weights, images, noise)
    logits = passes[-1].outputs
    sums = totals(labels, logits, mask, loss=config.loss, smoothing=config.label_smoothing)
    flow = LOSS_SLOPES[config.loss](labels, logits, config.label_smoothing)
    flow *= (mask / global_count)[:, tf.newaxis]
    slope = ACTIVATION_SLOPES[config.activation]
    found: list[tf.Tensor] = []
    for i in reversed(range(len(passes))):
        by_w, by_b, flow = dense_gradients(passes[i].inputs, weights[2 * i], flow)
        found = [by_w, by_b, *found]
        if i:
            before = passes[i - 1]
            if before.noise is not None:
                flow *= before.noise
            flow *= slope(before.outputs)
    return found, sums
