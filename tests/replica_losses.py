"""Trains a tiny network on some replicas and prints what came of it as JSON.

A process of its own, because one process can make logical devices and a strategy only once:

    python tests/replica_losses.py N CASES

CASES is JSON, ``{"case": {"name": value, ...}, ...}``: each is trained from the beginning, and
answered by its name. The names are fields of `TrainConfig`; ``rows=N`` takes fewer of the examples
below, ``calls_of=N`` so many steps in a call, ``dataset=DIR`` a dataset's train split instead, and
``window=N`` sets how many records of it are shuffled together. ``input=as streamed`` keeps them in
memory, but takes them in the order of a stream. With TF_CONFIG set this is one worker of a cluster.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from pipeline.dataset import load_manifest
from trainer import stream
from trainer.config import TrainConfig
from trainer.data import Examples, cut
from trainer.export import weights_sha256
from trainer.model import MLP
from trainer.optimizers import make_update
from trainer.sources import Resident, open_source
from trainer.step import NOTHING, make_evaluate, make_train_steps
from trainer.strategy import join, make_strategy, per_replica

INPUTS, HIDDEN, CLASSES = 6, (7, 5), 3
ROWS, BATCH_SIZE, EPOCHS = 50, 16, 3  # 4 steps an epoch, the last of 2 rows
CALLS = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5), slice(5, 12)]
EVALUATION_BATCH = 8
SEED = 22
ADAM = {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}
CONFIG = TrainConfig(
    preset="core", hidden_units=HIDDEN, batch_size=BATCH_SIZE, epochs=EPOCHS, seed=SEED, **ADAM
)


def examples(rows=ROWS):
    """The problem."""
    random = np.random.default_rng(5)
    images = random.standard_normal((ROWS, INPUTS)).astype(np.float32)
    labels = (images @ random.standard_normal((INPUTS, CLASSES))).argmax(axis=-1)
    return Examples(images[:rows], labels[:rows].astype(np.int64))


def batches(source):
    """The steps of every epoch: (epoch, indices int32 [steps, batch], mask) each."""
    return [(e, *cut(source.order(e), BATCH_SIZE)) for e in range(EPOCHS)]


def in_calls(function, indices, mask, epoch, length):
    """The sums over all steps, taken in calls of so many."""
    sums = NOTHING
    for at in range(0, len(indices), length):
        part = slice(at, at + length)
        sums = function(indices[part], mask[part], epoch, sums)
    return sums


def taken(train, steps, wanted, length):
    """Takes a stretch of all steps; calls end with their epoch."""
    sums, at = [0.0, 0], 0
    for epoch, indices, mask in steps:
        own = slice(max(wanted.start - at, 0), max(wanted.stop - at, 0))
        at += len(indices)
        found = in_calls(train, indices[own], mask[own], epoch, length)
        sums = [sums[0] + found.loss, sums[1] + found.correct]
    return sums


def find(strategy, settings):
    """Trains, and returns what came of it."""
    dataset, rows = settings.pop("dataset", None), settings.pop("rows", ROWS)
    length = settings.pop("calls_of", ROWS)
    stream.WINDOW = settings.pop("window", 8192)
    config = dataclasses.replace(CONFIG, **settings)
    if dataset:
        manifest = load_manifest(Path(dataset))
        source = open_source(
            Path(dataset),
            manifest,
            "train",
            SEED,
            "stream" if "stream" in config.input else "resident",
        )
        if config.input == "as streamed":
            order = source.order
            source = open_source(Path(dataset), manifest, "train", SEED, "resident")
            source.order = order
        inputs, classes = 784, manifest.num_classes
    else:
        source, inputs, classes = Resident(examples(rows), SEED), INPUTS, CLASSES

    with strategy.scope():
        model = MLP(inputs, HIDDEN, classes, seed=SEED)
        update = make_update(config, model.weights, -(-source.size // BATCH_SIZE))
    train = make_train_steps(strategy, model, update, source, config)
    evaluate = make_evaluate(strategy, model, update, source, config, EVALUATION_BATCH)
    own = range(len(strategy.extended.worker_devices))

    def copies(variables):
        """[replica of this process][variable], as nested lists."""
        return [
            [strategy.experimental_local_results(v)[i].numpy().tolist() for v in variables]
            for i in own
        ]

    initial = copies(model.weights)
    steps = batches(source)
    calls = [taken(train, steps, wanted, length) for wanted in CALLS]
    workers = join(strategy)
    agree, is_chief = workers.agree, workers.is_chief
    result = {
        "replicas": strategy.num_replicas_in_sync,
        "chief": is_chief,
        "agreed": [agree(False), agree(is_chief), agree(True)],
        "exchanged": workers.exchange("1é" if is_chief else ""),
        "placed": [
            strategy.experimental_local_results(per_replica(strategy, np.zeros))[i].device[-5:]
            for i in own
        ],
        "calls": calls,
        "sha256": weights_sha256([weight.numpy() for weight in model.weights]),
    }
    if not dataset:
        result |= {
            "initial": initial,
            "weights": copies(model.weights),
            "slots": copies([slot for slots in update.slots for slot in slots]),
            "iterations": copies([update.iterations]),
            "evaluation": list(
                in_calls(evaluate, *cut(np.arange(rows), EVALUATION_BATCH), 0, length)
            ),
        }
    return result


def main(replicas, cases):
    strategy = make_strategy(replicas)
    print(json.dumps({name: find(strategy, settings) for name, settings in cases.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]) or None, json.loads(sys.argv[2]))
