"""The compiled functions: many training steps in one call, and a pass of validation.

A step, on every replica:

    share of the batch -> gradients of each of its shards -> sum over all shards -> update

A *shard* is the unit in which gradients are computed. Usually each replica has one, and the
strategy adds them up. With ``reproducible`` a global batch is always cut in `VIRTUAL_SHARDS`,
however many replicas share them, and their gradients are added up in one fixed binary tree: the
same numbers are added in the same order, and so the weights come out equal, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf

from trainer.config import VIRTUAL_SHARDS, TrainConfig
from trainer.deform import Deform
from trainer.gradients import Totals, make_gradients, totals
from trainer.model import MLP
from trainer.optimizers import Update, UpdateState
from trainer.sources import Source, pad
from trainer.strategy import shares, shares_memory

NOTHING = Totals(0.0, 0)


class StepsFunction(Protocol):
    """Takes many steps."""

    def __call__(
        self, indices: np.ndarray, mask: np.ndarray, epoch: int, so_far: Totals = NOTHING
    ) -> Totals:
        """Takes steps over rows of indices, and adds to the sums of those before.

        Step is added to step, so that the sums come out the same however steps are cut into
        calls.

        Args:
            indices: int32 [steps, batch].
            mask: float32 [steps, batch].
            epoch: whose order the indices are a stretch of.
            so_far: what the calls before gave.
        """


def make_train_steps(
    strategy: tf.distribute.Strategy,
    model: MLP,
    update: Update,
    source: Source,
    config: TrainConfig,
    *,
    deform: Deform | None = None,
) -> StepsFunction:
    """Builds the function that takes as many steps as it is given rows of indices.

    Each replica updates its own copy of the weights: equal copies and equal gradients stay
    equal. What XLA compiles is pure and gets all values as arguments, because a variable
    captured by it would be that of the first replica. On a single replica nothing is sent to
    others, so there the loop over the steps is compiled whole; the numbers come out the same.

    Args:
        strategy: its scope holds the variables.
        model: the network.
        update: its optimizer.
        source: gives the images and labels of rows.
        config: batch size, seed and so on.
        deform: what to do to the images before each step, if anything.
    """
    shards = _num_shards(strategy, config)
    own_shards = shards // strategy.num_replicas_in_sync
    of_shard = _make_of_shard(config, model, deform)
    if shares_memory(strategy):
        bring_together = hand_over
    else:
        bring_together = gather_shards if config.reproducible else reduce_shards

    @tf.function(jit_compile=True, autograph=False)
    def updated(weights, parts, state):  # type: ignore[no-untyped-def]
        *found, loss, correct = add_tree(parts)
        return *update.update(weights, found, state), Totals(loss, correct)

    def step(images, labels, rows, examples, mask, count, epoch, i):  # type: ignore[no-untyped-def]
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * own_shards
        weights = [tf.identity(w) for w in model.weights]
        parts = [
            of_shard(
                weights,
                images,
                labels,
                *(piece(values[i], j, own_shards) for values in (rows, examples, mask)),
                count,
                epoch,
                tf.stack([tf.cast(update.iterations, tf.int32), first + j]),
            )
            for j in range(own_shards)
        ]
        weights, state, sums = updated(weights, bring_together(parts), update.state)
        for variable, value in zip(model.weights, weights, strict=True):
            variable.assign(value)
        update.assign(UpdateState(*state))
        return Totals(*sums)

    whole = strategy.num_replicas_in_sync == 1
    return _loop(strategy, step, source, config.batch_size, config.steps_per_call, whole=whole)


def _make_of_shard(
    config: TrainConfig, model: MLP, deform: Deform | None
) -> Callable[..., list[tf.Tensor]]:
    """Makes the function that gives the gradients of a shard, and its sums after them."""
    gradients = make_gradients(config, model)

    @tf.function(jit_compile=True, autograph=False)
    def of_shard(weights, images, labels, rows, examples, mask, count, epoch, key):  # type: ignore[no-untyped-def]
        chosen = tf.gather(images, rows)
        if deform is not None:
            chosen = deform(chosen, epoch, examples, config.seed)
        found, sums = gradients(weights, chosen, tf.gather(labels, rows), mask, count, key)
        return [*found, *sums]

    return of_shard


def make_evaluate(
    strategy: tf.distribute.Strategy,
    model: MLP,
    update: Update,
    source: Source,
    config: TrainConfig,
    batch_size: int,
) -> StepsFunction:
    """Builds the function that sums loss and right answers over rows of indices."""
    own_shards = _num_shards(strategy, config) // strategy.num_replicas_in_sync

    # Compiled, a shard's numbers come out alike wherever it is computed, as in training.
    @tf.function(jit_compile=True, autograph=False)
    def of_shard(weights, images, labels, rows, mask):  # type: ignore[no-untyped-def]
        logits = model.apply(weights, tf.gather(images, rows))
        return list(totals(tf.gather(labels, rows), logits, mask, loss=config.loss))

    def step(images, labels, rows, _examples, mask, _count, _epoch, i):  # type: ignore[no-untyped-def]
        weights = [tf.identity(w) for w in update.evaluated(model.weights)]
        parts = [
            of_shard(
                weights,
                images,
                labels,
                *(piece(values[i], j, own_shards) for values in (rows, mask)),
            )
            for j in range(own_shards)
        ]
        return Totals(*compiled_tree(gather_shards(parts)))

    return _loop(strategy, step, source, batch_size, config.steps_per_call, whole=False)


def _num_shards(strategy: tf.distribute.Strategy, config: TrainConfig) -> int:
    return VIRTUAL_SHARDS if config.reproducible else strategy.num_replicas_in_sync


def piece(values: tf.Tensor, j: int, count: int) -> tf.Tensor:
    """The j-th of `count` equal parts of the first dimension."""
    size = values.shape[0] // count
    return values[j * size : (j + 1) * size]


def hand_over(parts: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """Brings together what the shards of all replicas found, for `add_tree`; in replica context.

    For replicas in one memory, where a replica's numbers can be read by the others as they lie:
    nothing is copied, and the sums are left to each replica's own update.
    """

    def listed(strategy, parts):  # type: ignore[no-untyped-def]
        columns = [[strategy.experimental_local_results(v) for v in part] for part in parts]
        replicas = range(strategy.num_replicas_in_sync)
        return [[values[i] for values in part] for i in replicas for part in columns]

    return tf.distribute.get_replica_context().merge_call(listed, args=(parts,))


def gather_shards(parts: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """Brings together what the shards of all replicas found, for `add_tree`; in replica context.

    Each replica's own are added up before, where there are others to be sent to.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return parts
    own = parts[0] if len(parts) == 1 else compiled_tree(parts)
    gathered = context.all_gather([value[tf.newaxis] for value in own], axis=0)
    columns = [tf.unstack(value, context.num_replicas_in_sync) for value in gathered]
    return [list(row) for row in zip(*columns, strict=True)]


