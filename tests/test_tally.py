import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from pipeline import tally
from pipeline.dataset import Shard
from pipeline.records import image_ids

SIZES = (7, 0, 12)
SHARDS = [
    Shard(file=f"test-{i}", num_examples=n, bytes=1, sha256="0" * 64) for i, n in enumerate(SIZES)
]


def blocks(models=2, classes=3):
    """Scored rows of `SHARDS`, in blocks of 5."""
    random = np.random.default_rng(0)
    for shard, size in enumerate(SIZES):
        for first in range(0, size, 5):
            rows = min(5, size - first)
            pixels = random.integers(0, 256, (rows, 784), np.uint8)
            labels = random.integers(0, classes, rows)
            answers = tuple(
                random.dirichlet(np.ones(classes), rows).astype(np.float32) for _ in range(models)
            )
            block = tally.RecordBlock(shard, first, pixels, labels, image_ids(pixels))
            yield tally.ScoredBlock(block, answers)


def added(parts, models=2):
    return sum(map(tally.tally, parts), tally.zero_tally(3, models))


def test_every_row_once():
    total = added(blocks())
    assert total.read == ((0, 0, 7), (2, 0, 12))
    tally.require_all_read_once(total, SHARDS)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))))
def test_in_any_order_of_blocks_and_of_merging(order):
    parts = list(blocks())
    mixed = [parts[i] for i in order]
    total = added(mixed[:2]) + (added(mixed[3:]) + added(mixed[2:3]))
    assert total.read == ((0, 0, 7), (2, 0, 12))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda parts: parts[1:], "test-0: 2 records"),
        (lambda parts: parts[:-1], "test-2: 10 records"),
        (lambda parts: [*parts, parts[0]], "test-0: 12 records"),
        # as many rows as there should be, but five of them twice
        (lambda parts: [*parts[:3], parts[2], parts[4]], r"12 records scored \(0-5, 0-5, 10-12\)"),
        (lambda parts: [parts[0], *parts[2:]], r"test-0: 5 records scored \(0-5\); .* says 7"),
        (lambda parts: parts[2:], r"test-0: 0 records scored \(none\)"),
    ],
    ids=["lost", "lost last", "twice", "one for another", "lost end", "lost shard"],
)
def test_rows_lost_or_read_twice(change, named):
    with pytest.raises(RuntimeError, match=named):
        tally.require_all_read_once(added(change(list(blocks()))), SHARDS)


def test_rows_read_twice_in_place_of_others_whose_positions_add_up_alike():
    shard = dataclasses.replace(SHARDS[0], num_examples=2000)
    pixels, labels = np.zeros((500, 784), np.uint8), np.zeros(500, np.int64)
    answers = (np.ones((500, 3), np.float32),)
    parts = [
        tally.ScoredBlock(tally.RecordBlock(0, first, pixels, labels, ["a"] * 500), answers)
        for first in (500, 500, 1000, 1000)  # as 0, 500, 1000, 1500
    ]
    with pytest.raises(RuntimeError, match=r"2000 records scored \(500-1000, 500-1500, 1000-1500"):
        tally.require_all_read_once(added(parts, models=1), [shard])


def test_which_rows_there_are_is_told_whatever_their_order_and_their_files():
    ids, labels = [f"{i:032x}" for i in range(6)], [0, 1, 2, 0, 1, 2]
    by_hand = sum(
        int(hashlib.sha256(f"{name} {label}".encode()).hexdigest(), 16)
        for name, label in zip(ids, labels, strict=True)
    )
    assert tally.sum_rows(ids, labels) == by_hand % 2**256
    copies = [ids[0], ids[1] + "-1", *ids[2:]]  # which of two copies is one depends on the rest
    assert tally.sum_rows(copies[::-1], labels[::-1]) == by_hand % 2**256
    others = [
        ([*ids[:5], ids[4]], labels),
        (ids, [0, 1, 2, 0, 2, 1]),
        (ids[:5], labels[:5]),
        ([*ids, ids[0]], [*labels, 0]),
    ]
    assert by_hand % 2**256 not in [tally.sum_rows(*rows) for rows in others]


def test_test_id_is_of_the_rows_and_of_the_classes():
    parts = list(blocks())
    base = tally.make_test_id(added(parts), "abc")
    moved = [
        part._replace(block=part.block._replace(shard=2 - part.block.shard)) for part in parts[::-1]
    ]
    assert tally.make_test_id(added(moved), "abc") == base
    assert len(base) == 32
    for others in ((parts[1:], "abc"), ([*parts, parts[0]], "abc"), (parts, "abd")):
        assert tally.make_test_id(added(others[0]), others[1]) != base


def test_models_are_counted_and_paired_as_by_hand():
    parts = list(blocks(models=3))
    total = added(parts, models=3)
    labels = np.concatenate([part.block.labels for part in parts])
    right = [
        np.concatenate([part.answers[model] for part in parts]).argmax(axis=1) == labels
        for model in range(3)
    ]
    assert [counts.correct for counts in total.models] == [int(r.sum()) for r in right]
    for other, table in zip(right[1:], total.paired, strict=True):
        for label in range(3):
            mine, theirs = right[0][labels == label], other[labels == label]
            assert table[label].tolist() == [
                (mine & theirs).sum(),
                (mine & ~theirs).sum(),
                (~mine & theirs).sum(),
                (~mine & ~theirs).sum(),
            ]
    first, *others = total.models
    assert len(first.samples) > 0 and len(first.mistakes) + len(first.uncertain) == 19
    assert all(c.samples == c.mistakes == c.uncertain == () for c in others)


def test_as_text_and_back():
    total = added(blocks())
    again = tally.parse_tally(tally.tally_json(total))
    assert (again.read, again.rows) == (total.read, total.rows)
    for one, other in zip(again.models, total.models, strict=True):
        for field in dataclasses.fields(one):
            found, expected = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_equal(found, expected)
            assert type(found) is type(expected)
            if isinstance(expected, np.ndarray):
                assert found.dtype == expected.dtype
    assert len(again.models[0].samples) > 0 and len(again.models[0].mistakes) > 0
    assert [type(image) for image in again.models[0].samples] == [
        type(image) for image in total.models[0].samples
    ]
    for one, other in zip(again.paired, total.paired, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert tally.tally_json(again) == tally.tally_json(total)
