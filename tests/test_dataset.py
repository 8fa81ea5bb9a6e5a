import dataclasses
import gzip
import hashlib
import json
import struct
import tracemalloc

import helpers
import numpy as np
import pytest

from pipeline import dataset
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
    record = dataset.encode_record(b"\x00\x33\xff" + bytes(781), 5, "ab")
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
    ours = dataset.encode_record(pixels, label, record_id)
    theirs = example(tf, pixels, label, record_id)
    assert ours == theirs.SerializeToString(deterministic=True)
    assert tf.train.Example.FromString(ours) == theirs
    read = dataset.decode_record(theirs.SerializeToString())
    assert (read.label, read.id) == (label, record_id)
    assert read.image.tobytes() == dataset.decode_record(ours).image.tobytes()


@pytest.mark.parametrize("label", [0, 127, 128, 255])
def test_record_round_trip(pixels, label):
    record = dataset.decode_record(dataset.encode_record(pixels, label, f"{ID}-7"))
    assert (record.label, record.id, record.image.dtype) == (label, f"{ID}-7", np.float32)
    assert np.rint(record.image * 255).astype(np.uint8).tobytes() == pixels


def test_records_that_are_none(pixels):
    record = dataset.encode_record(pixels, 3, ID)
    broken = {
        "empty": b"",
        "text": b"no record at all",
        "no features": b"\x0a\x00",
        "no end": record + b"\x0a",
        "other type": b"\x08\x01",
        "endless number": b"\xff" * 12,
        "a fourth feature": record + dataset._message(1, dataset._feature("labels", 3, b"\x01")),
        "unfinished label": record[:-1] + b"\x83",
        "id not ascii": record.replace(ID.encode(), b"\xff" * 32),
        "small image": dataset._message(
            1,
            dataset._feature("id", 1, b"a")
            + dataset._feature("image", 2, bytes(4 * 783))
            + dataset._feature("label", 3, b"\x01"),
        ),
        "odd image": dataset._message(
            1,
            dataset._feature("id", 1, b"a")
            + dataset._feature("image", 2, bytes(4 * 784 - 1))
            + dataset._feature("label", 3, b"\x01"),
        ),
        "three numbers as label": dataset._message(
            1,
            dataset._feature("id", 1, b"a")
            + dataset._feature("image", 2, bytes(4 * 784))
            + dataset._feature("label", 3, b"\x01\x02\x03"),
        ),
        "no label": dataset._message(
            1, dataset._feature("id", 1, b"a") + dataset._feature("image", 2, bytes(4 * 784))
        ),
    } | {f"first {n}": record[:n] for n in range(1, len(record))}
    for name, data in broken.items():
        with pytest.raises(ValueError, match="not a record of this format"):
            pytest.fail(f"{name}: {dataset.decode_record(data)}")


def test_scale_table():
    expected = [np.float32(value) / np.float32(255) for value in range(256)]
    assert dataset.SCALE_TABLE.dtype == np.float32
    assert dataset.SCALE_TABLE.tolist() == [float(value) for value in expected]
    assert (dataset.SCALE_TABLE[0], dataset.SCALE_TABLE[255]) == (0, 1)
    assert struct.pack("<f", dataset.SCALE_TABLE[51]) == bytes.fromhex("cdcc4c3e")  # 0.2


def test_unscale_gives_back_every_pixel():
    assert dataset.unscale(dataset.SCALE_TABLE).tolist() == list(range(256))


LENGTHS = ["", "-1", "-12345"]


@pytest.mark.parametrize("labels", [[0, 1, 127, 9, 5, 3], [0, 128, 255, 9, 127, 200]])
@pytest.mark.parametrize("suffixes", [[""] * 6, ["-7"] * 6, LENGTHS * 2], ids=str)
@pytest.mark.parametrize("count", [6, 1, 0])
def test_many_frames_are_those_of_each(labels, suffixes, count):
    pixels = np.random.default_rng(2).integers(0, 256, (6, 784), np.uint8)[:count]
    labels = np.array(labels[:count], np.uint8)
    ids = [f"{ID}{suffix}" for suffix in suffixes[:count]]
    expected = b"".join(
        dataset.frame(dataset.encode_record(row.tobytes(), int(label), name))
        for row, label, name in zip(pixels, labels, ids, strict=True)
    )
    assert dataset.encode_frames(pixels, labels, ids) == expected
    read = [dataset.decode_record(r) for r in dataset.read_frames(expected, "x")]
    assert [(r.label, r.id) for r in read] == list(zip(labels.tolist(), ids, strict=True))


