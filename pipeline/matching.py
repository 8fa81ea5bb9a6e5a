"""Which records of two datasets are of the same image, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.dataset import ID_LENGTH

HASH = np.dtype(f"S{ID_LENGTH // 2}")  # the first bytes of the key of a `tables.ENTRY`
ROWS_AT_ONCE = 1 << 18  # looked up at a time


class Index(NamedTuple):
    """The records of a dataset in the order of their images' hashes.

    Attributes:
        hashes: `HASH` [n], equal for the copies of an image, which stand in the order of ids.
        labels: uint16 [n], the places of the class names in a list that two datasets share.
        splits: uint8 [n].
    """

    hashes: np.ndarray
    labels: np.ndarray
    splits: np.ndarray


class Changes(NamedTuple):
    """What `compare` found: records of one side alone, and of both by (before, after)."""

    added: int
    removed: int
    moves: Counter[tuple[int, int]]
    relabels: Counter[tuple[int, int]]


def compare(one: Index, other: Index) -> Changes:
    """Matches the records of two datasets by their images, a bounded number at a time.

    Images without copies have one record to match. Numbers of copies say nothing: one more
    copy of a lower label moves them all. So of the copies of an image those of the same label
    and split are matched first, then those of the same label, then the rest in order.
    """
    shared = 0
    moves: Counter[tuple[int, int]] = Counter()
    relabels: Counter[tuple[int, int]] = Counter()
    alone, alone_in_other = _without_copies(one.hashes), _without_copies(other.hashes)
    with_copies = [np.empty(0, np.int64)]
    for first in range(0, len(other.hashes) if len(one.hashes) else 0, ROWS_AT_ONCE):
        hashes = other.hashes[first : first + ROWS_AT_ONCE]
        at = np.searchsorted(one.hashes, hashes)
        at[at == len(one.hashes)] = 0
        same = one.hashes[at] == hashes
        single = same & alone[at] & alone_in_other[first : first + ROWS_AT_ONCE]
        before, after = at[single], first + np.flatnonzero(single)
        shared += len(after)
        moves += _pairs(one.splits[before], other.splits[after])
        relabels += _pairs(one.labels[before], other.labels[after])
        with_copies.append(first + np.flatnonzero(same & ~single))
    for codes, codes_in_other in _match_copies(*_code(one, other, np.concatenate(with_copies))):
        shared += len(codes)
        moves += _pairs(codes & 0xFF, codes_in_other & 0xFF)
        relabels += _pairs(codes >> 8 & 0xFFFF, codes_in_other >> 8 & 0xFFFF)
    return Changes(len(other.hashes) - shared, len(one.hashes) - shared, moves, relabels)


def _without_copies(hashes: np.ndarray) -> np.ndarray:
    """Whether a hash differs from both its neighbours; bool [n]."""
    first = _first_of_each(hashes)
    return first & np.append(first[1:], True)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """Whether a value differs from the one before it; bool [n]."""
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def _code(one: Index, other: Index, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is to be matched as numbers: image, label (16 bits), split (8 bits); int64 each.

    Args:
        one: in which every one of the images stands.
        other: the same.
        rows: int64 [n], of `other`, in order: all records of these images.
    """
    hashes = other.hashes[rows]
    first = _first_of_each(hashes)
    images, numbers = hashes[first], np.cumsum(first) - 1
    starts = np.searchsorted(one.hashes, images)
    counts = np.searchsorted(one.hashes, images, side="right") - starts
    numbers_in_one = np.repeat(np.arange(len(images)), counts)
    at = _spans(starts, counts)
    return (
        numbers_in_one << 24 | one.labels[at].astype(np.int64) << 8 | one.splits[at],
        numbers << 24 | other.labels[rows].astype(np.int64) << 8 | other.splits[rows],
    )


def _spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers of ranges, one range after the other: int64 [sum of counts]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _match_copies(codes: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the codes of matched records, as equally long arrays; see `compare`."""
    codes, others = np.sort(codes), np.sort(others)
    for shift in (0, 8, 24):  # all of it, image and label, image
        starts = np.flatnonzero(_first_of_each(codes >> shift))
        counts = np.diff(starts, append=len(codes))
        keys = codes[starts] >> shift
        starts_in_other = np.searchsorted(others >> shift, keys)
        ends = np.searchsorted(others >> shift, keys, side="right")
        pairs = np.minimum(counts, ends - starts_in_other)
        at, at_in_other = _spans(starts, pairs), _spans(starts_in_other, pairs)
        yield codes[at], others[at_in_other]
        codes, others = np.delete(codes, at), np.delete(others, at_in_other)


def _pairs(before: np.ndarray, after: np.ndarray) -> Counter[tuple[int, int]]:
    """Counts what differs, by (before, after)."""
    differ = before != after
    pairs, counts = np.unique(
        np.stack([before[differ], after[differ]], axis=1), axis=0, return_counts=True
    )
    keys = (tuple(pair) for pair in pairs.tolist())
    return Counter(dict(zip(keys, counts.tolist(), strict=True)))
