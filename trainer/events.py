"""Scalars and histograms for TensorBoard, written without its package, which only views them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.summary_pb2 import SummaryMetadata

NAMES = ("loss", "accuracy", "val_loss", "val_accuracy", "examples_per_second")
HISTOGRAM_BINS = 30
HISTOGRAMS = 50  # about so many over a run; each reads all weights


def _metadata(plugin: str) -> SummaryMetadata:
    """What the functions of `tf.summary` would add, if they did not ask for the package."""
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))


class EventWriter:
    """Writes the lines of ``metrics.jsonl``, and weights, as an event file."""

    def __init__(self, directory: Path) -> None:
        self._writer = tf.summary.create_file_writer(str(directory))

    def write(self, line: dict[str, Any], weights: Sequence[np.ndarray] | None = None) -> None:
        """Writes what is known after an epoch, at its step.

        Args:
            line: the epoch's numbers; null ones are left out.
            weights: if given, in the order w, b, w, b, ...: their histograms are named
                ``layer_0/w`` and so on.
        """
        with self._writer.as_default():
            for name in NAMES:
                if line[name] is not None:
                    value = tf.constant(line[name], tf.float32)
                    tf.summary.write(name, value, line["step"], _metadata("scalars"))
            for i, weight in enumerate(weights or ()):
                name = f"layer_{i // 2}/{'wb'[i % 2]}"
                tf.summary.write(name, histogram(weight), line["step"], _metadata("histograms"))
        self._writer.flush()

    @staticmethod
    def wants_histograms(epoch: int, epochs: int) -> bool:
        """Whether to write the weights after this epoch: every one, or some of a long run."""
        return epoch % -(-epochs // HISTOGRAMS) == 0 or epoch == epochs


def histogram(values: np.ndarray) -> np.ndarray:
    """Counts values in bins of equal width.

    Args:
        values: finite, of any shape, at least one.

    Returns:
        float64 [bins, 3]: left edge, right edge, count, as TensorBoard's plugin reads them.
    """
    counts, edges = np.histogram(values, HISTOGRAM_BINS)
    return np.stack([edges[:-1], edges[1:], counts], axis=-1).astype(np.float64)
