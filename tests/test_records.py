import gzip
import hashlib
import struct
import tracemalloc

import numpy as np
import pytest

from pipeline import dataset
from pipeline import records as codec
from pipeline.command import InputError

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, 784, np.uint8).tobytes()


def example(tf, pixels, label, record_id):
    def feature(**kwargs):
        return tf.train.Feature(**kwargs)

    image = np.frombuffer(pixels, np.uint8).astype(np.float32) / np.float32(255)
    return tf.train.Example(
        features=tf.train.Features(
            feature={
                "image": feature(float_list=tf.train.FloatList(value=image)),
                "label": feature(int64_list=tf.train.Int64List(value=[label])),
                "id": feature(bytes_list=tf.train.BytesList(value=[record_id.encode()])),
            }
        )
    )


# Records


def test_golden_record():
    record = codec.encode_record(b"\x00\x33\xff" + bytes(781), 5, "ab")
    assert record == bytes.fromhex(
        "0a f1 18"  # Example.features, 3185 bytes
        "0a 0c 0a 02 6964 12 06 0a 04 0a 02 6162"  # "id": bytes_list ["ab"]
        "0a d0 18 0a 05 696d616765 12 c6 18 12 c3 18 0a c0 18"  # "image": float_list, 3136 bytes
        "00000000 cdcc4c3e 0000803f"  # 0, 0.2, 1
    ) + bytes(4 * 781) + bytes.fromhex(
        "0a 0e 0a 05 6c6162656c 12 05 1a 03 0a 01 05"  # "label": int64_list [5]
    )


@pytest.mark.parametrize("label", [0, 1, 9, 127, 128, 255])
@pytest.mark.parametrize("record_id", [ID, f"{ID}-1", f"{ID}-123456"])
def test_record_is_tensorflows(tf, pixels, label, record_id):
    ours = codec.encode_record(pixels, label, record_id)
    theirs = example(tf, pixels, label, record_id)
    assert ours == theirs.SerializeToString(deterministic=True)
    assert tf.train.Example.FromString(ours) == theirs
    read = codec.decode_record(theirs.SerializeToString())
    assert (read.label, read.id) == (label, record_id)
    assert read.image.tobytes() == codec.decode_record(ours).image.tobytes()


@pytest.mark.parametrize("label", [0, 127, 128, 255])
def test_record_round_trip(pixels, label):
    record = codec.decode_record(codec.encode_record(pixels, label, f"{ID}-7"))
    assert (record.label, record.id, record.image.dtype) == (label, f"{ID}-7", np.float32)
    assert np.rint(record.image * 255).astype(np.uint8).tobytes() == pixels


def test_records_that_are_none(pixels):
    record = codec.encode_record(pixels, 3, ID)
    broken = {
        "empty": b"",
        "text": b"no record at all",
        "no features": b"\x0a\x00",
        "no end": record + b"\x0a",
        "other type": b"\x08\x01",
        "endless number": b"\xff" * 12,
        "a fourth feature": record + codec.message(1, codec._feature("labels", 3, b"\x01")),
        "unfinished label": record[:-1] + b"\x83",
        "id not ascii": record.replace(ID.encode(), b"\xff" * 32),
        "small image": codec.message(
            1,
            codec._feature("id", 1, b"a")
            + codec._feature("image", 2, bytes(4 * 783))
            + codec._feature("label", 3, b"\x01"),
        ),
        "odd image": codec.message(
            1,
            codec._feature("id", 1, b"a")
            + codec._feature("image", 2, bytes(4 * 784 - 1))
            + codec._feature("label", 3, b"\x01"),
        ),
        "three numbers as label": codec.message(
            1,
            codec._feature("id", 1, b"a")
            + codec._feature("image", 2, bytes(4 * 784))
            + codec._feature("label", 3, b"\x01\x02\x03"),
        ),
        "no label": codec.message(
            1, codec._feature("id", 1, b"a") + codec._feature("image", 2, bytes(4 * 784))
        ),
    } | {f"first {n}": record[:n] for n in range(1, len(record))}
    for name, data in broken.items():
        with pytest.raises(ValueError, match="not a record of this format"):
            pytest.fail(f"{name}: {codec.decode_record(data)}")


