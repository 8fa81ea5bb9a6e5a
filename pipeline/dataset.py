"""The contract between the stages: what a record is, what a dataset folder is.

A record is a serialized ``tf.train.Example`` with

    image   784 float32 in [0, 1], row-major, exactly ``float32(uint8) / float32(255)``
    label   one int64
    id      bytes: `image_ids` of the pixels; further copies get ``-1``, ``-2``, ...

in a TFRecord file. ``manifest.json`` names every file with its size and checksum and is
written last: without it there is no dataset, and nobody globs.

The encoding is written out here, rather than through TensorFlow, because it is the hot
path of the Beam stages: packing 784 floats this way costs a copy instead of a Python loop,
and a worker need not spend seconds importing TensorFlow. The tests hold it against
``tf.train.Example`` and ``tf.data.TFRecordDataset``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from pipeline import command, storage
from pipeline.command import InputError

PROG = "pipeline.dataset"
FORMAT_VERSION = 1
IMAGE_SHAPE = (28, 28, 1)
NUM_PIXELS = 784
MAX_CLASSES = 256
SPLITS = ("train", "validation", "test")
MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.json"
QUARANTINE_NAME = "quarantine"
RECORDS_NAME = "records.jsonl"  # in it, what was set aside
DUPLICATES = ("images", "copies", "conflicting", "leaked", "held_out")
COMPRESSIONS = {"none": "", "gzip": ".gz"}
SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5}}-of-[0-9]{{5}}\.tfrecord(\.gz)?")
MAX_RECORD_BYTES = 4096
ID_LENGTH = 32

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


def _message(field: int, body: bytes) -> bytes:
    """A length-delimited field (wire type 2): bytes, or a message."""
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _feature(name: str, kind: int, values: bytes) -> bytes:
    """One entry of the map ``Features.feature``; kind 1 bytes, 2 floats, 3 integers."""
    return _message(
        1, _message(1, name.encode()) + _message(2, _message(kind, _message(1, values)))
    )


def encode_record(pixels: bytes, label: int, record_id: str) -> bytes:
    """Serializes one record; its map entries stand in the order of their names.

    Args:
        pixels: 784 bytes, one per pixel, unscaled.
        label: from 0 to 255.
        record_id: ASCII.
    """
    scaled = SCALE_TABLE[np.frombuffer(pixels, np.uint8)].astype("<f4").tobytes()
    return _message(
        1,
        _feature("id", 1, record_id.encode("ascii"))
        + _feature("image", 2, scaled)
        + _feature("label", 3, _varint(label)),
    )


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
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
        tag, at = _read_varint(data, at)
        length, at = _read_varint(data, at)
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
        label, end = _read_varint(found["label"], 0)
        record = Record(image, label, bytes(found["id"]).decode("ascii"))
    except (KeyError, IndexError, UnicodeDecodeError, ValueError):
        raise ValueError("not a record of this format") from None
    if image.size != NUM_PIXELS or end != len(found["label"]) or len(found) != 3:
        raise ValueError("not a record of this format")
    return record


# TFRecord framing: length, checksum of the length, data, checksum of the data
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
    """Wraps one record as it stands in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return b"".join(
        (
            length,
            struct.pack("<I", _masked_crc(length)),
            record,
            struct.pack("<I", _masked_crc(record)),
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
    checks = [_masked_crc(record.tobytes()) for record in records]
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
            or struct.unpack("<I", header[8:])[0] != _masked_crc(header[:8])
            or struct.unpack("<I", check)[0] != _masked_crc(record)
        ):
            raise InputError(f"{name}: damaged at byte {at}; expected a whole TFRecord frame")
        yield record
        at += 16 + size


# The manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its name in the dataset's folder, records, size in bytes, checksum.

    The checksum is the SHA-256 of the content, uncompressed, in hex: what gzip makes of equal
    content depends on the machine.
    """

    file: str
    num_examples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One split: records in all, records of each class, files in order."""

    num_examples: int
    label_counts: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset folder holds; see the contract for each field.

    Attributes:
        dataset_id: `dataset_id` of the shards; equal content has equal ids.
        source: what was read, as its source describes itself; no path, no time.
        quarantined: records set aside, ``{"count", "by_reason"}``.
        dropped: records left out on request.
        flagged: records written although something about them is odd, by what it is.
        duplicates: how often the same pixels occur, and how often with different labels.
    """

    format_version: int
    dataset_id: str
    source: dict[str, Any]
    split_by: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    splits: dict[str, Split]
    quarantined: dict[str, Any]
    dropped: int
    flagged: dict[str, int]
    duplicates: dict[str, Any]


def dataset_id(shards: Iterable[Shard], class_names: Sequence[str]) -> str:
    """Hashes what a dataset holds: 32 hex digits over checksums, class names and format."""
    files = [[shard.file.removesuffix(".gz"), shard.sha256] for shard in shards]
    content = [FORMAT_VERSION, list(class_names), files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:ID_LENGTH]


def shard_name(split: str, index: int, num_shards: int, compression: str = "none") -> str:
    """The file name of one shard: ``train-00003-of-00008.tfrecord``, with ``.gz`` if it is."""
    return f"{split}-{index:05d}-of-{num_shards:05d}.tfrecord{COMPRESSIONS[compression]}"


def manifest_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"


def parse_manifest(text: str, name: str) -> Manifest:
    """Reads `manifest_json` back, trusting nothing in it.

    Raises:
        InputError: not a manifest, of another format version, or naming files elsewhere.
    """
    try:
        raw = json.loads(text)
        version = raw["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{name}: not a dataset manifest") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name}: format_version is {version!r}, expected {FORMAT_VERSION};"
            " run pipeline.preprocess again, with --overwrite or into a new folder"
        )
    try:
        manifest = Manifest(
            **raw
            | {
                "class_names": tuple(raw["class_names"]),
                "image_shape": tuple(raw["image_shape"]),
                "splits": {split: _parse_split(raw["splits"][split]) for split in SPLITS},
            }
        )
        _check_manifest(manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{name}: not a valid manifest: {error}") from None
    return manifest


def _parse_split(raw: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in raw["shards"])
    return Split(
        num_examples=raw["num_examples"], label_counts=tuple(raw["label_counts"]), shards=shards
    )


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError where the manifest contradicts itself."""
    if manifest.image_shape != IMAGE_SHAPE:
        raise ValueError(f"image_shape is {manifest.image_shape}, expected {IMAGE_SHAPE}")
    if type(manifest.num_classes) is not int or not 2 <= manifest.num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {manifest.num_classes!r}, expected 2 to {MAX_CLASSES}")
    if len(manifest.class_names) != manifest.num_classes:
        raise ValueError(
            f"{len(manifest.class_names)} class names for {manifest.num_classes} classes"
        )
    if not all(isinstance(name, str) for name in manifest.class_names):
        raise ValueError("a class name is not a string")
    if len(set(manifest.class_names)) != manifest.num_classes:
        raise ValueError("a class name occurs twice")
    if manifest.split_by not in ("positional", "hash"):
        raise ValueError(f"split_by is {manifest.split_by!r}, expected positional or hash")
    for name, split in manifest.splits.items():
        for shard in split.shards:
            if not SHARD_FILE.fullmatch(shard.file):
                raise ValueError(f"shard {shard.file!r} is not a plain file name")
        if len(split.label_counts) != manifest.num_classes:
            raise ValueError(f"{name} counts {len(split.label_counts)} labels")
        in_shards = [shard.num_examples for shard in split.shards]
        for count in (split.num_examples, *split.label_counts, *in_shards):
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} counts {count!r}, expected a whole number")
        if not split.num_examples == sum(split.label_counts) == sum(in_shards):
            raise ValueError(f"{name} has {split.num_examples} examples, but its parts differ")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    if len({shard.file for shard in shards}) != len(shards):
        raise ValueError("a file is listed twice")
    _check_remarks(manifest)
    if manifest.dataset_id != dataset_id(shards, manifest.class_names):
        raise ValueError("dataset_id does not follow from the checksums")


