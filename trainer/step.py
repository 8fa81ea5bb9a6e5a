"""The compiled functions: many training steps in one call, and a pass of validation."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from trainer.data import Examples
from trainer.gradients import Totals, tape_gradients, totals
from trainer.model import MLP
from trainer.optimizers import Adam, AdamState

# (indices int32 [steps, batch], mask float32 [steps, batch]) -> sums over all of them
StepsFunction = Callable[[tf.Tensor, tf.Tensor], Totals]


def place(strategy: tf.distribute.Strategy, examples: Examples) -> tuple[tf.Tensor, tf.Tensor]:
    """Copies a split to the device of every replica, once, so that a step only gathers from it."""

    def on_each_device(values: object) -> tf.Tensor:
        def on_device(context: tf.distribute.ValueContext) -> tf.Tensor:
            device = strategy.extended.worker_devices[context.replica_id_in_sync_group]
            with tf.device(device):  # TensorFlow would leave all copies on the first
                return tf.identity(tf.convert_to_tensor(values))

        return strategy.experimental_distribute_values_from_function(on_device)

    return on_each_device(examples.images), on_each_device(examples.labels)


def share(rows: tf.Tensor) -> tf.Tensor:
    """This replica's part of a global batch: [batch, ...] -> [batch / replicas, ...]."""
    context = tf.distribute.get_replica_context()
    size = rows.shape[0] // context.num_replicas_in_sync
    return rows[context.replica_id_in_sync_group * size :][:size]


def make_train_steps(
    strategy: tf.distribute.Strategy,
    model: MLP,
    optimizer: Adam,
    examples: Examples,
    batch_size: int,
) -> StepsFunction:
    """Builds the function that takes as many steps as it is given rows of indices.

    Each replica computes the gradients of its share of the batch, the gradients are summed
    over the replicas, and each replica updates its own copy of the weights: equal copies and
    equal gradients stay equal. What is compiled by XLA is pure and gets all values as
    arguments, because a variable captured by it would be that of the first replica.
    """
    images, labels = place(strategy, examples)

    @tf.function(jit_compile=True)
    def gradients(weights, x, y, mask, count):  # type: ignore[no-untyped-def]
        return tape_gradients(model, weights, x, y, mask, count)

    @tf.function(jit_compile=True)
    def update(weights, summed, state):  # type: ignore[no-untyped-def]
        return optimizer.update(weights, summed, state)

    def step(images, labels, indices, mask):  # type: ignore[no-untyped-def]
        rows = share(indices)
        weights = [tf.identity(w) for w in model.weights]
        parts, sums = gradients(
            weights,
            tf.gather(images, rows),
            tf.gather(labels, rows),
            share(mask),
            tf.reduce_sum(mask),
        )
        context = tf.distribute.get_replica_context()
        summed, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, (parts, sums))
        new_weights, state = update(weights, summed, optimizer.state)
        for variable, value in zip(model.weights, new_weights, strict=True):
            variable.assign(value)
        optimizer.assign(AdamState(*state))
        return sums

    return _loop(strategy, step, images, labels, batch_size)


def make_evaluate(
    strategy: tf.distribute.Strategy, model: MLP, examples: Examples, batch_size: int
) -> StepsFunction:
    """Builds the function that sums loss and right answers over rows of indices."""
    images, labels = place(strategy, examples)

    def step(images, labels, indices, mask):  # type: ignore[no-untyped-def]
        rows = share(indices)
        sums = totals(tf.gather(labels, rows), model(tf.gather(images, rows)), share(mask))
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sums)

    return _loop(strategy, step, images, labels, batch_size)


def _loop(
    strategy: tf.distribute.Strategy,
    step: Callable[..., Totals],
    images: tf.Tensor,
    labels: tf.Tensor,
    batch_size: int,
) -> StepsFunction:
    """Runs a replica function over rows of indices, inside one graph.

    The loop stands outside `Strategy.run`: a sum over replicas cannot stand in a loop within.
    """

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, batch_size], tf.int32),  # one trace for any number of steps
            tf.TensorSpec([None, batch_size], tf.float32),
        ]
    )
    def run(indices, mask):  # type: ignore[no-untyped-def]
        loss, correct = tf.constant(0.0, tf.float64), tf.constant(0, tf.int64)
        for i in tf.range(tf.shape(indices)[0]):
            sums = strategy.run(step, (images, labels, indices[i], mask[i]))
            # Summed over replicas already: every replica holds the same.
            first = [strategy.experimental_local_results(value)[0] for value in sums]
            loss += tf.cast(first[0], tf.float64)
            correct += tf.cast(first[1], tf.int64)
        return Totals(loss, correct)

    return run
