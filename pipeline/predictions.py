"""A model's answers as files of JSON lines, one for each shard of the split and in its order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import apache_beam as beam
import numpy as np

from pipeline.metrics import predict
from pipeline.storage import Place, open_atomic, place
from pipeline.tally import ScoredBlock


class Answers(NamedTuple):
    """What of a block is saved; `first` is the position in the shard of the first row.

    Attributes:
        first: an integer.
        ids: n of them.
        labels: int64 [n].
        probabilities: float32 [n, C].
    """

    first: int
    ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray


def file_name(shard: int, num_shards: int) -> str:
    """The name of the file that goes with a shard."""
    return f"predictions-{shard:05d}-of-{num_shards:05d}.jsonl"


def lines(answers: Answers) -> Iterator[str]:
    """Yields a line of JSON for each row.

    A probability is written with the fewest digits that no other float32 shares.
    """
    texts = answers.probabilities.astype(str)
    classes = predict(answers.probabilities).tolist()
    rows = zip(answers.ids, answers.labels.tolist(), classes, texts, strict=True)
    for name, label, predicted, row in rows:
        content = {
            "id": name,
            "label": label,
            "class": predicted,
            "probabilities": [float(text) for text in row],
        }
        yield json.dumps(content) + "\n"


@dataclasses.dataclass(eq=False)
class WritePredictions(beam.PTransform):
    """Brings the answers of each shard together and writes its file; a shard without rows too."""

    num_shards: int
    directory: Place

    def expand(self, scored: beam.PCollection[ScoredBlock]) -> beam.PCollection[str]:
        """ScoredBlock -> the names of the files."""
        numbers = [(shard, None) for shard in range(self.num_shards)]
        every = scored.pipeline | "EveryShard" >> beam.Create(numbers)
        return (
            (scored | "Key" >> beam.Map(_by_shard), every)
            | "Flatten" >> beam.Flatten()
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.Map(_write, self.num_shards, str(self.directory))
        )


def _by_shard(scored: ScoredBlock) -> tuple[int, Answers | None]:
    block = scored.block
    return block.shard, Answers(block.first, block.ids, block.labels, scored.answers[0])


def _write(keyed: tuple[int, Iterable[Answers | None]], num_shards: int, directory: str) -> str:
    shard, found = keyed
    name = file_name(shard, num_shards)
    blocks = sorted((Answers(*each) for each in found if each is not None), key=lambda a: a.first)
    with open_atomic(place(directory) / name) as file:
        for answers in blocks:
            file.write("".join(lines(answers)).encode())
    return name
