"""Several sources as one: yesterday's set and this week's labelled images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.command import InputError
from pipeline.dataset import MAX_CLASSES
from pipeline.sources import Block, Prefixed, RawRows, Source, sort_names

MIN_CLASSES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedSource:
    """The rows of several sources, one after the other; see `pipeline.sources.Source`.

    A class is known by its name: sources may have different classes, and the same in another
    order.
    """

    sources: tuple[Source, ...]

    @property
    def specs(self) -> tuple[str, ...]:
        """What opens them again."""
        return tuple(spec for source in self.sources for spec in source.specs)

    @property
    def default_split_by(self) -> str:
        """Positional only if it is for all."""
        ways = {source.default_split_by for source in self.sources}
        return ways.pop() if len(ways) == 1 else "hash"

    @property
    def has_order(self) -> bool:
        """Whether a position in it means anything."""
        return all(source.has_order for source in self.sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first source's, in its order; then what others add to them, sorted.

        Numbers alone are sorted as a whole, so that a set with fewer digits may come first.
        """
        first = self.sources[0].class_names
        every = {name for source in self.sources for name in source.class_names}
        if all(name.isdecimal() for name in every):
            return sort_names(every)
        return first + sort_names(every - set(first))

    @property
    def part_sizes(self) -> dict[str, int]:
        """Rows of each part."""
        return {
            part: sum(source.part_sizes[part] for source in self.sources)
            for part in ("train", "test")
        }

    def describe(self) -> dict[str, Any]:
        """Lists what was joined."""
        parts = [source.describe() for source in self.sources]
        title = " and ".join(part["title"] for part in parts)
        return {"kind": "joined", "title": title, "sources": parts}

    def fingerprint(self) -> list[Any]:
        """Every source's."""
        return [source.fingerprint() for source in self.sources]

    def blocks(self) -> list[Block]:
        """Every source's blocks, each knowing whose it is."""
        return [
            block._replace(source=index)
            for index, source in enumerate(self.sources)
            for block in source.blocks()
        ]

    def read(self, block: Block) -> Iterator[RawRows]:
        """Reads a block, with labels and positions as they are in the whole."""
        source = self.sources[block.source]
        names = self.class_names
        labels = np.array([names.index(name) for name in source.class_names])
        for rows in source.read(block):
            before = sum(s.part_sizes[rows.part] for s in self.sources[: block.source])
            known = (rows.labels >= 0) & (rows.labels < len(labels))
            moved = np.where(known, labels[np.where(known, rows.labels, 0)], len(names) + 256)
            prefix = f"{block.source + 1}:"
            yield rows._replace(
                labels=moved,
                positions=rows.positions + before,
                origins=Prefixed(prefix, rows.origins),
                faults=tuple(f._replace(origin=prefix + f.origin) for f in rows.faults),
            )


def join(sources: list[Source]) -> Source:
    """One source is itself; several become one.

    Raises:
        InputError: they have too few classes together, or too many.
    """
    source = sources[0] if len(sources) == 1 else JoinedSource(sources=tuple(sources))
    if not MIN_CLASSES <= (found := len(source.class_names)) <= MAX_CLASSES:
        specs = " ".join(f"--source {spec}" for spec in source.specs)
        raise InputError(
            f"{specs}: {found} {'class' if found == 1 else 'classes'} in all,"
            f" expected {MIN_CLASSES} to {MAX_CLASSES}"
        )
    return source
