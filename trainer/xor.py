"""The smallest example of it all: a network of 17 weights learns XOR, from ten seeds.

python -m trainer.task --preset xor

No line and so no single layer parts the points where exactly one input is 1 from the others: the
hidden layer has to find features of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from pipeline import command
from trainer.config import TrainConfig
from trainer.gradients import make_gradients
from trainer.losses import sigmoid
from trainer.model import MLP
from trainer.optimizers import Update, UpdateState, make_update

POINTS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
ANSWERS = np.array([[0], [1], [1], [0]], np.float32)
SEEDS = 10
FAILED = 1  # exit code
CLOSE = 0.1  # an output is learned when it is nearer than this to its answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one seed came to.

    Attributes:
        seed: of the initial weights.
        outputs: float32 [4], the probability of 1 for each of `POINTS`.
        loss: the mean cross-entropy, in nats, before the last step.
    """

    seed: int
    outputs: np.ndarray
    loss: float

    @property
    def learned(self) -> bool:
        """Whether every output is close to its answer; never where one is NaN."""
        return bool(np.all(np.abs(self.outputs - ANSWERS[:, 0]) < CLOSE))


def build(config: TrainConfig) -> tuple[MLP, Update]:
    """The network and its update as they stand at first."""
    model = MLP(
        POINTS.shape[1],
        config.hidden_units,
        ANSWERS.shape[1],
        activation=config.activation,
        initializer=config.initializer,
        seed=config.seed,
    )
    return model, make_update(config, model.weights, steps_per_epoch=1)


# (weights, state, seed of dropout) -> weights and state after all epochs, the last sum of losses
Training = Callable[
    [Sequence[tf.Tensor], UpdateState, tf.Tensor], tuple[list[tf.Tensor], UpdateState, tf.Tensor]
]


def make_training(config: TrainConfig) -> Training:
    """Compiles a whole training; being pure, it serves every seed."""
    model, update = build(config)
    gradients = make_gradients(config, model)
    everyone, count = tf.ones(len(POINTS)), tf.constant(float(len(POINTS)))

    @tf.function(jit_compile=True)
    def training(weights, state, seed):  # type: ignore[no-untyped-def]
        loss = tf.constant(0.0)
        for step in tf.range(config.epochs):
            key = tf.stack([step, seed])
            found, sums = gradients(
                weights, tf.constant(POINTS), tf.constant(ANSWERS), everyone, count, key
            )
            weights, state = update.update(weights, found, state)
            loss = sums.loss
        return weights, state, loss

    return training


def train(config: TrainConfig, training: Training) -> Result:
    """Trains one network from one seed."""
    model, update = build(config)
    weights, state, loss = training(
        [tf.identity(w) for w in model.weights], update.state, tf.constant(config.seed)
    )
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)
    update.assign(state)
    outputs = sigmoid(model.apply(update.evaluated(model.weights), POINTS))
    return Result(seed=config.seed, outputs=outputs.numpy()[:, 0], loss=float(loss) / len(POINTS))


def table(results: Sequence[Result]) -> str:
    """The outputs of every seed, and which learned."""
    rows = [["seed", *(f"{x:.0f} xor {y:.0f}" for x, y in POINTS), "loss", "learned"]]
    for result in results:
        outputs = [f"{output:.4f}" for output in result.outputs]
        answer = "yes" if result.learned else "no"
        rows.append([f"{result.seed:10}", *outputs, f"{result.loss:.6f}", answer])
    lines = command.aligned(rows, left=[len(rows[0]) - 1])
    failed = [str(result.seed) for result in results if not result.learned]
    lines.append(f"{len(results) - len(failed)} of {len(results)} seeds learned XOR")
    if failed:
        lines[-1] += f"; not {', '.join(failed)}"
    return "\n".join(lines)


def execute(config: TrainConfig) -> int:
    """Trains from ten seeds, the config's and those after it; returns an exit code."""
    training = make_training(config)
    seeds = [(config.seed + i) % 2**31 for i in range(SEEDS)]
    results = [train(dataclasses.replace(config, seed=seed), training) for seed in seeds]
    print(table(results))
    return command.DONE if all(result.learned for result in results) else FAILED
