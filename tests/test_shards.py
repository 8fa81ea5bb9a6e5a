import gzip
import hashlib

import numpy as np
import pytest

from pipeline import dataset, shards
from pipeline.dataset import SPLITS, parse_manifest
from pipeline.dataset import manifest_json as to_json
from pipeline.records import image_digests, image_ids, read_records
from pipeline.shards import ShardOptions
from pipeline.transforms import ROW

SPLIT_CODES = {split: code for code, split in enumerate(SPLITS)}


ONE_SHARD = ShardOptions(num_shards=1)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 784), np.uint8)


def pack(*rows):
    """Rows (split, label, 784 pixels) as they come out of the shuffle."""
    packed = np.zeros(len(rows), ROW)
    for row, (split, label, pixels) in zip(packed, rows, strict=True):
        row["split"], row["label"], row["pixels"] = SPLIT_CODES[split], label, pixels
        row["id"] = image_digests(pixels[None]).view(">u8")[0]
    return packed


def read(directory, written):
    return {
        split: [(record.id, record.label) for record in read_records(directory, shard)]
        for split, shard in written.shards.items()
    }


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("", []),
        ("a", [0]),
        ("aa", [0, 1]),
        ("abc", [0, 0, 0]),
        ("aabccc", [0, 1, 0, 0, 1, 2]),
        ("aba", [0, 0, 0]),  # only neighbours count
    ],
)
def test_occurrence_numbers(ids, expected):
    halves = np.array([(7, ord(letter)) for letter in ids], np.uint64).reshape(-1, 2)
    for columns in (halves, halves[:, ::-1]):  # either half tells two ids apart
        starts = shards.group_starts(columns)
        assert starts.tolist() == [number == 0 for number in expected]
        found = shards.occurrence_numbers(starts)
        assert found.tolist() == expected
        assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("occurrence", "expected"),
    [(0, ""), (1, "-1"), (2, "-2"), (10, "-10")],
)
def test_record_id(occurrence, expected):
    halves = np.array([0x0123456789ABCDEF, 0x11], np.uint64)
    assert shards.record_id(halves, occurrence) == f"0123456789abcdef{'0' * 14}11{expected}"


def test_records_stand_in_the_order_of_their_ids(tmp_path):
    pixels = images(20)
    rows = pack(*[(SPLITS[i % 3], i % 10, pixels[i]) for i in range(20)])
    written = shards.write(rows, 2, ShardOptions(num_shards=7), tmp_path)
    names = image_ids(pixels)
    for code, split in enumerate(SPLITS):
        expected = sorted((names[i], i % 10) for i in range(20) if i % 3 == code)
        assert read(tmp_path, written)[split] == expected
        assert written.shards[split].file == f"{split}-00002-of-00007.tfrecord"
    assert written.labels["test"] == dict.fromkeys((2, 5, 8, 1, 4, 7), 1)
    assert written.index == 2
    assert written.duplicates == dict.fromkeys(dataset.DUPLICATES, 0)


