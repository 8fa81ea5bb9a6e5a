"""What a pass over a split adds up to, for one model or several: counts, and pairs of models.

Like `pipeline.metrics.Counts`, of which it is made, a tally is merged exactly, in any order, and
`tally_json` keeps every bit of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.dataset import ID_LENGTH, Shard
from pipeline.metrics import PAIRED, Counts, count, pair, zero_counts
from pipeline.shown import ScoredImage

SUMS = 1 << 256  # sums of hashes are kept modulo this
# The fields of Counts that are arrays, and those that are images.
TABLES = ("confusion", "bins", "levels")
IMAGES = ("mistakes", "uncertain", "samples")
NAMED_STRETCHES = 4  # of a shard, where not every record was read once


class RecordBlock(NamedTuple):
    """Some records of one shard, in order.

    Attributes:
        shard: its number.
        first: the position in the shard of the first of them.
        pixels: uint8 [n, 784].
        labels: int64 [n].
        ids: n of them.
    """

    shard: int
    first: int
    pixels: np.ndarray
    labels: np.ndarray
    ids: list[str]


class ScoredBlock(NamedTuple):
    """A block, and of each model its probabilities: float32 [n, C]."""

    block: RecordBlock
    answers: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """What is known of the rows scored so far.

    Attributes:
        read: which rows, as stretches (shard, first, end) in order, each from `first` on and
            before `end`. Those that touch are joined, so a split that was read once and whole has
            one for each shard; rows read twice stand in two.
        rows: `sum_rows` of them.
        models: the counts of each model; those of the first alone hold images.
        paired: `metrics.pair` of the first model with each of the others.
    """

    read: tuple[tuple[int, int, int], ...]
    rows: int
    models: tuple[Counts, ...]
    paired: tuple[np.ndarray, ...]

    def __add__(self, other: Tally) -> Tally:
        models = zip(self.models, other.models, strict=True)
        paired = zip(self.paired, other.paired, strict=True)
        return Tally(
            read=_joined(self.read + other.read),
            rows=(self.rows + other.rows) % SUMS,
            models=tuple(one + two for one, two in models),
            paired=tuple(one + two for one, two in paired),
        )


def _joined(stretches: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Joins those that touch: the same rows, as often, in fewer stretches, in order."""
    found: list[tuple[int, int, int]] = []
    for shard, first, end in sorted(stretches):
        if found and found[-1][0] == shard and found[-1][2] == first:
            found[-1] = (shard, found[-1][1], end)
        else:
            found.append((shard, first, end))
    return tuple(found)


def zero_tally(num_classes: int, num_models: int) -> Tally:
    """The tally of no rows."""
    return Tally(
        read=(),
        rows=0,
        models=(zero_counts(num_classes),) * num_models,
        paired=(np.zeros((num_classes, len(PAIRED)), np.int64),) * (num_models - 1),
    )


def tally(scored: ScoredBlock) -> Tally:
    """Counts a block of at least one row."""
    block, answers = scored
    return Tally(
        read=((block.shard, block.first, block.first + len(block.ids)),),
        rows=sum_rows(block.ids, block.labels.tolist()),
        models=tuple(
            count(block.labels, answer, block.ids, block.pixels, with_images=number == 0)
            for number, answer in enumerate(answers)
        ),
        paired=tuple(pair(block.labels, answers[0], other) for other in answers[1:]),
    )


def tally_json(total: Tally) -> str:
    """A tally as text, which `parse_tally` reads back."""
    return json.dumps(
        {
            "read": total.read,
            "rows": total.rows,
            "models": [_plain(counts) for counts in total.models],
            "paired": [table.tolist() for table in total.paired],
        }
    )


def parse_tally(text: str) -> Tally:
    """Reads `tally_json` back."""
    raw = json.loads(text)
    return Tally(
        read=tuple((shard, first, end) for shard, first, end in raw["read"]),
        rows=raw["rows"],
        models=tuple(_counts(each) for each in raw["models"]),
        paired=tuple(np.array(table, np.int64) for table in raw["paired"]),
    )


def _plain(counts: Counts) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(Counts):
        value = getattr(counts, field.name)
        if field.name in IMAGES:
            value = [(*image[:3], image[3].hex(), image[4].hex()) for image in value]
        plain[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return plain


def _counts(plain: dict[str, Any]) -> Counts:
    fields: dict[str, Any] = {name: np.array(plain[name], np.int64) for name in TABLES}
    for name in IMAGES:
        fields[name] = tuple(
            ScoredImage(id_, label, predicted, bytes.fromhex(probabilities), bytes.fromhex(pixels))
            for id_, label, predicted, probabilities, pixels in plain[name]
        )
    return Counts(log_loss_sums=tuple(plain["log_loss_sums"]), **fields)


def sum_rows(ids: Sequence[str], labels: Sequence[int]) -> int:
    """Sums hashes of rows, each of its image and label, modulo `SUMS`: in any order the same."""
    rows = (f"{id_[:ID_LENGTH]} {label}" for id_, label in zip(ids, labels, strict=True))
    return sum(int.from_bytes(hashlib.sha256(row.encode()).digest()) for row in rows) % SUMS


def make_test_id(total: Tally, class_names: Sequence[str]) -> str:
    """Names the rows that judged a model: 32 hex digits over images, labels and class names.

    In which order and in how many files they lie does not matter.
    """
    content = [list(class_names), total.models[0].num_examples, total.rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:ID_LENGTH]


def require_all_read_once(total: Tally, shards: Sequence[Shard]) -> None:
    """Makes sure that every record of a split was scored once.

    Raises:
        RuntimeError: one was not, or was more than once.
    """
    for number, shard in enumerate(shards):
        size = shard.num_examples
        found = [(first, end) for of, first, end in total.read if of == number]
        if found != ([(0, size)] if size else []):
            rows = sum(end - first for first, end in found)
            where = ", ".join(f"{first}-{end}" for first, end in found[:NAMED_STRETCHES])
            raise RuntimeError(
                f"{shard.file}: {rows} records scored ({where or 'none'}); the manifest says"
                f" {size}, and each is to be scored once"
            )
