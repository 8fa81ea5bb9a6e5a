import dataclasses
import hashlib
import json
import shutil
import sys

import helpers
import numpy as np
import pytest

from pipeline import dataset, inspection, preprocess
from pipeline.dataset import SPLITS, Shard, Split, image_ids, load_manifest, manifest_json
from pipeline.preprocess import PreprocessConfig


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
    return [dataset.read_records(directory, shard) for shard in manifest.splits[split].shards]


def encode(record):
    """A record as it stands in a file, its pixels as they are."""
    features = (
        dataset._feature("id", 1, record.id.encode())
        + dataset._feature("image", 2, np.asarray(record.image, "<f4").tobytes())
        + dataset._feature("label", 3, dataset._varint(record.label))
    )
    return dataset.frame(dataset._message(1, features))


def rewrite(directory, split, index, records):
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
    assert "quarantined 2, dropped 1, blank 3" in inspection.describe(tmp_path / "set")


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
    "quarantine of something else": (
        lambda folder: (folder / "quarantine/records.jsonl").write_text("[]\n"),
        ["quarantine/records.jsonl: cannot be read"],
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
def test_without_a_valid_manifest_there_is_one_line(folder, monkeypatch, capfd, action, spoil):
    spoil(folder)
    assert run(monkeypatch, action, *[folder] * (1 + (action == "diff"))) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"python -m pipeline.dataset: error: {folder}")


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
    image = np.full(784, dataset.SCALE_TABLE[level])
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


def test_records_written_anew_are_whole(folder):
    """What the cases above do is sound where they change nothing."""
    records = records_of(folder, "train")[0]
    before = helpers.tree(folder)
    rewrite(folder, "train", 0, records)
    assert helpers.tree(folder) == before


def test_a_label_of_no_class_is_told_in_one_line(folder, small_dataset, monkeypatch, capfd):
    records = list(records_of(folder, "train")[0])
    records[0] = records[0]._replace(label=77)
    rewrite(folder, "train", 0, records)
    for action in (["describe", folder], ["diff", folder, small_dataset]):
        assert run(monkeypatch, *action) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        assert "train-00000-of-00003.tfrecord: a label is not below 10" in err


# describe


def test_describe(small_dataset, monkeypatch, capsys):
    assert run(monkeypatch, "describe", small_dataset) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line.split("  ")[0].strip(): line.split()[-3:] for line in out.splitlines()}
    data = helpers.make_images()
    images, labels = data["train"]
    parts = {
        "train": (images[100:], labels[100:]),
        "validation": (images[:100], labels[:100]),
        "test": data["test"],
    }
    assert rows["records"] == ["500", "100", "120"] and rows["files"] == ["3", "3", "3"]
    scaled = [images / 255 for images, _ in parts.values()]
    assert rows["pixel mean"] == [f"{each.mean():.4f}" for each in scaled]
    assert rows["deviation"] == [f"{each.std():.4f}" for each in scaled]
    sizes = [
        sum(path.stat().st_size for path in small_dataset.glob(f"{split}-*")) for split in SPLITS
    ]
    assert rows["MB"] == [f"{size / 1e6:.1f}" for size in sizes]
    for label in range(10):
        assert rows[str(label)] == [str((labels == label).sum()) for _, labels in parts.values()]
    manifest = load_manifest(small_dataset)
    assert out.startswith(f"{small_dataset}: dataset {manifest.dataset_id}\n")
    assert "source: images from IDX files; split by positional" in out
    assert "quarantined 0, dropped 0, blank 0" in out
    assert "with different labels 0, in test and elsewhere 0" in out


def test_describe_an_empty_split(tmp_path):
    hand_made(tmp_path, {"train": [(0, "a")], "test": [(1, "b")]}, ("a", "b"))
    rows = inspection.describe(tmp_path).splitlines()
    (mean,) = (line.split() for line in rows if line.startswith("pixel mean"))
    assert mean[2:] == ["0.0000", "nan", "0.0039"]


# diff