def test_checksums_are_of_the_files(tmp_path):
    written = shards.write(pack(("train", 1, images(1)[0])), 0, ONE_SHARD, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for shard in written.shards.values():
        content = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_shard_without_rows(tmp_path):
    written = shards.write(np.zeros(0, ROW), 0, ONE_SHARD, tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}-00000-of-00001.tfrecord").read_bytes() == b""
        assert written.shards[split].num_examples == 0 and written.labels[split] == {}
        assert read_records(tmp_path, written.shards[split]) == []
    assert written.duplicates == dict.fromkeys(dataset.DUPLICATES, 0)
    assert written.examples == {"images": [], "conflicting": [], "leaked": [], "held_out": []}
    assert (written.dropped, written.blank) == (0, 0)


def test_bytes_do_not_depend_on_the_order_of_rows(tmp_path):
    pixels = images(4)
    rows = pack(
        *[(split, label, pixels[i % 4]) for i, split in enumerate(SPLITS * 4) for label in (7, 3)]
    )
    first = shards.write(rows, 0, ONE_SHARD, tmp_path / "first")
    for seed in range(5):
        shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
        assert shards.write(shuffled, 0, ONE_SHARD, tmp_path / str(seed)) == first


def test_second_attempt_replaces_the_first(tmp_path):
    pixels = images(2)
    for name in SPLITS:
        (tmp_path / f"{name}-00000-of-00001.tfrecord").write_bytes(b"half of a longer file" * 999)
    rows = pack(("train", 1, pixels[0]), ("test", 2, pixels[1]))
    again = [shards.write(rows, 0, ONE_SHARD, tmp_path) for _ in range(2)]
    assert again[0] == again[1]
    assert [len(records) for records in read(tmp_path, again[1]).values()] == [1, 0, 1]
    assert len(list(tmp_path.iterdir())) == 3


def test_copies_are_numbered_in_the_order_of_their_labels(tmp_path):
    (pixels,) = images(1)
    (name,) = image_ids(pixels[None])
    written = shards.write(
        pack(("train", 7, pixels), ("train", 2, pixels), ("train", 5, pixels)),
        0,
        ONE_SHARD,
        tmp_path,
    )
    assert read(tmp_path, written)["train"] == [(name, 2), (f"{name}-1", 5), (f"{name}-2", 7)]


def test_copies_with_one_label_are_numbered_in_the_order_of_their_splits(tmp_path):
    (pixels,) = images(1)
    (name,) = image_ids(pixels[None])
    written = shards.write(
        pack(("test", 3, pixels), ("validation", 3, pixels), ("train", 3, pixels)),
        0,
        ONE_SHARD,
        tmp_path,
    )
    assert read(tmp_path, written) == {
        "train": [(name, 3)],
        "validation": [(f"{name}-1", 3)],
        "test": [(f"{name}-2", 3)],
    }


A, B, C = images(3, seed=5)
DUPLICATES = {
    # rows: images, copies, conflicting, leaked, held out
    "none": ([("train", 1, A), ("test", 1, B)], (0, 0, 0, 0, 0)),
    "one copy": ([("train", 1, A), ("train", 1, A)], (1, 1, 0, 0, 0)),
    "two copies": ([("train", 1, A)] * 3, (1, 2, 0, 0, 0)),
    "other label": ([("train", 1, A), ("train", 2, A)], (1, 1, 1, 0, 0)),
    "two others": ([("train", 1, A), ("train", 2, A), ("train", 3, A)], (1, 2, 1, 0, 0)),
    "in test": ([("train", 1, A), ("test", 1, A)], (1, 1, 0, 1, 0)),
    "validation and test": ([("validation", 1, A), ("test", 1, A)], (1, 1, 0, 1, 0)),
    "train and validation": ([("train", 1, A), ("validation", 1, A)], (1, 1, 0, 0, 1)),
    "twice in test": ([("test", 1, A), ("test", 1, A)], (1, 1, 0, 0, 0)),
    "leak with conflict": ([("train", 1, A), ("test", 2, A)], (1, 1, 1, 1, 0)),
    "several": (
        [
            *(("train", 1, A), ("test", 1, A), ("train", 4, A)),  # leaked, conflicting
            *(("train", 1, B), ("train", 1, B), ("validation", 1, B)),
            ("test", 9, C),
        ],
        (2, 4, 1, 1, 1),
    ),
}


@pytest.mark.parametrize(("rows", "expected"), DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_duplicates(tmp_path, rows, expected, reverse):
    written = shards.write(pack(*(rows[::-1] if reverse else rows)), 0, ONE_SHARD, tmp_path)
    assert tuple(written.duplicates.values()) == expected
    assert tuple(written.duplicates) == dataset.DUPLICATES
    assert list(written.examples) == ["images", "conflicting", "leaked", "held_out"]
    for kind in written.examples:
        assert len(written.examples[kind]) == written.duplicates[kind]
        assert set(written.examples[kind]) <= set(image_ids(np.stack([A, B, C])))
    assert (written.dropped, written.blank) == (0, 0)


def test_manifest(tmp_path):
    written = [
        shards.write(
            pack(("train", 0, A), ("train", 0, A), ("test", 2, B)),
            1,
            ShardOptions(num_shards=2),
            tmp_path,
        ),
        shards.write(
            pack(("validation", 1, C), ("test", 1, C)), 0, ShardOptions(num_shards=2), tmp_path
        ),
    ]
    source = {"kind": "idx", "title": "a few"}
    options = {
        "source": source,
        "split_by": "hash",
        "class_names": ("a", "b", "c"),
        "quarantined": {"wrong size": 2, "damaged": 1},
    }
    manifest = shards.make_manifest(written, **options)
    assert manifest == shards.make_manifest(written[::-1], **options)
    assert {name: split.num_examples for name, split in manifest.splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 2,
    }
    assert {name: split.label_counts for name, split in manifest.splits.items()} == {
        "train": (2, 0, 0),
        "validation": (0, 1, 0),
        "test": (0, 1, 1),
    }
    assert [shard.file for shard in manifest.splits["test"].shards] == [
        "test-00000-of-00002.tfrecord",
        "test-00001-of-00002.tfrecord",
    ]
    name_a, name_c = image_ids(np.stack([A, C]))
    assert manifest.duplicates == {
        "images": 2,
        "copies": 2,
        "conflicting": 0,
        "leaked": 1,
        "held_out": 0,
        "examples": {
            "images": sorted([name_a, name_c]),
            "conflicting": [],
            "leaked": [name_c],
            "held_out": [],
        },
    }
    assert manifest.quarantined == {"count": 3, "by_reason": {"damaged": 1, "wrong size": 2}}
    assert list(manifest.quarantined["by_reason"]) == ["damaged", "wrong size"]
    assert (manifest.dropped, manifest.flagged) == (0, {"blank": 0})
    assert (manifest.num_classes, manifest.split_by, manifest.source) == (3, "hash", source)
    assert parse_manifest(to_json(manifest), "m") == manifest


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_dropping_leaks(tmp_path, reverse):
    rows = [
        *(("train", 1, A), ("train", 4, A), ("validation", 1, A), ("test", 2, A), ("test", 2, A)),
        *(("train", 1, B), ("validation", 1, B), ("test", 9, C)),
    ]
    rows = pack(*(rows[::-1] if reverse else rows))
    written = shards.write(rows, 0, ShardOptions(num_shards=1, drop_leaks=True), tmp_path)
    name_a, name_b, name_c = image_ids(np.stack([A, B, C]))
    # The copies keep the numbers that they would have with those that are dropped.
    assert read(tmp_path, written) == {
        "train": [(name_b, 1)],
        "validation": [(f"{name_b}-1", 1)],
        "test": sorted([(f"{name_a}-2", 2), (f"{name_a}-3", 2), (name_c, 9)]),
    }
    assert written.dropped == 3
    assert written.labels == {"train": {1: 1}, "validation": {1: 1}, "test": {2: 2, 9: 1}}
    assert written.duplicates == {
        "images": 2,
        "copies": 5,
        "conflicting": 1,
        "leaked": 1,
        "held_out": 2,
    }
    assert written.examples["leaked"] == [name_a]


def test_examples_are_the_lowest_ids(tmp_path):
    pixels = images(9)
    rows = pack(*[(split, 1, each) for each in pixels for split in ("train", "test")])
    written = shards.write(rows, 0, ONE_SHARD, tmp_path)
    lowest = sorted(image_ids(pixels))[:5]
    assert written.duplicates["leaked"] == 9
    assert written.examples == {
        "images": lowest,
        "conflicting": [],
        "leaked": lowest,
        "held_out": [],
    }


def test_blank_images_are_counted(tmp_path):
    white, black = np.full(784, 255, np.uint8), np.zeros(784, np.uint8)
    nearly = black.copy()
    nearly[783] = 1
    rows = pack(("train", 1, white), ("test", 1, black), ("test", 1, nearly), ("train", 2, black))
    assert shards.write(rows, 0, ONE_SHARD, tmp_path).blank == 3
    options = ShardOptions(num_shards=1, drop_leaks=True)
    assert shards.write(rows, 0, options, tmp_path).blank == 2


def test_rows_are_written_a_few_at_a_time_with_the_same_bytes(tmp_path, monkeypatch):
    rows = pack(*[("train", i % 300 % 256, pixels) for i, pixels in enumerate(images(23))])
    whole = shards.write(rows, 0, ONE_SHARD, tmp_path / "whole")
    monkeypatch.setattr(shards, "ROWS_AT_ONCE", 5)
    assert shards.write(rows, 0, ONE_SHARD, tmp_path / "pieces") == whole


def test_gzip_holds_the_same_bytes(tmp_path):
    rows = pack(*[(SPLITS[i % 2], i % 10, pixels) for i, pixels in enumerate(images(12))])
    plain = shards.write(rows, 1, ShardOptions(num_shards=4), tmp_path)
    options = ShardOptions(num_shards=4, compression="gzip")
    packed = shards.write(rows, 1, options, tmp_path)
    assert shards.write(rows, 1, options, tmp_path / "again") == packed
    for split in SPLITS:
        one, other = plain.shards[split], packed.shards[split]
        assert other.file == f"{one.file}.gz"
        assert (other.num_examples, other.sha256) == (one.num_examples, one.sha256)
        content = (tmp_path / other.file).read_bytes()
        assert other.bytes == len(content)
        assert gzip.decompress(content) == (tmp_path / one.file).read_bytes()
        assert content == (tmp_path / "again" / other.file).read_bytes()
        # No time and no file name in the header: equal content gives equal bytes.
        assert content[3:8] == bytes(5)
    assert read(tmp_path, packed) == read(tmp_path, plain)
