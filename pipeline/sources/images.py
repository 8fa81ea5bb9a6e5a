"""``images:DIR``: a tree ``{train,test}/CLASS/*.png`` (or jpg), most people's own data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.command import InputError, log
from pipeline.dataset import MAX_CLASSES, NUM_PIXELS
from pipeline.sources import Block, Fault, RawRows, sort_names

PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ROWS_PER_BLOCK = 1024
MAX_FILE_BYTES = 1 << 26
READ_SIZE = 1 << 20
# https://www.w3.org/TR/png-3: values of a pixel by colour type, and by interlace method the
# passes (left, top, step across, step down) in which the pixels stand.
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_PALETTE = 3
PNG_PASSES = (
    ((0, 0, 1, 1),),
    (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ),
)
MAX_IMAGE_PIXELS = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassFolder:
    """One folder of images: its part, its name, its class and how many images it holds."""

    part: str
    name: str
    label: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesSource:
    """A tree of image files; see `pipeline.sources.Source`."""

    specs: tuple[str, ...]
    root: Path
    class_names: tuple[str, ...]
    folders: tuple[ClassFolder, ...]
    listing_hash: str
    resize: bool
    default_split_by: str = "hash"
    has_order: bool = False

    @property
    def part_sizes(self) -> dict[str, int]:
        """Files of each part."""
        return {
            part: sum(folder.size for folder in self.folders if folder.part == part)
            for part in PARTS
        }

    def describe(self) -> dict[str, Any]:
        """Names the kind; a folder's name is a path."""
        return {"kind": "images", "title": "images from folders", "resized": self.resize}

    def fingerprint(self) -> list[Any]:
        """A hash of every file's relative name, size and modification time."""
        return [self.listing_hash]

    def blocks(self) -> list[Block]:
        """Ranges of the sorted files of each class folder; `part` names the folder."""
        return [
            Block(f"{folder.part}/{folder.name}", first, min(ROWS_PER_BLOCK, folder.size - first))
            for folder in self.folders
            for first in range(0, folder.size, ROWS_PER_BLOCK)
        ]

    def read(self, block: Block) -> Iterator[RawRows]:
        """Reads the files of a block; what cannot be read becomes a fault."""
        part, name = block.part.split("/", 1)
        label = self.class_names.index(name)
        folder = self.root / part / name
        names = list_images(folder, folder.stat().st_mtime_ns)[
            block.first : block.first + block.size
        ]
        if len(names) != block.size:
            raise RuntimeError(f"{self.root / part / name}: changed while it was read")
        pixels, origins, faults = [], [], []
        for file_name in names:
            # A name need not be text: what is not is written out, as "\\xff".
            printable = os.fsencode(file_name).decode(errors="backslashreplace")
            origin = f"{part}/{name}/{printable}"
            try:
                data = _read_file(self.root / part / name / file_name)
                pixels.append(decode(data, resize=self.resize))
                origins.append(origin)
            except BadImageError as error:
                faults.append(
                    Fault(error.reason, origin, hashlib.sha256(error.data).hexdigest()[:32])
                )
        yield RawRows(
            part=part,
            positions=np.zeros(len(pixels), np.int64),
            pixels=np.array(pixels, np.uint8).reshape(-1, NUM_PIXELS),
            labels=np.full(len(pixels), label, np.int64),
            origins=origins,
            faults=tuple(faults),
        )


class BadImageError(Exception):
    """A file that is no image this job can use: a short reason, and what was read of it."""

    def __init__(self, reason: str, data: bytes) -> None:
        super().__init__(reason)
        self.reason = reason
        self.data = data


def open_source(directory: str, *, resize: bool) -> ImagesSource:
    """Lists a tree of images.

    Raises:
        InputError: no such folder, no class folders, or not 2 to 256 classes.
    """
    root = Path(directory)
    try:
        if not root.is_dir():
            raise InputError(f"--source images:{directory}: no such folder")
    except OSError as error:  # too long a name
        raise InputError(f"--source images:{directory}: {error.strerror}") from None
    found = {part: _class_names(root / part) for part in PARTS}
    class_names = sort_names(set().union(*found.values()))
    if not 2 <= len(class_names) <= MAX_CLASSES:
        raise InputError(
            f"--source images:{directory}: {len(class_names)} class folders in train and test,"
            f" expected 2 to {MAX_CLASSES}"
        )
    for name in class_names:
        if os.fsencode(name).decode(errors="ignore") != name:
            raise InputError(
                f"--source images:{directory}: class folder {name!r}: expected a name in UTF-8"
            )
    digest = hashlib.sha256()
    folders = [
        ClassFolder(
            part=part,
            name=name,
            label=class_names.index(name),
            size=_scan(root / part / name, f"{part}/{name}", digest),
        )
        for part in PARTS
        for name in class_names
        if name in found[part]
    ]
    return ImagesSource(
        specs=(f"images:{root.absolute()}",),
        root=root.absolute(),
        class_names=class_names,
        folders=tuple(folders),
        listing_hash=digest.hexdigest(),
        resize=resize,
    )


