import collections

import apache_beam as beam
import helpers
import numpy as np
import pytest

from pipeline import runners, transforms
from pipeline.command import InputError
from pipeline.dataset import SPLITS, id_bits, image_ids
from pipeline.sources import RawRows, open_source
from pipeline.transforms import ROW, Splitter, make_splitter, shard_rows

TRAIN, VALIDATION, TEST = range(3)
IDS = image_ids(np.random.default_rng(0).integers(0, 256, (3000, 784), np.uint8))


# The split


@pytest.mark.parametrize(
    ("by", "train_size", "size", "fraction", "expected"),
    [
        ("positional", 60_000, None, None, Splitter(by="positional", validation_size=10_000)),
        ("positional", 70_000, None, None, Splitter(by="positional", validation_size=10_000)),
        ("positional", 59_999, None, None, Splitter(by="positional", validation_size=9_999)),
        ("positional", 600, None, None, Splitter(by="positional", validation_size=100)),
        ("positional", 5, None, None, Splitter(by="positional", validation_size=0)),
        ("positional", 1, None, None, Splitter(by="positional", validation_size=0)),
        ("positional", 600, 0, None, Splitter(by="positional", validation_size=0)),
        ("positional", 600, 599, None, Splitter(by="positional", validation_size=599)),
        ("hash", 600, None, None, Splitter(by="hash", validation_fraction=1 / 6)),
        ("hash", 600, None, 0.25, Splitter(by="hash", validation_fraction=0.25)),
        ("hash", 600, None, 0.0, Splitter(by="hash", validation_fraction=0.0)),
    ],
)
def test_make_splitter(by, train_size, size, fraction, expected):
    assert make_splitter(by, train_size, size, fraction) == expected


@pytest.mark.parametrize(
    ("by", "size", "fraction", "message"),
    [
        ("hash", 10, None, "--validation_size goes with --split_by positional"),
        ("hash", 0, None, "--validation_size goes with --split_by positional"),
        ("hash", 10, 0.1, "--validation_size goes with --split_by positional"),
        ("positional", None, 0.1, "--validation_fraction goes with --split_by hash"),
        ("positional", None, 0.0, "--validation_fraction goes with --split_by hash"),
        ("positional", 10, 0.1, "--validation_fraction goes with --split_by hash"),
        ("positional", 600, None, "--validation_size 600: expected less than train's 600 rows"),
        ("positional", 601, None, "--validation_size 601: expected less than train's 600 rows"),
    ],
)
def test_make_splitter_refuses(by, size, fraction, message):
    with pytest.raises(InputError) as caught:
        make_splitter(by, 600, size, fraction)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (0, [VALIDATION] * 4),
        (7, [VALIDATION, VALIDATION, VALIDATION, TRAIN]),
        (9, [VALIDATION, TRAIN, TRAIN, TRAIN]),
        (10, [TRAIN] * 4),
    ],
)
def test_positional_split_takes_the_first_rows(first, expected):
    splitter = Splitter(by="positional", validation_size=10)
    assert splitter("train", first, IDS[:4]).tolist() == expected
    assert splitter("test", first, IDS[:4]).tolist() == [TEST] * 4


@pytest.mark.parametrize("by", ["positional", "hash"])
def test_split_of_no_rows(by):
    splitter = Splitter(by=by)
    for part in ("train", "test"):
        found = splitter(part, 0, [])
        assert (found.shape, found.dtype) == ((0,), np.uint8)


def test_hash_split_goes_by_the_first_32_bits():
    splitter = Splitter(by="hash", validation_fraction=0.25)
    ids = [f"{first}{'0' * 24}" for first in ("00000000", "3fffffff", "40000000", "ffffffff")]
    assert splitter("train", 5, ids).tolist() == [VALIDATION, VALIDATION, TRAIN, TRAIN]
    assert splitter("test", 5, ids).tolist() == [TEST] * 4


def test_hash_split_is_about_its_fraction():
    for fraction in (1 / 6, 0.5):
        found = Splitter(by="hash", validation_fraction=fraction)("train", 0, IDS)
        share = (found == VALIDATION).mean()
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / len(IDS))
    for fraction, split in ((0.0, TRAIN), (1.0, VALIDATION)):
        found = Splitter(by="hash", validation_fraction=fraction)("train", 0, IDS)
        assert (found == split).all()