def test_many_frames_of_blank_images():
    # An empty record is what the table is filled with: its zeros must be overwritten in place.
    pixels = np.array([[0] * 784, [255] * 784], np.uint8)
    expected = b"".join(
        dataset.frame(dataset.encode_record(row.tobytes(), 0, "0" * 32)) for row in pixels
    )
    assert dataset.encode_frames(pixels, np.zeros(2, np.int64), ["0" * 32] * 2) == expected


# Identity


def test_digests_are_the_ids():
    pixels = np.random.default_rng(3).integers(0, 256, (20, 784), np.uint8)
    digests = dataset.image_digests(pixels)
    assert (digests.shape, digests.dtype) == ((20, 16), np.uint8)
    assert [digest.tobytes().hex() for digest in digests] == dataset.image_ids(pixels)
    assert dataset.image_digests(pixels[:0]).shape == (0, 16)
    assert dataset.image_ids(pixels[:0]) == []


@pytest.mark.parametrize(("first", "count"), [(0, 32), (32, 32), (64, 64), (0, 64), (120, 8)])
def test_digest_bits_are_id_bits(first, count):
    pixels = np.random.default_rng(4).integers(0, 256, (50, 784), np.uint8)
    found = dataset.digest_bits(dataset.image_digests(pixels), first, count)
    assert found.dtype == np.uint64
    assert found.tolist() == [
        dataset.id_bits(name, first, count) for name in dataset.image_ids(pixels)
    ]


def test_ids_are_of_the_pixels_alone():
    rows = np.zeros((3, 784), np.uint8)
    rows[1, 783] = 1
    ids = dataset.image_ids(rows)
    assert ids[0] == hashlib.sha256(bytes(784)).hexdigest()[:32] == ids[2]
    assert ids[1] == hashlib.sha256(bytes(783) + b"\x01").hexdigest()[:32]
    assert dataset.image_ids(rows[::-1]) == ids[::-1]  # also where rows are not contiguous
    assert dataset.image_ids(np.asfortranarray(rows)) == ids


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
    assert dataset.id_bits(f"0123456789abcdef0011223344556677{copy}", first, count) == expected


# Frames


def test_frames_are_read_by_tensorflow(tf, tmp_path, pixels):
    records = [dataset.encode_record(pixels, label, ID) for label in range(3)] + [b"", b"x" * 70]
    path = tmp_path / "ours.tfrecord"
    path.write_bytes(b"".join(map(dataset.frame, records)))
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records


def test_frames_of_tensorflow_are_read(tf, tmp_path, pixels):
    records = [dataset.encode_record(pixels, label, ID) for label in range(3)] + [b"", b"x" * 70]
    path = tmp_path / "theirs.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    content = path.read_bytes()
    assert list(dataset.read_frames(content, "theirs")) == records
    assert content == b"".join(map(dataset.frame, records))


def test_no_frames():
    assert list(dataset.read_frames(b"", "empty")) == []


def test_every_changed_byte_of_a_file_is_noticed():
    content = b"".join(map(dataset.frame, [b"first record", b"", b"second"]))
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            with pytest.raises(InputError, match=r"^some\.tfrecord: damaged at byte (0|28|44);"):
                pytest.fail(str(list(dataset.read_frames(bytes(changed), "some.tfrecord"))))


def test_every_cut_inside_a_frame_is_noticed():
    frames = [dataset.frame(record) for record in (b"first record", b"", b"second")]
    content = b"".join(frames)
    whole = {0: 0, 28: 1, 44: 2, len(content): 3}
    for size in range(len(content) + 1):
        if size in whole:
            assert len(list(dataset.read_frames(content[:size], "x"))) == whole[size]
        else:
            with pytest.raises(InputError, match="expected a whole TFRecord frame"):
                list(dataset.read_frames(content[:size], "x"))


