"""Deterministic TFRecord shards: the same rows give the same bytes, in whatever order they come."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from pipeline import slices
from pipeline.dataset import (
    DUPLICATES,
    FORMAT_VERSION,
    IMAGE_SHAPE,
    KINDS_OF_IMAGES,
    NUM_EXAMPLES,
    SPLITS,
    Manifest,
    Shard,
    Split,
    dataset_id,
    shard_name,
)
from pipeline.records import encode_frames
from pipeline.storage import Place, open_atomic

ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How shards are written.

    Attributes:
        num_shards: files in each split.
        compression: "none" or "gzip".
        drop_leaks: whether images that stand in test are left out of train and validation.
    """

    num_shards: int = 8
    compression: str = "none"
    drop_leaks: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenShards:
    """What one shard number holds, over all splits.

    Attributes:
        index: the shard number.
        shards: of each split, its file.
        labels: of each split, records by label.
        dropped: rows left out because they stand in test.
        blank: records whose pixels are all equal.
        duplicates: of each kind in `DUPLICATES`, how many: distinct images that occur more
            than once, records beyond the first of their image, distinct images with different
            labels, distinct images both in test and in another split, and distinct images
            both in train and in validation.
        examples: of each kind of image, its lowest ids, at most `NUM_EXAMPLES`.
        statistics: of each split and each of `slices.MEASURES`, records by level.
        encode_seconds: time spent encoding; no part of what is published.
    """

    index: int
    shards: dict[str, Shard]
    labels: dict[str, dict[int, int]]
    dropped: int
    blank: int
    duplicates: dict[str, int]
    examples: dict[str, list[str]]
    statistics: dict[str, slices.Histograms]
    encode_seconds: float = dataclasses.field(default=0.0, compare=False)


def order(rows: np.ndarray) -> np.ndarray:
    """Sorts rows by id, then label, then split: a total order, up to rows that are equal."""
    keys = (rows["split"], rows["label"], rows["id"][:, 1], rows["id"][:, 0])
    return rows[np.lexsort(keys)]


def group_starts(ids: np.ndarray) -> np.ndarray:
    """Where each run of equal neighbours begins: bool [n].

    Args:
        ids: uint64 [n, 2].
    """
    starts = np.ones(len(ids), bool)
    starts[1:] = (ids[1:] != ids[:-1]).any(axis=1)
    return starts


def occurrence_numbers(starts: np.ndarray) -> np.ndarray:
    """Numbers the members of each run: ``[T, F, T, T, F, F] -> [0, 1, 0, 0, 1, 2]``; int64."""
    positions = np.arange(len(starts))
    return positions - np.maximum.accumulate(np.where(starts, positions, 0))


def record_id(halves: np.ndarray, occurrence: int = 0) -> str:
    """The id of the nth copy of an image: the hash itself, then ``hash-1``, ``hash-2``, ..."""
    return f"{halves[0]:016x}{halves[1]:016x}" + (f"-{occurrence}" if occurrence else "")


def write(rows: np.ndarray, index: int, options: ShardOptions, directory: Place) -> WrittenShards:
    """Sorts the rows of one shard number and writes a file for each split.

    Args:
        rows: structured [n] with fields split, label, id and pixels, in any order.
        index: the shard number.
        options: how to write.
        directory: where the files go; a file already there is replaced whole, so that a
            second attempt at the same shard does no harm.
    """
    rows = order(rows)
    starts = group_starts(rows["id"])
    duplicates, examples, leaked = find_duplicates(rows, starts)
    occurrences = occurrence_numbers(starts)
    kept = np.ones(len(rows), bool)
    if options.drop_leaks:
        kept = ~(leaked & (rows["split"] != SPLITS.index("test")))
    written, labels, statistics, encode_seconds = {}, {}, {}, 0.0
    for code, split in enumerate(SPLITS):
        chosen = np.flatnonzero(kept & (rows["split"] == code))
        path = directory / shard_name(split, index, options.num_shards, options.compression)
        file = _write_file(path, rows, occurrences, chosen, options.compression)
        written[split], statistics[split], seconds = file
        encode_seconds += seconds
        values, counts = np.unique(rows["label"][chosen], return_counts=True)
        labels[split] = dict(zip(values.tolist(), counts.tolist(), strict=True))
    blank = (rows["pixels"] == rows["pixels"][:, :1]).all(axis=1) & kept
    return WrittenShards(
        index=index,
        shards=written,
        labels=labels,
        dropped=int((~kept).sum()),
        blank=int(blank.sum()),
        duplicates=duplicates,
        examples=examples,
        statistics=statistics,
        encode_seconds=encode_seconds,
    )