def test_hash_split_moves_no_row_when_the_source_is_reordered_or_grows():
    splitter = make_splitter("hash", 100, None, None)
    before = dict(zip(IDS[:100], splitter("train", 0, IDS[:100]).tolist(), strict=True))
    order = np.random.default_rng(1).permutation(len(IDS))
    shuffled = [IDS[i] for i in order]
    grown = dict(zip(shuffled, splitter("train", 7, shuffled).tolist(), strict=True))
    assert {name: grown[name] for name in before} == before
    assert set(before.values()) == {TRAIN, VALIDATION}


def test_larger_fraction_only_adds_to_validation():
    small, large = (
        Splitter(by="hash", validation_fraction=f)("train", 0, IDS) == VALIDATION
        for f in (0.1, 0.3)
    )
    assert (large[small]).all() and large.sum() > small.sum()


def test_splits_and_shards_are_independent():
    split = Splitter(by="hash", validation_fraction=0.5)("train", 0, IDS)
    shard = np.array([id_bits(name, 64, 64) % 2 for name in IDS])
    assert abs((split == shard).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(IDS))


# Rows on their way through the shuffle


def raw_rows(num_rows, part="train", first=0, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (num_rows, 784), np.uint8)
    return RawRows(part, first, pixels, random.integers(0, 10, num_rows))


def test_shard_rows():
    rows = raw_rows(60, first=5)
    splitter = Splitter(by="positional", validation_size=20)
    found = {index: np.frombuffer(packed, ROW) for index, packed in shard_rows(rows, splitter, 4)}
    assert sorted(found) == [0, 1, 2, 3]
    position = {row.tobytes(): i for i, row in enumerate(rows.pixels)}
    seen = []
    for index, packed in found.items():
        for row in packed:
            i = position[row["pixels"].tobytes()]
            seen.append(i)
            assert row["label"] == rows.labels[i]
            assert row["id"].decode() == image_ids(rows.pixels[i : i + 1])[0]
            assert row["split"] == (VALIDATION if i + 5 < 20 else TRAIN)
            assert int(row["id"].decode()[16:], 16) % 4 == index
    assert sorted(seen) == list(range(60))


def test_copies_meet_in_one_shard_whatever_their_part():
    rows = raw_rows(30)
    splitter = make_splitter("hash", 30, None, None)
    where = collections.defaultdict(set)
    for part in ("train", "test"):
        for index, packed in shard_rows(rows._replace(part=part), splitter, 5):
            for row in np.frombuffer(packed, ROW):
                where[row["id"]].add(index)
    assert len(where) == 30 and all(len(indices) == 1 for indices in where.values())


def test_rows_of_one_shard():
    ((index, packed),) = shard_rows(raw_rows(9), Splitter(by="hash"), 1)
    assert index == 0 and len(np.frombuffer(packed, ROW)) == 9


# The graph


@pytest.fixture
def in_process():
    return lambda build: runners.run(runners.beam_options([]), build)


def test_read_and_write_in_the_graph(small_idx, small_dataset, tmp_path, in_process):
    source = open_source(f"idx:{small_idx}")
    splitter = make_splitter("positional", 600, None, None)
    counters = in_process(
        lambda root: (
            root | transforms.ReadRows(source) | transforms.WriteShards(splitter, 3, tmp_path)
        )
    )
    expected = helpers.tree(small_dataset)
    assert helpers.tree(tmp_path) == {
        name: content for name, content in expected.items() if name.endswith(".tfrecord")
    }
    assert counters == {
        "read-train": 600,
        "read-test": 120,
        "written-train": 500,
        "written-validation": 100,
        "written-test": 120,
        "written-bytes": sum(path.stat().st_size for path in tmp_path.iterdir()),
    }


def test_every_shard_number_has_its_files(tmp_path, in_process):
    rows = raw_rows(2)
    in_process(
        lambda root: (
            root
            | beam.Create([rows]).with_output_types(RawRows)
            | transforms.WriteShards(Splitter(by="hash"), 20, tmp_path)
        )
    )
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == sorted(
        f"{split}-{index:05d}-of-00020.tfrecord" for split in SPLITS for index in range(20)
    )
    filled = {
        f"train-{int(name[16:], 16) % 20:05d}-of-00020.tfrecord" for name in image_ids(rows.pixels)
    }
    assert {name for name, size in sizes.items() if size} == filled
