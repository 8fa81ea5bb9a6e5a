"""Scores the records of a dataset with exported models, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler

from pipeline import cache, checksums, command, models
from pipeline.arrays import read_arrays
from pipeline.command import InputError
from pipeline.dataset import IMAGE_SHAPE, Shard
from pipeline.models import OUTPUT, SIGNATURE, other_classes
from pipeline.records import weights_sha256
from pipeline.storage import Place, place
from pipeline.tally import RecordBlock, ScoredBlock, Tally, tally, zero_tally
from pipeline.versions import VERSION_FILE, parse_version

# The last bits of a row's answer depend on the size of the batch it is in. Blocks are therefore
# cut by position in the shard and padded to one size: a report does not depend on the runner.
ROWS_PER_BLOCK = 500


def read_blocks(numbered: tuple[int, Shard], directory: str) -> Iterator[RecordBlock]:
    """Reads a shard, checked against the manifest, and cuts it in blocks.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    number, shard = numbered
    pixels, labels, ids = read_arrays(place(directory), shard)
    for first in range(0, len(ids), ROWS_PER_BLOCK):
        rows = slice(first, first + ROWS_PER_BLOCK)
        yield RecordBlock(number, first, pixels[rows], labels[rows], ids[rows])


def load_checked(folder: Place) -> Any:
    """Loads an exported model, held to what its folder says of its files and weights.

    Raises:
        InputError: it is damaged, or is not the model that its description names.
    """
    with command.quiet_import():
        import tensorflow as tf
    with cache.local(folder) as directory:
        _require_as_published(folder, directory)
        try:
            model = tf.saved_model.load(str(directory))
        # IndexError is what a file of weights that was cut short comes to.
        except (OSError, ValueError, LookupError, tf.errors.OpError) as error:
            said = str(error).splitlines()[0].replace(str(directory), str(folder))
            raise InputError(f"{folder}: cannot be loaded as a SavedModel: {said}") from None
        signature = model.signatures.get(SIGNATURE)
        if signature is None or OUTPUT not in signature.structured_outputs:
            raise InputError(f"{folder}: expected a SavedModel whose {SIGNATURE} gives {OUTPUT}")
        # A model from elsewhere may say nothing of itself, or keep its weights in another way.
        says = directory / models.MODEL_FILE
        noted = models.load_description(directory).get("weights_sha256") if says.is_file() else None
    weights = getattr(model, "weights", None)
    if isinstance(noted, str) and isinstance(weights, Sequence):
        found = weights_sha256([weight.numpy() for weight in weights])
        if found != noted:
            raise InputError(f"{folder}: its weights are not those that its {says.name} names")
    return model


def _require_as_published(folder: Place, directory: Path) -> None:
    """Compares a promoted model with what was noted of its files.

    Args:
        folder: as the user names it.
        directory: where its files are here.

    Raises:
        InputError: one is missing, or has another size or checksum.
    """
    try:
        noted = parse_version((directory / VERSION_FILE).read_text())
    except FileNotFoundError:
        return  # the export of a run
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / VERSION_FILE}: cannot be read as a version: {error}") from None
    problems = checksums.deep_damage(directory, noted.files, besides=[VERSION_FILE])
    if problems:
        raise InputError(problems[0].replace(str(directory), str(folder)))


class Loaded(list):
    """Loaded models. Beam holds them by a weak reference, which a plain list cannot have."""


class SavedModelsHandler(ModelHandler):
    """Runs the default signature of some SavedModels on the same blocks of records.

    Each element is a block of its own batch already, so nothing is batched further.
    """

    def __init__(self, model_dirs: Sequence[Place], num_classes: int) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._model_dirs = [str(folder) for folder in model_dirs]
        self._num_classes = num_classes

    def load_model(self) -> Loaded:
        """Loads the models, and keeps them whole: a signature alone would lose its variables.

        Raises:
            InputError: one cannot be loaded.
        """
        return Loaded(load_checked(place(folder)) for folder in self._model_dirs)

    def run_inference(
        self,
        batch: Sequence[RecordBlock],
        model: Loaded,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterator[ScoredBlock]:
        """Yields each block with the answers of all models.

        Raises:
            InputError: a model answers with another number of classes than the dataset has, or
                with what are no probabilities.
        """
        for block in batch:
            images = np.zeros((ROWS_PER_BLOCK, *IMAGE_SHAPE), np.uint8)
            images[: len(block.ids)] = block.pixels.reshape(-1, *IMAGE_SHAPE)
            answers = (each.signatures[SIGNATURE](images=images)[OUTPUT].numpy() for each in model)
            yield ScoredBlock(
                block,
                tuple(
                    self._checked(folder, answer)[: len(block.ids)]
                    for folder, answer in zip(self._model_dirs, answers, strict=True)
                ),
            )

    def _checked(self, folder: str, answer: np.ndarray) -> np.ndarray:
        if answer.ndim != 2:
            raise InputError(f"{folder}: answers with {answer.ndim} dimensions, expected 2")
        if answer.shape[1] != self._num_classes:
            raise other_classes(folder, answer.shape[1], self._num_classes)
        if not ((answer >= 0) & (answer <= 1)).all():  # nor NaN
            raise InputError(f"{folder}: answers with what are no probabilities, from 0 to 1")
        return answer

    def get_num_bytes(self, batch: Sequence[RecordBlock]) -> int:
        """The bytes of the images, for Beam's metrics."""
        return sum(block.pixels.nbytes for block in batch)


class AddUp(beam.CombineFn):
    """Adds up scored blocks."""

    def __init__(self, num_classes: int, num_models: int) -> None:
        self._sizes = num_classes, num_models

    def create_accumulator(self) -> Tally:
        """No rows."""
        return zero_tally(*self._sizes)

    def add_input(self, accumulator: Tally, element: ScoredBlock) -> Tally:
        """One more block."""
        return accumulator + tally(element)

    def merge_accumulators(self, accumulators: Sequence[Tally]) -> Tally:
        """Several workers' sums."""
        return sum(accumulators, self.create_accumulator())

    def extract_output(self, accumulator: Tally) -> Tally:
        """All there is."""
        return accumulator


@dataclasses.dataclass(eq=False)
class ReadRecords(beam.PTransform):
    """Reads the records of some shards, a block at a time."""

    shards: Sequence[Shard]
    directory: Place

    def expand(self, root: beam.Pipeline) -> beam.PCollection[RecordBlock]:
        """Shards, spread over the workers -> RecordBlock."""
        return (
            root
            | "ListShards" >> beam.Create(list(enumerate(self.shards)))
            | "Spread" >> beam.Reshuffle()  # else one worker lists and reads them all
            | "Read" >> beam.FlatMap(read_blocks, str(self.directory))
            | "Count" >> beam.Map(_counted)
        )


def _counted(block: RecordBlock) -> RecordBlock:
    Metrics.counter("evaluate", "read").inc(len(block.ids))
    return block
