"""Seconds of one epoch: this trainer under MirroredStrategy, one replica, beside Keras `fit`.

python -m benchmarks.train

The work is that of preset `core`: 784-700-500-10, Adam, float32, batches of 128, 50,000 images
already in memory. The contestants take turns, an epoch each; the first turn, with tracing and
compiling, is not counted. What matters is the ratio: the seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from pipeline import command


def ours(images: np.ndarray, labels: np.ndarray) -> Callable[[int], None]:
    """This trainer's epoch, as `trainer.loop` runs it."""
    from trainer import data, step, strategy
    from trainer.config import PRESETS
    from trainer.model import MLP
    from trainer.optimizers import Adam

    config = PRESETS["core"]
    mirrored = strategy.make_strategy(1)
    with mirrored.scope():
        model = MLP(784, config.hidden_units, 10, seed=config.seed)
        optimizer = Adam(model.weights)
    examples = data.Examples(images, labels)
    run = step.make_train_steps(mirrored, model, optimizer, examples, config.batch_size)

    def epoch(number: int) -> None:
        order = data.epoch_order(config.seed, number, len(labels))
        batches = data.cut(order, config.batch_size)
        for first in range(0, len(batches.indices), config.steps_per_call):
            steps = slice(first, first + config.steps_per_call)
            float(run(batches.indices[steps], batches.mask[steps]).loss)

    return epoch


def keras(images: np.ndarray, labels: np.ndarray, **options: object) -> Callable[[int], None]:
    """An epoch of Keras `fit` on the same network."""
    import tensorflow as tf

    model = tf.keras.Sequential(
        [
            tf.keras.layers.Dense(700, activation="relu"),
            tf.keras.layers.Dense(500, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **options)
    return lambda _: model.fit(images, labels, batch_size=128, epochs=1, verbose=0)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="epochs counted of each")
    rounds = parser.parse_args().rounds
    with command.quiet_import():
        import tensorflow as tf  # noqa: F401
    random = np.random.default_rng(0)
    images = random.random((50_000, 784), np.float32)
    labels = random.integers(0, 10, 50_000)
    contestants = {
        "this trainer": ours(images, labels),
        "Keras fit": keras(images, labels),
        "Keras fit, jit, 39 steps a call": keras(
            images, labels, jit_compile=True, steps_per_execution=39
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, epoch in contestants.items():
            started = time.perf_counter()
            epoch(number)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    print(f"{'':33} {'s/epoch':>8} {'first':>7} {'ratio':>6}")
    for name, median in medians.items():
        ratio = median / medians["this trainer"]
        print(f"{name:33} {median:8.2f} {seconds[name][0]:7.2f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
