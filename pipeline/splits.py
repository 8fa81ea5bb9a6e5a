"""Which split a row belongs to. No Beam here: the answer also tells one dataset from another."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.command import InputError
from pipeline.dataset import SPLITS
from pipeline.records import digest_bits
from pipeline.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splitter:
    """Decides the split of each row.

    Attributes:
        by: "positional": the first `validation_size` rows of the train part are validation;
            "hash": a row of the train part is when the hash of its id falls below
            `validation_fraction`, so equal images stay together and a row never moves.
    """

    by: str
    validation_size: int = 0
    validation_fraction: float = 0.0

    def __call__(self, part: str, positions: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Decides for rows of one part.

        Args:
            part: "train" or "test".
            positions: int64 [n], where they stand in the part.
            digests: their `image_digests`.

        Returns:
            uint8 [n], indices into `SPLITS`.
        """
        if part == "test":
            return np.full(len(positions), SPLITS.index("test"), np.uint8)
        if self.by == "positional":
            held_out = positions < self.validation_size
        else:
            held_out = digest_bits(digests, 0, 32) < self.validation_fraction * 2**32
        return np.where(held_out, SPLITS.index("validation"), SPLITS.index("train")).astype(
            np.uint8
        )


def make_splitter(
    by: str, source: Source, validation_size: int | None, validation_fraction: float | None
) -> Splitter:
    """Fills in what the user left open, and refuses what does not go together.

    The defaults are the tutorial's: 10,000 of 60,000 rows, or a sixth.

    Raises:
        InputError: a size for a split by hash, a fraction for a positional one, a size that
            leaves nothing to train on, or positions where they mean nothing.
    """
    if by == "hash":
        if validation_size is not None:
            raise InputError("--validation_size goes with --split_by positional, not hash")
        fraction = 1 / 6 if validation_fraction is None else validation_fraction
        if fraction >= 1:
            raise InputError(f"--validation_fraction {fraction:g}: expected less than 1")
        return Splitter(by=by, validation_fraction=fraction)
    if validation_fraction is not None:
        raise InputError("--validation_fraction goes with --split_by hash, not positional")
    if not source.has_order:
        raise InputError(
            "--split_by positional: image files stand in the order of their classes, so the first"
            " would all be of one class; expected hash"
        )
    train_size = source.part_sizes["train"]
    if validation_size is None:
        validation_size = 10_000 if train_size >= 60_000 else train_size // 6
    if validation_size and validation_size >= train_size:
        raise InputError(
            f"--validation_size {validation_size}: expected less than train's {train_size} rows"
        )
    return Splitter(by=by, validation_size=validation_size)