def test_frame_that_claims_more_than_there_is():
    length = struct.pack("<Q", 2**63)
    header = length + struct.pack("<I", dataset._masked_crc(length))
    with pytest.raises(InputError, match="damaged at byte 0"):
        list(dataset.read_frames(header + b"short", "x"))


# The manifest


def manifest():
    def split(name, counts):
        shards = tuple(
            dataset.Shard(
                file=dataset.shard_name(name, i, 2), num_examples=n, bytes=9 * n, sha256="f" * 64
            )
            for i, n in enumerate((1, sum(counts) - 1))
        )
        return dataset.Split(num_examples=sum(counts), label_counts=counts, shards=shards)

    splits = {"train": split("train", (3, 2)), "validation": split("validation", (0, 1))}
    splits["test"] = split("test", (2, 2))
    shards = [shard for part in splits.values() for shard in part.shards]
    return dataset.Manifest(
        format_version=1,
        dataset_id=dataset.dataset_id(shards, ("null", "één")),
        source={"kind": "idx", "title": "a few"},
        split_by="hash",
        num_classes=2,
        class_names=("null", "één"),
        image_shape=(28, 28, 1),
        splits=splits,
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={"blank": 0},
        duplicates=dict.fromkeys(dataset.DUPLICATES, 0),
    )


def test_manifest_round_trip():
    text = dataset.manifest_json(manifest())
    assert dataset.parse_manifest(text, "m") == manifest()
    assert dataset.manifest_json(dataset.parse_manifest(text, "m")) == text
    assert text.isascii() and text.endswith("}\n")
    assert list(json.loads(text)) == [
        "format_version",
        "dataset_id",
        "source",
        "split_by",
        "num_classes",
        "class_names",
        "image_shape",
        "splits",
        "quarantined",
        "dropped",
        "flagged",
        "duplicates",
    ]


def test_shard_name():
    assert dataset.shard_name("train", 3, 8) == "train-00003-of-00008.tfrecord"
    assert dataset.shard_name("test", 0, 1, "gzip") == "test-00000-of-00001.tfrecord.gz"


def test_two_files_of_one_name_are_told():
    raw = json.loads(dataset.manifest_json(manifest()))
    train, test = (raw["splits"][split]["shards"] for split in ("train", "test"))
    test[0]["file"] = train[0]["file"]
    shards = [
        dataset.Shard(**shard) for split in raw["splits"].values() for shard in split["shards"]
    ]
    raw["dataset_id"] = dataset.dataset_id(shards, raw["class_names"])
    with pytest.raises(InputError, match="a file is listed twice"):
        dataset.parse_manifest(json.dumps(raw), "m")


def test_dataset_id_does_not_depend_on_compression():
    plain = dataset.Shard(file="a.tfrecord", num_examples=1, bytes=20, sha256="0" * 64)
    packed = dataclasses.replace(plain, file="a.tfrecord.gz", bytes=9)
    assert dataset.dataset_id([plain], "ab") == dataset.dataset_id([packed], "ab")


def test_dataset_id_is_of_names_checksums_and_classes():
    one = dataset.Shard(file="a", num_examples=1, bytes=2, sha256="0" * 64)
    two = dataset.Shard(file="b", num_examples=1, bytes=2, sha256="1" * 64)
    base = dataset.dataset_id([one, two], ["0", "1"])
    # The id is part of the contract: it must not move between versions of this code.
    text = f'[1, ["0", "1"], [["a", "{"0" * 64}"], ["b", "{"1" * 64}"]]]'
    assert base == hashlib.sha256(text.encode()).hexdigest()[:32]
    for other in (
        dataset.dataset_id([two, one], ["0", "1"]),
        dataset.dataset_id([one], ["0", "1"]),
        dataset.dataset_id([one, dataclasses.replace(two, sha256="2" * 64)], ["0", "1"]),
        dataset.dataset_id([one, dataclasses.replace(two, file="c")], ["0", "1"]),
        dataset.dataset_id([one, two], ["1", "0"]),
        dataset.dataset_id([one, two], ["0", "1", "2"]),
    ):
        assert other != base


