"""The records of a shard as arrays, read at once where they have one layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.dataset import NUM_PIXELS, Shard
from pipeline.records import (
    decode_record,
    encode_record,
    frame,
    masked_crc,
    parse_records,
    read_shard,
    unscale,
)
from pipeline.storage import Place

ROWS_AT_ONCE = 1024


class Arrays(NamedTuple):
    """Some records: pixels uint8 [n, 784], labels int64 [n], n ids."""

    pixels: np.ndarray
    labels: np.ndarray
    ids: list[str]


def read_arrays(directory: Place, shard: Shard) -> Arrays:
    """Reads the records of a shard, checked against the manifest.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    data = read_shard(directory, shard)
    if (found := _at_once(data, shard.num_examples)) is not None:
        return found
    records = list(parse_records(data, str(directory / shard.file), shard.num_examples))
    images = [record.image for record in records]
    return Arrays(
        pixels=unscale(np.stack(images) if images else np.zeros((0, NUM_PIXELS), np.float32)),
        labels=np.array([record.label for record in records], np.int64),
        ids=[record.id for record in records],
    )


def _at_once(data: bytes, size: int) -> Arrays | None:
    """Reads what `records.encode_frames` has filled a table with; None of anything else.

    All that all records share is compared with the encoding of an empty record, and every
    checksum is computed: what is found wrong here is told by who reads record by record.
    """
    if not size or len(data) % size or (width := len(data) // size) <= 16:
        return None
    table = np.frombuffer(data, np.uint8).reshape(size, width)
    try:
        digits = len(decode_record(data[12 : width - 4]).id)
        empty = frame(encode_record(bytes(NUM_PIXELS), 0, "-" * digits))
        id_at, image_at = empty.index(b"-" * digits), empty.index(bytes(4 * NUM_PIXELS))
    except ValueError:
        return None
    template = np.frombuffer(empty, np.uint8)
    id_end, image_end = id_at + digits, image_at + 4 * NUM_PIXELS
    shared = (slice(0, id_at), slice(id_end, image_at), slice(image_end, width - 5))
    labels, checks = table[:, width - 5], table[:, width - 4 :]
    if (
        len(empty) != width
        or not all((table[:, part] == template[part]).all() for part in shared)
        or labels.max() > 0x7F
        or table[:, id_at:id_end].max() > 0x7F  # not ASCII
        or [masked_crc(row[12:-4].tobytes()) for row in table]
        != checks.copy().view("<u4")[:, 0].tolist()
    ):
        return None
    pixels = np.empty((size, NUM_PIXELS), np.uint8)
    for at in range(0, size, ROWS_AT_ONCE):  # as floats they take four times as much, thrice
        some = slice(at, at + ROWS_AT_ONCE)
        pixels[some] = unscale(table[some, image_at:image_end].copy().view("<f4"))
    text = table[:, id_at:id_end].tobytes().decode("ascii")
    ids = [text[at : at + digits] for at in range(0, len(text), digits)]
    return Arrays(pixels, labels.astype(np.int64), ids)