def test_scale_table():
    expected = [np.float32(value) / np.float32(255) for value in range(256)]
    assert codec.SCALE_TABLE.dtype == np.float32
    assert codec.SCALE_TABLE.tolist() == [float(value) for value in expected]
    assert (codec.SCALE_TABLE[0], codec.SCALE_TABLE[255]) == (0, 1)
    assert struct.pack("<f", codec.SCALE_TABLE[51]) == bytes.fromhex("cdcc4c3e")  # 0.2


def test_unscale_gives_back_every_pixel():
    assert codec.unscale(codec.SCALE_TABLE).tolist() == list(range(256))


LENGTHS = ["", "-1", "-12345"]


@pytest.mark.parametrize("labels", [[0, 1, 127, 9, 5, 3], [0, 128, 255, 9, 127, 200]])
@pytest.mark.parametrize("suffixes", [[""] * 6, ["-7"] * 6, LENGTHS * 2], ids=str)
@pytest.mark.parametrize("count", [6, 1, 0])
def test_many_frames_are_those_of_each(labels, suffixes, count):
    pixels = np.random.default_rng(2).integers(0, 256, (6, 784), np.uint8)[:count]
    labels = np.array(labels[:count], np.uint8)
    ids = [f"{ID}{suffix}" for suffix in suffixes[:count]]
    expected = b"".join(
        codec.frame(codec.encode_record(row.tobytes(), int(label), name))
        for row, label, name in zip(pixels, labels, ids, strict=True)
    )
    assert codec.encode_frames(pixels, labels, ids) == expected
    read = [codec.decode_record(r) for r in codec.read_frames(expected, "x")]
    assert [(r.label, r.id) for r in read] == list(zip(labels.tolist(), ids, strict=True))


def test_many_frames_of_blank_images():
    # An empty record is what the table is filled with: its zeros must be overwritten in place.
    pixels = np.array([[0] * 784, [255] * 784], np.uint8)
    expected = b"".join(
        codec.frame(codec.encode_record(row.tobytes(), 0, "0" * 32)) for row in pixels
    )
    assert codec.encode_frames(pixels, np.zeros(2, np.int64), ["0" * 32] * 2) == expected


# Identity


def test_digests_are_the_ids():
    pixels = np.random.default_rng(3).integers(0, 256, (20, 784), np.uint8)
    digests = codec.image_digests(pixels)
    assert (digests.shape, digests.dtype) == ((20, 16), np.uint8)
    assert [digest.tobytes().hex() for digest in digests] == codec.image_ids(pixels)
    assert codec.image_digests(pixels[:0]).shape == (0, 16)
    assert codec.image_ids(pixels[:0]) == []


@pytest.mark.parametrize(("first", "count"), [(0, 32), (32, 32), (64, 64), (0, 64), (120, 8)])
def test_digest_bits_are_id_bits(first, count):
    pixels = np.random.default_rng(4).integers(0, 256, (50, 784), np.uint8)
    found = codec.digest_bits(codec.image_digests(pixels), first, count)
    assert found.dtype == np.uint64
    assert found.tolist() == [codec.id_bits(name, first, count) for name in codec.image_ids(pixels)]


def test_ids_are_of_the_pixels_alone():
    rows = np.zeros((3, 784), np.uint8)
    rows[1, 783] = 1
    ids = codec.image_ids(rows)
    assert ids[0] == hashlib.sha256(bytes(784)).hexdigest()[:32] == ids[2]
    assert ids[1] == hashlib.sha256(bytes(783) + b"\x01").hexdigest()[:32]
    assert codec.image_ids(rows[::-1]) == ids[::-1]  # also where rows are not contiguous
    assert codec.image_ids(np.asfortranarray(rows)) == ids


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [
        (0, 32, 0x01234567),
        (32, 32, 0x89ABCDEF),
        (64, 64, 0x0011223344556677),
        (0, 1, 0),
        (7, 1, 1),
        (4, 8, 0x12),
        (127, 1, 1),
        (0, 128, 0x0123456789ABCDEF0011223344556677),
    ],
)
@pytest.mark.parametrize("copy", ["", "-1", "-12"])
def test_id_bits(first, count, expected, copy):
    assert codec.id_bits(f"0123456789abcdef0011223344556677{copy}", first, count) == expected


