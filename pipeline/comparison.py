"""What is in a dataset, and how two differ.

Of a record, 22 bytes are held (`pipeline.tables`): seven million take 154 MB, and matching them
with as many of another dataset some more arrays of that size, no Python object each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline import command, tables
from pipeline.command import InputError
from pipeline.dataset import SPLITS, Manifest, load_manifest
from pipeline.drift import divergence
from pipeline.matching import HASH, Index, compare
from pipeline.records import SCALE_TABLE, unscale
from pipeline.storage import Place

MOST_LINES = 20  # on labels that changed
COLUMN = 12
LONGEST_NAME = 40
LEFT_OUT = "..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What `describe` and `diff` say of one split.

    Attributes:
        num_records: how many.
        label_counts: int64 [num_classes].
        levels: int64 [256], pixels by grey level.
    """

    num_records: int
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
        return (
            float(np.sqrt(max(squares - self.mean**2, 0.0))) if self.num_records else float("nan")
        )

    def _moment(self, values: np.ndarray) -> float:
        total = self.levels.sum()
        return float(self.levels @ values / total) if total else float("nan")


def statistics(
    directory: Place, manifest: Manifest, split: str
) -> tuple[SplitStatistics, np.ndarray]:
    """Reads a split, a batch of records at a time; also gives them as `tables.ENTRY` [n].

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """
    levels = np.zeros(256, np.int64)
    parts = [np.empty(0, tables.ENTRY)]
    for shard in manifest.splits[split].shards:
        for records in tables.batches(directory, shard):
            if any(record.label >= manifest.num_classes for record in records):
                raise InputError(
                    f"{directory / shard.file}: a label is not below {manifest.num_classes}"
                )
            try:
                parts.append(tables.entries(records, SPLITS.index(split)))
            except ValueError as error:
                raise InputError(f"{directory / shard.file}: {error}") from None
            pixels = unscale(np.stack([record.image for record in records]))
            levels += np.bincount(pixels.ravel(), minlength=256)
    counts = np.array(manifest.splits[split].label_counts, np.int64)
    table = np.concatenate(parts)
    return SplitStatistics(num_records=len(table), label_counts=counts, levels=levels), table


def describe(directory: Place) -> str:
    """A dataset as a table: splits, classes, statistics, what was set aside."""
    manifest = load_manifest(directory)
    found = {split: statistics(directory, manifest, split)[0] for split in SPLITS}
    rows = [
        ["", *SPLITS],
        ["records", *(f"{found[split].num_records:,}" for split in SPLITS)],
        ["files", *(str(len(manifest.splits[split].shards)) for split in SPLITS)],
        ["MB", *(f"{_bytes(manifest, split) / 1e6:.1f}" for split in SPLITS)],
        ["pixel mean", *(f"{found[split].mean:.4f}" for split in SPLITS)],
        ["deviation", *(f"{found[split].deviation:.4f}" for split in SPLITS)],
    ]
    classes = [
        [
            _shortened(name),
            *(f"{manifest.splits[split].label_counts[label]:,}" for split in SPLITS),
        ]
        for label, name in enumerate(manifest.class_names)
    ]
    table = _aligned([*rows, *classes])
    duplicates = manifest.duplicates
    lines = [
        f"{directory}: dataset {manifest.dataset_id}",
        f"source: {manifest.source['title']}; split by {manifest.split_by}",
        "",
        *table[: len(rows)],
        "",
        *table[len(rows) :],
        "",
        f"quarantined {manifest.quarantined['count']}, dropped {manifest.dropped},"
        f" blank {manifest.flagged.get('blank', 0)}",
        f"images that occur more than once {duplicates['images']} (copies"
        f" {duplicates['copies']}), with different labels {duplicates['conflicting']},"
        f" in test and elsewhere {duplicates['leaked']}",
    ]
    return "\n".join(lines)


def _shortened(name: str) -> str:
    """A name without its middle where it is longer than `LONGEST_NAME`: ends tell names apart."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - len(LEFT_OUT)) // 2
    return name[: LONGEST_NAME - len(LEFT_OUT) - half] + LEFT_OUT + name[-half:]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    named = [(f"{name} ", *cells) for name, *cells in rows]
    return command.aligned(named, least=COLUMN, gap="")


def _bytes(manifest: Manifest, split: str) -> int:
    return sum(shard.bytes for shard in manifest.splits[split].shards)


def diff(one: Place, other: Place) -> str:
    """What changed from one dataset to another, and how far their distributions moved."""
    manifests = [load_manifest(directory) for directory in (one, other)]
    names_a, names_b = (manifest.class_names for manifest in manifests)
    names = sorted({*names_a, *names_b})
    a, index_a = _read(one, manifests[0], names)
    b, index_b = _read(other, manifests[1], names)
    changes = compare(index_a, index_b)
    moves, relabels = changes.moves, changes.relabels
    lines = [
        f"A {one}: dataset {manifests[0].dataset_id}",
        f"B {other}: dataset {manifests[1].dataset_id}",
        "",
        f"added      {changes.added:,}",
        f"removed    {changes.removed:,}",
        f"relabelled {sum(relabels.values()):,}",
        f"moved      {sum(moves.values()):,}",
    ]
    named = {(SPLITS[x], SPLITS[y]): n for (x, y), n in moves.items()}
    lines += [f"  {x} -> {y} {n:,}" for (x, y), n in sorted(named.items())]
    largest = sorted(relabels.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_LINES]
    lines += [f"  {names[x]} -> {names[y]} {n:,}" for (x, y), n in largest]
    rows = [["drift", "classes", "pixels", "mean A", "mean B"]]
    for split in SPLITS:
        classes = divergence(
            _by_name(a[split], names_a, names_b), _by_name(b[split], names_b, names_a)
        )
        pixels = divergence(a[split].levels.tolist(), b[split].levels.tolist())
        cells = [_number(value) for value in (classes, pixels, a[split].mean, b[split].mean)]
        rows.append([split, *cells])
    lines += ["", *_aligned(rows)]
    lines.append(
        "drift is the Jensen-Shannon divergence in bits: 0 where shares are equal, 1 where none is"
        " in common"
    )
    return "\n".join(lines)


def _read(
    directory: Place, manifest: Manifest, names: list[str]
) -> tuple[dict[str, SplitStatistics], Index]:
    found, parts = {}, []
    for split in SPLITS:
        found[split], table = statistics(directory, manifest, split)
        parts.append(table)
    places = np.array([names.index(name) for name in manifest.class_names], np.uint16)
    table = np.concatenate(parts)
    parts.clear()
    order = np.argsort(table["key"], kind="stable")
    hashes = table["key"].astype(HASH)[order]
    return found, Index(hashes, places[table["label"][order]], table["split"][order])


def _by_name(found: SplitStatistics, own: tuple[str, ...], others: tuple[str, ...]) -> list[int]:
    """Class counts in an order that both datasets share."""
    counts = dict(zip(own, found.label_counts.tolist(), strict=True))
    return [counts.get(name, 0) for name in sorted({*own, *others})]


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"
