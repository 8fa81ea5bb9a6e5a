"""Scores the records of a dataset with exported models, block by block."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipeline import command
from pipeline.command import InputError
from pipeline.dataset import IMAGE_SHAPE, Shard
from pipeline.metrics import Counts, count, zero_counts
from pipeline.records import read_records, unscale

if TYPE_CHECKING:
    import tensorflow as tf

# The last bits of a row's answer depend on the size of the batch it is in. Blocks are therefore
# cut by position in the shard and padded to one size: a report does not depend on the runner.
ROWS_PER_BLOCK = 500


class RecordBlock(NamedTuple):
    """Some records of one shard, in order: pixels uint8 [n, 784], labels int64 [n], n ids."""

    pixels: np.ndarray
    labels: np.ndarray
    ids: list[str]


def read_blocks(shard: Shard, directory: str) -> Iterator[RecordBlock]:
    """Reads a shard, checked against the manifest, and cuts it in blocks.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    records = read_records(Path(directory), shard)
    for first in range(0, len(records), ROWS_PER_BLOCK):
        rows = records[first : first + ROWS_PER_BLOCK]
        yield RecordBlock(
            pixels=unscale(np.stack([row.image for row in rows])),
            labels=np.array([row.label for row in rows], np.int64),
            ids=[row.id for row in rows],
        )


def load_description(model_dir: Path) -> dict[str, Any]:
    """Reads ``model.json`` of an exported model.

    Raises:
        InputError: the folder holds no exported model.
    """
    path = model_dir / "model.json"
    try:
        description = json.loads(path.read_text())
        description["model_id"]
    except OSError:
        raise InputError(f"{model_dir}: no model.json; expected the export of a run") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not the description of a model") from None
    if not (model_dir / "saved_model.pb").is_file():
        raise InputError(f"{model_dir}: no saved_model.pb; expected the export of a run")
    return description


class SavedModelHandler(ModelHandler):
    """Runs the default signature of a SavedModel on blocks of records.

    Each element is a block of its own batch already, so nothing is batched further.
    """

    def __init__(self, model_dir: Path, num_classes: int) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._model_dir = str(model_dir)
        self._num_classes = num_classes

    def load_model(self) -> tf.Module:
        """Loads the model, and keeps it whole: its signature alone would lose its variables."""
        with command.quiet_import():
            import tensorflow as tf
        return tf.saved_model.load(self._model_dir)

    def run_inference(
        self,
        batch: Sequence[RecordBlock],
        model: tf.Module,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterator[Counts]:
        """Yields the counts of each block.

        Raises:
            InputError: the model answers with another number of classes than the dataset has.
        """
        for block in batch:
            images = np.zeros((ROWS_PER_BLOCK, *IMAGE_SHAPE), np.uint8)
            images[: len(block.ids)] = block.pixels.reshape(-1, *IMAGE_SHAPE)
            answer = model.signatures["serving_default"](images=images)["probabilities"].numpy()
            if answer.shape[1] != self._num_classes:
                raise InputError(
                    f"{self._model_dir}: answers with {answer.shape[1]} classes, the dataset has"
                    f" {self._num_classes}"
                )
            yield count(block.labels, answer[: len(block.ids)], block.ids, block.pixels)

    def get_num_bytes(self, batch: Sequence[RecordBlock]) -> int:
        """The bytes of the images, for Beam's metrics."""
        return sum(block.pixels.nbytes for block in batch)


class MergeCounts(beam.CombineFn):
    """Adds up counts."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def create_accumulator(self) -> Counts:
        """No rows."""
        return zero_counts(self._num_classes)

    def add_input(self, accumulator: Counts, element: Counts) -> Counts:
        """One more block."""
        return accumulator + element

    def merge_accumulators(self, accumulators: Sequence[Counts]) -> Counts:
        """Several workers' sums."""
        return sum(accumulators, self.create_accumulator())

    def extract_output(self, accumulator: Counts) -> Counts:
        """All there is."""
        return accumulator


@dataclasses.dataclass(eq=False)
class ReadRecords(beam.PTransform):
    """Reads the records of some shards, a block at a time."""

    shards: Sequence[Shard]
    directory: Path

    def expand(self, root: beam.Pipeline) -> beam.PCollection[RecordBlock]:
        """Shards, spread over the workers -> RecordBlock."""
        return (
            root
            | "ListShards" >> beam.Create(list(self.shards))
            | "Spread" >> beam.Reshuffle()  # else one worker lists and reads them all
            | "Read" >> beam.FlatMap(read_blocks, str(self.directory))
            | "Count" >> beam.Map(_counted)
        )


def _counted(block: RecordBlock) -> RecordBlock:
    Metrics.counter("evaluate", "read").inc(len(block.ids))
    return block


@dataclasses.dataclass(eq=False)
class ScoreModel(beam.PTransform):
    """Scores every block with one model and merges the counts."""

    model_dir: Path
    num_classes: int

    def expand(self, blocks: beam.PCollection[RecordBlock]) -> beam.PCollection[Counts]:
        """RecordBlock -> one Counts."""
        return (
            blocks
            | "Predict" >> RunInference(SavedModelHandler(self.model_dir, self.num_classes))
            | "Merge" >> beam.CombineGlobally(MergeCounts(self.num_classes))
        )