def changed(**values):
    def change(raw):
        raw.update(values)

    return change


def in_train(**values):
    def change(raw):
        raw["splits"]["train"].update(values)

    return change


def in_shard(**values):
    def change(raw):
        raw["splits"]["train"]["shards"][0].update(values)

    return change


def without(*path):
    def change(raw):
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return change


BROKEN = {
    "next version": changed(format_version=2),
    "version as text": changed(format_version="1"),
    "version null": changed(format_version=None),
    "version a list": changed(format_version=[]),
    "unknown key": changed(created="today"),
    "no version": without("format_version"),
    "no id": without("dataset_id"),
    "no classes": without("class_names"),
    "no shape": without("image_shape"),
    "no duplicates": without("duplicates"),
    "no validation": without("splits", "validation"),
    "no counts": without("splits", "train", "label_counts"),
    "no sum": without("splits", "train", "num_examples"),
    "no shards": without("splits", "train", "shards"),
    "no checksum": without("splits", "train", "shards", 0, "sha256"),
    "no file": without("splits", "train", "shards", 0, "file"),
    "splits a list": changed(splits=[]),
    "split null": changed(splits={"train": None, "validation": None, "test": None}),
    "shards null": in_train(shards=None),
    "shard a string": in_train(shards=["train"]),
    "32x32": changed(image_shape=[32, 32, 1]),
    "flat": changed(image_shape=[784]),
    "shape null": changed(image_shape=None),
    "one class": changed(num_classes=1, class_names=["0"]),
    "too many classes": changed(num_classes=257, class_names=["x"] * 257),
    "classes as text": changed(num_classes="2"),
    "fewer names": changed(class_names=["0"]),
    "names null": changed(class_names=None),
    "folder above": in_shard(file="../train-00000-of-00002.tfrecord"),
    "absolute": in_shard(file="/etc/passwd"),
    "folder below": in_shard(file="a/b"),
    "parent": in_shard(file=".."),
    "the folder": in_shard(file="."),
    "no name": in_shard(file=""),
    "name null": in_shard(file=None),
    "name a number": in_shard(file=7),
    "sum off": in_train(num_examples=6),
    "sum a list": in_train(num_examples=[5]),
    "counts off": in_train(label_counts=[3, 3]),
    "counts of three classes": in_train(label_counts=[3, 1, 1]),
    "counts as text": in_train(label_counts=["3", "2"]),
    "less than none": in_train(label_counts=[7, -2]),
    "half a row": in_train(label_counts=[2.5, 2.5]),
    "shard off": in_shard(num_examples=2),
    "shard as text": in_shard(num_examples="1"),
    "other checksum": in_shard(sha256="0" * 64),
    "other id": changed(dataset_id="0" * 32),
    "a file twice": in_shard(file="train-00001-of-00002.tfrecord"),
    "a source without a title": changed(source={}),
    "a source that is text": changed(source="idx"),
    "nothing of quarantine": changed(quarantined={}),
    "quarantine null": changed(quarantined=None),
    "reasons a list": changed(quarantined={"count": 0, "by_reason": []}),
    "reasons off": changed(quarantined={"count": 1, "by_reason": {"damaged": 2}}),
    "dropped as text": changed(dropped="0"),
    "flagged a list": changed(flagged=[]),
    "less than none blank": changed(flagged={"blank": -1}),
    "no leaks": changed(duplicates={"images": 0, "copies": 0, "conflicting": 0}),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_manifest(change):
    raw = json.loads(dataset.manifest_json(manifest()))
    dataset.parse_manifest(json.dumps(raw), "m.json")
    change(raw)
    with pytest.raises(InputError, match=r"^m\.json: .+$") as caught:
        dataset.parse_manifest(json.dumps(raw), "m.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[]", "[1]", "null", "7", '"format_version"', "{}", "NaN", "[" * 100_000],
    ids=lambda text: text[:14] or "empty",
)
def test_text_that_is_no_manifest(text):
    with pytest.raises(InputError, match=r"^m\.json: not a dataset manifest$"):
        dataset.parse_manifest(text, "m.json")


