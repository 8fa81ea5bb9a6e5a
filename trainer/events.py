"""Scalars for TensorBoard, written without the tensorboard package, which only views them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.summary_pb2 import SummaryMetadata

NAMES = ("loss", "accuracy", "val_loss", "val_accuracy", "examples_per_second")


class EventWriter:
    """Writes the lines of ``metrics.jsonl`` as an event file."""

    def __init__(self, directory: Path) -> None:
        self._writer = tf.summary.create_file_writer(str(directory))
        # What `tf.summary.scalar` would add, if it did not ask for the package.
        self._metadata = SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="scalars")
        )

    def write(self, line: dict[str, Any]) -> None:
        """Writes one epoch's numbers at its step; null ones are left out."""
        with self._writer.as_default():
            for name in NAMES:
                if line[name] is not None:
                    value = tf.constant(line[name], tf.float32)
                    tf.summary.write(name, value, step=line["step"], metadata=self._metadata)
        self._writer.flush()
