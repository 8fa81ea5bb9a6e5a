"""From the rows of a source to shards: pure functions first, PTransforms on top."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import zstandard
from apache_beam.metrics import Metrics

from pipeline import shards
from pipeline.command import InputError
from pipeline.dataset import QUARANTINE_NAME, SPLITS, digest_bits, image_digests, image_ids
from pipeline.sources import Block, RawRows, Source
from pipeline.storage import write_atomic

NAMESPACE = "preprocess"

# One row as it crosses the shuffle: the pixels unscaled, a quarter of the scaled size.
ROW = np.dtype([("split", "u1"), ("label", "u1"), ("id", "u8", 2), ("pixels", "u1", 784)])


# Validation


class Quarantined(NamedTuple):
    """A row set aside: its id, the reason, where it came from (a relative name), its part."""

    id: str
    reason: str
    origin: str
    part: str


def validate(rows: RawRows, num_classes: int) -> tuple[RawRows, list[Quarantined]]:
    """Parts rows that can be written from those that cannot.

    Images are checked by their source, where they are decoded; what is left is the label.
    """
    good = (rows.labels >= 0) & (rows.labels < num_classes)
    bad = np.flatnonzero(~good)
    set_aside = [
        Quarantined(name, "label out of range", rows.origins[index], rows.part)
        for index, name in zip(bad.tolist(), image_ids(rows.pixels[bad]), strict=True)
    ]
    set_aside += [Quarantined(f.id, f.reason, f.origin, rows.part) for f in rows.faults]
    kept = rows._replace(
        positions=rows.positions[good],
        pixels=rows.pixels[good],
        labels=rows.labels[good],
        origins=(),
        faults=(),
    )
    return kept, set_aside


# Splits


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

    def __call__(self, part: str, positions: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Decides for rows of one part.

        Args:
            part: "train" or "test".
            positions: int64 [n], where they stand in the part.
            digests: their `image_digests`.

        Returns:
            uint8 [n], indices into `SPLITS`.
        """
        if part == "test":
            return np.full(len(positions), SPLITS.index("test"), np.uint8)
        if self.by == "positional":
            held_out = positions < self.validation_size
        else:
            held_out = digest_bits(digests, 0, 32) < self.validation_fraction * 2**32
        return np.where(held_out, SPLITS.index("validation"), SPLITS.index("train")).astype(
            np.uint8
        )


def make_splitter(
    by: str, source: Source, validation_size: int | None, validation_fraction: float | None
) -> Splitter:
    """Fills in what the user left open, and refuses what does not go together.

    The defaults are the tutorial's: 10,000 of 60,000 rows, or a sixth.

    Raises:
        InputError: a size for a split by hash, a fraction for a positional one, a size that
            leaves nothing to train on, or positions where they mean nothing.
    """
    if by == "hash":
        if validation_size is not None:
            raise InputError("--validation_size goes with --split_by positional, not hash")
        fraction = 1 / 6 if validation_fraction is None else validation_fraction
        return Splitter(by=by, validation_fraction=fraction)
    if validation_fraction is not None:
        raise InputError("--validation_fraction goes with --split_by hash, not positional")
    if not source.has_order:
        raise InputError(
            "--split_by positional: image files stand in the order of their classes, so the first"
            " would all be of one class; expected hash"
        )
    train_size = source.part_sizes["train"]
    if validation_size is None:
        validation_size = 10_000 if train_size >= 60_000 else train_size // 6
    if validation_size and validation_size >= train_size:
        raise InputError(
            f"--validation_size {validation_size}: expected less than train's {train_size} rows"
        )
    return Splitter(by=by, validation_size=validation_size)


# The shuffle


def pack(rows: RawRows, splitter: Splitter, num_shards: int) -> Iterator[tuple[int, bytes]]:
    """Yields (shard number, its rows as `pack_rows` gives them).

    The shard number is 64 bits of the id modulo `num_shards`: all copies of an image meet in
    one, whichever split they are in.
    """
    digests = image_digests(rows.pixels)
    table = np.zeros(len(digests), ROW)
    table["split"] = splitter(rows.part, rows.positions, digests)
    table["label"] = rows.labels
    table["id"] = digests.view(">u8").reshape(-1, 2)
    table["pixels"] = rows.pixels
    number = digest_bits(digests, 64, 64) % np.uint64(num_shards)
    for index in np.unique(number):
        yield int(index), compress(table[number == index])


def compress(table: np.ndarray) -> bytes:
    """Packs rows of `ROW`: images of digits take a fifth of their size where they are kept."""
    return zstandard.ZstdCompressor(level=1).compress(table.tobytes())


