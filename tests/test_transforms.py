import collections

import apache_beam as beam
import helpers
import numpy as np
import pytest

from pipeline import runners, transforms
from pipeline.command import InputError
from pipeline.dataset import SPLITS
from pipeline.records import id_bits, image_digests, image_ids
from pipeline.shards import ShardOptions
from pipeline.sources import Fault, NumberedRows, RawRows, open_sources
from pipeline.splits import Splitter, make_splitter
from pipeline.transforms import ROW, Quarantined, compress, decompress, pack, validate

TRAIN, VALIDATION, TEST = range(3)
DIGESTS = image_digests(np.random.default_rng(0).integers(0, 256, (3000, 784), np.uint8))
NOWHERE = np.zeros(len(DIGESTS), np.int64)  # by hash, positions mean nothing


class Sized:
    """A source as far as a splitter looks at it."""

    def __init__(self, train_size, has_order=True):
        self.part_sizes = {"train": train_size, "test": 10}
        self.has_order = has_order


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
    assert make_splitter(by, Sized(train_size), size, fraction) == expected


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
        make_splitter(by, Sized(600), size, fraction)
    assert message in str(caught.value)


def test_positions_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="image files stand in the order of their classes"):
        make_splitter("positional", Sized(600, has_order=False), None, None)
    assert make_splitter("hash", Sized(600, has_order=False), None, None).by == "hash"


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
    positions = np.arange(first, first + 4)
    assert splitter("train", positions, DIGESTS[:4]).tolist() == expected
    assert splitter("train", positions[::-1], DIGESTS[:4]).tolist() == expected[::-1]
    assert splitter("test", positions, DIGESTS[:4]).tolist() == [TEST] * 4


@pytest.mark.parametrize("by", ["positional", "hash"])
def test_split_of_no_rows(by):
    splitter = Splitter(by=by)
    for part in ("train", "test"):
        found = splitter(part, np.zeros(0, np.int64), DIGESTS[:0])
        assert (found.shape, found.dtype) == ((0,), np.uint8)


def test_hash_split_goes_by_the_first_32_bits():
    splitter = Splitter(by="hash", validation_fraction=0.25)
    ids = [f"{first}{'f0' * 12}" for first in ("00000000", "3fffffff", "40000000", "ffffffff")]
    digests = np.array([list(bytes.fromhex(name)) for name in ids], np.uint8)
    positions = np.arange(5, 9)
    assert splitter("train", positions, digests).tolist() == [VALIDATION, VALIDATION, TRAIN, TRAIN]
    assert splitter("test", positions, digests).tolist() == [TEST] * 4


def test_hash_split_is_about_its_fraction():
    for fraction in (1 / 6, 0.5):
        found = Splitter(by="hash", validation_fraction=fraction)("train", NOWHERE, DIGESTS)
        share = (found == VALIDATION).mean()
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / len(DIGESTS))
    for fraction, split in ((0.0, TRAIN), (1.0, VALIDATION)):
        found = Splitter(by="hash", validation_fraction=fraction)("train", NOWHERE, DIGESTS)
        assert (found == split).all()


def test_hash_split_moves_no_row_when_the_source_is_reordered_or_grows():
    splitter = make_splitter("hash", Sized(100), None, None)
    names = [digest.tobytes() for digest in DIGESTS]
    found = splitter("train", NOWHERE[:100], DIGESTS[:100])
    before = dict(zip(names[:100], found.tolist(), strict=True))
    order = np.random.default_rng(1).permutation(len(DIGESTS))
    shuffled = [names[i] for i in order]
    found = splitter("train", np.arange(7, 7 + len(order)), DIGESTS[order])
    grown = dict(zip(shuffled, found.tolist(), strict=True))
    assert {name: grown[name] for name in before} == before
    assert set(before.values()) == {TRAIN, VALIDATION}


def test_larger_fraction_only_adds_to_validation():
    small, large = (
        Splitter(by="hash", validation_fraction=f)("train", NOWHERE, DIGESTS) == VALIDATION
        for f in (0.1, 0.3)
    )
    assert (large[small]).all() and large.sum() > small.sum()


def test_splits_and_shards_are_independent():
    split = Splitter(by="hash", validation_fraction=0.5)("train", NOWHERE, DIGESTS)
    shard = np.array([id_bits(digest.tobytes().hex(), 64, 64) % 2 for digest in DIGESTS])
    assert abs((split == shard).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(DIGESTS))


# Rows on their way through the shuffle


def raw_rows(num_rows, part="train", first=0, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (num_rows, 784), np.uint8)
    positions = np.arange(first, first + num_rows)
    origins = NumberedRows("file", positions)
    return RawRows(part, positions, pixels, random.integers(0, 10, num_rows), origins)


def packed_rows(rows, splitter, num_shards):
    """(shard number, its rows as a table) of everything that `pack` yields."""
    return [(index, decompress([data])) for index, data in pack(rows, splitter, num_shards)]


