"""From a dataset folder to batches: a pure function of (seed, epoch, step)."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.command import InputError
from pipeline.dataset import NUM_PIXELS, Manifest, read_shard

PARSE_BATCH = 4096
FEATURES = {
    "image": tf.io.FixedLenFeature([NUM_PIXELS], tf.float32),
    "label": tf.io.FixedLenFeature([], tf.int64),
}


class Examples(NamedTuple):
    """A whole split: images float32 [n, 784], labels int64 [n], in the order of its shards."""

    images: np.ndarray
    labels: np.ndarray


class Batches(NamedTuple):
    """The batches of a stretch of steps, as rows of a split.

    Attributes:
        indices: int32 [steps, batch], 0 where padded.
        mask: float32 [steps, batch], 1 for an example, 0 for padding.
    """

    indices: np.ndarray
    mask: np.ndarray


def load_split(directory: Path, manifest: Manifest, split: str) -> Examples:
    """Reads a split that fits in memory, after checking its files against the manifest.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """
    shards = [shard for shard in manifest.splits[split].shards if shard.num_examples]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        list(pool.map(lambda shard: len(read_shard(directory, shard)), shards))
    size = manifest.splits[split].num_examples
    images = np.empty((size, NUM_PIXELS), np.float32)
    labels = np.empty(size, np.int64)
    at = 0
    files = [str(directory / shard.file) for shard in shards]
    for batch in _parsed(files, "GZIP" if files and files[0].endswith(".gz") else ""):
        rows = slice(at, at + len(batch["label"]))
        if rows.stop <= size:
            images[rows], labels[rows] = batch["image"], batch["label"]
        at = rows.stop
    if at != size:
        raise InputError(f"{directory}: {at} records in {split}, the manifest says {size}")
    return Examples(images, labels)


def _parsed(files: list[str], compression: str) -> tf.data.NumpyIterator:
    """Parses records a batch at a time: one by one would cost more than the training."""
    dataset = tf.data.TFRecordDataset(files, compression).batch(PARSE_BATCH)
    return (
        dataset.map(
            lambda records: tf.io.parse_example(records, FEATURES),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(1)
        .as_numpy_iterator()
    )


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of ``range(size)`` that depends on nothing but its arguments; int32.

    It sorts the raw words of a counter-based generator, whose stream NumPy promises never to
    change, which it does not promise of its own `permutation`.
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int32)


def cut(order: np.ndarray, batch_size: int) -> Batches:
    """Cuts rows in batches; the last is padded, so that every row counts once."""
    steps = -(-len(order) // batch_size)
    indices = np.zeros(steps * batch_size, np.int32)
    indices[: len(order)] = order
    mask = np.zeros(steps * batch_size, np.float32)
    mask[: len(order)] = 1
    return Batches(indices.reshape(steps, batch_size), mask.reshape(steps, batch_size))
