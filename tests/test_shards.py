import hashlib

import numpy as np
import pytest

from pipeline import shards
from pipeline.dataset import SPLITS, image_ids, parse_manifest, read_records
from pipeline.dataset import manifest_json as to_json
from pipeline.transforms import ROW

SPLIT_CODES = {split: code for code, split in enumerate(SPLITS)}


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 784), np.uint8)


def pack(*rows):
    """Rows (split, label, 784 pixels) as they come out of the shuffle."""
    packed = np.zeros(len(rows), ROW)
    for row, (split, label, pixels) in zip(packed, rows, strict=True):
        row["split"], row["label"], row["pixels"] = SPLIT_CODES[split], label, pixels
        row["id"] = image_ids(pixels[None])[0]
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
    found = shards.occurrence_numbers(np.array(list(ids), "S1"))
    assert found.tolist() == expected
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("occurrence", "expected"), [(0, "ab"), (1, "ab-1"), (2, "ab-2"), (10, "ab-10")]
)
def test_record_id(occurrence, expected):
    assert shards.record_id(b"ab", occurrence) == expected


def test_records_stand_in_the_order_of_their_ids(tmp_path):
    pixels = images(20)
    rows = pack(*[(SPLITS[i % 3], i % 10, pixels[i]) for i in range(20)])
    written = shards.write(rows, 2, 7, tmp_path)
    names = image_ids(pixels)
    for code, split in enumerate(SPLITS):
        expected = sorted((names[i], i % 10) for i in range(20) if i % 3 == code)
        assert read(tmp_path, written)[split] == expected
        assert written.shards[split].file == f"{split}-00002-of-00007.tfrecord"
    assert written.labels["test"] == dict.fromkeys((2, 5, 8, 1, 4, 7), 1)
    assert (written.index, written.images, written.copies) == (2, 0, 0)


def test_checksums_are_of_the_files(tmp_path):
    written = shards.write(pack(("train", 1, images(1)[0])), 0, 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for shard in written.shards.values():
        content = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_shard_without_rows(tmp_path):
    written = shards.write(np.zeros(0, ROW), 0, 1, tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}-00000-of-00001.tfrecord").read_bytes() == b""
        assert written.shards[split].num_examples == 0 and written.labels[split] == {}
        assert read_records(tmp_path, written.shards[split]) == []
    assert (written.images, written.copies, written.conflicting, written.leaked) == (0, 0, 0, 0)


def test_bytes_do_not_depend_on_the_order_of_rows(tmp_path):
    pixels = images(4)
    rows = pack(
        *[(split, label, pixels[i % 4]) for i, split in enumerate(SPLITS * 4) for label in (7, 3)]
    )
    first = shards.write(rows, 0, 1, tmp_path / "first")
    for seed in range(5):
        shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
        assert shards.write(shuffled, 0, 1, tmp_path / str(seed)) == first


def test_second_attempt_replaces_the_first(tmp_path):
    pixels = images(2)
    for name in SPLITS:
        (tmp_path / f"{name}-00000-of-00001.tfrecord").write_bytes(b"half of a longer file" * 999)
    rows = pack(("train", 1, pixels[0]), ("test", 2, pixels[1]))
    again = [shards.write(rows, 0, 1, tmp_path) for _ in range(2)]
    assert again[0] == again[1]
    assert [len(records) for records in read(tmp_path, again[1]).values()] == [1, 0, 1]
    assert len(list(tmp_path.iterdir())) == 3


def test_copies_are_numbered_in_the_order_of_their_labels(tmp_path):
    (pixels,) = images(1)
    (name,) = image_ids(pixels[None])
    written = shards.write(
        pack(("train", 7, pixels), ("train", 2, pixels), ("train", 5, pixels)), 0, 1, tmp_path
    )
    assert read(tmp_path, written)["train"] == [(name, 2), (f"{name}-1", 5), (f"{name}-2", 7)]


def test_copies_with_one_label_are_numbered_in_the_order_of_their_splits(tmp_path):
    (pixels,) = images(1)
    (name,) = image_ids(pixels[None])
    written = shards.write(
        pack(("test", 3, pixels), ("validation", 3, pixels), ("train", 3, pixels)), 0, 1, tmp_path
    )
    assert read(tmp_path, written) == {
        "train": [(name, 3)],
        "validation": [(f"{name}-1", 3)],
        "test": [(f"{name}-2", 3)],
    }


A, B, C = images(3, seed=5)
DUPLICATES = {
    # rows: images, copies, conflicting, leaked
    "none": ([("train", 1, A), ("test", 1, B)], (0, 0, 0, 0)),
    "one copy": ([("train", 1, A), ("train", 1, A)], (1, 1, 0, 0)),
    "two copies": ([("train", 1, A)] * 3, (1, 2, 0, 0)),
    "other label": ([("train", 1, A), ("train", 2, A)], (1, 1, 1, 0)),
    "two others": ([("train", 1, A), ("train", 2, A), ("train", 3, A)], (1, 2, 1, 0)),
    "in test": ([("train", 1, A), ("test", 1, A)], (1, 1, 0, 1)),
    "validation and test": ([("validation", 1, A), ("test", 1, A)], (1, 1, 0, 1)),
    "train and validation": ([("train", 1, A), ("validation", 1, A)], (1, 1, 0, 0)),
    "twice in test": ([("test", 1, A), ("test", 1, A)], (1, 1, 0, 0)),
    "leak with conflict": ([("train", 1, A), ("test", 2, A)], (1, 1, 1, 1)),
    "several": (
        [
            *(("train", 1, A), ("test", 1, A), ("train", 4, A)),  # leaked, conflicting
            *(("train", 1, B), ("train", 1, B), ("validation", 1, B)),
            ("test", 9, C),
        ],
        (2, 4, 1, 1),
    ),
}


@pytest.mark.parametrize(("rows", "expected"), DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_duplicates(tmp_path, rows, expected, reverse):
    written = shards.write(pack(*(rows[::-1] if reverse else rows)), 0, 1, tmp_path)
    found = (written.images, written.copies, written.conflicting, written.leaked)
    assert found == expected


def test_manifest(tmp_path):
    written = [
        shards.write(pack(("train", 0, A), ("train", 0, A), ("test", 2, B)), 1, 2, tmp_path),
        shards.write(pack(("validation", 1, C), ("test", 1, C)), 0, 2, tmp_path),
    ]
    source = {"kind": "idx", "title": "a few"}
    manifest = shards.make_manifest(written, source, "hash", ("a", "b", "c"))
    assert manifest == shards.make_manifest(written[::-1], source, "hash", ("a", "b", "c"))
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
    assert manifest.duplicates == {"images": 2, "copies": 2, "conflicting": 0, "leaked": 1}
    assert (manifest.num_classes, manifest.split_by, manifest.source) == (3, "hash", source)
    assert parse_manifest(to_json(manifest), "m") == manifest
