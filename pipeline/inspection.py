"""Is a dataset what its manifest states? Every statement is held against the files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline import tables
from pipeline.command import InputError
from pipeline.copies import CopiesFound, check_duplicates, find_copies
from pipeline.dataset import (
    ID_LENGTH,
    IMAGE_ID,
    MANIFEST_NAME,
    METRICS_NAME,
    QUARANTINE_NAME,
    RECORDS_NAME,
    SPLITS,
    Manifest,
    is_line,
    load_manifest,
)
from pipeline.records import SCALE_TABLE, Record, encode_frames, id_bits, image_ids, unscale
from pipeline.storage import Place

PARTS = ("train", "test")  # of a source
QUARANTINE_FIELDS = ("id", "reason", "origin", "part")


def verify(directory: Place) -> list[str]:
    """Checks everything a manifest states against the files.

    All copies of an image stand under one shard number, whichever their splits: the files are
    read shard number by shard number, and one file is held at a time, with 22 bytes for each
    record of its number.

    What the manifest says of copies is recomputed. Of rows that were dropped nothing is left in
    the files but gaps in the numbering of copies, so where there are such, what it says is held
    against the least and the most that the files allow; see `pipeline.copies`.

    Returns:
        One line for each thing that differs; none where the dataset is whole.

    Raises:
        InputError: there is no valid manifest to check against.
    """
    manifest = load_manifest(directory)
    problems = _verify_files(directory, manifest) + _verify_quarantine(directory, manifest)
    labels = {split: np.zeros(manifest.num_classes, np.int64) for split in SPLITS}
    unsound = set()
    blank, lowest, highest = 0, [2**32], [-1]
    copies = []
    for index in range(len(manifest.splits[SPLITS[0]].shards)):
        files = [_read_file(directory, manifest, split, index) for split in SPLITS]
        for split, file in zip(SPLITS, files, strict=True):
            problems += file.problems
            blank += file.blank
            if file.problems:
                unsound.add(split)
            else:
                counted = np.bincount(file.table["label"], minlength=manifest.num_classes)
                labels[split] += counted
        lowest.append(files[SPLITS.index("train")].lowest)
        highest.append(files[SPLITS.index("validation")].highest)
        if not any(file.problems for file in files):
            found = find_copies(np.concatenate([file.table for file in files]), index, manifest)
            problems += found.problems
            copies.append(found)
    for split in SPLITS:
        stated = manifest.splits[split].label_counts
        if split not in unsound and tuple(labels[split].tolist()) != stated:
            problems.append(f"{split}: label_counts differ from the labels in its records")
    if problems:
        return problems
    overlap = max(highest) >= min(lowest)
    return _verify_counts(manifest, blank, copies, overlap)


def _verify_counts(
    manifest: Manifest, blank: int, copies: list[CopiesFound], overlap: bool
) -> list[str]:
    """What the manifest says of all files together; of use only where those are sound."""
    problems = check_duplicates(manifest, copies)
    if manifest.split_by == "hash" and overlap:
        problems.append("split_by hash, but an id in train is not above all in validation")
    if blank != manifest.flagged["blank"]:
        problems.append(f"{manifest.flagged['blank']} blank images, found {blank}")
    return [f"{MANIFEST_NAME}: {problem}" for problem in problems]


def _verify_files(directory: Place, manifest: Manifest) -> list[str]:
    named = {shard.file for split in manifest.splits.values() for shard in split.shards}
    named |= {MANIFEST_NAME, METRICS_NAME, QUARANTINE_NAME}
    present = {path.name for path in directory.iterdir()}
    return [f"{name}: not named in the manifest" for name in sorted(present - named)]


# Quarantine


def _verify_quarantine(directory: Place, manifest: Manifest) -> list[str]:
    """Checks what was set aside: every line, the counts by reason, and that nothing else is there.

    Of the lines that are wrong the first is told.
    """
    folder = directory / QUARANTINE_NAME
    path = folder / RECORDS_NAME
    reasons: Counter[str] = Counter()
    try:
        problems = [
            f"{QUARANTINE_NAME}/{name}: not named in the manifest"
            for name in sorted(path.name for path in folder.iterdir())
            if name != RECORDS_NAME
        ]
        for number, line in enumerate(io.BytesIO(path.read_bytes()), 1):
            row = _parse_line(line)
            if wrong := _wrong_with(row):
                return [*problems, f"{path}: line {number}: {wrong}"]
            reasons[row["reason"]] += 1
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path}: cannot be read: {error}"]
    if dict(reasons) != manifest.quarantined["by_reason"]:
        problems.append(f"{path}: its records are not those that the manifest counts")
    return problems


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _wrong_with(row: Any) -> str | None:
    """What is wrong with a row that was set aside; None if nothing is."""
    if not isinstance(row, dict) or set(row) != set(QUARANTINE_FIELDS):
        return f"expected {', '.join(QUARANTINE_FIELDS)}"
    if not all(isinstance(value, str) for value in row.values()):
        return "a value is not a string"
    if not IMAGE_ID.fullmatch(row["id"]):
        return f"id {row['id']!r}, expected {ID_LENGTH} hexadecimal digits"
    if not is_line(row["reason"]):
        return f"reason {row['reason']!r}, expected one line"
    origin = PurePosixPath(row["origin"])
    if not origin.name or origin.is_absolute() or ".." in origin.parts:
        return f"origin {row['origin']!r}, expected a relative name"
    if row["part"] not in PARTS:
        return f"part {row['part']!r}, expected {' or '.join(PARTS)}"
    return None


# Shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFound:
    """What a shard file holds: what is wrong with it, its records as `tables.ENTRY`, blank ones.

    Where something is wrong, the table may lack records.
    """

    problems: list[str]
    table: np.ndarray
    blank: int

    @property
    def lowest(self) -> int:
        """Of the bits of its ids that a split by hash goes by; 2**32 of no records."""
        return int(_split_bits(self.table).min(initial=2**32))

    @property
    def highest(self) -> int:
        """The same; -1 of no records."""
        return int(_split_bits(self.table).max(initial=-1))


def _split_bits(table: np.ndarray) -> np.ndarray:
    return (tables.id_halves(table)[:, 0] >> np.uint64(32)).astype(np.int64)


def _read_file(directory: Place, manifest: Manifest, split: str, index: int) -> FileFound:
    """Reads a file a batch at a time; of each kind of thing that is wrong, tells the first."""
    files = manifest.splits[split].shards
    shard = files[index]
    problems: dict[str, None] = {}
    parts = [np.empty(0, tables.ENTRY)]
    blank = 0
    encoded = hashlib.sha256()
    try:
        for records in tables.batches(directory, shard):
            wrong = dict.fromkeys(_check_records(records, manifest.num_classes, index, len(files)))
            problems |= wrong
            if not wrong.keys() & {tables.NOT_AN_ID, _label_problem(manifest.num_classes)}:
                parts.append(tables.entries(records, SPLITS.index(split)))
            images = np.stack([record.image for record in records])
            blank += int((images == images[:, :1]).all(axis=1).sum())
            if not problems:
                encoded.update(encode_again(records, images))
    except InputError as error:
        return FileFound(problems=[str(error)], table=parts[0], blank=0)
    table = np.concatenate(parts)
    problems |= dict.fromkeys(_check_order(table["key"]))
    if not problems and encoded.hexdigest() != shard.sha256:
        problems["a record is not encoded as this format has it"] = None
    lines = [f"{shard.file}: {problem}" for problem in problems]
    return FileFound(problems=lines, table=table, blank=blank)


def encode_again(records: list[Record], images: np.ndarray) -> bytes:
    """The one encoding of these records, which are sound, whatever they were read from."""
    labels = np.array([record.label for record in records])
    return encode_frames(unscale(images), labels, [record.id for record in records])


def _label_problem(num_classes: int) -> str:
    return f"a label is not below {num_classes}"


def _check_records(
    records: list[Record], num_classes: int, index: int, num_shards: int
) -> Iterator[str]:
    """Says what is wrong with some records of a file, at most once for each kind of thing."""
    images = np.stack([record.image for record in records])
    with np.errstate(invalid="ignore"):  # a pixel that is no number at all
        pixels = unscale(images)
    if not np.array_equal(SCALE_TABLE[pixels], images):
        yield "a pixel is not uint8 / 255"
    if any(record.label >= num_classes for record in records):
        yield _label_problem(num_classes)
    if not all(tables.RECORD_ID.fullmatch(record.id) for record in records):
        yield tables.NOT_AN_ID
        return
    names = [record.id[:ID_LENGTH] for record in records]
    if names != image_ids(pixels):
        yield "an id is not the hash of its pixels"
    if any(id_bits(name, 64, 64) % num_shards != index for name in names):
        yield "a record belongs in another file"


def _check_order(keys: np.ndarray) -> Iterator[str]:
    if len(np.unique(keys)) != len(keys):
        yield "an id occurs twice"
    if (keys[1:] < keys[:-1]).any():
        yield "the records are not in the order of their ids"
