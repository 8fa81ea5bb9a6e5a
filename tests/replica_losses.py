"""Trains a tiny network on N logical CPU replicas and prints what came of it as JSON.

A process of its own, because one process can make logical devices and a strategy only once:

    python tests/replica_losses.py N
"""

import json
import sys

import numpy as np

from trainer.data import Examples, cut, epoch_order
from trainer.model import MLP
from trainer.optimizers import Adam
from trainer.step import make_evaluate, make_train_steps, place
from trainer.strategy import make_strategy

INPUTS, HIDDEN, CLASSES = 6, (7, 5), 3
ROWS, BATCH_SIZE, EPOCHS = 50, 16, 3  # 4 steps an epoch, the last of 2 rows
CALLS = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5), slice(5, 12)]
EVALUATION_BATCH = 8
SEED = 22
ADAM = {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}


def problem():
    """The examples, and their batches over all epochs."""
    random = np.random.default_rng(5)
    images = random.standard_normal((ROWS, INPUTS)).astype(np.float32)
    labels = (images @ random.standard_normal((INPUTS, CLASSES))).argmax(axis=-1)
    batches = [cut(epoch_order(SEED, epoch, ROWS), BATCH_SIZE) for epoch in range(EPOCHS)]
    indices, mask = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Examples(images, labels.astype(np.int64)), indices, mask


def main(replicas):
    strategy = make_strategy(replicas)
    examples, indices, mask = problem()

    with strategy.scope():
        model = MLP(INPUTS, HIDDEN, CLASSES, seed=SEED)
        optimizer = Adam(model.weights, **ADAM)
    train = make_train_steps(strategy, model, optimizer, examples, BATCH_SIZE)
    evaluate = make_evaluate(strategy, model, examples, EVALUATION_BATCH)

    def copies(variables):
        """[replica][variable], as nested lists."""
        return [
            [strategy.experimental_local_results(v)[i].numpy().tolist() for v in variables]
            for i in range(replicas)
        ]

    def floats(sums):
        return [float(sums.loss), int(sums.correct)]

    initial = copies(model.weights)
    calls = [floats(train(indices[steps], mask[steps])) for steps in CALLS]
    placed = [
        strategy.experimental_local_results(values)[i].device.rsplit(":", 2)[-2:]
        for values in place(strategy, examples)
        for i in range(replicas)
    ]
    result = {
        "placed": placed,
        "replicas": strategy.num_replicas_in_sync,
        "initial": initial,
        "calls": calls,
        "weights": copies(model.weights),
        "slots": copies([*optimizer.m, *optimizer.v, optimizer.iterations]),
        "evaluation": floats(evaluate(*cut(np.arange(ROWS), EVALUATION_BATCH))),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]))
