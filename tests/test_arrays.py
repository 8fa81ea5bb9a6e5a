import hashlib

import numpy as np
import pytest

from pipeline import arrays
from pipeline.command import InputError
from pipeline.dataset import Shard, load_manifest
from pipeline.records import encode_frames, encode_record, frame, read_records, unscale

NAMES = [f"{i:032x}" for i in range(5)]


def rows(size=5, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (size, 784), np.uint8), random.integers(0, 128, size)


def written(folder, content, size):
    (folder / "test").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    return Shard(file="test", num_examples=size, bytes=len(content), sha256=checksum)


@pytest.mark.parametrize(
    ("labels", "ids", "at_once"),
    [
        ([0, 1, 127, 3, 4], NAMES, True),
        ([0, 1, 2, 3, 4], [f"{name}-1" for name in NAMES], True),
        ([0, 1, 2, 3, 4], [*NAMES[:4], f"{NAMES[4]}-1"], False),  # of two lengths
        ([0, 1, 128, 3, 4], NAMES, False),  # a label of two bytes
        ([200] * 5, NAMES, False),
    ],
)
def test_what_was_encoded_comes_back(tmp_path, monkeypatch, labels, ids, at_once):
    pixels, _ = rows()
    shard = written(tmp_path, encode_frames(pixels, np.array(labels), ids), 5)
    if at_once:
        monkeypatch.setattr(arrays, "parse_records", None)
    found = arrays.read_arrays(tmp_path, shard)
    assert (found.pixels == pixels).all() and found.pixels.dtype == np.uint8
    assert found.labels.tolist() == labels and found.labels.dtype == np.int64
    assert found.ids == ids


def test_any_number_at_once_gives_the_same(tmp_path, monkeypatch):
    shard = written(tmp_path, encode_frames(*rows(), NAMES), 5)
    monkeypatch.setattr(arrays, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(arrays, "parse_records", None)
    assert (arrays.read_arrays(tmp_path, shard).pixels == rows()[0]).all()


def test_no_records(tmp_path):
    found = arrays.read_arrays(tmp_path, written(tmp_path, b"", 0))
    assert found.pixels.shape == (0, 784) and found.labels.shape == (0,) and found.ids == []


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_dataset_is_read_as_record_by_record(small_dataset, split):
    for shard in load_manifest(small_dataset).splits[split].shards:
        found = arrays.read_arrays(small_dataset, shard)
        records = read_records(small_dataset, shard)
        assert (found.pixels == unscale(np.stack([record.image for record in records]))).all()
        assert found.labels.tolist() == [record.label for record in records]
        assert found.ids == [record.id for record in records]


@pytest.mark.parametrize("record", [0, 1, 4])
def test_a_bit_turned_anywhere_is_told_as_record_by_record(tmp_path, record):
    """Under a manifest that agrees with the damaged bytes; the frames' own checksums see it."""
    content = encode_frames(*rows(), NAMES)
    size = len(content) // 5
    for at in (0, 9, 13, 40, 60, 90, 500, size - 6, size - 5, size - 1):
        damaged = bytearray(content)
        damaged[record * size + at] ^= 0x81
        shard = written(tmp_path, bytes(damaged), 5)
        with pytest.raises(InputError, match=f"damaged at byte {record * size}"):
            arrays.read_arrays(tmp_path, shard)


@pytest.mark.parametrize("size", [4, 6, 1])
def test_another_number_of_records(tmp_path, size):
    shard = written(tmp_path, encode_frames(*rows(), NAMES), size)
    with pytest.raises(InputError, match=f"5 records, the manifest says {size}"):
        arrays.read_arrays(tmp_path, shard)


def test_frames_of_something_else(tmp_path):
    other = [frame(b"x" * 40)] * 3
    with pytest.raises(InputError, match="not a record of this format"):
        arrays.read_arrays(tmp_path, written(tmp_path, b"".join(other), 3))
    good = frame(encode_record(bytes(784), 1, NAMES[0]))
    odd = frame(b"y" * (len(good) - 16))  # of the same length, and with a right checksum
    with pytest.raises(InputError, match="not a record of this format"):
        arrays.read_arrays(tmp_path, written(tmp_path, good + odd, 2))
