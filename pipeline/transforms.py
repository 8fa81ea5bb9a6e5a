"""From the rows of a source to shards: pure functions first, PTransforms on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from pipeline import shards
from pipeline.command import InputError
from pipeline.dataset import SPLITS, id_bits, image_ids
from pipeline.sources import Block, RawRows, Source

# One row as it crosses the shuffle: the pixels unscaled, a quarter of the scaled size.
ROW = np.dtype([("split", "u1"), ("label", "u1"), ("id", "S32"), ("pixels", "u1", 784)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splitter:
    """Decides the split of each row.

    Attributes:
        by: "positional": the first `validation_size` rows of the train part are validation;
            "hash": a row of the train part is when the hash of its id falls below
            `validation_fraction`, so equal images stay together and a row never moves.
    """

    by: str
    validation_size: int = 0
    validation_fraction: float = 0.0

    def __call__(self, part: str, first: int, ids: list[str]) -> np.ndarray:
        """Returns uint8 [n], indices into `SPLITS`, for rows from position `first` of a part."""
        if part == "test":
            return np.full(len(ids), SPLITS.index("test"), np.uint8)
        if self.by == "positional":
            held_out = np.arange(first, first + len(ids)) < self.validation_size
        else:
            limit = self.validation_fraction * 2**32
            held_out = np.array([id_bits(name, 0, 32) < limit for name in ids], bool)
        return np.where(held_out, SPLITS.index("validation"), SPLITS.index("train")).astype(
            np.uint8
        )


def make_splitter(
    by: str, train_size: int, validation_size: int | None, validation_fraction: float | None
) -> Splitter:
    """Fills in what the user left open, and refuses what does not go together.

    The defaults are the tutorial's: 10,000 of 60,000 rows, or a sixth.

    Raises:
        InputError: a size for a split by hash, a fraction for a positional one, or a size
            that leaves nothing to train on.
    """
    if by == "hash":
        if validation_size is not None:
            raise InputError("--validation_size goes with --split_by positional, not hash")
        return Splitter(
            by=by, validation_fraction=1 / 6 if validation_fraction is None else validation_fraction
        )
    if validation_fraction is not None:
        raise InputError("--validation_fraction goes with --split_by hash, not positional")
    if validation_size is None:
        validation_size = 10_000 if train_size >= 60_000 else train_size // 6
    if validation_size >= train_size:
        raise InputError(
            f"--validation_size {validation_size}: expected less than train's {train_size} rows"
        )
    return Splitter(by=by, validation_size=validation_size)


def shard_rows(rows: RawRows, splitter: Splitter, num_shards: int) -> Iterator[tuple[int, bytes]]:
    """Yields (shard, its rows packed as `ROW`): shard = 64 bits of the id modulo `num_shards`.

    All copies of an image meet in one shard number, whichever split they are in.
    """
    ids = image_ids(rows.pixels)
    packed = np.zeros(len(ids), ROW)
    packed["split"] = splitter(rows.part, rows.first, ids)
    packed["label"] = rows.labels
    packed["id"] = ids
    packed["pixels"] = rows.pixels
    shard = np.array([id_bits(name, 64, 64) % num_shards for name in ids])
    for index in np.unique(shard):
        yield int(index), packed[shard == index].tobytes()


@dataclasses.dataclass(eq=False)
class ReadRows(beam.PTransform):
    """Reads the blocks of a source on the workers."""

    source: Source

    def expand(self, root: beam.Pipeline) -> beam.PCollection[RawRows]:
        """Blocks, spread over the workers -> RawRows."""
        return (
            root
            | "ListBlocks" >> beam.Create(self.source.blocks())
            # Each block is little to list and much to read: without this break, the step that
            # lists them all would also read them all, on one worker.
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_Read(self.source)).with_output_types(RawRows)
        )


class _Read(beam.DoFn):
    def __init__(self, source: Source) -> None:
        self._source = source
        self._counters = {
            part: Metrics.counter("preprocess", f"read-{part}") for part in source.part_sizes
        }

    def process(self, block: Block) -> Iterator[RawRows]:
        for rows in self._source.read(Block(*block)):
            self._counters[rows.part].inc(len(rows.labels))
            yield rows


@dataclasses.dataclass(eq=False)
class WriteShards(beam.PTransform):
    """Splits rows, brings those of one shard number together and writes its files."""

    splitter: Splitter
    num_shards: int
    directory: Path

    def expand(self, rows: beam.PCollection[RawRows]) -> beam.PCollection[shards.WrittenShards]:
        """RawRows -> one WrittenShards for every shard number."""
        every_shard = rows.pipeline | "EveryShard" >> beam.Create(
            [(index, b"") for index in range(self.num_shards)]
        ).with_output_types(tuple[int, bytes])
        keyed = rows | "Shard" >> beam.FlatMap(
            shard_rows, self.splitter, self.num_shards
        ).with_output_types(tuple[int, bytes])
        return (
            (keyed, every_shard)  # so that a shard number without rows still has its files
            | "Flatten" >> beam.Flatten()
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.Map(_write_shard, self.num_shards, str(self.directory))
        )


def _write_shard(
    keyed: tuple[int, Iterable[bytes]], num_shards: int, directory: str
) -> shards.WrittenShards:
    index, packed = keyed
    rows = np.frombuffer(b"".join(packed), ROW)
    written = shards.write(rows, index, num_shards, Path(directory))
    for split, shard in written.shards.items():
        Metrics.counter("preprocess", f"written-{split}").inc(shard.num_examples)
        Metrics.counter("preprocess", "written-bytes").inc(shard.bytes)
    return written
