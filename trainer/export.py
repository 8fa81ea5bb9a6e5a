"""The SavedModel that gets evaluated and served, and what is known of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import __version__, checksums, storage
from pipeline.command import InputError, log
from pipeline.dataset import IMAGE_SHAPE, NUM_PIXELS, Manifest
from pipeline.models import SUMS_FILE
from pipeline.records import SCALE_TABLE, weights_sha256
from trainer import run_folder
from trainer.checkpoints import Progress
from trainer.config import TrainConfig
from trainer.data import FEATURES
from trainer.fresh_check import compare, fresh_process
from trainer.warmup import WARMUP_FILE, requests

# (weights, float32 [n, 784]) -> logits float32 [n, C]
Apply = Callable[[Sequence[tf.Tensor], tf.Tensor], tf.Tensor]


class ServedModel(tf.Module):
    """The network with its pre- and postprocessing: raw images, or records, to probabilities.

    Attributes:
        weights: w, b, w, b, ... of its own, free of any replica.
    """

    def __init__(self, apply: Apply, weights: Sequence[np.ndarray]) -> None:
        super().__init__(name="served_model")
        self.weights = [tf.Variable(weight, name="wb"[i % 2]) for i, weight in enumerate(weights)]
        self._apply = apply
        # A look-up gives the very floats of the records; a division in a graph would not.
        self.scale_table = tf.constant(SCALE_TABLE)

    @tf.function(
        input_signature=[tf.TensorSpec([None, *IMAGE_SHAPE], tf.uint8, name="images")],
        autograph=False,
    )
    def serve_images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """uint8 [n, 28, 28, 1] -> classes int64 [n], probabilities float32 [n, C]."""
        scaled = tf.gather(self.scale_table, tf.cast(images, tf.int32))
        return self._answer(tf.reshape(scaled, [-1, NUM_PIXELS]))

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name="examples")], autograph=False
    )
    def serve_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialized records [n] -> the same as `serve_images` of their images."""
        features = {"image": FEATURES["image"]}
        return self._answer(tf.io.parse_example(examples, features)["image"])

    def _answer(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = probabilities_of(self._apply(self.weights, images))
        return {"classes": tf.argmax(probabilities, axis=-1), "probabilities": probabilities}


def probabilities_of(logits: tf.Tensor) -> tf.Tensor:
    """Logits of either loss as probabilities that sum to 1: [n, C].

    For independent sigmoids the odds that class k alone is right are p_k / (1 - p_k), which is
    exp(logit k): given that one class is, softmax again.
    """
    return tf.nn.softmax(logits)


def describe(
    weights: list[np.ndarray],
    config: TrainConfig,
    manifest: Manifest,
    progress: Progress,
    *,
    devices: list[str] | None = None,
    learned_from: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of ``model.json``.

    Args:
        weights: as exported.
        config: how they were trained.
        manifest: of the dataset.
        progress: where training ended.
        devices: on which.
        learned_from: what the model that it began from says under this name; see `warm_start`.
    """
    checksum = weights_sha256(weights)
    content = run_folder.describe(config, manifest.dataset_id, devices)
    settings = {field.name: content[field.name] for field in dataclasses.fields(config)}
    own = {"dataset_id": manifest.dataset_id, "splits": config.train_on.split("+")}
    return {
        "model_id": hashlib.sha256(
            json.dumps([checksum, manifest.dataset_id]).encode()
        ).hexdigest()[:32],
        "weights_sha256": checksum,
        "dataset_id": manifest.dataset_id,
        "learned_from": [*(each for each in learned_from if each != own), own],
        "preset": config.preset,
        "seed": config.seed,
        "config": settings,
        "devices": content["devices"],
        "epochs_trained": progress.epoch,
        "epoch_exported": progress.best_epoch or progress.epoch,
        "parameters": sum(weight.size for weight in weights),
        "dataset": {
            "source": manifest.source,
            "split_by": manifest.split_by,
            "class_names": list(manifest.class_names),
            "num_examples": {name: split.num_examples for name, split in manifest.splits.items()},
        },
        "versions": {
            "digits-pipeline": __version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "numpy": np.__version__,
        },
    }


def export(
    apply: Apply,
    weights: list[np.ndarray],
    description: dict[str, Any],
    places: run_folder.Places[Path],
    images: np.ndarray,
) -> None:
    """Publishes the folder that is evaluated and served; it appears whole, or not at all.

    Before it gets its name, a fresh process loads it and answers as the trainer does. A model
    of the same run with fewer epochs, or one that is damaged, is replaced.

    Args:
        apply: the network's function.
        weights: as evaluated.
        description: the content of ``model.json``.
        places: the run's; its ``metrics.jsonl`` goes along for the report.
        images: float32 [n, 784], scaled pixels to ask about.

    Raises:
        InputError: the run has diverged.
        ExportError: what was exported does not answer like what was trained.
    """
    if not all(np.isfinite(weight).all() for weight in weights):
        raise InputError("the weights are not finite; a smaller --learning_rate may help")
    again = run_folder.holds_model(places.model)
    with (
        storage.published_whole(places.model, replace=again, last=run_folder.MODEL_FILE) as staging,
        fresh_process() as fresh,
    ):
        expected = _save(apply, weights, staging, images)
        storage.write_atomic(staging / WARMUP_FILE, requests())
        shutil.copyfile(places.metrics, staging / run_folder.METRICS_FILE)
        text = json.dumps(description, indent=2) + "\n"
        storage.write_atomic(staging / run_folder.MODEL_FILE, text)
        noted = checksums.plain(checksums.sums(staging))
        storage.write_atomic(staging / SUMS_FILE, json.dumps(noted, indent=2) + "\n")
        began = time.monotonic()
        compare(fresh.ask(staging, images), weights, expected)
        log.info(
            "a fresh process answers %d images as the trainer does (%.1f s)",
            len(images),
            time.monotonic() - began,
        )


def _save(apply: Apply, weights: list[np.ndarray], folder: Path, images: np.ndarray) -> np.ndarray:
    """Writes the SavedModel; returns its probabilities of some images, float32 [n, C]."""
    with tf.device("CPU:0"):  # where most servers run
        served = ServedModel(apply, weights)
        expected: np.ndarray = probabilities_of(apply(served.weights, tf.constant(images))).numpy()
    signatures = {
        "serving_default": served.serve_images,
        "serve_examples": served.serve_examples,
    }
    tf.saved_model.save(served, str(folder), signatures=signatures)
    return expected
