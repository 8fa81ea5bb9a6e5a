"""Looking into datasets: is one whole, what is in it, how do two differ."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.command import InputError
from pipeline.dataset import (
    ID_LENGTH,
    MANIFEST_NAME,
    METRICS_NAME,
    QUARANTINE_NAME,
    RECORDS_NAME,
    SCALE_TABLE,
    SPLITS,
    Manifest,
    Record,
    id_bits,
    image_ids,
    load_manifest,
    read_records,
    unscale,
)

ID_FORM = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}(-[1-9][0-9]{{0,9}})?")


def verify(directory: Path) -> list[str]:
    """Checks everything a manifest states against the files.

    Returns:
        One line for each thing that differs; none where the dataset is whole.

    Raises:
        InputError: there is no valid manifest to check against.
    """
    manifest = load_manifest(directory)
    problems = _verify_files(directory, manifest) + _verify_quarantine(directory, manifest)
    blank = 0
    for split in SPLITS:
        found, blank_here = _verify_split(directory, manifest, split)
        problems += found
        blank += blank_here
    if not problems and blank != manifest.flagged["blank"]:
        problems.append(f"{MANIFEST_NAME}: {manifest.flagged['blank']} blank images, found {blank}")
    return problems


def _verify_files(directory: Path, manifest: Manifest) -> list[str]:
    named = {shard.file for split in manifest.splits.values() for shard in split.shards}
    named |= {MANIFEST_NAME, METRICS_NAME, QUARANTINE_NAME}
    present = {path.name for path in directory.iterdir()}
    return [f"{name}: not named in the manifest" for name in sorted(present - named)]


def _verify_quarantine(directory: Path, manifest: Manifest) -> list[str]:
    path = directory / QUARANTINE_NAME / RECORDS_NAME
    try:
        reasons = Counter(json.loads(line)["reason"] for line in path.read_text().splitlines())
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"{path}: cannot be read: {error}"]
    if dict(reasons) != manifest.quarantined["by_reason"]:
        return [f"{path}: its records are not those that the manifest counts"]
    return []


def _verify_split(directory: Path, manifest: Manifest, split: str) -> tuple[list[str], int]:
    """Says what is wrong with a split, and how many of its images are blank."""
    problems = []
    labels: Counter[int] = Counter()
    blank = 0
    files = manifest.splits[split].shards
    for index, shard in enumerate(files):
        try:
            records = read_records(directory, shard)
        except InputError as error:
            problems.append(str(error))
            continue
        labels.update(record.label for record in records)
        blank += sum(bool((record.image == record.image[0]).all()) for record in records)
        problems += [
            f"{shard.file}: {text}"
            for text in _verify_records(records, manifest.num_classes, index, len(files))
        ]
    counted = tuple(labels[label] for label in range(manifest.num_classes))
    if not problems and counted != manifest.splits[split].label_counts:
        problems.append(f"{split}: label_counts differ from the labels in its records")
    return problems, blank


def _verify_records(
    records: list[Record], num_classes: int, index: int, num_shards: int
) -> Iterator[str]:
    """Says what is wrong with the records of a file, at most once for each kind of thing."""
    if not records:
        return
    images = np.stack([record.image for record in records])
    with np.errstate(invalid="ignore"):  # a pixel that is no number at all
        pixels = unscale(images)
    if not np.array_equal(SCALE_TABLE[pixels], images):
        yield "a pixel is not uint8 / 255"
    if any(record.label >= num_classes for record in records):
        yield f"a label is not below {num_classes}"
    if not all(ID_FORM.fullmatch(record.id) for record in records):
        yield "an id is not a hash and the number of a copy"
        return
    names = [record.id[:ID_LENGTH] for record in records]
    if names != image_ids(pixels):
        yield "an id is not the hash of its pixels"
    if any(id_bits(name, 64, 64) % num_shards != index for name in names):
        yield "a record belongs in another file"
    if len({record.id for record in records}) != len(records):
        yield "an id occurs twice"
    keys = [(record.id[:ID_LENGTH], int(record.id[ID_LENGTH + 1 :] or 0)) for record in records]
    if keys != sorted(keys):
        yield "the records are not in the order of their ids"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What `describe` and `diff` say of one split.

    Attributes:
        records: label and split-free identity of every record: id -> label.
        label_counts: int64 [C].
        levels: int64 [256], how often each grey level occurs.
    """

    records: dict[str, int]
    label_counts: np.ndarray
    levels: np.ndarray

    @property
    def mean(self) -> float:
        """Mean of the scaled pixels; nan of no records."""
        return self._moment(SCALE_TABLE.astype(np.float64))

    @property
    def deviation(self) -> float:
        """Standard deviation of the scaled pixels; nan of no records."""
        squares = self._moment(SCALE_TABLE.astype(np.float64) ** 2)
        return float(np.sqrt(max(squares - self.mean**2, 0.0))) if self.records else float("nan")

    def _moment(self, values: np.ndarray) -> float:
        total = self.levels.sum()
        return float(self.levels @ values / total) if total else float("nan")


