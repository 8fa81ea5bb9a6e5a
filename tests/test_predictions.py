import json

import apache_beam as beam
import numpy as np
import pytest

from pipeline import predictions, runners
from pipeline.tally import RecordBlock, ScoredBlock


def answers(rows, first=0):
    probabilities = np.array(rows, np.float32)
    ids = [f"{first + i:032x}" for i in range(len(rows))]
    return predictions.Answers(first, ids, np.arange(len(rows)) % 3, probabilities)


def test_lines():
    found = [json.loads(line) for line in predictions.lines(answers([[0.1, 0.7, 0.2], [1, 0, 0]]))]
    assert found == [
        {"id": "0" * 32, "label": 0, "class": 1, "probabilities": [0.1, 0.7, 0.2]},
        {"id": "0" * 31 + "1", "label": 1, "class": 0, "probabilities": [1.0, 0.0, 0.0]},
    ]


def test_probabilities_come_back_to_the_last_bit():
    random = np.random.default_rng(0)
    rows = np.exp(-90 * random.random((200, 5))).astype(np.float32)
    rows[0] = [np.finfo(np.float32).tiny, 1e-45, 0, 1, np.nextafter(np.float32(1), np.float32(0))]
    found = [json.loads(line)["probabilities"] for line in predictions.lines(answers(rows))]
    assert (np.array(found, np.float32) == rows).all()
    assert max(len(repr(value)) for row in found for value in row) < 15


def scored(shard, first, size):
    rows = np.random.default_rng(shard).dirichlet(np.ones(3), 20).astype(np.float32)
    block = RecordBlock(
        shard,
        first,
        np.zeros((size, 784), np.uint8),
        np.arange(first, first + size) % 3,
        [f"{i:032x}" for i in range(first, first + size)],
    )
    return ScoredBlock(block, (rows[first : first + size], None))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_file_for_each_shard_in_its_order_whatever_the_blocks(tmp_path, order):
    for name in "ab":
        (tmp_path / name).mkdir()
    blocks = [scored(0, 0, 5), scored(0, 5, 5), scored(0, 10, 2), scored(2, 0, 3)]
    whole = [scored(0, 0, 12), scored(2, 0, 3)]
    for folder, parts in (("a", [blocks[i] for i in order]), ("b", whole)):
        runners.run(
            runners.beam_options([]),
            lambda root, parts=parts, folder=folder: (
                root | beam.Create(parts) | predictions.WritePredictions(4, tmp_path / folder)
            ),
            "test",
        )
    found = content(tmp_path / "a")
    assert found == content(tmp_path / "b")
    names = [f"predictions-0000{i}-of-00004.jsonl" for i in range(4)]
    assert sorted(found) == names
    assert [found[name].count(b"\n") for name in names] == [12, 0, 3, 0]
    ids = [json.loads(line)["id"] for line in found[names[0]].splitlines()]
    assert ids == [f"{i:032x}" for i in range(12)]
