"""From a dataset folder to batches: a pure function of (seed, epoch, step)."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.command import InputError
from pipeline.dataset import NUM_PIXELS, Manifest, Shard
from pipeline.records import verify_shard

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


def shards_of(manifest: Manifest, splits: str) -> list[Shard]:
    """The files of a split, or of several joined by ``+``, but for empty ones."""
    names = splits.split("+")
    return [shard for name in names for shard in manifest.splits[name].shards if shard.num_examples]


def verify(directory: Path, shards: Sequence[Shard]) -> None:
    """Checks files against the manifest, by size and checksum.

    Raises:
        InputError: the first that is missing or is not what the manifest says.
    """
    # Hashing releases the interpreter.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda shard: verify_shard(directory, shard), shards))


def load_split(directory: Path, manifest: Manifest, splits: str) -> Examples:
    """Reads a split that fits in memory, or several joined by ``+``, after checking its files.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """
    shards = shards_of(manifest, splits)
    verify(directory, shards)
    size = sum(manifest.splits[name].num_examples for name in splits.split("+"))
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
        raise InputError(f"{directory}: {at} records in {splits}, the manifest says {size}")
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


def first_images(directory: Path, manifest: Manifest, count: int) -> np.ndarray:
    """Some images of the train split, to ask a model about; float32 [n, 784]."""
    file = shards_of(manifest, "train")[0].file
    compression = "GZIP" if file.endswith(".gz") else ""
    records = tf.data.TFRecordDataset(str(directory / file), compression).take(count)
    return np.stack([tf.io.parse_single_example(r, FEATURES)["image"].numpy() for r in records])


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of ``range(size)`` that depends on nothing but its arguments; int32.

    It sorts the raw words of a counter-based generator, whose stream NumPy promises never to
    change, which it does not promise of its own `permutation`.
    """
    return np.argsort(philox_words(seed, epoch, size), kind="stable").astype(np.int32)


def philox_words(seed: int, epoch: int, count: int) -> np.ndarray:
    """Random words that depend on nothing but the arguments; uint64 [count]."""
    return np.random.Philox(key=[seed, epoch]).random_raw(count)


def cut(order: np.ndarray, batch_size: int) -> Batches:
    """Cuts rows in batches; the last is padded, so that every row counts once."""
    steps = -(-len(order) // batch_size)
    indices = np.zeros(steps * batch_size, np.int32)
    indices[: len(order)] = order
    mask = np.zeros(steps * batch_size, np.float32)
    mask[: len(order)] = 1
    return Batches(indices.reshape(steps, batch_size), mask.reshape(steps, batch_size))