def _write_file(
    path: Place, rows: np.ndarray, occurrences: np.ndarray, chosen: np.ndarray, compression: str
) -> tuple[Shard, slices.Histograms, float]:
    """Writes the chosen rows, a bounded number at a time.

    Returns:
        The file, its records by level of ink and stroke width, and seconds spent encoding.
    """
    digest = hashlib.sha256()
    statistics = slices.no_rows()
    encoding = 0.0
    with open_atomic(path) as file:
        with _compressed(file, compression) as out:
            for first in range(0, len(chosen), ROWS_AT_ONCE):
                some = rows[chosen[first : first + ROWS_AT_ONCE]]
                numbers = occurrences[chosen[first : first + ROWS_AT_ONCE]]
                ids = [record_id(*pair) for pair in zip(some["id"], numbers, strict=True)]
                started = time.monotonic()
                content = encode_frames(some["pixels"], some["label"], ids)
                encoding += time.monotonic() - started
                digest.update(content)
                out.write(content)
                statistics = slices.added(statistics, slices.histograms(some["pixels"]))
        size = file.tell()
    shard = Shard(file=path.name, num_examples=len(chosen), bytes=size, sha256=digest.hexdigest())
    return shard, statistics, encoding


@contextlib.contextmanager
def _compressed(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    if compression == "none":
        yield file
        return
    # No name and no time: they would make equal content differ.
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as out:
        yield out  # type: ignore[misc]


def find_duplicates(
    rows: np.ndarray, starts: np.ndarray
) -> tuple[dict[str, int], dict[str, list[str]], np.ndarray]:
    """Counts and names what occurs more than once among sorted rows; see `WrittenShards`.

    Returns:
        Counts, example ids, and of each row whether its image is in test and elsewhere too.
    """
    first = np.flatnonzero(starts)
    group = np.cumsum(starts) - 1
    sizes = np.bincount(group, minlength=len(first)) if len(first) else np.zeros(0, int)
    present = np.zeros((len(SPLITS), len(first)), bool)
    present[rows["split"], group] = True
    in_train, in_validation, in_test = present
    found = {
        "images": sizes > 1,
        # Sorted by label inside a run, so its last label differs from its first if any does.
        "conflicting": rows["label"][first] != rows["label"][first + sizes - 1],
        "leaked": in_test & (in_train | in_validation),
        "held_out": in_train & in_validation,
    }
    counts = {kind: int(flags.sum()) for kind, flags in found.items()}
    counts["copies"] = len(rows) - len(first)
    examples = {
        kind: [record_id(rows["id"][i]) for i in first[flags][:NUM_EXAMPLES]]
        for kind, flags in found.items()
    }
    return {kind: counts[kind] for kind in DUPLICATES}, examples, found["leaked"][group]


def make_manifest(
    written: Iterable[WrittenShards],
    *,
    source: dict[str, Any],
    split_by: str,
    class_names: tuple[str, ...],
    quarantined: dict[str, int],
) -> Manifest:
    """Puts together the manifest of a dataset from what each shard number holds.

    Args:
        written: of every shard number, in any order.
        source: what was read.
        split_by: how it was split.
        class_names: one name per class.
        quarantined: rows set aside, by reason.
    """
    in_order = sorted(written, key=lambda part: part.index)
    splits = {split: _merge_split(in_order, split, len(class_names)) for split in SPLITS}
    every_file = [file for split in splits.values() for file in split.shards]
    return Manifest(
        format_version=FORMAT_VERSION,
        dataset_id=dataset_id(every_file, class_names),
        source=source,
        split_by=split_by,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=IMAGE_SHAPE,
        splits=splits,
        quarantined={
            "count": sum(quarantined.values()),
            "by_reason": dict(sorted(quarantined.items())),
        },
        dropped=sum(part.dropped for part in in_order),
        flagged={"blank": sum(part.blank for part in in_order)},
        duplicates=_merge_duplicates(in_order),
    )


def merge_statistics(written: Iterable[WrittenShards]) -> dict[str, slices.Histograms]:
    """Of each split the records by level of ink and stroke width, over all shard numbers."""
    merged = {split: slices.no_rows() for split in SPLITS}
    for part in written:
        for split in SPLITS:
            merged[split] = slices.added(merged[split], part.statistics[split])
    return merged


def _merge_split(in_order: list[WrittenShards], split: str, num_classes: int) -> Split:
    files = tuple(part.shards[split] for part in in_order)
    return Split(
        num_examples=sum(file.num_examples for file in files),
        label_counts=tuple(
            sum(part.labels[split].get(label, 0) for part in in_order)
            for label in range(num_classes)
        ),
        shards=files,
    )


def _merge_duplicates(in_order: list[WrittenShards]) -> dict[str, Any]:
    merged: dict[str, Any] = {
        kind: sum(part.duplicates[kind] for part in in_order) for kind in DUPLICATES
    }
    merged["examples"] = {
        kind: sorted(name for part in in_order for name in part.examples[kind])[:NUM_EXAMPLES]
        for kind in KINDS_OF_IMAGES
    }
    return merged