def reduce_shards(parts: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """Adds up what the shards of all replicas found; in replica context.

    The sum's order is the strategy's, the same each time for one number of replicas. It costs half
    of what gathering does: a replica is sent one sum, not what every other one found.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return parts
    (own,) = parts
    return [context.all_reduce(tf.distribute.ReduceOp.SUM, own)]


def add_tree(parts: list[list[tf.Tensor]]) -> list[tf.Tensor]:
    """((a + b) + (c + d)) + ...: neighbours first, tensor by tensor.

    To be compiled: a sum of two given numbers is rounded alike in every compilation, so four
    parts added at once, or two and two and then the two, come out equal. Outside of one,
    TensorFlow would take the tree for one long sum, in an order of its own.
    """
    while len(parts) > 1:
        pairs = zip(parts[0::2], parts[1::2], strict=False)
        added = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
        parts = added + parts[len(parts) // 2 * 2 :]
    return parts[0]


compiled_tree = tf.function(add_tree, jit_compile=True, autograph=False)


def call_length(source: Source, batch_size: int, steps_per_call: int) -> int:
    """How many steps a call has room for: those of a split, its partial batch too, at most."""
    length = min(steps_per_call, -(-source.size // batch_size))
    if source.rows_per_call is not None:
        length = min(length, source.rows_per_call // batch_size)
    return max(1, length)


def _make_run(
    strategy: tf.distribute.Strategy, step: Callable[..., Totals], *, whole: bool
) -> Callable[..., Totals]:
    """Makes the function that takes the first `steps` steps of a call on every replica.

    The loop stands outside `Strategy.run`: a sum over replicas cannot stand in a loop within. It
    is written out, as AutoGraph's own would be compiled anew for every number of steps.
    """

    @tf.function(jit_compile=whole, autograph=False)
    def run(images, labels, rows, examples, mask, counts, epoch, steps, loss, correct):  # type: ignore[no-untyped-def]
        def take(i, loss, correct):  # type: ignore[no-untyped-def]
            sums = strategy.run(step, (images, labels, rows, examples, mask, counts[i], epoch, i))
            # Summed over replicas already: every replica holds the same.
            first = [strategy.experimental_local_results(value)[0] for value in sums]
            return (
                i + 1,
                loss + tf.cast(first[0], tf.float64),
                correct + tf.cast(first[1], tf.int64),
            )

        start = (tf.constant(0), loss, correct)
        _, loss, correct = tf.while_loop(lambda i, *_: i < steps, take, start)
        return Totals(loss, correct)

    return run


def _loop(
    strategy: tf.distribute.Strategy,
    step: Callable[..., Totals],
    source: Source,
    batch_size: int,
    steps_per_call: int,
    *,
    whole: bool,
) -> StepsFunction:
    """Runs a replica function over rows of indices, inside one graph.

    Calls are padded to one number of steps, so that one compilation serves all of them.
    """
    run = _make_run(strategy, step, whole=whole)
    length = call_length(source, batch_size, steps_per_call)
    feed = source.feed(strategy, batch_size, length)

    def call(indices: np.ndarray, mask: np.ndarray, epoch: int, so_far: Totals) -> Totals:
        images, labels, rows = feed(indices, epoch)
        padded = pad(mask, length)
        sums = run(
            images,
            labels,
            rows,
            shares(strategy, pad(indices, length)),
            shares(strategy, padded),
            padded.sum(axis=1),
            tf.constant(epoch, tf.int32),
            tf.constant(len(indices), tf.int32),
            tf.constant(so_far.loss, tf.float64),
            tf.constant(so_far.correct, tf.int64),
        )
        return Totals(float(sums.loss), int(sums.correct))

    def calls(
        indices: np.ndarray, mask: np.ndarray, epoch: int, so_far: Totals = NOTHING
    ) -> Totals:
        for at in range(0, len(indices), length):
            part = slice(at, at + length)
            so_far = call(indices[part], mask[part], epoch, so_far)
        return so_far

    return calls