def _check_remarks(manifest: Manifest) -> None:
    """Raises ValueError or KeyError where what was noted of the source is not as agreed."""
    if not isinstance(manifest.source["title"], str):
        raise ValueError("source has no title")
    counts = [manifest.dropped, manifest.quarantined["count"], manifest.flagged["blank"]]
    for count in (*counts, *(manifest.duplicates[kind] for kind in DUPLICATES)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{count!r} is no number of records")
    if sum(manifest.quarantined["by_reason"].values()) != manifest.quarantined["count"]:
        raise ValueError("quarantined counts more or fewer than its reasons")


def load_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a dataset folder.

    Raises:
        InputError: there is none, or it is not valid.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; expected a dataset")
    try:
        return parse_manifest(path.read_text(), str(path))
    except FileNotFoundError:
        raise InputError(
            f"{directory}: no {MANIFEST_NAME}; expected a dataset written by pipeline.preprocess"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def read_shard(directory: Path, shard: Shard) -> bytes:
    """Reads a shard file, uncompressed, and checks it against the manifest.

    Raises:
        InputError: the file is missing, or its size or checksum differs.
    """
    path = directory / shard.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) != shard.bytes:
        raise InputError(f"{path}: has {len(data)} bytes, the manifest says {shard.bytes}")
    if path.suffix == ".gz":
        data = _uncompress(data, path, shard.num_examples * MAX_RECORD_BYTES)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise InputError(f"{path}: its checksum differs from the manifest's")
    return data


def _uncompress(data: bytes, path: Path, limit: int) -> bytes:
    """Uncompresses a gzip file that may not grow beyond a limit."""
    reader = zlib.decompressobj(wbits=31)
    try:
        # A manifest may claim more records than fit in a length.
        content = reader.decompress(data, min(limit + 1, sys.maxsize))
    except zlib.error as error:
        raise InputError(f"{path}: not a gzip file: {error}") from None
    if len(content) > limit or not reader.eof or reader.unused_data:
        raise InputError(f"{path}: cut short, or larger than its records can be")
    return content


def read_records(directory: Path, shard: Shard) -> list[Record]:
    """Reads and decodes a whole shard, checked against the manifest.

    Raises:
        InputError: the file is damaged or is not what the manifest says.
    """
    path = str(directory / shard.file)
    try:
        records = [
            decode_record(record) for record in read_frames(read_shard(directory, shard), path)
        ]
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if len(records) != shard.num_examples:
        raise InputError(f"{path}: {len(records)} records, the manifest says {shard.num_examples}")
    return records


# The command


def parse(argv: list[str]) -> tuple[str, list[Path]]:
    """Parses the command line: the action, and the datasets it is about."""
    parser = command.Parser(PROG, __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    for name, operands, text in (
        ("verify", 1, "check everything the manifest states"),
        ("describe", 1, "print splits, classes and statistics"),
        ("diff", 2, "print what changed from one dataset to another"),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.error = parser.error
        action.add_argument("dirs", nargs=operands, metavar="DIR")
    flags = parser.parse_args(argv)
    return flags.action, [storage.folder(name) for name in flags.dirs]


def execute(request: tuple[str, list[Path]]) -> int:
    """Runs the command; a dataset that is not what its manifest states is wrong input."""
    from pipeline import inspection

    action, directories = request
    if action != "verify":
        command.show(
            inspection.describe(*directories)
            if action == "describe"
            else inspection.diff(*directories)
        )
        return command.DONE
    problems = inspection.verify(*directories)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return command.BAD_INPUT
    manifest = load_manifest(directories[0])
    total = sum(split.num_examples for split in manifest.splits.values())
    command.show(f"{directories[0]}: {total:,} records, all as the manifest states")
    return command.DONE


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