def test_other_version_says_what_to_do():
    raw = json.loads(dataset.manifest_json(manifest())) | {"format_version": 2}
    with pytest.raises(InputError, match=r"is 2, expected 1; run .* again, with --overwrite or"):
        dataset.parse_manifest(json.dumps(raw), "m.json")


# The folder


def test_small_dataset_is_what_was_put_in(small_dataset):
    found = dataset.load_manifest(small_dataset)
    read = {
        split: [
            record
            for shard in found.splits[split].shards
            for record in dataset.read_records(small_dataset, shard)
        ]
        for split in dataset.SPLITS
    }
    data = helpers.make_images()
    expected = {
        "train": [array[100:] for array in data["train"]],
        "validation": [array[:100] for array in data["train"]],
        "test": data["test"],
    }
    for split, (images, labels) in expected.items():
        assert sorted((r.id, r.label, r.image.tobytes()) for r in read[split]) == sorted(
            (name, label, dataset.SCALE_TABLE[image.reshape(784)].tobytes())
            for name, label, image in zip(
                dataset.image_ids(images.reshape(-1, 784)), labels.tolist(), images, strict=True
            )
        )


def test_manifest_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such folder; expected a dataset"):
        dataset.load_manifest(tmp_path / "none")
    with pytest.raises(InputError, match=r"no manifest\.json; expected a dataset"):
        dataset.load_manifest(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        dataset.load_manifest(tmp_path)


def test_manifest_that_is_not_text(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="cannot be read"):
        dataset.load_manifest(tmp_path)


def shard_of(directory, content, num_examples):
    (directory / "a.tfrecord").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return dataset.Shard(
        file="a.tfrecord", num_examples=num_examples, bytes=len(content), sha256=digest
    )


def test_shard_is_checked(tmp_path, pixels):
    content = dataset.frame(dataset.encode_record(pixels, 1, ID))
    shard = shard_of(tmp_path, content, 1)
    assert [record.id for record in dataset.read_records(tmp_path, shard)] == [ID]

    path = tmp_path / shard.file
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"a.tfrecord: has {len(content) - 1} bytes"):
        dataset.read_records(tmp_path, shard)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"a\.tfrecord: its checksum differs"):
        dataset.read_records(tmp_path, shard)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.tfrecord: cannot be read: No such file"):
        dataset.read_records(tmp_path, shard)


@pytest.mark.parametrize(
    ("content", "num_examples", "message"),
    [
        (b"no frames here", 1, "damaged at byte 0"),
        (dataset.frame(b"no record"), 1, "not a record of this format"),
        (b"", 1, "0 records, the manifest says 1"),
        (dataset.frame(dataset.encode_record(bytes(784), 1, ID)) * 2, 1, "2 records"),
    ],
    ids=["no frames", "no record", "too few", "too many"],
)
def test_shard_with_a_right_checksum_and_wrong_content(tmp_path, content, num_examples, message):
    with pytest.raises(InputError, match=rf"a\.tfrecord: .*{message}"):
        dataset.read_records(tmp_path, shard_of(tmp_path, content, num_examples))


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
    content = dataset.frame(dataset.encode_record(pixels, 1, ID)) * 3
    shard = gzip_shard(tmp_path, content, 3)
    assert dataset.read_shard(tmp_path, shard) == content
    assert [record.id for record in dataset.read_records(tmp_path, shard)] == [ID] * 3
    assert dataset.read_records(tmp_path, gzip_shard(tmp_path, b"", 0)) == []


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
    content = dataset.frame(dataset.encode_record(pixels, 1, ID)) * 2
    shard = gzip_shard(tmp_path, content, 2, change)
    with pytest.raises(InputError, match=rf"a\.tfrecord\.gz: {message}"):
        dataset.read_shard(tmp_path, shard)


def test_compressed_shard_that_swells_is_not_held_in_memory(tmp_path):
    size = 64 << 20
    shard = gzip_shard(tmp_path, b"", 1, lambda _: gzip.compress(bytes(size), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="larger than its records can be"):
            dataset.read_shard(tmp_path, shard)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 16
