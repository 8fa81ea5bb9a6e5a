"""The models that `benchmarks.gates` puts before the gate: trained once, their answers kept.

All are of one config but for the seed, and of one dataset but for labels that went bad. They are
trained by the trainer's own compiled steps, one after another in one process: the values of a
model are taken over by the next one's, so that nothing is compiled twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from trainer.config import TrainConfig

NUM_CLASSES = 10
VALIDATION = 10_000  # rows before the train split, as `pipeline.preprocess` cuts MNIST
SPOILING_SEED = 5  # of which labels go bad, and what they turn to


class Night(NamedTuple):
    """What distinguishes a model: its seed, and the per cent of labels that were chance."""

    seed: int
    spoiled: int = 0


class Mnist(NamedTuple):
    """Images float32 [n, 784], labels int64 [n], of the train split and of the test set."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_mnist(folder: Path) -> Mnist:
    """Reads the IDX files of a folder, and leaves out the validation split."""
    from pipeline.sources import idx

    source = idx.open_source(str(folder))
    rows: dict[str, list[Any]] = {"train": [], "test": []}
    for block in source.blocks():
        rows[block.part] += source.read(block)
    parts = [
        np.concatenate([getattr(some, what) for some in rows[part]])
        for part in ("train", "test")
        for what in ("pixels", "labels")
    ]
    images, labels, test_images, test_labels = parts
    scale = np.float32(255)
    return Mnist(images[VALIDATION:] / scale, labels[VALIDATION:], test_images / scale, test_labels)


def spoil(labels: np.ndarray, percent: int) -> np.ndarray:
    """Labels of which so many per cent are drawn anew from all classes, nine in ten wrong.

    What is bad at 2 per cent is bad at 4 as well, and in the same way.
    """
    random = np.random.default_rng(SPOILING_SEED)
    chance = random.integers(0, NUM_CLASSES, len(labels))
    rows = random.permutation(len(labels))[: len(labels) * percent // 100]
    spoiled = labels.copy()
    spoiled[rows] = chance[rows]
    return spoiled


def answers(
    mnist: Mnist, nights: Sequence[Night], config: TrainConfig, work_dir: Path
) -> np.ndarray:
    """Every model's answers on the test set: uint8 [nights, test rows].

    Args:
        mnist: what to train on and to ask about.
        nights: which models.
        config: of all of them, the seed aside.
        work_dir: holds a file for each model, so that none is trained twice; made if missing.
    """
    folder = work_dir / _key(mnist, config)
    folder.mkdir(parents=True, exist_ok=True)
    files = {night: folder / f"seed{night.seed}_spoiled{night.spoiled}.npy" for night in nights}
    missing = [night for night, file in files.items() if not file.exists()]
    for night, found in _trained(mnist, missing, config) if missing else ():
        unfinished = folder / "unfinished.npy"
        np.save(unfinished, found)
        unfinished.replace(files[night])
    return np.stack([np.load(files[night]) for night in nights])


def _key(mnist: Mnist, config: TrainConfig) -> str:
    """Names what answers depend on beside the night."""
    digest = hashlib.sha256(repr(dataclasses.replace(config, seed=0)).encode())
    for array in mnist:
        digest.update(array.data)
    return digest.hexdigest()[:12]


def _trained(
    mnist: Mnist, nights: Sequence[Night], config: TrainConfig
) -> Iterator[tuple[Night, np.ndarray]]:
    """Trains models, and yields each with its answers."""
    import tensorflow as tf
    from tqdm import tqdm

    from trainer import data
    from trainer.trained import Splits, build, make_network

    source = _make_source(mnist)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    trained = build(config, strategy, Splits(source, None), NUM_CLASSES)
    first = trained.values()
    for night in tqdm(nights, unit="model", disable=None):
        mine = dataclasses.replace(config, seed=night.seed)
        weights = make_network(mine, NUM_CLASSES).weights
        trained.assign([weight.numpy() for weight in weights] + first[len(weights) :])
        source.current_labels = spoil(mnist.labels, night.spoiled)
        for epoch in range(mine.epochs):
            order = data.epoch_order(night.seed, epoch, source.size)
            trained.train(*data.cut(order, mine.batch_size), epoch)
        logits = trained.model.apply(trained.evaluated(), tf.constant(mnist.test_images))
        yield night, logits.numpy().argmax(axis=1).astype(np.uint8)


def _make_source(mnist: Mnist) -> Any:
    """Examples whose labels may change between calls: those of `current_labels`."""
    import tensorflow as tf

    from trainer.data import Examples
    from trainer.sources import Resident
    from trainer.strategy import per_replica

    class Relabelled(Resident):
        current_labels = mnist.labels

        def feed(
            self, strategy: tf.distribute.Strategy, batch_size: int, steps: int
        ) -> Callable[[np.ndarray, int], tuple[Any, Any, Any]]:
            given = super().feed(strategy, batch_size, steps)

            def feed(indices: np.ndarray, epoch: int) -> tuple[Any, Any, Any]:
                images, _, rows = given(indices, epoch)
                return images, per_replica(strategy, lambda _: self.current_labels), rows

            return feed

    return Relabelled(Examples(mnist.images, mnist.labels), None)
