import dataclasses
import hashlib
import json
import shutil
import sys

import helpers
import numpy as np
import pytest

from pipeline import comparison, dataset, inspection, preprocess
from pipeline import records as codec
from pipeline.dataset import Split, load_manifest, manifest_json
from pipeline.options import PreprocessConfig
from pipeline.records import image_ids


@pytest.fixture
def folder(small_dataset, tmp_path):
    """A copy of `small_dataset` to be spoilt."""
    return shutil.copytree(small_dataset, tmp_path / "set")


def run(monkeypatch, *argv):
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["dataset", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        dataset.main()
    return caught.value.code


def records_of(directory, split):
    """One list of records for each file of a split."""
    manifest = load_manifest(directory)
    return [codec.read_records(directory, shard) for shard in manifest.splits[split].shards]


def encode(record):
    """A record as it stands in a file, its pixels as they are."""
    features = (
        codec._feature("id", 1, record.id.encode())
        + codec._feature("image", 2, np.asarray(record.image, "<f4").tobytes())
        + codec._feature("label", 3, codec._varint(record.label))
    )
    return codec.frame(codec.message(1, features))


def rewrite(directory, split, index, records, encode=encode):
    """Writes other records into a file, and a manifest in which every checksum is right."""
    manifest = load_manifest(directory)
    content = b"".join(map(encode, records))
    old = manifest.splits[split]
    shard = dataclasses.replace(
        old.shards[index],
        num_examples=len(records),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    (directory / shard.file).write_bytes(content)
    shards = (*old.shards[:index], shard, *old.shards[index + 1 :])
    size = sum(each.num_examples for each in shards)
    counts = list(old.label_counts)
    counts[0] += size - sum(counts)
    write_manifest(
        directory,
        manifest,
        split,
        Split(num_examples=size, label_counts=tuple(counts), shards=shards),
    )


def write_manifest(directory, manifest, split, changed):
    splits = manifest.splits | {split: changed}
    every = [shard for each in splits.values() for shard in each.shards]
    named = dataset.dataset_id(every, manifest.class_names)
    text = manifest_json(dataclasses.replace(manifest, splits=splits, dataset_id=named))
    (directory / "manifest.json").write_text(text)


# verify


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_whole_dataset(small_idx, tmp_path, monkeypatch, capsys, compression):
    config = PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=tmp_path / "set", compression=compression
    )
    assert preprocess.execute(config) == 0
    assert inspection.verify(tmp_path / "set") == []
    assert run(monkeypatch, "verify", tmp_path / "set") == 0
    assert capsys.readouterr() == (
        f"{tmp_path / 'set'}: 720 records, all as the manifest states\n",
        "",
    )


def test_dataset_with_everything_odd_is_whole(tmp_path):
    data = helpers.make_images(60, 30)
    data["train"][0][7:10] = 0  # blank, and each other's copies
    data["train"][0][11] = data["test"][0][2]
    data["train"][1][20:22] = 11
    source = f"idx:{helpers.write_idx(tmp_path / 'idx', data)}"
    config = PreprocessConfig(
        sources=(source,), output_dir=tmp_path / "set", num_classes=10,
        max_quarantined=0.1, drop_leaks=True, num_shards=2,
    )  # fmt: skip
    assert preprocess.execute(config) == 0
    manifest = load_manifest(tmp_path / "set")
    assert (manifest.dropped, manifest.quarantined["count"]) == (1, 2)
    assert manifest.flagged == {"blank": 3}
    assert inspection.verify(tmp_path / "set") == []
    assert "quarantined 2, dropped 1, blank 3" in comparison.describe(tmp_path / "set")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9])
def test_dataset_split_by_hash_is_whole(small_idx, tmp_path, fraction):
    config = PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=tmp_path / "set", split_by="hash",
        validation_fraction=fraction,
    )  # fmt: skip
    assert preprocess.execute(config) == 0
    assert inspection.verify(tmp_path / "set") == []


def change_byte(folder):
    path = folder / "train-00001-of-00003.tfrecord"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def edit_manifest(**values):
    def edit(folder):
        raw = json.loads((folder / "manifest.json").read_text()) | values
        (folder / "manifest.json").write_text(json.dumps(raw))

    return edit


