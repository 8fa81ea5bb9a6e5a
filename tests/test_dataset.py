import dataclasses
import hashlib
import json
import shutil

import helpers
import pytest

from pipeline import dataset
from pipeline import records as codec
from pipeline.command import InputError

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
        duplicates=dict.fromkeys(dataset.DUPLICATES, 0)
        | {"examples": {kind: [] for kind in dataset.KINDS_OF_IMAGES}},
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
    with pytest.raises(InputError, match=r"file 'train-00000-of-00002.tfrecord', expected test-"):
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
    "source null": changed(source=None),
    "source a list": changed(source=["title"]),
    "bytes as text": in_shard(bytes="9"),
    "less than no bytes": in_shard(bytes=-1),
    "checksum a number": in_shard(sha256=0),
    "quarantine a list": changed(quarantined=["count", "by_reason"]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_manifest(change):
    raw = json.loads(dataset.manifest_json(manifest()))
    dataset.parse_manifest(json.dumps(raw), "m.json")
    change(raw)
    with pytest.raises(InputError, match=r"^m\.json: .+$") as caught:
        dataset.parse_manifest(json.dumps(raw), "m.json")
    assert "\n" not in str(caught.value)


def classes(*names):
    """Changes the names, and the id that follows from them."""

    def change(raw):
        shards = [dataset.Shard(**s) for part in raw["splits"].values() for s in part["shards"]]
        raw.update(class_names=names, dataset_id=dataset.dataset_id(shards, names))

    return change


def files(split, *names):
    """Renames the files of a split, the last of which may be more than there are."""

    def change(raw):
        shards = raw["splits"][split]["shards"]
        del shards[len(names) :]
        for shard, name in zip(shards, names, strict=False):
            shard["file"] = name
        for name in names[len(shards) :]:
            shards.append({"file": name, "num_examples": 0, "bytes": 0, "sha256": "f" * 64})

    return change


def one_file_each(raw):
    """Every split has one file, named as one of two."""
    for part in raw["splits"].values():
        part["shards"][0]["num_examples"] = part["num_examples"]
        del part["shards"][1]


def no_files(raw):
    for part in raw["splits"].values():
        part.update(num_examples=0, label_counts=[0, 0], shards=[])


def duplicates(examples=None, **counts):
    def change(raw):
        raw["duplicates"].update(counts)
        raw["duplicates"]["examples"].update(examples or {})

    return change


A_FILE, ANOTHER = "train-00000-of-00002.tfrecord", "train-00001-of-00002.tfrecord"
NAMES = [f"{digit}" * 32 for digit in "012345"]
WRONG = {
    "title of two lines": (
        changed(source={"kind": "idx", "title": "a\nb"}),
        "source has no title of one line",
    ),
    "title a list": (changed(source={"title": ["a"]}), "source has no title of one line"),
    "title empty": (changed(source={"title": ""}), "source has no title of one line"),
    "class of two lines": (classes("a", "b\nc"), "class name 'b\\nc' is not a string of one line"),
    "class with a bell": (classes("a\x07", "b"), "class name 'a\\x07' is not a string of one line"),
    "class that ends a line": (
        classes("a", "b\u2028"),
        "class name 'b\\u2028' is not a string of one line",
    ),
    "class half a character": (
        classes("a", "\ud800"),
        "class name '\\ud800' is not a string of one line",
    ),
    "class empty": (classes("", "b"), "class name '' is not a string of one line"),
    "class a number": (classes("a", 1), "class name 1 is not a string of one line"),
    "class twice": (classes("a", "a"), "a class name occurs twice"),
    "quarantine with more": (
        changed(quarantined={"count": 0, "by_reason": {}, "why": ""}),
        "quarantined is not count and by_reason",
    ),
    "reason of two lines": (
        changed(quarantined={"count": 1, "by_reason": {"a\nb": 1}}),
        "a reason in quarantined is not a string of one line",
    ),
    "reason of none": (
        changed(quarantined={"count": 1, "by_reason": {"a": 1, "b": 0}}),
        "quarantined counts more or fewer than its reasons",
    ),
    "reasons less than none": (
        changed(quarantined={"count": 1, "by_reason": {"a": 2, "b": -1}}),
        "quarantined counts -1, expected a whole number",
    ),
    "count true": (
        changed(quarantined={"count": True, "by_reason": {"a": 1}}),
        "quarantined counts True, expected a whole number",
    ),
    "dropped less than none": (changed(dropped=-1), "dropped counts -1, expected a whole number"),
    "flagged nothing": (changed(flagged={}), "flagged is not blank alone"),
    "flagged more": (changed(flagged={"blank": 0, "odd": 0}), "flagged is not blank alone"),
    "blank a half": (
        changed(flagged={"blank": 0.5}),
        "flagged counts 0.5, expected a whole number",
    ),
    "duplicates with more": (
        duplicates(twins=0),
        "duplicates is not images, copies, conflicting, leaked, held_out and examples",
    ),
    "duplicates as text": (
        duplicates(copies="0"),
        "duplicates counts '0', expected a whole number",
    ),
    "examples of more": (
        duplicates({"copies": []}),
        "examples of duplicates are of other kinds",
    ),
    "examples a dictionary": (duplicates({"leaked": {}}), "examples of leaked are not ids"),
    "examples that are no ids": (
        duplicates({"leaked": ["0" * 31]}, leaked=1),
        "examples of leaked are not ids",
    ),
    "examples of a copy": (
        duplicates({"leaked": ["0" * 32 + "-1"]}, leaked=1),
        "examples of leaked are not ids",
    ),
    "fewer examples": (
        duplicates({"images": NAMES[:1]}, images=2),
        "examples of images are not the lowest of 2",
    ),
    "more examples": (
        duplicates({"images": NAMES[:2]}, images=1),
        "examples of images are not the lowest of 1",
    ),
    "six examples": (
        duplicates({"images": NAMES}, images=6),
        "examples of images are not the lowest of 6",
    ),
    "examples in disorder": (
        duplicates({"images": NAMES[1::-1]}, images=2),
        "examples of images are not the lowest of 2",
    ),
    "an example twice": (
        duplicates({"images": NAMES[:1] * 2}, images=2),
        "examples of images are not the lowest of 2",
    ),
    "files exchanged": (
        files("train", ANOTHER, A_FILE),
        f"file '{ANOTHER}', expected {A_FILE}",
    ),
    "another split's file": (
        files("test", A_FILE, "test-00001-of-00002.tfrecord"),
        f"file '{A_FILE}', expected test-00000-of-00002.tfrecord",
    ),
    "one compressed": (
        files("train", A_FILE, f"{ANOTHER}.gz"),
        f"file '{ANOTHER}.gz', expected {ANOTHER}",
    ),
    "one more file": (
        files("test", *(f"test-0000{i}-of-00002.tfrecord" for i in range(3))),
        "test has 3 files, train has 2",
    ),
    "other numbers": (one_file_each, f"file '{A_FILE}', expected train-00000-of-00001.tfrecord"),
    "no files": (no_files, "train has no files"),
    "short checksum": (in_shard(sha256="f" * 63), f"'{'f' * 63}' is not a checksum"),
    "checksum in capitals": (in_shard(sha256="F" * 64), f"'{'F' * 64}' is not a checksum"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_manifest_cannot_state(change, message):
    raw = json.loads(dataset.manifest_json(manifest()))
    change(raw)
    with pytest.raises(InputError) as caught:
        dataset.parse_manifest(json.dumps(raw), "m.json")
    assert str(caught.value) == f"m.json: not a valid manifest: {message}"


def test_what_a_manifest_may_state():
    raw = json.loads(dataset.manifest_json(manifest()))
    classes("a b", "\u00e9\u00a0\u200d")(raw)
    duplicates({"images": NAMES[:5], "leaked": NAMES[2:4]}, images=7, copies=9, leaked=2)(raw)
    raw["quarantined"] = {"count": 3, "by_reason": {"damaged": 1, "wrong size": 2}}
    found = dataset.parse_manifest(json.dumps(raw), "m.json")
    assert json.loads(dataset.manifest_json(found)) == raw | {
        "class_names": ["a b", "\u00e9\u00a0\u200d"]
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", True),
        (" ", True),
        ("\u00e9\u3000\U0001f469", True),
        ("", False),
        *((f"a{each}b", False) for each in "\n\r\t\0\x1c\x7f\x85\u2028\u2029\ud800"),
        (None, False),
        (7, False),
        (b"a", False),
        (["a"], False),
    ],
    ids=repr,
)
def test_is_line(text, expected):
    assert dataset.is_line(text) is expected


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
            for record in codec.read_records(small_dataset, shard)
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
            (name, label, codec.SCALE_TABLE[image.reshape(784)].tobytes())
            for name, label, image in zip(
                codec.image_ids(images.reshape(-1, 784)), labels.tolist(), images, strict=True
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


def test_files_are_checked_by_their_sizes(small_dataset, tmp_path):
    folder = shutil.copytree(small_dataset, tmp_path / "set")
    found = dataset.load_manifest(folder)
    shard = found.splits["test"].shards[1]
    path = folder / shard.file
    path.write_bytes(bytes(shard.bytes))  # other content: its size is right
    for split in dataset.SPLITS:
        dataset.check_files(folder, found, split)
    path.write_bytes(bytes(shard.bytes + 1))
    dataset.check_files(folder, found, "train")
    for spoil, message in (
        (lambda: None, f"has {shard.bytes + 1} bytes, the manifest says {shard.bytes}"),
        (path.unlink, "missing; the manifest names it"),
        (path.mkdir, "missing; the manifest names it"),
    ):
        spoil()
        with pytest.raises(InputError) as caught:
            dataset.check_files(folder, found, "test")
        assert str(caught.value) == f"{path}: {message}"