# Frames


def test_frames_are_read_by_tensorflow(tf, tmp_path, pixels):
    records = [codec.encode_record(pixels, label, ID) for label in range(3)] + [b"", b"x" * 70]
    path = tmp_path / "ours.tfrecord"
    path.write_bytes(b"".join(map(codec.frame, records)))
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records


def test_frames_of_tensorflow_are_read(tf, tmp_path, pixels):
    records = [codec.encode_record(pixels, label, ID) for label in range(3)] + [b"", b"x" * 70]
    path = tmp_path / "theirs.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    content = path.read_bytes()
    assert list(codec.read_frames(content, "theirs")) == records
    assert content == b"".join(map(codec.frame, records))


def test_no_frames():
    assert list(codec.read_frames(b"", "empty")) == []


def test_every_changed_byte_of_a_file_is_noticed():
    content = b"".join(map(codec.frame, [b"first record", b"", b"second"]))
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            with pytest.raises(InputError, match=r"^some\.tfrecord: damaged at byte (0|28|44);"):
                pytest.fail(str(list(codec.read_frames(bytes(changed), "some.tfrecord"))))


def test_every_cut_inside_a_frame_is_noticed():
    frames = [codec.frame(record) for record in (b"first record", b"", b"second")]
    content = b"".join(frames)
    whole = {0: 0, 28: 1, 44: 2, len(content): 3}
    for size in range(len(content) + 1):
        if size in whole:
            assert len(list(codec.read_frames(content[:size], "x"))) == whole[size]
        else:
            with pytest.raises(InputError, match="expected a whole TFRecord frame"):
                list(codec.read_frames(content[:size], "x"))


def test_frame_that_claims_more_than_there_is():
    length = struct.pack("<Q", 2**63)
    header = length + struct.pack("<I", codec.masked_crc(length))
    with pytest.raises(InputError, match="damaged at byte 0"):
        list(codec.read_frames(header + b"short", "x"))


# Shards


def shard_of(directory, content, num_examples):
    (directory / "a.tfrecord").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return dataset.Shard(
        file="a.tfrecord", num_examples=num_examples, bytes=len(content), sha256=digest
    )


def test_shard_is_checked(tmp_path, pixels):
    content = codec.frame(codec.encode_record(pixels, 1, ID))
    shard = shard_of(tmp_path, content, 1)
    assert [record.id for record in codec.read_records(tmp_path, shard)] == [ID]

    path = tmp_path / shard.file
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"a.tfrecord: has {len(content) - 1} bytes"):
        codec.read_records(tmp_path, shard)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"a\.tfrecord: its checksum differs"):
        codec.read_records(tmp_path, shard)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.tfrecord: cannot be read: No such file"):
        codec.read_records(tmp_path, shard)


@pytest.mark.parametrize(
    ("content", "num_examples", "message"),
    [
        (b"no frames here", 1, "damaged at byte 0"),
        (codec.frame(b"no record"), 1, "not a record of this format"),
        (b"", 1, "0 records, the manifest says 1"),
        (codec.frame(codec.encode_record(bytes(784), 1, ID)) * 2, 1, "2 records"),
    ],
    ids=["no frames", "no record", "too few", "too many"],
)
def test_shard_with_a_right_checksum_and_wrong_content(tmp_path, content, num_examples, message):
    with pytest.raises(InputError, match=rf"a\.tfrecord: .*{message}"):
        codec.read_records(tmp_path, shard_of(tmp_path, content, num_examples))