def test_pack():
    rows = raw_rows(60, first=5)
    splitter = Splitter(by="positional", validation_size=20)
    found = dict(packed_rows(rows, splitter, 4))
    assert sorted(found) == [0, 1, 2, 3]
    position = {row.tobytes(): i for i, row in enumerate(rows.pixels)}
    seen = []
    for index, packed in found.items():
        for row in packed:
            i = position[row["pixels"].tobytes()]
            seen.append(i)
            assert row["label"] == rows.labels[i]
            name = f"{row['id'][0]:016x}{row['id'][1]:016x}"
            assert name == image_ids(rows.pixels[i : i + 1])[0]
            assert row["split"] == (VALIDATION if i + 5 < 20 else TRAIN)
            assert int(name[16:], 16) % 4 == index
    assert sorted(seen) == list(range(60))


def test_copies_meet_in_one_shard_whatever_their_part():
    rows = raw_rows(30)
    splitter = make_splitter("hash", Sized(30), None, None)
    where = collections.defaultdict(set)
    for part in ("train", "test"):
        for index, packed in packed_rows(rows._replace(part=part), splitter, 5):
            for row in packed:
                where[row["id"].tobytes()].add(index)
    assert len(where) == 30 and all(len(indices) == 1 for indices in where.values())


def test_rows_of_one_shard():
    ((index, packed),) = packed_rows(raw_rows(9), Splitter(by="hash"), 1)
    assert index == 0 and len(packed) == 9


def test_no_rows_are_packed_to_nothing():
    assert list(pack(raw_rows(0), Splitter(by="hash"), 3)) == []


def test_pieces_are_unpacked_to_one_table():
    table = np.zeros(7, ROW)
    table["label"] = range(7)
    table["pixels"] = raw_rows(7).pixels
    pieces = [compress(table[:3]), compress(table[:0]), compress(table[3:])]
    assert decompress(pieces).tobytes() == table.tobytes()
    assert len(decompress([])) == 0
    assert len(compress(np.zeros(100, ROW))) < 1000


# What cannot be written


def test_validate():
    rows = raw_rows(6, first=40)._replace(labels=np.array([0, 9, 10, -1, 255, 3]))
    faults = (Fault("damaged", "train/a.png", "f" * 32),)
    kept, set_aside = validate(rows._replace(faults=faults), 10)
    ids = image_ids(rows.pixels)
    assert set_aside == [
        Quarantined(ids[2], "label out of range", "file#42", "train"),
        Quarantined(ids[3], "label out of range", "file#43", "train"),
        Quarantined(ids[4], "label out of range", "file#44", "train"),
        Quarantined("f" * 32, "damaged", "train/a.png", "train"),
    ]
    # The positional split goes by where a row stands, whatever is set aside before it.
    assert kept.positions.tolist() == [40, 41, 45]
    assert kept.labels.tolist() == [0, 9, 3]
    np.testing.assert_array_equal(kept.pixels, rows.pixels[[0, 1, 5]])
    assert (kept.part, kept.size, len(kept.faults)) == ("train", 3, 0)


def test_nothing_to_set_aside():
    rows = raw_rows(5)
    kept, set_aside = validate(rows, 10)
    assert set_aside == [] and kept.size == 5
    np.testing.assert_array_equal(kept.pixels, rows.pixels)


# The graph


@pytest.fixture
def in_process():
    return lambda build: runners.run(runners.beam_options([]), build, transforms.NAMESPACE)


def test_read_and_write_in_the_graph(small_idx, small_dataset, tmp_path, in_process):
    source = open_sources([f"idx:{small_idx}"])
    splitter = make_splitter("positional", source, None, None)
    options = ShardOptions(num_shards=3)
    metrics = in_process(
        lambda root: (
            root | transforms.ReadRows(source) | transforms.WriteShards(splitter, options, tmp_path)
        )
    )
    expected = helpers.tree(small_dataset)
    assert helpers.tree(tmp_path) == {
        name: content for name, content in expected.items() if name.endswith(".tfrecord")
    }
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert metrics.counters == {
        "read-train": 600,
        "read-test": 120,
        "written-train": 500,
        "written-validation": 100,
        "written-test": 120,
        "written-bytes": sum(sizes),
    }
    assert metrics.distributions["shard-bytes"] == {
        "count": 9,
        "sum": sum(sizes),
        "min": min(sizes),
        "max": max(sizes),
    }
    assert metrics.distributions["shard-write-msec"]["count"] == 3


def test_every_shard_number_has_its_files(tmp_path, in_process):
    rows = raw_rows(2)
    in_process(
        lambda root: (
            root
            | beam.Create([rows]).with_output_types(RawRows)
            | transforms.WriteShards(Splitter(by="hash"), ShardOptions(num_shards=20), tmp_path)
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