def statistics(directory: Path, manifest: Manifest, split: str) -> SplitStatistics:
    """Reads a split, checked against the manifest, and sums it up."""
    records: dict[str, int] = {}
    levels = np.zeros(256, np.int64)
    for shard in manifest.splits[split].shards:
        read = read_records(directory, shard)
        if any(record.label >= manifest.num_classes for record in read):
            raise InputError(
                f"{directory / shard.file}: a label is not below {manifest.num_classes}"
            )
        records |= {record.id: record.label for record in read}
        if read:
            pixels = unscale(np.stack([record.image for record in read]))
            levels += np.bincount(pixels.ravel(), minlength=256)
    counts = np.array(manifest.splits[split].label_counts, np.int64)
    return SplitStatistics(records=records, label_counts=counts, levels=levels)


def describe(directory: Path) -> str:
    """A dataset as a table: splits, classes, statistics, what was set aside."""
    manifest = load_manifest(directory)
    found = {split: statistics(directory, manifest, split) for split in SPLITS}
    lines = [
        f"{directory}: dataset {manifest.dataset_id}",
        f"source: {manifest.source['title']}; split by {manifest.split_by}",
        "",
        f"{'':<12}" + "".join(f"{split:>12}" for split in SPLITS),
        _row("records", [f"{len(found[split].records):,}" for split in SPLITS]),
        _row("files", [str(len(manifest.splits[split].shards)) for split in SPLITS]),
        _row("MB", [f"{_bytes(manifest, split) / 1e6:.1f}" for split in SPLITS]),
        _row("pixel mean", [f"{found[split].mean:.4f}" for split in SPLITS]),
        _row("deviation", [f"{found[split].deviation:.4f}" for split in SPLITS]),
        "",
    ]
    for label, name in enumerate(manifest.class_names):
        counts = [f"{manifest.splits[split].label_counts[label]:,}" for split in SPLITS]
        lines.append(_row(name[:11], counts))
    duplicates = manifest.duplicates
    lines += [
        "",
        f"quarantined {manifest.quarantined['count']}, dropped {manifest.dropped},"
        f" blank {manifest.flagged.get('blank', 0)}",
        f"images that occur more than once {duplicates['images']} (copies"
        f" {duplicates['copies']}), with different labels {duplicates['conflicting']},"
        f" in test and elsewhere {duplicates['leaked']}",
    ]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells)


def _bytes(manifest: Manifest, split: str) -> int:
    return sum(shard.bytes for shard in manifest.splits[split].shards)


def diff(one: Path, other: Path) -> str:
    """What changed from one dataset to another, and how far their distributions moved."""
    manifests = [load_manifest(directory) for directory in (one, other)]
    a, b = (
        {split: statistics(directory, manifest, split) for split in SPLITS}
        for directory, manifest in zip((one, other), manifests, strict=True)
    )
    names_a, names_b = (manifest.class_names for manifest in manifests)
    where_a, where_b = _where(a, names_a), _where(b, names_b)
    shared = where_a.keys() & where_b.keys()
    lines = [
        f"A {one}: dataset {manifests[0].dataset_id}",
        f"B {other}: dataset {manifests[1].dataset_id}",
        "",
        f"added      {len(where_b.keys() - shared):,}",
        f"removed    {len(where_a.keys() - shared):,}",
        f"relabelled {sum(where_a[i][1] != where_b[i][1] for i in shared):,}",
        f"moved      {sum(where_a[i][0] != where_b[i][0] for i in shared):,}",
    ]
    moves = Counter((where_a[i][0], where_b[i][0]) for i in shared)
    lines += [f"  {x} -> {y} {n:,}" for (x, y), n in sorted(moves.items()) if x != y]
    relabels = Counter((where_a[i][1], where_b[i][1]) for i in shared)
    lines += [f"  {x} -> {y} {n:,}" for (x, y), n in relabels.most_common() if x != y][:20]
    lines += ["", f"{'drift':<12}{'classes':>12}{'pixels':>12}{'mean A':>12}{'mean B':>12}"]
    for split in SPLITS:
        classes = distance(
            _by_name(a[split], names_a, names_b), _by_name(b[split], names_b, names_a)
        )
        pixels = distance(a[split].levels, b[split].levels)
        cells = [_number(value) for value in (classes, pixels, a[split].mean, b[split].mean)]
        lines.append(_row(split, cells))
    lines.append(
        "drift is the total variation distance: 0 for the same shares, 1 for none in common"
    )
    return "\n".join(lines)


def _where(
    splits: dict[str, SplitStatistics], names: tuple[str, ...]
) -> dict[str, tuple[str, str]]:
    """Id -> (split, class name)."""
    return {
        record: (split, names[label])
        for split, found in splits.items()
        for record, label in found.records.items()
    }


def _by_name(found: SplitStatistics, own: tuple[str, ...], others: tuple[str, ...]) -> np.ndarray:
    """Class counts in an order that both datasets share."""
    counts = dict(zip(own, found.label_counts.tolist(), strict=True))
    return np.array([counts.get(name, 0) for name in sorted({*own, *others})])


def distance(one: np.ndarray, other: np.ndarray) -> float | None:
    """The total variation distance of two histograms: half the sum of |p - q|; None of none."""
    if not one.sum() or not other.sum():
        return None
    return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"
