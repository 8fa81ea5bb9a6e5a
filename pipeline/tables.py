"""The records of a dataset as tables: what is to be held of many at once, in 22 bytes each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.dataset import ID_LENGTH, Shard
from pipeline.records import Record, iter_records
from pipeline.storage import Place

BATCH = 4096  # records decoded at a time
KEY_BYTES = ID_LENGTH // 2 + 4
RECORD_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}(-[1-9][0-9]{{0,8}})?")
NOT_AN_ID = "an id is not a hash and the number of a copy"

# One record. Its key is the 16 bytes of the image's hash and the occurrence number, big-endian:
# keys compare as records are ordered. NumPy drops zeros at the end of a string that it hands
# out, never of those in the table: keys are compared and viewed there.
ENTRY = np.dtype([("key", f"S{KEY_BYTES}"), ("label", "u1"), ("split", "u1")])


def batches(directory: Place, shard: Shard) -> Iterator[list[Record]]:
    """Yields the records of a file, at most `BATCH` at a time.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    records = iter_records(directory, shard)
    while some := list(itertools.islice(records, BATCH)):
        yield some


def entries(records: Sequence[Record], split: int) -> np.ndarray:
    """Makes a table of records of one split.

    Args:
        records: n, with labels below 256.
        split: an index into `SPLITS`.

    Returns:
        `ENTRY` [n].

    Raises:
        ValueError: an id is not as `pipeline.shards.record_id` makes it.
    """
    if not all(RECORD_ID.fullmatch(record.id) for record in records):
        raise ValueError(NOT_AN_ID)
    table = np.empty(len(records), ENTRY)
    keys = b"".join(
        bytes.fromhex(record.id[:ID_LENGTH])
        + int(record.id[ID_LENGTH + 1 :] or 0).to_bytes(4, "big")
        for record in records
    )
    table["key"] = np.frombuffer(keys, ENTRY["key"])
    table["label"] = [record.label for record in records]
    table["split"] = split
    return table


def id_halves(table: np.ndarray) -> np.ndarray:
    """The hashes of a table's images, as `pipeline.shards` sorts them: uint64 [n, 2]."""
    return _key_bytes(table)[:, : ID_LENGTH // 2].copy().view(">u8").astype(np.uint64)


def occurrences(table: np.ndarray) -> np.ndarray:
    """The occurrence numbers of a table: int64 [n]."""
    return _key_bytes(table)[:, ID_LENGTH // 2 :].copy().view(">u4")[:, 0].astype(np.int64)


def _key_bytes(table: np.ndarray) -> np.ndarray:
    return np.frombuffer(table["key"].tobytes(), np.uint8).reshape(-1, KEY_BYTES)
