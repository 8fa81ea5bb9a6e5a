"""``images:DIR``: a tree ``{train,test}/CLASS/*.png`` (or jpg), most people's own data.

DIR is a local folder or ``gs://bucket/folder``.

What the driver handles is one element for each `ROWS_PER_BLOCK` files: a tree of 70,000 makes
about 70 blocks, and the workers list a block's folder again and open its files. The driver only
scans the folders (`_scan`), because the number of files decides the blocks, and their names,
sizes and times the fingerprint: it opens none of them, keeps the names of one folder at a time,
and takes from the source a count for each folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import reading, storage
from pipeline.command import InputError, log
from pipeline.dataset import MAX_CLASSES, NUM_PIXELS, is_line
from pipeline.sources import Block, Fault, RawRows, sort_names
from pipeline.sources.decoding import BadImageError, decode, read_file
from pipeline.storage import Place

PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ROWS_PER_BLOCK = 1024


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
    root: Place
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
        """A hash of every file's relative name, size and modification time or generation."""
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
        folder = self.root / part / name
        names = list_images(folder, self.listing_hash)[block.first : block.first + block.size]
        if len(names) != block.size:
            raise InputError(f"{folder}: changed while it was read")
        # A name need not be text: what is not is written out, as "\\xff".
        printable = [os.fsencode(each).decode(errors="backslashreplace") for each in names]
        origins = [f"{part}/{name}/{each}" for each in printable]

        def read(number: int) -> np.ndarray | Fault:
            return _read_image(folder / names[number], origins[number], resize=self.resize)

        pixels, kept, faults = [], [], []
        for origin, found in zip(
            origins, reading.each(folder, read, range(block.size)), strict=True
        ):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                pixels.append(found)
                kept.append(origin)
        yield RawRows(
            part=part,
            positions=np.zeros(len(pixels), np.int64),
            pixels=np.array(pixels, np.uint8).reshape(-1, NUM_PIXELS),
            labels=np.full(len(pixels), self.class_names.index(name), np.int64),
            origins=kept,
            faults=tuple(faults),
        )


def _read_image(path: Place, origin: str, *, resize: bool) -> np.ndarray | Fault:
    """One image, uint8 [784], or why it is none."""
    try:
        return decode(read_file(path), resize=resize)
    except BadImageError as error:
        return Fault(error.reason, origin, hashlib.sha256(error.data).hexdigest()[:32])


def open_source(directory: str, *, resize: bool) -> ImagesSource:
    """Lists a tree of images.

    Raises:
        InputError: no such folder, no class folders, or more than 256 classes.
    """
    root = storage.place(directory)
    try:
        if not root.is_dir():
            raise InputError(f"--source images:{directory}: no such folder")
    except OSError as error:  # too long a name
        raise InputError(f"--source images:{directory}: {error.strerror}") from None
    found = {part: _class_names(root / part) for part in PARTS}
    class_names = sort_names(set().union(*found.values()))
    _check_class_names(directory, class_names)
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


def _check_class_names(directory: str, class_names: tuple[str, ...]) -> None:
    if not 1 <= len(class_names) <= MAX_CLASSES:
        raise InputError(
            f"--source images:{directory}: {len(class_names)} class folders in train and test,"
            f" expected 1 to {MAX_CLASSES}"
        )
    for name in class_names:
        if os.fsencode(name).decode(errors="ignore") != name or not is_line(name):
            raise InputError(
                f"--source images:{directory}: class folder {name!r}: expected a name in UTF-8,"
                " of one line, without control characters"
            )


def _class_names(part: Place) -> set[str]:
    """The class folders of a part; a part that is not there has none."""
    try:
        return {e.name for e in part.iterdir() if not e.name.startswith(".") and e.is_dir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"{part}: cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=4)  # a worker reads many blocks of one folder
def list_images(folder: Place, _listing_hash: str) -> list[str]:
    """The names of a folder's image files, sorted: the same list on every machine."""
    return sorted(name for name in reading.stamps(folder) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _scan(folder: Place, relative: str, digest: Any) -> int:
    """Counts a folder's images and hashes what would change if one of them did."""
    try:
        found = reading.stamps(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error}") from None
    others = sum(not _is_image(name) and not name.startswith(".") for name in found)
    if others:
        log.warning(
            "%s: %d entries are not %s and are left out", folder, others, "/".join(SUFFIXES)
        )
    images = sorted((os.fsencode(name), *stamp) for name, stamp in found.items() if _is_image(name))
    digest.update(repr((relative, images)).encode())
    return len(images)
