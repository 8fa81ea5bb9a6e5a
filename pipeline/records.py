"""The codec of the contract: ids, records, TFRecord framing, and reading shards back.

The encoding is written out here, rather than through TensorFlow, because it is the hot
path of the Beam stages: packing 784 floats this way costs a copy instead of a Python loop,
and a worker need not spend seconds importing TensorFlow. The tests hold it against
``tf.train.Example`` and ``tf.data.TFRecordDataset``.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from pipeline.command import InputError
from pipeline.dataset import ID_LENGTH, NUM_PIXELS, Shard
from pipeline.storage import Place

MAX_RECORD_BYTES = 4096
BLOCK = 1 << 20  # bytes of a file that are checked at a time

# The only way this project scales a pixel: a table look-up is exact wherever it runs, while a
# division inside a compiled graph becomes a product, off by one bit for half of the values.
SCALE_TABLE = np.arange(256, dtype=np.float32) / np.float32(255)


def unscale(images: np.ndarray) -> np.ndarray:
    """Gives back the bytes of scaled pixels: exact, as rounding is far coarser than float32."""
    return np.rint(images * np.float32(255)).astype(np.uint8)


# Identity


def image_ids(pixels: np.ndarray) -> list[str]:
    """Names images by their content.

    Args:
        pixels: uint8 [n, 784].

    Returns:
        n strings of 32 hexadecimal digits: the first half of the SHA-256 of the 784 bytes.
    """
    return [digest.tobytes().hex() for digest in image_digests(pixels)]


def image_digests(pixels: np.ndarray) -> np.ndarray:
    """The same as bytes: uint8 [n, 784] -> uint8 [n, 16]."""
    digests = [hashlib.sha256(row.tobytes()).digest()[: ID_LENGTH // 2] for row in pixels]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ID_LENGTH // 2)


def id_bits(image_id: str, first: int, count: int) -> int:
    """Returns `count` of an id's 128 bits, from bit `first`, as an integer.

    Decisions taken from an id each use bits of their own, and so are independent:
    0-31 validation or train, 32-63 the test part of a source without one, 64-127 the shard.
    """
    return (int(image_id[:ID_LENGTH], 16) >> (128 - first - count)) & ((1 << count) - 1)


def digest_bits(digests: np.ndarray, first: int, count: int) -> np.ndarray:
    """`id_bits` of many: uint8 [n, 16] -> uint64 [n]; `first` and `count` in whole bytes."""
    chosen = np.zeros((len(digests), 8), np.uint8)
    chosen[:, 8 - count // 8 :] = digests[:, first // 8 : (first + count) // 8]
    return chosen.view(">u8")[:, 0].astype(np.uint64)


def weights_sha256(weights: Sequence[np.ndarray]) -> str:
    """Names a model's weights, layer by layer: hashes shape, then float32 little-endian bytes."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(repr(weight.shape).encode())
        digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()


# Records: the protocol-buffer encoding of tf.train.Example
# https://protobuf.dev/programming-guides/encoding/


class Record(NamedTuple):
    """One decoded example: `image` float32 [784], `label`, `id`."""

    image: np.ndarray
    label: int
    id: str


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(field: int, body: bytes) -> bytes:
    """A length-delimited field (wire type 2): bytes, or a message."""
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _feature(name: str, kind: int, values: bytes) -> bytes:
    """One entry of the map ``Features.feature``; kind 1 bytes, 2 floats, 3 integers."""
    return message(1, message(1, name.encode()) + message(2, message(kind, message(1, values))))


def encode_record(pixels: bytes, label: int, record_id: str) -> bytes:
    """Serializes one record; its map entries stand in the order of their names.

    Args:
        pixels: 784 bytes, one per pixel, unscaled.
        label: from 0 to 255.
        record_id: ASCII.
    """
    scaled = SCALE_TABLE[np.frombuffer(pixels, np.uint8)].astype("<f4").tobytes()
    return message(
        1,
        _feature("id", 1, record_id.encode("ascii"))
        + _feature("image", 2, scaled)
        + _feature("label", 3, _varint(label)),
    )


