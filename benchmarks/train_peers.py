"""The contestants of `benchmarks.train`: each gives a function that trains one epoch.

All start from the weights that this trainer draws, take the same batches in the same order, and
give the mean loss of the epoch, which shows that they do the same arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config import PRESETS, TrainConfig

# The number of an epoch -> its mean loss; None where that cannot be compared
Epoch = Callable[[int], float | None]
CORE = dataclasses.replace(PRESETS["core"], schedule="constant")  # as the peers have it
BATCH = CORE.batch_size
DEFORMED = {
    name: getattr(PRESETS["accurate"], name)
    for name in ("rotate", "scale", "shear", "shift", "elastic_alpha", "elastic_sigma")
}


class Work(NamedTuple):
    """What is trained: images float32 [n, 784], labels int64 [n], and the hidden widths."""

    images: np.ndarray
    labels: np.ndarray
    hidden: tuple[int, ...] = CORE.hidden_units


def make_work(examples: int, hidden: tuple[int, ...] = CORE.hidden_units) -> Work:
    """Random images, which the time does not depend on, of classes that can be learned."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (examples, 784), np.uint8) / np.float32(255)
    answers = (images - np.float32(0.5)) @ random.standard_normal((784, 10), np.float32)
    return Work(images, answers.argmax(axis=1), hidden)


