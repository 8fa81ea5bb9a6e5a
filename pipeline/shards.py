"""Deterministic TFRecord shards: the same rows give the same bytes, in whatever order they come."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import (
    FORMAT_VERSION,
    IMAGE_SHAPE,
    SPLITS,
    Manifest,
    Shard,
    Split,
    dataset_id,
    encode_record,
    frame,
    shard_name,
)
from pipeline.storage import write_atomic


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenShards:
    """What one shard number holds, over all splits.

    Attributes:
        index: the shard number.
        shards: of each split, its file.
        labels: of each split, records by label.
        images: distinct images that occur more than once.
        copies: records beyond the first of their image.
        conflicting: distinct images that occur with different labels.
        leaked: distinct images that occur both in test and in another split.
    """

    index: int
    shards: dict[str, Shard]
    labels: dict[str, dict[int, int]]
    images: int
    copies: int
    conflicting: int
    leaked: int


def order(rows: np.ndarray) -> np.ndarray:
    """Sorts rows by id, then label, then split: a total order, up to rows that are equal."""
    return rows[np.lexsort((rows["split"], rows["label"], rows["id"]))]


def occurrence_numbers(ids: np.ndarray) -> np.ndarray:
    """Numbers equal neighbours: ``[a, a, b, c, c, c] -> [0, 1, 0, 0, 1, 2]``; int64."""
    positions = np.arange(len(ids))
    is_first = np.ones(len(ids), bool)
    is_first[1:] = ids[1:] != ids[:-1]
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0))


def record_id(name: bytes, occurrence: int) -> str:
    """The id of the nth copy of an image: the name itself, then ``name-1``, ``name-2``, ..."""
    return name.decode() + (f"-{occurrence}" if occurrence else "")


def write(rows: np.ndarray, index: int, num_shards: int, directory: Path) -> WrittenShards:
    """Sorts the rows of one shard number and writes a file for each split.

    Args:
        rows: structured [n] with fields split, label, id and pixels, in any order.
        index: the shard number.
        num_shards: how many there are.
        directory: where the files go; a file already there is replaced whole, so that a
            second attempt at the same shard does no harm.
    """
    rows = order(rows)
    occurrences = occurrence_numbers(rows["id"])
    written, labels = {}, {}
    for code, split in enumerate(SPLITS):
        chosen = rows["split"] == code
        content = b"".join(
            frame(
                encode_record(row["pixels"].tobytes(), int(row["label"]), record_id(row["id"], n))
            )
            for row, n in zip(rows[chosen], occurrences[chosen], strict=True)
        )
        name = shard_name(split, index, num_shards)
        write_atomic(directory / name, content)
        written[split] = Shard(
            file=name,
            num_examples=int(chosen.sum()),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        values, counts = np.unique(rows["label"][chosen], return_counts=True)
        labels[split] = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return WrittenShards(
        index=index, shards=written, labels=labels, **_duplicates(rows, occurrences)
    )


def _duplicates(rows: np.ndarray, occurrences: np.ndarray) -> dict[str, int]:
    """Counts copies among sorted rows; see `WrittenShards`."""
    test = SPLITS.index("test")
    found = {"images": 0, "copies": int((occurrences > 0).sum()), "conflicting": 0, "leaked": 0}
    for second in np.flatnonzero(occurrences == 1):
        last = second
        while last + 1 < len(rows) and occurrences[last + 1]:
            last += 1
        same = rows[second - 1 : last + 1]
        found["images"] += 1
        found["conflicting"] += len(np.unique(same["label"])) > 1
        found["leaked"] += bool((same["split"] == test).any() and (same["split"] != test).any())
    return found


def make_manifest(
    written: Iterable[WrittenShards],
    source: dict[str, Any],
    split_by: str,
    class_names: tuple[str, ...],
) -> Manifest:
    """Puts together the manifest of a dataset from what each shard number holds."""
    in_order = sorted(written, key=lambda part: part.index)
    splits = {}
    for split in SPLITS:
        files = tuple(part.shards[split] for part in in_order)
        counts = [
            sum(part.labels[split].get(label, 0) for part in in_order)
            for label in range(len(class_names))
        ]
        splits[split] = Split(
            num_examples=sum(file.num_examples for file in files),
            label_counts=tuple(counts),
            shards=files,
        )
    every_file = [file for split in splits.values() for file in split.shards]
    duplicates = {
        name: sum(getattr(part, name) for part in in_order)
        for name in ("images", "copies", "conflicting", "leaked")
    }
    return Manifest(
        format_version=FORMAT_VERSION,
        dataset_id=dataset_id(every_file, class_names),
        source=source,
        split_by=split_by,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=IMAGE_SHAPE,
        splits=splits,
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={},
        duplicates=duplicates,
    )