def _class_names(part: Path) -> set[str]:
    """The class folders of a part; a part that is not there has none."""
    try:
        with os.scandir(part) as entries:
            return {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"{part}: cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=4)  # a worker reads many blocks of one folder
def list_images(folder: Path, _modified: int) -> list[str]:
    """The names of a folder's image files, sorted: the same list on every machine."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_image(e.name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _scan(folder: Path, relative: str, digest: Any) -> int:
    """Counts a folder's images and hashes what would change if one of them did."""
    found, others = [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_image(entry.name):
                    found.append((os.fsencode(entry.name), *_size_and_time(entry)))
                else:
                    others += not entry.name.startswith(".")
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error}") from None
    if others:
        log.warning(
            "%s: %d entries are not %s and are left out", folder, others, "/".join(SUFFIXES)
        )
    digest.update(repr((relative, sorted(found))).encode())
    return len(found)


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Of a file; a link that leads nowhere is an unreadable image, and has neither."""
    try:
        found = entry.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _read_file(path: Path) -> bytes:
    """Reads an image file, however large it says it is no more than `MAX_FILE_BYTES`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise BadImageError("not a file", b"")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}", b"") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadImageError("too large", data)
    return data


def decode(data: bytes, *, resize: bool) -> np.ndarray:
    """Decodes a grey image; uint8 [784].

    Colours are accepted where they are all grey, and transparency where nothing is transparent.

    Args:
        data: the content of a PNG or JPEG file.
        resize: whether an image of another size is resized (with anti-aliasing) or refused.

    Raises:
        BadImageError: not an image, damaged, not grey, or of another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise BadImageError("too large", data)
            if (width, height) != (28, 28) and not resize:
                raise BadImageError("wrong size", data)
            if image.format == "PNG":  # checks what loading it would not: every checksum
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
                if not _is_whole_png(data):
                    raise BadImageError("damaged", data)
            grey = _grey(image, data)
    except BadImageError:
        raise
    except Image.DecompressionBombError:
        raise BadImageError("too large", data) from None
    except Exception:  # Pillow's decoders fail in ways of their own on damaged files
        raise BadImageError("damaged", data) from None
    if grey.size != (28, 28):
        grey = grey.resize((28, 28), Image.Resampling.BICUBIC)
    return np.asarray(grey, np.uint8).reshape(NUM_PIXELS)


def _is_whole_png(data: bytes) -> bool:
    """Checks what Pillow lets pass: rows that are missing at the end, and a missing palette."""
    chunks = list(_png_chunks(data))
    header = next(body for kind, body in chunks if kind == b"IHDR")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * PNG_CHANNELS[colour]
    expected = 0
    for left, top, across, down in PNG_PASSES[interlaced]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    found, reader = 0, zlib.decompressobj()
    for kind, piece in chunks:
        while kind == b"IDAT" and piece and found < expected:
            found += len(reader.decompress(piece, READ_SIZE))
            piece = reader.unconsumed_tail
    return found >= expected and (colour != PNG_PALETTE or any(k == b"PLTE" for k, _ in chunks))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (kind, content) of the chunks of a PNG file."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + size]
        at += 12 + size


def _grey(image: Any, data: bytes) -> Any:
    if image.mode in ("L", "1"):
        return image.convert("L")
    if image.mode not in ("LA", "P", "PA", "RGB", "RGBA"):
        raise BadImageError("not 8-bit grey", data)
    red, green, blue, alpha = image.convert("RGBA").split()
    if not red.tobytes() == green.tobytes() == blue.tobytes() or alpha.getextrema()[0] < 255:
        raise BadImageError("not 8-bit grey", data)
    return red
