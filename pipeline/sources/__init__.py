"""Where images come from: one file per kind of input, each yielding the same blocks.

Synopsis::

    source = open_sources(["idx:/data/mnist"])  # checks what can be checked cheaply
    for block in source.blocks():               # small, picklable
        for rows in source.read(block):         # on a worker
            rows.pixels, rows.labels
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline import gcs
from pipeline.command import InputError

KINDS = ("idx", "tfds", "images", "digits")
IN_FOLDERS = ("idx", "images")
SYNTAX = "idx:DIR, tfds:NAME, images:DIR, digits or auto"


class Block(NamedTuple):
    """A range of rows of one part of a source, small enough to be read by one worker.

    Attributes:
        part: "train" or "test", or a place in it that the source knows.
        first: the first row.
        size: how many.
        source: which of several joined sources it belongs to.
    """

    part: str
    first: int
    size: int
    source: int = 0


class Fault(NamedTuple):
    """A row that cannot be used: why, where it is (a relative name), the hash of its bytes."""

    reason: str
    origin: str
    id: str


class RawRows(NamedTuple):
    """Rows as a source yields them.

    Attributes:
        part: "train" or "test", as the source has it.
        positions: int64 [n], where they stand in that part.
        pixels: uint8 [n, 784].
        labels: int64 [n].
        origins: n relative names.
        faults: further rows, that could not be read.
    """

    part: str
    positions: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    origins: Sequence[str] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def size(self) -> int:
        """Rows read, faults included."""
        return len(self.labels) + len(self.faults)


class NumberedRows(Sequence[str]):
    """The origins of rows without names of their own: ``file#position``, made when asked for."""

    def __init__(self, file: str, positions: np.ndarray) -> None:
        self._file = file
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._file}#{self._positions[index]}"


class Prefixed(Sequence[str]):
    """Origins with the number of their source before them, made when asked for."""

    def __init__(self, prefix: str, origins: Sequence[str]) -> None:
        self._prefix = prefix
        self._origins = origins

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._prefix}{self._origins[index]}"


class Source(Protocol):
    """A set of labelled 28x28 images. Picklable, and cheap to pickle."""

    @property
    def specs(self) -> tuple[str, ...]:
        """What `open_sources` takes to open it again."""

    @property
    def default_split_by(self) -> str:
        """How validation is set apart unless the user says: "positional" or "hash"."""

    @property
    def has_order(self) -> bool:
        """Whether a row's position is its own, and not that of its class."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""

    @property
    def part_sizes(self) -> dict[str, int]:
        """Rows of "train" and of "test"; either may be 0."""

    def describe(self) -> dict[str, Any]:
        """What was read, for the manifest: at least ``kind`` and ``title``; no path, no time."""

    def fingerprint(self) -> list[Any]:
        """What changes when the content may have changed.

        From names, sizes, and modification times or the generations of objects.
        """

    def blocks(self) -> list[Block]:
        """The ranges that cover every row once."""

    def read(self, block: Block) -> Iterator[RawRows]:
        """Yields the rows of a block in order, a bounded number at a time."""


def ranges(part_sizes: dict[str, int], size: int) -> list[Block]:
    """Cuts each part in blocks of `size` rows; the last one of a part may be shorter."""
    return [
        Block(part, first, min(size, total - first))
        for part, total in part_sizes.items()
        for first in range(0, total, size)
    ]


def sort_names(names: set[str]) -> tuple[str, ...]:
    """Sorts class names, as numbers where they all are."""
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def open_sources(
    specs: Sequence[str],
    *,
    num_classes: int | None = None,
    resize: bool = False,
    share: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> Source:
    """Opens the sources named on the command line, as one.

    Args:
        specs: one or several.
        num_classes: fixes the number of classes of ``idx:`` sources.
        resize: whether ``images:`` of other sizes are resized.
        share: whether what ``tfds:`` had to prepare is published where others read it; if not, it
            can be described, and not be read.
        environ: where ``auto`` looks.

    Raises:
        InputError: there is no such source, or it cannot be read, or all have less than two
            classes together.
    """
    kinds = {spec.partition(":")[0] for spec in specs}
    if num_classes is not None and not kinds & {"idx", "auto"}:
        raise InputError(f"--num_classes {num_classes}: goes with idx: sources alone")
    if resize and "images" not in kinds:
        raise InputError("--resize: goes with images: sources alone")
    # A source's libraries are loaded only when it is used.
    joined = importlib.import_module("pipeline.sources.joined")
    alone = len(specs) == 1
    return joined.join([_open(spec, alone, num_classes, resize, share, environ) for spec in specs])


def _open(
    spec: str,
    alone: bool,
    num_classes: int | None,
    resize: bool,
    share: bool,
    environ: Mapping[str, str],
) -> Source:
    kind, _, argument = spec.partition(":")
    if kind not in (*KINDS, "auto"):
        raise InputError(f"--source {spec}: unknown source; expected {SYNTAX}")
    if kind in ("digits", "auto") and ":" in spec:
        raise InputError(f"--source {spec}: {kind} takes no argument; expected {SYNTAX}")
    if kind not in ("digits", "auto") and not argument:
        raise InputError(f"--source {spec}: expected something after the colon: {SYNTAX}")
    if "://" in argument and not (kind in IN_FOLDERS and argument.startswith(gcs.SCHEME)):
        expected = "a local folder or gs://bucket/folder" if kind in IN_FOLDERS else "a name"
        raise InputError(f"--source {spec}: expected {expected}")
    module = importlib.import_module(f"pipeline.sources.{kind}")
    if kind == "idx":
        return module.open_source(argument, num_classes, alone=alone)
    if kind == "images":
        return module.open_source(argument, resize=resize)
    if kind == "auto":
        return module.open_source(environ, num_classes, share=share)
    if kind == "tfds":
        return module.open_source(argument, share=share)
    return module.open_source(argument)