def hand_made(directory, splits, class_names):
    """A dataset of one file a split, of blank images: {split: [(grey level, class name)]}."""
    directory.mkdir(exist_ok=True)
    made = {}
    for split in SPLITS:
        rows = []
        for level, name in splits.get(split, []):
            pixels = np.full((1, 784), level, np.uint8)
            rows.append((image_ids(pixels)[0], class_names.index(name), pixels.tobytes()))
        content = b"".join(
            dataset.frame(dataset.encode_record(pixels, label, name))
            for name, label, pixels in sorted(rows)
        )
        shard = Shard(
            file=dataset.shard_name(split, 0, 1),
            num_examples=len(rows),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        (directory / shard.file).write_bytes(content)
        counts = tuple(sum(label == i for _, label, _ in rows) for i in range(len(class_names)))
        made[split] = Split(num_examples=len(rows), label_counts=counts, shards=(shard,))
    shards = [shard for each in made.values() for shard in each.shards]
    manifest = dataset.Manifest(
        format_version=1,
        dataset_id=dataset.dataset_id(shards, class_names),
        source={"kind": "idx", "title": "by hand"},
        split_by="hash",
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=(28, 28, 1),
        splits=made,
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={"blank": sum(split.num_examples for split in made.values())},
        duplicates=dict.fromkeys(dataset.DUPLICATES, 0),
    )  # fmt: skip
    (directory / "manifest.json").write_text(manifest_json(manifest))
    (directory / "quarantine").mkdir(exist_ok=True)
    (directory / "quarantine/records.jsonl").touch()
    assert inspection.verify(directory) == []
    return directory


def test_diff(tmp_path, monkeypatch, capsys):
    one = hand_made(
        tmp_path / "one",
        {
            "train": [(0, "cat"), (51, "cat"), (102, "dog"), (153, "dog")],
            "validation": [(204, "dog")],
            "test": [(255, "cat"), (1, "dog")],
        },
        ("cat", "dog"),
    )
    other = hand_made(
        tmp_path / "other",
        {
            # 0 stays; 51 is a dog now; 102 is gone; 153 moves; 7 and 8 are new
            "train": [(0, "cat"), (51, "dog"), (7, "ant"), (8, "cat")],
            "validation": [(153, "dog"), (204, "cat")],
            "test": [(255, "cat"), (1, "dog")],
        },
        ("ant", "cat", "dog"),
    )
    assert run(monkeypatch, "diff", one, other) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert err == ""
    assert lines[0] == ["A", f"{one}:", "dataset", load_manifest(one).dataset_id]
    assert lines[1] == ["B", f"{other}:", "dataset", load_manifest(other).dataset_id]
    assert lines[3:7] == [["added", "2"], ["removed", "1"], ["relabelled", "2"], ["moved", "1"]]
    assert lines[7] == ["train", "->", "validation", "1"]
    assert sorted(lines[8:10]) == [["cat", "->", "dog", "1"], ["dog", "->", "cat", "1"]]
    drift = {line[0]: line[1:] for line in lines[11:15]}
    assert drift["drift"] == ["classes", "pixels", "mean", "A", "mean", "B"]
    # Classes cat 2/4 and dog 2/4 become ant 1/4, cat 2/4, dog 1/4: a quarter has moved. Of the
    # four levels two are the same. Means (0+51+102+153)/4/255 and (0+51+7+8)/4/255.
    assert drift["train"] == ["0.2500", "0.5000", "0.3000", "0.0647"]
    # dog 1/1 becomes dog 1/2 and cat 1/2; 204 alone becomes 153 and 204.
    assert drift["validation"] == ["0.5000", "0.5000", "0.8000", "0.7000"]
    assert drift["test"] == ["0.0000", "0.0000", "0.5020", "0.5020"]


def test_diff_the_other_way(tmp_path):
    one = hand_made(tmp_path / "one", {"train": [(0, "a")], "test": [(5, "b")]}, ("a", "b"))
    other = hand_made(tmp_path / "other", {"train": [(9, "b")]}, ("a", "b"))
    found = [line.split() for line in inspection.diff(one, other).splitlines()]
    assert found[3:7] == [["added", "1"], ["removed", "2"], ["relabelled", "0"], ["moved", "0"]]
    assert ["train", "1.0000", "1.0000", "0.0000", "0.0353"] in found
    assert ["test", "-", "-", "0.0196", "-"] in found
    back = [line.split() for line in inspection.diff(other, one).splitlines()]
    assert back[3:7] == [["added", "2"], ["removed", "1"], ["relabelled", "0"], ["moved", "0"]]


def test_no_difference(small_dataset, small_idx, tmp_path):
    config = PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=tmp_path / "gz", compression="gzip", num_shards=2
    )
    assert preprocess.execute(config) == 0
    found = [line.split() for line in inspection.diff(small_dataset, tmp_path / "gz").splitlines()]
    assert [line[1] for line in found[3:7]] == ["0"] * 4
    assert all(line[1:3] == ["0.0000", "0.0000"] for line in found[9:12])
    assert [line[0] for line in found[9:12]] == list(SPLITS)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 1], [1, 1], 0.0),
        ([1, 1], [5, 5], 0.0),
        ([1, 0], [0, 3], 1.0),
        ([3, 1], [1, 3], 0.5),
        ([0, 0], [1, 1], None),
        ([1, 1], [0, 0], None),
    ],
)
def test_distance(one, other, expected):
    assert inspection.distance(np.array(one), np.array(other)) == expected


# The command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: ACTION"),
        (["check", "x"], "invalid choice: 'check'"),
        (["verify"], "required: DIR"),
        (["diff", "x"], "required: DIR"),
        (["verify", "x", "y"], "unrecognized arguments: y"),
        (["verify", "gs://bucket/x"], "gs://bucket/x: expected a local folder"),
        (["describe", ""], "expected a folder, got an empty name"),
    ],
)
def test_bad_command_line(monkeypatch, capfd, argv, message):
    assert run(monkeypatch, *argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err
    assert err.startswith("python -m pipeline.dataset: error: ") and err.count("\n") == 1


def test_command_in_its_own_process(folder):
    (folder / "extra").touch()
    done = helpers.run_cli("pipeline.dataset", "verify", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "extra: not named in the manifest\n"
