"""The SavedModel that gets evaluated and served, and what is known of it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import __version__, storage
from pipeline.command import InputError
from pipeline.dataset import IMAGE_SHAPE, NUM_PIXELS, SCALE_TABLE
from trainer.config import TrainConfig
from trainer.data import FEATURES
from trainer.model import MLP

MODEL_FILE = "model.json"
METRICS_FILE = "metrics.jsonl"


class ServedModel(tf.Module):
    """The network with its pre- and postprocessing: raw images, or records, to probabilities."""

    def __init__(self, model: MLP) -> None:
        super().__init__(name="served_model")
        self.model = model
        # A look-up gives the very floats of the records; a division in a graph would not.
        self.scale_table = tf.constant(SCALE_TABLE)

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE_SHAPE], tf.uint8, name="images")])
    def serve_images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """uint8 [n, 28, 28, 1] -> classes int64 [n], probabilities float32 [n, C]."""
        scaled = tf.gather(self.scale_table, tf.cast(images, tf.int32))
        return self._answer(tf.reshape(scaled, [-1, NUM_PIXELS]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialized records [n] -> the same as `serve_images` of their images."""
        features = {"image": FEATURES["image"]}
        return self._answer(tf.io.parse_example(examples, features)["image"])

    def _answer(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = tf.nn.softmax(self.model(images))
        return {"classes": tf.argmax(probabilities, axis=-1), "probabilities": probabilities}


def weights_sha256(weights: list[np.ndarray]) -> str:
    """Hashes weights, layer by layer: shape, then float32 little-endian bytes."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(repr(weight.shape).encode())
        digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()


def describe(weights: list[np.ndarray], config: TrainConfig, dataset_id: str) -> dict[str, Any]:
    """The content of ``model.json``."""
    checksum = weights_sha256(weights)
    identity = json.dumps([checksum, dataset_id])
    return {
        "model_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "weights_sha256": checksum,
        "dataset_id": dataset_id,
        "preset": config.preset,
        "seed": config.seed,
        "versions": {
            "digits-pipeline": __version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "numpy": np.__version__,
        },
    }


def export(
    model: MLP, config: TrainConfig, dataset_id: str, metrics: Path, final: Path
) -> dict[str, Any]:
    """Publishes the folder that is evaluated and served; it appears whole, or not at all.

    Args:
        model: the trained network; its weights are copied out of its replicas.
        config: how it was trained.
        dataset_id: on what.
        metrics: the run's ``metrics.jsonl``, which goes along for the report.
        final: the folder.

    Returns:
        The content of ``model.json``.

    Raises:
        InputError: the run has diverged.
    """
    weights = [weight.numpy() for weight in model.weights]
    if not all(np.isfinite(weight).all() for weight in weights):
        raise InputError("the weights are not finite; a smaller --learning_rate may help")
    widths = [weight.shape for weight in weights[0::2]]
    with tf.device("CPU:0"):  # where most servers run, and free of any replica
        plain = MLP(widths[0][0], [shape[1] for shape in widths[:-1]], widths[-1][1], seed=0)
        for variable, value in zip(plain.weights, weights, strict=True):
            variable.assign(value)
        served = ServedModel(plain)
    description = describe(weights, config, dataset_id)
    with storage.published_whole(final) as staging:
        tf.saved_model.save(
            served,
            str(staging),
            signatures={
                "serving_default": served.serve_images,
                "serve_examples": served.serve_examples,
            },
        )
        shutil.copyfile(metrics, staging / METRICS_FILE)
        storage.write_atomic(staging / MODEL_FILE, json.dumps(description, indent=2) + "\n")
    return description
