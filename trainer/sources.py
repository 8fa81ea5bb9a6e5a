"""Where the examples of a step come from: from memory, or streamed from their files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tensorflow as tf

from pipeline.dataset import NUM_PIXELS, Manifest
from trainer.data import Examples, epoch_order, load_split, shards_of
from trainer.strategy import per_replica, shares

# Examples are kept in memory when all copies of them fit in this part of the machine's, and one
# in this part of each GPU's.
FRACTION = 1 / 8
COPIES = 2  # of the machine's own: as read, and as a tensor to be given to the replicas
BYTES_PER_EXAMPLE = 4 * NUM_PIXELS + 8  # float32 pixels, int64 label

# (indices int32 [steps, batch], epoch) -> images, labels, rows of them, each per replica
Feed = Callable[[np.ndarray, int], tuple[Any, Any, Any]]


class Source(Protocol):
    """The examples of a split, by their rows: their places in the order of its shards.

    Attributes:
        size: how many.
        rows_per_call: how many fit in one call of the compiled function; None: all.
    """

    size: int
    rows_per_call: int | None

    def order(self, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch: int32 [size], each once."""

    def feed(self, strategy: tf.distribute.Strategy, batch_size: int, steps: int) -> Feed:
        """Makes the function that brings the rows of up to `steps` steps to the replicas.

        Returns:
            A function of indices, taken from `order` one stretch after another or from any
            place in it, that gives for each replica images float32 [n, 784], labels int64 [n],
            and int32 [steps, batch / replicas], saying where among them the indices stand.
        """


class Resident:
    """Examples in memory, on the device of every replica, so that a step only gathers."""

    rows_per_call: int | None = None

    def __init__(self, examples: Examples, seed: int | None) -> None:
        """Keeps examples; without a seed they come in their own order."""
        self.examples = examples
        self.size = len(examples.labels)
        self._seed = seed

    def order(self, epoch: int) -> np.ndarray:
        """See `Source`."""
        if self._seed is None:
            return np.arange(self.size, dtype=np.int32)
        return epoch_order(self._seed, epoch, self.size)

    def feed(self, strategy: tf.distribute.Strategy, batch_size: int, steps: int) -> Feed:
        """See `Source`."""
        images = per_replica(strategy, lambda _: self.examples.images)
        labels = per_replica(strategy, lambda _: self.examples.labels)
        return lambda indices, _: (images, labels, shares(strategy, pad(indices, steps)))


def pad(rows: np.ndarray, steps: int) -> np.ndarray:
    """Adds steps of zeros, up to a fixed number: [n, batch] -> [steps, batch]."""
    return np.pad(rows, ((0, steps - len(rows)), (0, 0)))


def resolve_input(
    wanted: Literal["auto", "resident", "stream"], manifest: Manifest, devices: Sequence[str]
) -> Literal["resident", "stream"]:
    """Turns ``auto`` into what it means for a dataset on this machine: resident or stream.

    Args:
        wanted: as asked for.
        manifest: of the dataset.
        devices: of the replicas of this process; each holds a copy of the examples.
    """
    if wanted != "auto":
        return wanted
    examples = sum(manifest.splits[name].num_examples for name in ("train", "validation"))
    size = examples * BYTES_PER_EXAMPLE
    fits = size * (COPIES + len(devices)) <= memory() * FRACTION
    return "resident" if fits and size <= gpu_memory(devices) * FRACTION else "stream"


def gpu_memory(devices: Sequence[str]) -> float:
    """Bytes that TensorFlow may use of the smallest GPU among devices; infinite without any."""
    names = {device.split("device:")[-1] for device in devices if "GPU:" in device}
    if not names:
        return math.inf
    from tensorflow.python.client import device_lib  # no other says how much there is

    found = device_lib.list_local_devices()
    return min(device.memory_limit for device in found if device.name.split(":", 1)[-1] in names)


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        found = min(found, int(text))
    return found


def open_source(
    directory: Path, manifest: Manifest, splits: str, seed: int | None, mode: str
) -> Source:
    """Opens one split, or several joined by ``+``, after checking its files.

    Args:
        directory: the dataset's.
        manifest: says which files, and what they hold.
        splits: ``train``, ``validation`` or ``train+validation``.
        seed: of the order; None: the order of the shards.
        mode: ``resident`` or ``stream``.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """
    if mode == "resident":
        return Resident(load_split(directory, manifest, splits), seed)
    from trainer.stream import Streamed

    return Streamed(directory, shards_of(manifest, splits), seed)