def batches(work: Work, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an epoch's steps, and which of them count."""
    from trainer import data

    return data.cut(data.epoch_order(CORE.seed, number, len(work.labels)), BATCH)


def first_weights(work: Work) -> list[np.ndarray]:
    """The weights that every contestant begins with."""
    from trainer.model import MLP

    return [weight.numpy() for weight in MLP(784, work.hidden, 10, seed=CORE.seed).weights]


def ours(strategy: Any, work: Work, *, dataset: Path | None = None, **settings: Any) -> Epoch:
    """This trainer's epoch, as `trainer.loop` runs it; streamed where a dataset is given."""
    from pipeline.dataset import load_manifest
    from trainer import data, sources, step
    from trainer.deform import make_deform
    from trainer.model import MLP
    from trainer.optimizers import make_update

    config: TrainConfig = dataclasses.replace(CORE, hidden_units=work.hidden, **settings)
    source: sources.Source
    if dataset:
        manifest = load_manifest(dataset)
        source = sources.open_source(dataset, manifest, "train", config.seed, config.input)
    else:
        source = sources.Resident(data.Examples(work.images, work.labels), config.seed)
    with strategy.scope():
        model = MLP(784, work.hidden, 10, seed=config.seed)
        update = make_update(config, model.weights, -(-source.size // config.batch_size))
    deform = make_deform(config)
    run = step.make_train_steps(strategy, model, update, source, config, deform=deform)

    def epoch(number: int) -> float | None:
        indices, mask = data.cut(source.order(number), config.batch_size)
        total = 0.0
        for first in range(0, len(indices), config.steps_per_call):
            steps = slice(first, first + config.steps_per_call)
            total += run(indices[steps], mask[steps], number).loss
        return None if dataset or deform else total / source.size

    return epoch


def keras(work: Work, **options: Any) -> Epoch:
    """Keras `fit`."""
    import tensorflow as tf

    from trainer import data

    dense = tf.keras.layers.Dense
    hidden = [dense(width, activation="relu") for width in work.hidden]
    model = tf.keras.Sequential([tf.keras.Input((784,)), *hidden, dense(10)])
    model.set_weights(first_weights(work))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **options)

    def epoch(number: int) -> float:
        rows = data.epoch_order(CORE.seed, number, len(work.labels))
        images, labels = work.images[rows], work.labels[rows]
        done = model.fit(images, labels, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
        return done.history["loss"][0]

    return epoch


def jax(work: Work) -> Epoch | None:
    """JAX, the whole epoch in one compiled scan; None where it is not installed."""
    if importlib.util.find_spec("jax") is None:
        return None
    import jax
    import jax.numpy as jnp

    images, labels = jnp.asarray(work.images), jnp.asarray(work.labels)

    def loss(weights, x, y, mask):  # type: ignore[no-untyped-def]
        for w, b in zip(weights[0:-2:2], weights[1:-2:2], strict=True):
            x = jnp.maximum(x @ w + b, 0)
        logits = x @ weights[-2] + weights[-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
        total, right = -(picked * mask).sum(), ((logits.argmax(-1) == y) * mask).sum()
        return total / mask.sum(), (total, right)

    def step(state, batch):  # type: ignore[no-untyped-def]
        weights, means, squares, t = state
        rows, mask = batch
        found, sums = jax.grad(loss, has_aux=True)(weights, images[rows], labels[rows], mask)
        t += 1
        means = [0.9 * m + 0.1 * g for m, g in zip(means, found, strict=True)]
        squares = [0.999 * v + 0.001 * g * g for v, g in zip(squares, found, strict=True)]
        rate, root = 1e-3 / (1 - 0.9**t), jax.lax.rsqrt(1 - 0.999**t)  # as `optimizers.adam`
        weights = [
            w - rate * m / (root * jnp.sqrt(v) + 1e-7)
            for w, m, v in zip(weights, means, squares, strict=True)
        ]
        return (weights, means, squares, t), sums

    @jax.jit
    def run(state, rows, mask):  # type: ignore[no-untyped-def]
        state, (losses, right) = jax.lax.scan(step, state, (rows, mask))
        return state, losses.sum(), right.sum()

    weights = [jnp.asarray(w) for w in first_weights(work)]
    zeros = [jnp.zeros_like(w) for w in weights]
    state = [(weights, zeros, zeros, jnp.float32(0))]

    def epoch(number: int) -> float:
        state[0], total, _ = run(state[0], *batches(work, number))
        return float(total) / len(work.labels)

    return epoch


def torch(work: Work) -> Epoch | None:
    """PyTorch, eager, with its fused Adam; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    images, labels = torch.from_numpy(work.images), torch.from_numpy(work.labels)
    widths = [784, *work.hidden, 10]
    dense = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    values = first_weights(work)
    for layer, w, b in zip(dense, values[0::2], values[1::2], strict=True):
        layer.weight.data, layer.bias.data = torch.tensor(w.T), torch.tensor(b)
    hidden = [part for layer in dense[:-1] for part in (layer, torch.nn.ReLU())]
    model = torch.nn.Sequential(*hidden, dense[-1])
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7, fused=True)

    def epoch(number: int) -> float:
        total = 0.0
        for rows, mask in zip(*batches(work, number), strict=True):
            chosen = torch.from_numpy(rows[mask == 1].astype(np.int64))
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            adam.step()
            total += loss.detach() * len(chosen)
        return float(total) / len(work.labels)

    return epoch


def tutorial(work: Work) -> Epoch:
    """The Core-API tutorial's way: an eager step for each batch, Adam a loop in Python."""
    import tensorflow as tf

    weights = [tf.Variable(w) for w in first_weights(work)]
    means = [tf.Variable(tf.zeros(w.shape)) for w in weights]
    squares = [tf.Variable(tf.zeros(w.shape)) for w in weights]
    steps = [0.0]

    def train_step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            for w, b in zip(weights[0:-2:2], weights[1:-2:2], strict=True):
                x = tf.nn.relu(x @ w + b)
            logits = x @ weights[-2] + weights[-1]
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            )
        steps[0] += 1
        found = tape.gradient(loss, weights)
        for w, g, m, v in zip(weights, found, means, squares, strict=True):
            m.assign(0.9 * m + 0.1 * g)
            v.assign(0.999 * v + 0.001 * g * g)
            m_hat, v_hat = m / (1 - 0.9 ** steps[0]), v / (1 - 0.999 ** steps[0])
            w.assign_sub(1e-3 * m_hat / (tf.sqrt(v_hat) + 1e-7))
        return loss

    def epoch(number: int) -> float:
        total = 0.0
        for rows, mask in zip(*batches(work, number), strict=True):
            chosen = rows[mask == 1]
            x, y = tf.constant(work.images[chosen]), tf.constant(work.labels[chosen])
            total += float(train_step(x, y)) * len(chosen)
        return total / len(work.labels)

    return epoch


def products(work: Work) -> Epoch:
    """The matrix products of an epoch, forward and backward, and nothing else."""
    import tensorflow as tf

    steps = -(-len(work.labels) // BATCH)
    weights = first_weights(work)[0::2]

    @tf.function(jit_compile=True)
    def run(x, weights):  # type: ignore[no-untyped-def]
        def step(i, x, kept):  # type: ignore[no-untyped-def]
            inputs = [x]
            for w in weights:
                inputs.append(inputs[-1] @ w)
            flow = inputs.pop()
            used = kept
            for j in reversed(range(len(weights))):
                used += tf.matmul(inputs[j], flow, transpose_a=True)[0, 0]
                if j:
                    flow = tf.matmul(flow, weights[j], transpose_b=True)
            # What comes out goes in again, lest the compiler leave work out.
            return i + 1, x + 1e-30 * used, used

        start = (tf.constant(0), x, tf.constant(0.0))
        return tf.while_loop(lambda i, *_: i < steps, step, start)[2]

    def epoch(number: int) -> None:
        float(run(work.images[:BATCH], weights))

    return epoch