def decompress(packed: Iterable[bytes]) -> np.ndarray:
    """Unpacks what `compress` packed, several pieces into one table of `ROW`."""
    unpack = zstandard.ZstdDecompressor().decompress
    return np.frombuffer(b"".join(map(unpack, packed)), ROW)


# The graph's steps


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
            | "Read" >> beam.FlatMap(_read, self.source)
        )


def _read(block: Block, source: Source) -> Iterator[RawRows]:
    for rows in source.read(Block(*block)):
        _count(f"read-{rows.part}", rows.size)
        yield rows


@dataclasses.dataclass(eq=False)
class Validate(beam.PTransform):
    """Sets aside what cannot be written."""

    num_classes: int

    def expand(self, rows: beam.PCollection[RawRows]) -> beam.pvalue.DoOutputsTuple:
        """RawRows -> (good: RawRows, bad: Quarantined)."""
        return rows | "Check" >> beam.ParDo(_Validate(self.num_classes)).with_outputs(
            "bad", main="good"
        )


class _Validate(beam.DoFn):
    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def process(self, rows: RawRows) -> Iterator[RawRows | beam.pvalue.TaggedOutput]:
        good, bad = validate(rows, self._num_classes)
        for row in bad:
            _count(f"quarantined-{row.reason.replace(' ', '-')}", 1)
            yield beam.pvalue.TaggedOutput("bad", row)
        yield good


@dataclasses.dataclass(eq=False)
class WriteShards(beam.PTransform):
    """Splits rows, brings those of one shard number together and writes its files."""

    splitter: Splitter
    options: shards.ShardOptions
    directory: Path

    def expand(self, rows: beam.PCollection[RawRows]) -> beam.PCollection[shards.WrittenShards]:
        """RawRows -> one WrittenShards for every shard number."""
        pairs = tuple[int, bytes]
        numbers = [(index, compress(np.zeros(0, ROW))) for index in range(self.options.num_shards)]
        # A shard number without rows still has its files.
        every = rows.pipeline | "EveryShard" >> beam.Create(numbers).with_output_types(pairs)
        packed = rows | "Pack" >> beam.FlatMap(
            pack, self.splitter, self.options.num_shards
        ).with_output_types(pairs)
        return (
            (packed, every)
            | "Flatten" >> beam.Flatten()
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.Map(_write_shard, self.options, str(self.directory))
        )


def _write_shard(
    keyed: tuple[int, Iterable[bytes]], options: shards.ShardOptions, directory: str
) -> shards.WrittenShards:
    index, packed = keyed
    started = time.monotonic()
    written = shards.write(decompress(packed), index, options, Path(directory))
    milliseconds = round(1000 * (time.monotonic() - started))
    Metrics.distribution(NAMESPACE, "shard-write-msec").update(milliseconds)
    for split, shard in written.shards.items():
        _count(f"written-{split}", shard.num_examples)
        _count("written-bytes", shard.bytes)
        Metrics.distribution(NAMESPACE, "shard-bytes").update(shard.bytes)
    if written.dropped:
        _count("dropped-leaks", written.dropped)
    return written


@dataclasses.dataclass(eq=False)
class WriteQuarantine(beam.PTransform):
    """Writes the rows set aside, and counts them by reason."""

    directory: Path

    def expand(self, bad: beam.PCollection[Quarantined]) -> beam.PCollection[dict[str, int]]:
        """Quarantined -> {reason: count}."""
        return (
            bad
            | "Collect" >> beam.combiners.ToList()
            | "Write" >> beam.Map(_write_quarantine, str(self.directory))
        )


def _write_quarantine(bad: list[Quarantined], directory: str) -> dict[str, int]:
    rows = sorted(
        (Quarantined(*row) for row in bad), key=lambda row: (row.part, row.origin, row.id)
    )
    lines = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
    write_atomic(Path(directory) / QUARANTINE_NAME / "records.jsonl", lines)
    return dict(Counter(row.reason for row in rows))


@dataclasses.dataclass(eq=False)
class CountRows(beam.PTransform):
    """Counts what was read, apart from what becomes of it."""

    def expand(self, rows: beam.PCollection[RawRows]) -> beam.PCollection[int]:
        """RawRows -> how many rows in all."""
        return rows | "Size" >> beam.Map(lambda r: r.size) | "Sum" >> beam.CombineGlobally(sum)


# What this process has done, for a progress line: the counters of a runner that works in this
# process can only be asked for when it has ended.
done_here: dict[str, int] = {}


def _count(name: str, number: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(number)
    done_here[name] = done_here.get(name, 0) + number