def read_varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    """Reads an integer of variable length; returns it and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (field number, content) of a message that has only length-delimited fields."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        length, at = read_varint(data, at)
        if tag & 7 != 2 or at + length > len(data):
            raise ValueError("not a record of this format")
        yield tag >> 3, data[at : at + length]
        at += length


def decode_record(data: bytes) -> Record:
    """Parses what `encode_record` wrote.

    Raises:
        ValueError: the bytes are no such record.
    """
    found: dict[str, memoryview] = {}
    try:
        for _, features in _fields(memoryview(data)):
            for _, entry in _fields(features):
                (_, name), (_, feature) = _fields(entry)
                ((_, values),) = _fields(feature)
                ((_, found[bytes(name).decode("ascii")]),) = _fields(values)
        image = np.frombuffer(found["image"], "<f4")
        label, end = read_varint(found["label"], 0)
        record = Record(image, label, bytes(found["id"]).decode("ascii"))
    except (KeyError, IndexError, UnicodeDecodeError, ValueError):
        raise ValueError("not a record of this format") from None
    if image.size != NUM_PIXELS or end != len(found["label"]) or len(found) != 3:
        raise ValueError("not a record of this format")
    return record


# TFRecord framing: length, checksum of the length, data, checksum of the data
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details


def masked_crc(data: bytes) -> int:
    """The checksum that a frame holds of its content."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
    """Wraps one record as it stands in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc(length)),
            record,
            struct.pack("<I", masked_crc(record)),
        )
    )


def encode_frames(pixels: np.ndarray, labels: np.ndarray, ids: Sequence[str]) -> bytes:
    """``frame(encode_record(...))`` of many rows, joined.

    Records of ids of one length and labels below 128 have one layout: they are made at once,
    by filling a table with the encoding of an empty record and overwriting what differs.

    Args:
        pixels: uint8 [n, 784].
        labels: integers [n], below 256.
        ids: n ASCII strings.
    """
    if not len(ids) or len(set(map(len, ids))) > 1 or max(labels) > 0x7F:
        rows = zip(pixels, labels.tolist(), ids, strict=True)
        return b"".join(
            frame(encode_record(row.tobytes(), label, name)) for row, label, name in rows
        )
    width = len(ids[0])
    empty = encode_record(bytes(NUM_PIXELS), 0, "-" * width)
    size = len(empty)
    table = np.empty((len(ids), size + 16), np.uint8)
    table[:, :-4] = np.frombuffer(frame(empty)[:-4], np.uint8)
    records = table[:, 12 : 12 + size]
    at = empty.index(b"-" * width)
    records[:, at : at + width] = np.frombuffer("".join(ids).encode(), np.uint8).reshape(-1, width)
    at = empty.index(bytes(4 * NUM_PIXELS))
    records[:, at : at + 4 * NUM_PIXELS] = SCALE_TABLE[pixels].astype("<f4").view(np.uint8)
    records[:, -1] = labels
    checks = [masked_crc(record.tobytes()) for record in records]
    table[:, -4:] = np.array(checks, "<u4")[:, None].view(np.uint8)
    return table.tobytes()


def read_frames(data: bytes, name: str) -> Iterator[bytes]:
    """Yields the records of a TFRecord file's content.

    Raises:
        InputError: a frame is cut short or its checksum is wrong.
    """
    at = 0
    while at < len(data):
        header = data[at : at + 12]
        size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
        record, check = data[at + 12 : at + 12 + size], data[at + 12 + size : at + 16 + size]
        if (
            len(check) != 4
            or struct.unpack("<I", header[8:])[0] != masked_crc(header[:8])
            or struct.unpack("<I", check)[0] != masked_crc(record)
        ):
            raise InputError(f"{name}: damaged at byte {at}; expected a whole TFRecord frame")
        yield record
        at += 16 + size


# Shards


def read_shard(directory: Place, shard: Shard) -> bytes:
    """Reads a shard file, uncompressed, and checks it against the manifest.

    Raises:
        InputError: the file is missing, or its size or checksum differs.
    """
    path = directory / shard.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return check_shard(data, path, shard)


def check_shard(data: bytes, path: Place, shard: Shard) -> bytes:
    """Holds the content of a shard file against the manifest, and gives it uncompressed.

    Raises:
        InputError: its size or checksum differs.
    """
    _check_size(len(data), path, shard)
    if path.suffix == ".gz":
        data = b"".join(_unpacked([data], path, shard))
    _check_sha256(hashlib.sha256(data), path, shard)
    return data


def verify_shard(directory: Path, shard: Shard) -> None:
    """Checks a shard file as `read_shard` does, a block at a time: it need not fit in memory.

    Raises:
        InputError: the file is missing, or its size or checksum differs.
    """
    path = directory / shard.file
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            _check_size(os.fstat(file.fileno()).st_size, path, shard)
            blocks: Iterable[bytes] = iter(lambda: file.read(BLOCK), b"")
            for block in _unpacked(blocks, path, shard) if path.suffix == ".gz" else blocks:
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    _check_sha256(digest, path, shard)


def _check_size(size: int, path: Place, shard: Shard) -> None:
    if size != shard.bytes:
        raise InputError(f"{path}: has {size} bytes, the manifest says {shard.bytes}")


def _check_sha256(digest: hashlib._Hash, path: Place, shard: Shard) -> None:
    if digest.hexdigest() != shard.sha256:
        raise InputError(f"{path}: its checksum differs from the manifest's")


def _unpacked(packed: Iterable[bytes], path: Place, shard: Shard) -> Iterator[bytes]:
    """The content of a gzip file, block by block, as long as it is no larger than its records."""
    # A manifest may claim more records than fit in a length.
    left = min(shard.num_examples * MAX_RECORD_BYTES + 1, sys.maxsize)
    reader = zlib.decompressobj(wbits=31)
    try:
        for block in packed:
            content = reader.decompress(block, left)
            left -= len(content)
            if not left or reader.unused_data:
                break
            yield content
    except zlib.error as error:
        raise InputError(f"{path}: not a gzip file: {error}") from None
    if not left or not reader.eof or reader.unused_data:
        raise InputError(f"{path}: cut short, or larger than its records can be")


def iter_records(directory: Place, shard: Shard) -> Iterator[Record]:
    """Decodes the records of a shard, checked against the manifest, one after the other.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    data = read_shard(directory, shard)
    yield from parse_records(data, str(directory / shard.file), shard.num_examples)


def parse_records(data: bytes, name: str, expected: int) -> Iterator[Record]:
    """Decodes the content of a file, one record after the other.

    Raises:
        InputError: a record is damaged, or there are not as many as expected.
    """
    count = 0
    for frame_content in read_frames(data, name):
        try:
            record = decode_record(frame_content)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        count += 1
        yield record
    if count != expected:
        raise InputError(f"{name}: {count} records, the manifest says {expected}")


def read_records(directory: Place, shard: Shard) -> list[Record]:
    """All of `iter_records`."""
    return list(iter_records(directory, shard))