def move_label_counts(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["splits"]["test"]["label_counts"][0] -= 1
    raw["splits"]["test"]["label_counts"][9] += 1
    (folder / "manifest.json").write_text(json.dumps(raw))


def move_counts_of_files(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["splits"]["test"]["shards"][0]["num_examples"] -= 1
    raw["splits"]["test"]["shards"][2]["num_examples"] += 1
    (folder / "manifest.json").write_text(json.dumps(raw))


def exchange_files(folder):
    a, b = (folder / f"train-0000{i}-of-00003.tfrecord" for i in (0, 1))
    a.rename(folder / "c")
    b.rename(a)
    (folder / "c").rename(b)


FILES = {
    "a changed byte": (change_byte, ["train-00001-of-00003.tfrecord: its checksum differs"]),
    "a missing file": (
        lambda folder: (folder / "validation-00002-of-00003.tfrecord").unlink(),
        ["validation-00002-of-00003.tfrecord: cannot be read: No such file"],
    ),
    "two missing files": (
        lambda folder: [
            (folder / f"{split}-00000-of-00003.tfrecord").unlink() for split in ("train", "test")
        ],
        ["train-00000-of-00003.tfrecord: cannot", "test-00000-of-00003.tfrecord: cannot be read"],
    ),
    "a cut file": (
        lambda folder: (folder / "test-00000-of-00003.tfrecord").write_bytes(b"short"),
        ["test-00000-of-00003.tfrecord: has 5 bytes"],
    ),
    "an extra file": (
        lambda folder: (folder / "train-00003-of-00004.tfrecord").touch(),
        ["train-00003-of-00004.tfrecord: not named in the manifest"],
    ),
    "a hidden file": (
        lambda folder: (folder / ".lock").touch(),
        [".lock: not named in the manifest"],
    ),
    "files exchanged": (exchange_files, ["train-00000-of-00003", "train-00001-of-00003"]),
    "other label counts": (move_label_counts, ["test: label_counts differ from the labels"]),
    "other counts of files": (
        move_counts_of_files,
        ["test-00000-of-00003.tfrecord:", "test-00002-of-00003.tfrecord:"],
    ),
    "split another way": (
        edit_manifest(split_by="hash"),
        ["manifest.json: split_by hash, but an id in train is not above all in validation"],
    ),
    "more blank images": (
        edit_manifest(flagged={"blank": 1}),
        ["manifest.json: 1 blank images, found 0"],
    ),
    "more set aside": (
        edit_manifest(quarantined={"count": 1, "by_reason": {"damaged": 1}}),
        ["records.jsonl: its records are not those that the manifest counts"],
    ),
    "no quarantine": (
        lambda folder: shutil.rmtree(folder / "quarantine"),
        ["quarantine/records.jsonl: cannot be read"],
    ),
    "a folder in quarantine's place of records": (
        lambda folder: [
            (folder / "quarantine/records.jsonl").unlink(),
            (folder / "quarantine/records.jsonl").mkdir(),
        ],
        ["quarantine/records.jsonl: cannot be read: [Errno 21]"],
    ),
    "quarantine with more files": (
        lambda folder: [(folder / "quarantine" / name).touch() for name in ("b.png", ".a")],
        ["quarantine/.a: not named in the manifest", "quarantine/b.png: not named"],
    ),
    "quarantine of something else": (
        lambda folder: (folder / "quarantine/records.jsonl").write_text("[]\n"),
        ["quarantine/records.jsonl: line 1: expected id, reason, origin, part"],
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), FILES.values(), ids=FILES.keys())
def test_verify_finds(folder, monkeypatch, capsys, spoil, expected):
    spoil(folder)
    problems = inspection.verify(folder)
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
    assert run(monkeypatch, "verify", folder) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", problems)


@pytest.mark.parametrize(
    "spoil",
    [
        edit_manifest(dataset_id="0" * 32),
        edit_manifest(class_names=list("012345678x")),
        edit_manifest(splits={}),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").unlink(),
        shutil.rmtree,
    ],
    ids=["other id", "other classes", "no splits", "half", "none", "no folder"],
)
@pytest.mark.parametrize("action", ["verify", "describe", "diff"])
def test_without_a_valid_manifest_there_is_one_line(folder, monkeypatch, capsys, action, spoil):
    spoil(folder)
    assert run(monkeypatch, action, *[folder] * (1 + (action == "diff"))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"python -m pipeline.dataset: error: {folder}")


GOOD_ROW = {"id": "0" * 32, "reason": "damaged", "origin": "train/a/..b.png", "part": "train"}


def without(key):
    return {name: value for name, value in GOOD_ROW.items() if name != key}


ROWS = {
    "not json": ("{", "expected id, reason, origin, part"),
    "deep": ("[" * 100_000, "expected id, reason, origin, part"),
    "blank line": ("", "expected id, reason, origin, part"),
    "a list": (json.dumps(list(GOOD_ROW)), "expected id, reason, origin, part"),
    "no origin": (without("origin"), "expected id, reason, origin, part"),
    "more": (GOOD_ROW | {"label": "7"}, "expected id, reason, origin, part"),
    "id null": (GOOD_ROW | {"id": None}, "a value is not a string"),
    "reason a list": (GOOD_ROW | {"reason": ["damaged"]}, "a value is not a string"),
    "part a number": (GOOD_ROW | {"part": 0}, "a value is not a string"),
    "no id": (GOOD_ROW | {"id": ""}, "id '', expected 32 hexadecimal digits"),
    "id of a copy": (
        GOOD_ROW | {"id": "0" * 32 + "-1"},
        f"id '{'0' * 32}-1', expected 32 hexadecimal digits",
    ),
    "reason of two lines": (GOOD_ROW | {"reason": "a\nb"}, "reason 'a\\nb', expected one line"),
    "origin above": (
        GOOD_ROW | {"origin": "train/../../x"},
        "origin 'train/../../x', expected a relative name",
    ),
    "origin absolute": (
        GOOD_ROW | {"origin": "/data/x.png"},
        "origin '/data/x.png', expected a relative name",
    ),
    "no name": (GOOD_ROW | {"origin": ""}, "origin '', expected a relative name"),
    "another part": (
        GOOD_ROW | {"part": "validation"},
        "part 'validation', expected train or test",
    ),
}


def write_quarantine(folder, lines, by_reason):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "quarantine/records.jsonl").write_text(text)
    edit_manifest(quarantined={"count": sum(by_reason.values()), "by_reason": by_reason})(folder)


@pytest.mark.parametrize(("row", "message"), ROWS.values(), ids=ROWS.keys())
def test_verify_finds_a_line_of_quarantine(folder, row, message):
    write_quarantine(folder, [GOOD_ROW, GOOD_ROW], {"damaged": 2})
    assert inspection.verify(folder) == []
    write_quarantine(folder, [GOOD_ROW, row, "{"], {"damaged": 3})
    path = folder / "quarantine/records.jsonl"
    assert inspection.verify(folder) == [f"{path}: line 2: {message}"]


@pytest.mark.parametrize(
    "by_reason", [{"damaged": 1}, {"damaged": 3}, {"wrong size": 2}, {"damaged": 2, "large": 1}],
    ids=str,
)  # fmt: skip
def test_verify_finds_other_reasons(folder, by_reason):
    write_quarantine(folder, [GOOD_ROW, GOOD_ROW], by_reason)
    path = folder / "quarantine/records.jsonl"
    assert inspection.verify(folder) == [
        f"{path}: its records are not those that the manifest counts"
    ]


def with_pixel(value):
    def change(records):
        image = records[2].image.copy()
        image[100] = value
        records[2] = records[2]._replace(image=image)

    return change


def replaced(**values):
    def change(records):
        records[2] = records[2]._replace(**values)

    return change


def swap(records):
    records[0], records[1] = records[1], records[0]


def repeat(records):
    records.insert(1, records[0])


def far_copy(records):
    records[2] = records[2]._replace(id=f"{records[2].id}-x")


def elsewhere(records):
    levels = np.arange(256, dtype=np.uint8)
    names = image_ids(np.repeat(levels[:, None], 784, axis=1))
    level = next(i for i, name in enumerate(names) if int(name[16:], 16) % 3 == 1)
    image = np.full(784, codec.SCALE_TABLE[level])
    records.append(records[0]._replace(image=image, id=names[level]))
    records.sort(key=lambda record: record.id)


RECORDS = {
    "half a level": (with_pixel(0.5), ["a pixel is not uint8 / 255", "hash of its pixels"]),
    "another level": (with_pixel(np.float32(1)), ["an id is not the hash of its pixels"]),
    "not a number": (with_pixel(np.nan), ["a pixel is not uint8 / 255", "hash of its pixels"]),
    "too bright": (with_pixel(2.0), ["a pixel is not uint8 / 255", "hash of its pixels"]),
    "negative": (with_pixel(-1.0), ["a pixel is not uint8 / 255", "hash of its pixels"]),
    "label": (replaced(label=10), ["a label is not below 10"]),
    "large label": (replaced(label=2**40), ["a label is not below 10"]),
    "other id": (
        lambda records: records.__setitem__(2, records[2]._replace(id=records[3].id)),
        ["an id is not the hash of its pixels", "an id occurs twice"],
    ),
    "id with letters": (far_copy, ["an id is not a hash and the number of a copy"]),
    "short id": (replaced(id="ab"), ["an id is not a hash and the number of a copy"]),
    "no id": (replaced(id=""), ["an id is not a hash and the number of a copy"]),
    "order": (swap, ["the records are not in the order of their ids"]),
    "twice": (repeat, ["an id occurs twice"]),
    "another file's": (elsewhere, ["a record belongs in another file"]),
}


@pytest.mark.parametrize(("change", "expected"), RECORDS.values(), ids=RECORDS.keys())
def test_verify_finds_a_record(folder, monkeypatch, capsys, change, expected):
    records = list(records_of(folder, "train")[0])
    change(records)
    rewrite(folder, "train", 0, records)
    problems = inspection.verify(folder)
    assert all(p.startswith("train-00000-of-00003.tfrecord: ") for p in problems)
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
    assert run(monkeypatch, "verify", folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == problems


def label_as_bytes(record):
    features = (
        codec._feature("id", 1, record.id.encode())
        + codec._feature("image", 2, record.image.astype("<f4").tobytes())
        + codec._feature("label", 1, codec._varint(record.label))
    )
    return codec.frame(codec.message(1, features))


def another_order(record):
    features = (
        codec._feature("label", 3, codec._varint(record.label))
        + codec._feature("image", 2, record.image.astype("<f4").tobytes())
        + codec._feature("id", 1, record.id.encode())
    )
    return codec.frame(codec.message(1, features))


def negative_zeros(record):
    return encode(
        record._replace(image=np.where(record.image == 0, np.float32(-0.0), record.image))
    )


@pytest.mark.parametrize("form", [label_as_bytes, another_order, negative_zeros])
def test_verify_finds_a_record_of_another_encoding(folder, form):
    """It decodes to the very same, but other readers may refuse it, or read another number."""
    rewrite(folder, "train", 0, records_of(folder, "train")[0], form)
    assert inspection.verify(folder) == [
        "train-00000-of-00003.tfrecord: a record is not encoded as this format has it"
    ]


def test_records_written_anew_are_whole(folder):
    """What the cases above do is sound where they change nothing."""
    records = records_of(folder, "train")[0]
    before = helpers.tree(folder)
    rewrite(folder, "train", 0, records)
    assert helpers.tree(folder) == before


def test_a_label_of_no_class_is_told_in_one_line(folder, small_dataset, monkeypatch, capsys):
    records = list(records_of(folder, "train")[0])
    records[0] = records[0]._replace(label=77)
    rewrite(folder, "train", 0, records)
    for action in (["describe", folder], ["diff", folder, small_dataset]):
        assert run(monkeypatch, *action) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert "train-00000-of-00003.tfrecord: a label is not below 10" in err


# The command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: ACTION"),
        (["check", "x"], "invalid choice: 'check'"),
        (["verify"], "required: DIR"),
        (["diff", "x"], "required: DIR"),
        (["verify", "x", "y"], "unrecognized arguments: y"),
        (["verify", "gs://bucket/../x"], "gs://bucket/../x: has an empty part, or . or .."),
        (["verify", "s3://bucket/x"], "s3://bucket/x: expected a local folder or gs://"),
        (["describe", ""], "expected a folder, got an empty name"),
    ],
)
def test_bad_command_line(monkeypatch, capsys, argv, message):
    assert run(monkeypatch, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("python -m pipeline.dataset: error: ") and err.count("\n") == 1


def test_command_in_its_own_process(folder):
    (folder / "extra").touch()
    done = helpers.run_cli("pipeline.dataset", "verify", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "extra: not named in the manifest\n"
