"""Copies of an image in the files of a dataset, and what its manifest says of them.

Copies are numbered before any is dropped, in the order of their labels, then of their splits.
Where none was dropped, the numbers and all that the manifest says of copies follow from the
files. Where leaks were dropped (``--drop_leaks``), every copy of such an image outside test is
gone, and one in test is always left. Then still exact are the numbers of images without a copy
in test, and how many copies there were: rows written and dropped less distinct images. A number
missing before another is a dropped row, and its image was one of the leaks; rows dropped after
the last one left no trace. The rest can only be held within bounds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline import shards, tables
from pipeline.dataset import (
    DUPLICATES,
    KINDS_OF_IMAGES,
    NUM_EXAMPLES,
    SPLITS,
    Manifest,
    shard_name,
)

COPY = np.dtype([("split", "u1"), ("label", "u1"), ("id", "u8", 2), ("occurrence", "i8")])
TEST = SPLITS.index("test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiesFound:
    """What the files of one shard number show, over all splits.

    Attributes:
        problems: what contradicts the numbering, one line each.
        counts: of each kind in `DUPLICATES`, how many for certain.
        examples: of each kind of image, the lowest ids, at most `NUM_EXAMPLES`.
        images: distinct images.
        in_test: of those, how many in test.
        missing: rows that were dropped for certain.
        named: ids that the manifest names as examples and that are here, in test or not.
    """

    problems: list[str]
    counts: dict[str, int]
    examples: dict[str, list[str]]
    images: int
    in_test: int
    missing: int
    named: dict[str, bool]


def find_copies(table: np.ndarray, index: int, manifest: Manifest) -> CopiesFound:
    """Looks through all records of one shard number.

    Args:
        table: `tables.ENTRY` [n], in the order of ids within each split.
        index: the shard number.
        manifest: of the dataset.
    """
    rows = np.empty(len(table), COPY)
    rows["split"], rows["label"] = table["split"], table["label"]
    rows["id"], rows["occurrence"] = tables.id_halves(table), tables.occurrences(table)
    rows = shards.order(rows)
    starts = shards.group_starts(rows["id"])
    group = np.cumsum(starts) - 1
    in_test = np.bincount(group, rows["split"] == TEST, minlength=int(starts.sum())) > 0
    gaps = rows["occurrence"] - shards.occurrence_numbers(starts)
    counts, examples, leaked = shards.find_duplicates(rows, starts)
    short = gaps[np.append(starts[1:], True)[: len(rows)]] > 0  # of each image
    if manifest.dropped:
        firsts = rows["id"][starts]
        for kind, flags in (("images", short | (np.bincount(group) > 1)), ("leaked", short)):
            counts[kind] = int(flags.sum())
            examples[kind] = [shards.record_id(each) for each in firsts[flags][:NUM_EXAMPLES]]
    files = f"*{shard_name('', index, len(manifest.splits['test'].shards))}"
    problems = [
        f"{files}: {problem}"
        for problem, wrong in (
            ("copies are not numbered from 0 in the order of their labels",
             _misnumbered(gaps, starts, in_test[group] & (manifest.dropped > 0))),
            ("an image is both in test and elsewhere, although such were dropped",
             bool(manifest.dropped and leaked.any())),
        )
        if wrong
    ]  # fmt: skip
    return CopiesFound(
        problems=problems,
        counts=counts,
        examples=examples,
        images=int(starts.sum()),
        in_test=int(in_test.sum()),
        missing=int(gaps[np.append(starts[1:], True)[: len(rows)]].sum()),
        named=_named(rows, manifest),
    )


def _misnumbered(gaps: np.ndarray, starts: np.ndarray, may_lack: np.ndarray) -> bool:
    """Tells whether numbers are not as they should be.

    Args:
        gaps: int64 [n], how far each number is ahead of its place among what is left.
        starts: bool [n], where each image begins.
        may_lack: bool [n], whether copies before it may have been dropped.
    """
    falls = (gaps[1:] < gaps[:-1]) & ~starts[1:]
    return bool((gaps < 0).any() or gaps[~may_lack].any() or falls.any())


def _named(rows: np.ndarray, manifest: Manifest) -> dict[str, bool]:
    found = {}
    every = manifest.duplicates["examples"]
    for name in {name for kind in KINDS_OF_IMAGES for name in every[kind]}:
        halves = np.array([int(name[:16], 16), int(name[16:], 16)], np.uint64)
        here = (rows["id"] == halves).all(axis=1)
        if here.any():
            found[name] = bool((rows["split"][here] == TEST).any())
    return found


def check_duplicates(manifest: Manifest, found: list[CopiesFound]) -> list[str]:
    """Says where the manifest contradicts the files on copies of images.

    Args:
        manifest: of the dataset.
        found: of every shard number.
    """
    missing = sum(part.missing for part in found)
    if missing > manifest.dropped:
        return [f"{manifest.dropped} dropped, but {missing} copies are missing"]
    bounds = _bounds(manifest, found)
    wrong = {
        kind: _expected(*bounds[kind])
        for kind in DUPLICATES
        if not bounds[kind][0] <= manifest.duplicates[kind] <= bounds[kind][1]
    }
    if manifest.dropped and "leaked" in wrong:  # the other bounds follow from it
        return [f"duplicates: {manifest.duplicates['leaked']} leaked, {wrong['leaked']}"]
    problems = [
        f"duplicates: {manifest.duplicates[kind]} {kind}, {text}" for kind, text in wrong.items()
    ]
    for kind in KINDS_OF_IMAGES:
        if not _right_examples(manifest, kind, found):
            problems.append(f"duplicates: the examples of {kind} are not its lowest ids")
    return problems


def _expected(least: int, most: int) -> str:
    if least > most:
        return "and no image can have been dropped"
    return f"found {least}" if least == most else f"expected {least} to {most}"


def _bounds(manifest: Manifest, found: list[CopiesFound]) -> dict[str, tuple[int, int]]:
    """Of each kind in `DUPLICATES`, the least and the most that the manifest may state."""
    certain = {kind: sum(part.counts[kind] for part in found) for kind in DUPLICATES}
    if not manifest.dropped:
        return {kind: (number, number) for kind, number in certain.items()}
    leaked, dropped = manifest.duplicates["leaked"], manifest.dropped
    written = sum(split.num_examples for split in manifest.splits.values())
    copies = written + dropped - sum(part.images for part in found)
    untold = dropped - sum(part.missing for part in found)  # rows that left no trace
    in_test = sum(part.in_test for part in found)
    known = certain["leaked"]
    more = {"conflicting": leaked, "held_out": min(leaked, dropped // 2)}
    return {
        "images": (max(certain["images"], leaked), certain["images"] + leaked - known),
        "copies": (copies, copies),
        "leaked": (max(1, known), known + min(untold, in_test - known)),
        **{kind: (certain[kind], certain[kind] + most) for kind, most in more.items()},
    }


def _right_examples(manifest: Manifest, kind: str, found: list[CopiesFound]) -> bool:
    """Whether the examples of a kind are the lowest ids, as far as the files tell."""
    stated: list[str] = manifest.duplicates["examples"][kind]
    lowest = {name for part in found for name in part.examples[kind]}
    if not manifest.dropped:
        return stated == sorted(lowest)[:NUM_EXAMPLES]
    here: dict[str, Any] = {name: test for part in found for name, test in part.named.items()}
    there = [name in here and (here[name] or kind != "leaked") for name in stated]
    return all(there) and stated == sorted({*lowest, *stated})[:NUM_EXAMPLES]
