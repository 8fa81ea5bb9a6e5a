"""``idx:DIR``: IDX files under MNIST's names, gzipped or not, local or ``gs://bucket/folder``.

Format: http://yann.lecun.com/exdb/mnist/ - two zero bytes, the element type (0x08 is an
unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit integer, data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from pipeline import reading, storage
from pipeline.command import InputError
from pipeline.dataset import NUM_PIXELS
from pipeline.reading import NO_FILE, Stamp
from pipeline.sources import Block, NumberedRows, RawRows, ranges
from pipeline.storage import Place

# By the SHA-256 of the labels of train and test.
KNOWN_SETS = {"671ff9d70b4811116d55c3dd479efa7a981e2e62753ef7a6d5c15fea81e63d27": "MNIST"}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
PARTS = {"train": ("train",), "test": ("t10k", "test")}
# A gzip file can only be read from its start, so each block of it reads past all before: large
# blocks keep that cheap, and what is held at once stays small.
ROWS_PER_BLOCK = 16384
ROWS_AT_ONCE = 2048
MAX_GZIP_BLOCKS = 8
READ_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One IDX file: where it is, its stamp, its dimensions, and where its data starts."""

    path: Place
    stamp: Stamp
    shape: tuple[int, ...]
    header_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxSource:
    """IDX files of a folder; see `pipeline.sources.Source`."""

    specs: tuple[str, ...]
    class_names: tuple[str, ...]
    part_sizes: dict[str, int]
    files: dict[str, tuple[IdxFile, IdxFile]]  # of each part that is there: images, labels
    labels_sha256: str
    default_split_by: str = "positional"
    has_order: bool = True

    def describe(self) -> dict[str, Any]:
        """Names the set where its labels are those of a known one; its folder is a path."""
        return {"kind": "idx", "title": KNOWN_SETS.get(self.labels_sha256, "images from IDX files")}

    def fingerprint(self) -> list[Any]:
        """Names, sizes and modification times or generations of the files, and the labels."""
        files = [file for pair in self.files.values() for file in pair]
        # Sets of equal sizes may have equal times, if something has normalised them.
        return [[file.path.name, *file.stamp] for file in files] + [self.labels_sha256]

    def blocks(self) -> list[Block]:
        """Ranges of rows: of a gzip file few, however large it is."""
        blocks = []
        for part, pair in self.files.items():
            size = self.part_sizes[part]
            zipped = any(file.path.suffix == ".gz" for file in pair)
            rows = max(ROWS_PER_BLOCK, -(-size // MAX_GZIP_BLOCKS)) if zipped else ROWS_PER_BLOCK
            blocks += ranges({part: size}, rows)
        return blocks

    def read(self, block: Block) -> Iterator[RawRows]:
        """Yields the rows of a block."""
        images, labels = self.files[block.part]
        with _open(images.path) as image_file, _open(labels.path) as label_file:
            _skip(image_file, images.header_bytes + block.first * NUM_PIXELS)
            _skip(label_file, labels.header_bytes + block.first)
            for rows in ranges({block.part: block.size}, ROWS_AT_ONCE):
                pixels = _read_exactly(image_file, rows.size * NUM_PIXELS, images.path)
                classes = _read_exactly(label_file, rows.size, labels.path)
                first = block.first + rows.first
                positions = np.arange(first, first + rows.size)
                yield RawRows(
                    part=block.part,
                    positions=positions,
                    pixels=np.frombuffer(pixels, np.uint8).reshape(rows.size, NUM_PIXELS),
                    labels=np.frombuffer(classes, np.uint8).astype(np.int64),
                    origins=NumberedRows(images.path.name, positions),
                )


def open_source(directory: str, num_classes: int | None = None, *, alone: bool = True) -> IdxSource:
    """Opens the IDX files of a folder, after checking their headers against their real lengths.

    Args:
        directory: the folder.
        num_classes: how many classes there are; by default the largest label of both parts,
            plus one. A label beyond is for validation to find.
        alone: whether no other source may have the part, train or test, that this one lacks.

    Raises:
        InputError: a file is missing or is not what its header says.
    """
    folder = storage.place(directory)
    try:
        if not folder.is_dir():
            raise InputError(f"--source idx:{directory}: no such folder")
        stamps = reading.stamps(folder)
        parts = PARTS if alone else _parts_there(stamps) or PARTS
        files = {part: _open_pair(folder, stamps, stems) for part, stems in parts.items()}
    except OSError as error:  # a folder that may not be looked into
        raise InputError(f"--source idx:{directory}: cannot be read: {error.strerror}") from None
    largest, labels_sha256 = _sum_up([labels for _, labels in files.values()])
    if num_classes is None:
        num_classes = largest + 1
    return IdxSource(
        specs=(f"idx:{folder.absolute()}",),
        class_names=tuple(str(label) for label in range(num_classes)),
        part_sizes={part: files[part][0].shape[0] if part in files else 0 for part in PARTS},
        files=files,
        labels_sha256=labels_sha256,
    )


def _open_pair(
    folder: Place, stamps: dict[str, Stamp], stems: tuple[str, ...]
) -> tuple[IdxFile, IdxFile]:
    images, labels = (
        inspect(folder / name, stamps[name], dimensions=dimensions)
        for name, dimensions in (
            (_find(folder, stamps, stems, IMAGES), 3),
            (_find(folder, stamps, stems, LABELS), 1),
        )
    )
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise InputError(f"{images.path}: images are {height}x{width}, expected 28x28")
    if images.shape[0] != labels.shape[0]:
        raise InputError(
            f"{labels.path}: {labels.shape[0]} labels for the {images.shape[0]} images of"
            f" {images.path.name}"
        )
    if not images.shape[0]:
        raise InputError(f"{images.path}: holds no images")
    return images, labels


def _parts_there(stamps: dict[str, Stamp]) -> dict[str, tuple[str, ...]]:
    """Those of `PARTS` of which the images, the labels or both are there."""
    return {
        part: stems
        for part, stems in PARTS.items()
        if any(_first(stamps, stems, kind) for kind in (IMAGES, LABELS))
    }


def _find(folder: Place, stamps: dict[str, Stamp], stems: tuple[str, ...], suffix: str) -> str:
    """Finds the name of the one file of this kind."""
    if (found := _first(stamps, stems, suffix)) is None:
        raise InputError(f"{folder}: no {stems[0]}-{suffix} or {stems[0]}-{suffix}.gz")
    return found


def _first(stamps: dict[str, Stamp], stems: tuple[str, ...], suffix: str) -> str | None:
    """Of the names that a file may have, with a dash or a dot, gzipped or not, one that it has."""
    names = (
        f"{stem}-{form}{ending}"
        for stem in stems
        for form in (suffix, suffix.replace("-idx", ".idx"))  # as some copies have it
        for ending in ("", ".gz")
    )
    return next((name for name in names if stamps.get(name, NO_FILE) != NO_FILE), None)


def inspect(path: Place, stamp: Stamp, *, dimensions: int) -> IdxFile:
    """Reads the header and checks that exactly as much data follows as it says.

    The length of gzip content is found by reading through it, a piece at a time, since what
    the file says of itself cannot be relied on.

    Raises:
        InputError: wrong magic number, wrong length, or not readable.
    """
    magic = bytes((0, 0, 8, dimensions))
    header_bytes = 4 + 4 * dimensions
    try:
        with _open(path) as file:
            header = file.read(header_bytes)
            if header[:4] != magic:
                raise InputError(
                    f"{path}: magic number is 0x{header[:4].hex()}, expected 0x{magic.hex()}"
                )
            if len(header) < header_bytes:
                raise InputError(f"{path}: ends inside its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            found = _length_of_rest(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    expected = int(np.prod(shape, dtype=object))
    if found != expected:
        raise InputError(
            f"{path}: {found} bytes of data, its header says"
            f" {' x '.join(map(str, shape))} = {expected}"
        )
    return IdxFile(path=path.absolute(), stamp=stamp, shape=shape, header_bytes=header_bytes)


def _length_of_rest(file: IO[bytes], path: Place) -> int:
    if path.suffix != ".gz":
        here = file.tell()
        return file.seek(0, os.SEEK_END) - here
    return sum(len(piece) for piece in iter(lambda: file.read(READ_SIZE), b""))


def _sum_up(files: list[IdxFile]) -> tuple[int, str]:
    """The largest of all labels, and their SHA-256, read a piece at a time."""
    largest, digest = 0, hashlib.sha256()
    for file in files:
        with _open(file.path) as opened:
            _skip(opened, file.header_bytes)
            while piece := opened.read(READ_SIZE):
                largest = max(largest, max(piece))
                digest.update(piece)
    return largest, digest.hexdigest()


@contextlib.contextmanager
def _open(path: Place) -> Iterator[IO[bytes]]:
    with reading.opened(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield unzipped  # type: ignore[misc]


def _skip(file: IO[bytes], count: int) -> None:
    """Moves on by `count` bytes; a gzip file reads and forgets them in pieces."""
    file.seek(count, 1)


def _read_exactly(file: IO[bytes], count: int, path: Place) -> bytes:
    data = file.read(count)
    if len(data) != count:  # it was checked when the source was opened
        raise InputError(f"{path}: changed while it was read")
    return data
