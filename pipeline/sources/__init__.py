"""Where images come from: one file per kind of input, each yielding the same blocks.

Synopsis::

    source = open_source("idx:/data/mnist")     # checks what can be checked cheaply
    for block in source.blocks():               # small, picklable
        for rows in source.read(block):         # on a worker
            rows.pixels, rows.labels
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.command import InputError

KINDS = ("idx", "tfds", "digits")
SYNTAX = "idx:DIR, tfds:NAME, digits or auto"


class Block(NamedTuple):
    """A range of rows of one part of a source, small enough to be read by one worker."""

    part: str
    first: int
    size: int


class RawRows(NamedTuple):
    """Rows as a source yields them.

    Attributes:
        part: "train" or "test", as the source has it.
        first: the position of the first row in that part.
        pixels: uint8 [n, 784].
        labels: int64 [n].
    """

    part: str
    first: int
    pixels: np.ndarray
    labels: np.ndarray


class Source(Protocol):
    """A set of labelled 28x28 images. Picklable, and cheap to pickle."""

    @property
    def spec(self) -> str:
        """What `open_source` takes to open it again."""

    @property
    def default_split_by(self) -> str:
        """How validation is set apart unless the user says: "positional" or "hash"."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""

    @property
    def part_sizes(self) -> dict[str, int]:
        """Rows of "train" and of "test"."""

    def describe(self) -> dict[str, Any]:
        """What was read, for the manifest: at least ``kind`` and ``title``; no path, no time."""

    def fingerprint(self) -> list[Any]:
        """What changes when the content may have changed, from names, sizes and times alone."""

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


def open_source(spec: str, environ: Mapping[str, str] = os.environ) -> Source:
    """Opens a source by its name on the command line.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    # A source's libraries are loaded only when it is used.
    if spec == "auto":
        return importlib.import_module("pipeline.sources.auto").open_source(environ)
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise InputError(f"--source {spec}: unknown source; expected {SYNTAX}")
    if kind == "digits" and argument:
        raise InputError(f"--source {spec}: digits takes no argument")
    if kind != "digits" and not argument:
        raise InputError(f"--source {spec}: expected something after the colon: {SYNTAX}")
    return importlib.import_module(f"pipeline.sources.{kind}").open_source(argument)
