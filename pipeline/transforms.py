"""From the rows of a source to shards: pure functions first, PTransforms on top."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import zstandard
from apache_beam.metrics import Metrics

from pipeline import shards
from pipeline.dataset import QUARANTINE_NAME, RECORDS_NAME
from pipeline.records import digest_bits, image_digests, image_ids
from pipeline.sources import Block, RawRows, Source
from pipeline.splits import Splitter
from pipeline.storage import Place, place, write_atomic

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
    directory: Place

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
    written = shards.write(decompress(packed), index, options, place(directory))
    for name, seconds in (
        ("shard-write-msec", time.monotonic() - started),
        ("shard-encode-msec", written.encode_seconds),
    ):
        Metrics.distribution(NAMESPACE, name).update(round(1000 * seconds))
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

    directory: Place

    def expand(self, bad: beam.PCollection[Quarantined]) -> beam.PCollection[dict[str, int]]:
        """Quarantined -> {reason: count}."""
        return (
            bad
            | "Collect" >> beam.combiners.ToList()
            | "Write" >> beam.Map(_write_quarantine, str(self.directory))
        )


def _write_quarantine(bad: list[Quarantined], directory: str) -> dict[str, int]:
    rows = sorted((Quarantined(*row) for row in bad), key=lambda row: row[::-1])  # by part, origin
    lines = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
    write_atomic(place(directory) / QUARANTINE_NAME / RECORDS_NAME, lines)
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