def gzip_shard(directory, content, num_examples, change=lambda data: data):
    """A shard of compressed content; its file is changed, its checksum is right."""
    packed = change(gzip.compress(content, mtime=0))
    (directory / "a.tfrecord.gz").write_bytes(packed)
    return dataset.Shard(
        file="a.tfrecord.gz",
        num_examples=num_examples,
        bytes=len(packed),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_compressed_shard(tmp_path, pixels):
    content = codec.frame(codec.encode_record(pixels, 1, ID)) * 3
    shard = gzip_shard(tmp_path, content, 3)
    assert codec.read_shard(tmp_path, shard) == content
    codec.verify_shard(tmp_path, shard)
    assert [record.id for record in codec.read_records(tmp_path, shard)] == [ID] * 3
    assert codec.read_records(tmp_path, gzip_shard(tmp_path, b"", 0)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "cut short, or larger"),
        (lambda data: data[: len(data) // 2], "cut short, or larger"),
        (lambda data: b"", "cut short, or larger"),
        (lambda data: data + b"more", "cut short, or larger"),
        (lambda data: data + data, "cut short, or larger"),
        (lambda data: gzip.compress(bytes(4097 * 2)), "cut short, or larger"),
        (lambda data: b"no gzip file", "not a gzip file"),
        (lambda data: data[:-8] + bytes(8), "not a gzip file"),
        (lambda data: gzip.compress(bytes(300)), "its checksum differs"),
    ],
    ids=["no end", "half", "empty", "more", "twice", "too large", "text", "checksum", "other"],
)
def test_compressed_shard_that_is_broken(tmp_path, pixels, change, message):
    content = codec.frame(codec.encode_record(pixels, 1, ID)) * 2
    shard = gzip_shard(tmp_path, content, 2, change)
    for check in (codec.read_shard, codec.verify_shard):
        with pytest.raises(InputError, match=rf"a\.tfrecord\.gz: {message}"):
            check(tmp_path, shard)


def test_compressed_shard_that_swells_is_not_held_in_memory(tmp_path):
    size = 64 << 20
    shard = gzip_shard(tmp_path, b"", 1, lambda _: gzip.compress(bytes(size), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="larger than its records can be"):
            codec.read_shard(tmp_path, shard)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 16


def test_compressed_shard_is_verified_block_by_block(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(codec, "BLOCK", 5)
    content = codec.frame(codec.encode_record(pixels, 1, ID)) * 3
    codec.verify_shard(tmp_path, gzip_shard(tmp_path, content, 3))
    with pytest.raises(InputError, match="cut short, or larger"):
        codec.verify_shard(tmp_path, gzip_shard(tmp_path, content, 3, lambda data: data + b"more"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "has 299 bytes, the manifest says 300"),
        (lambda data: data + b"x", "has 301 bytes, the manifest says 300"),
        (lambda data: b"x" + data[1:], "its checksum differs"),
        (lambda data: None, "cannot be read: No such file"),
    ],
    ids=["shorter", "longer", "other", "missing"],
)
def test_shard_that_is_not_what_the_manifest_says(tmp_path, change, message):
    content = bytes(300)
    shard = dataset.Shard(
        file="a.tfrecord", num_examples=3, bytes=300, sha256=hashlib.sha256(content).hexdigest()
    )
    (tmp_path / "a.tfrecord").write_bytes(content)
    codec.verify_shard(tmp_path, shard)
    (tmp_path / "a.tfrecord").unlink()
    if (changed := change(content)) is not None:
        (tmp_path / "a.tfrecord").write_bytes(changed)
    for check in (codec.read_shard, codec.verify_shard):
        with pytest.raises(InputError, match=rf"a\.tfrecord: {message}"):
            check(tmp_path, shard)


def test_verifying_a_shard_does_not_hold_it_in_memory(tmp_path):
    size = 64 << 20
    with (tmp_path / "a.tfrecord").open("wb") as file:
        file.truncate(size)
        digest = hashlib.sha256(bytes(size)).hexdigest()
    shard = dataset.Shard(file="a.tfrecord", num_examples=1, bytes=size, sha256=digest)
    tracemalloc.start()
    try:
        codec.verify_shard(tmp_path, shard)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 16
