"""Examples streamed from their files: parallel reads, and a shuffle within a bounded window.

The files of an epoch are drawn in random order and dealt to a few *lanes*, each of which reads
its files one after another. A *window* is a block of records of every lane; its records are
drawn in random order. All draws are pure functions of (seed, epoch), so that the order of an
epoch is known beforehand, and reading can begin anywhere in it. Records that are not this
worker's are read, but not parsed.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.command import InputError
from pipeline.dataset import NUM_PIXELS, Shard
from trainer.data import FEATURES, Examples, philox_words, verify
from trainer.strategy import columns, own_replicas, per_replica

WINDOW = 8192  # records: 26 MB of pixels
LANES = 4
ROWS_PER_CALL = 16384


class Plan(NamedTuple):
    """How an epoch is read.

    Attributes:
        lanes: the shards that each lane reads, one after another.
        order: int32 [n], the rows of the split as they come.
        picks: for each window, where its rows stand among its records, lane after lane.
    """

    lanes: list[list[int]]
    order: np.ndarray
    picks: list[np.ndarray]


def make_plan(sizes: Sequence[int], seed: int | None, epoch: int) -> Plan:
    """Plans an epoch over shards of these sizes; without a seed, one lane in its own order."""
    total = sum(sizes)
    if seed is None:
        words = np.arange(len(sizes) + total)
        count = 1
    else:
        words = philox_words(seed, epoch, len(sizes) + total)
        count = min(LANES, len(sizes))
    shuffled = np.argsort(words[: len(sizes)], kind="stable").tolist()
    lanes = [shuffled[j::count] for j in range(count)]
    rows_of = np.split(np.arange(total, dtype=np.int32), np.cumsum(sizes)[:-1])
    rows = [np.concatenate([rows_of[shard] for shard in lane]) for lane in lanes]
    block = WINDOW // count
    order, picks, at = [], [], len(sizes)
    for first in range(0, max(map(len, rows)), block):
        window = np.concatenate([lane[first : first + block] for lane in rows])
        pick = np.argsort(words[at : at + len(window)], kind="stable").astype(np.int32)
        at += len(window)
        picks.append(pick)
        order.append(window[pick])
    return Plan(lanes, np.concatenate(order), picks)


class Streamed:
    """Examples that stay in their files; in memory are a few windows of them.

    Attributes:
        size: how many.
        plan: gives the `Plan` of an epoch.
    """

    rows_per_call: int | None = ROWS_PER_CALL

    def __init__(self, directory: Path, shards: Sequence[Shard], seed: int | None) -> None:
        """Checks the files, a block of each at a time.

        Raises:
            InputError: a file is missing or is not what the manifest says.
        """
        verify(directory, shards)
        self._directory = directory
        self._shards = shards
        self._seed = seed
        # Two are remembered: of the epoch that is trained, and the one that is read ahead.
        self.plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.size = sum(shard.num_examples for shard in shards)

    def order(self, epoch: int) -> np.ndarray:
        """See `Source`."""
        return self.plan(epoch).order

    def _make_plan(self, epoch: int) -> Plan:
        return make_plan([shard.num_examples for shard in self._shards], self._seed, epoch)

    def feed(self, strategy: tf.distribute.Strategy, batch_size: int, steps: int):  # type: ignore[no-untyped-def]
        """See `Source`; each call brings its own images."""
        replicas = own_replicas(strategy)
        own = slice(
            columns(strategy, replicas.start, batch_size).start,
            columns(strategy, replicas.stop - 1, batch_size).stop,
        )
        width = own.stop - own.start
        share = width // len(replicas)
        reader = _Reader(self, batch_size, own)
        local = np.arange(steps * share, dtype=np.int32).reshape(steps, share)
        rows = per_replica(strategy, lambda _: local)

        def feed(indices: np.ndarray, epoch: int):  # type: ignore[no-untyped-def]
            found = reader.read(indices, epoch, steps)

            def of_replica(values: np.ndarray, replica: int) -> np.ndarray:
                first = (replica - replicas.start) * share
                cut = values.reshape(steps, width, *values.shape[1:])[:, first : first + share]
                return cut.reshape(steps * share, *values.shape[1:])

            def spread(values: np.ndarray) -> tf.distribute.DistributedValues:
                return per_replica(strategy, lambda replica: of_replica(values, replica))

            return spread(found.images), spread(found.labels), rows

        return feed

    def windows(self, epoch: int, first: int, batch_size: int, own: slice) -> Iterator[Examples]:
        """Reads the windows of an epoch from number `first` on; of each batch, columns `own`.

        Raises:
            InputError: the files do not hold the records that the manifest says.
        """
        plan = self.plan(epoch)
        dataset = self._dataset(plan, first, batch_size, own)
        try:
            for window in dataset.as_numpy_iterator():
                yield Examples(window["image"], window["label"])
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as error:
            text = str(error.message).splitlines()[0]
            raise InputError(f"{self._directory}: not what its manifest says: {text}") from None

    def _dataset(self, plan: Plan, first: int, batch_size: int, own: slice) -> tf.data.Dataset:
        block = WINDOW // len(plan.lanes)
        lanes = tuple(self._lane(lane, first * block, block) for lane in plan.lanes)
        positions = np.split(np.arange(self.size), np.cumsum([len(p) for p in plan.picks])[:-1])
        picks = [
            pick[(at % batch_size >= own.start) & (at % batch_size < own.stop)]
            for pick, at in zip(plan.picks, positions, strict=True)
        ][first:]
        # Ragged rows travel as one vector and its pieces' lengths.
        ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(picks), [len(p) for p in picks])
        sizes = [len(pick) for pick in plan.picks[first:]]

        def parse(blocks, size, pick):  # type: ignore[no-untyped-def]
            records = tf.concat(blocks, axis=0)
            tf.debugging.assert_equal(tf.size(records), size, "records are missing or too many")
            return tf.io.parse_example(tf.gather(records, pick), FEATURES)

        return (
            tf.data.Dataset.zip((lanes, tf.data.Dataset.from_tensor_slices((sizes, ragged))))
            .map(lambda blocks, rest: parse(blocks, *rest), num_parallel_calls=2)
            .prefetch(1)
        )

    def _lane(self, shards: list[int], skip: int, block: int) -> tf.data.Dataset:
        """Blocks of records from one file after another, the last one partial, then empty ones."""
        left = [self._shards[shard] for shard in shards]
        while left and left[0].num_examples <= skip:
            skip -= left.pop(0).num_examples
        nothing = tf.data.Dataset.from_tensors(tf.constant([], tf.string)).repeat()
        if not left:
            return nothing
        files = [str(self._directory / shard.file) for shard in left]
        compression = "GZIP" if files[0].endswith(".gz") else ""
        records = tf.data.TFRecordDataset(files, compression, buffer_size=1 << 20)
        return records.skip(skip).batch(block).prefetch(1).concatenate(nothing)


class _Reader:
    """Gives stretches of an epoch's order, reading a window ahead in a thread of its own.

    What it gives is a pure function of what it is asked for; asked for stretches in their
    order, as an epoch does, it has the next one ready.
    """

    def __init__(self, source: Streamed, batch_size: int, own: slice) -> None:
        self._source = source
        self._batch_size = batch_size
        self._own = own
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._next = (-1, -1)  # the epoch, and the place in its order, that comes next

    def read(self, indices: np.ndarray, epoch: int, steps: int) -> Examples:
        """The own columns of a stretch of the order, as rows, zeros up to those of `steps` steps.

        Args:
            indices: int32 [n, batch], which begins at the beginning of a batch.
            epoch: whose order it is a stretch of.
            steps: how many to fill up to.
        """
        order = self._source.order(epoch)
        first = self._next[1]
        if self._next[0] != epoch or order[first] != indices[0, 0]:
            first = int(np.flatnonzero(order == indices[0, 0])[0])
            self._begin(epoch, first)
        stop = min(first + indices.size, len(order))
        if not np.array_equal(order[first:stop], indices.ravel()[: stop - first]):
            raise ValueError("a stream gives its rows in the order of an epoch alone")
        self._next = (epoch, stop) if stop < len(order) else (epoch + 1, 0)
        width = self._own.stop - self._own.start
        images = np.zeros((steps * width, NUM_PIXELS), np.float32)
        labels = np.zeros(steps * width, np.int64)
        self._fill(images, labels, self._before(stop) - self._before(first))
        return Examples(images, labels)

    def _before(self, place: int) -> int:
        """How many of the first places of an order fall into the own columns."""
        batches, column = divmod(place, self._batch_size)
        width = self._own.stop - self._own.start
        return batches * width + min(max(column - self._own.start, 0), width)

    def _begin(self, epoch: int, place: int) -> None:
        """Makes the row at a place of an order the next one to be read."""
        starts = np.cumsum([0, *map(len, self._source.plan(epoch).picks)])
        window = int(np.searchsorted(starts, place, side="right")) - 1
        self._windows = self._endless(epoch, window)
        self._ahead = self._pool.submit(next, self._windows)
        self._left = self._turn()
        skip = self._before(place) - self._before(int(starts[window]))
        self._left = Examples(*(values[skip:] for values in self._left))

    def _endless(self, epoch: int, window: int) -> Iterator[Examples]:
        for number in itertools.count(epoch):
            first = window if number == epoch else 0
            yield from self._source.windows(number, first, self._batch_size, self._own)

    def _turn(self) -> Examples:
        """The window that was read ahead; the next one is begun."""
        window = self._ahead.result()
        self._ahead = self._pool.submit(next, self._windows)
        return window

    def _fill(self, images: np.ndarray, labels: np.ndarray, count: int) -> None:
        """Writes the next `count` rows to the beginning of two arrays."""
        filled = 0
        while filled < count:
            if not len(self._left.labels):
                self._left = self._turn()
            taken = min(count - filled, len(self._left.labels))
            rows = slice(filled, filled + taken)
            images[rows], labels[rows] = self._left.images[:taken], self._left.labels[:taken]
            self._left = Examples(*(values[taken:] for values in self._left))
            filled += taken
