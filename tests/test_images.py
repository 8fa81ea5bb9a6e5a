import hashlib
import io
import json
import logging
import os
import pickle

import helpers
import numpy as np
import pytest
from PIL import Image
from test_decoding import BAD, GOOD, encoded, grey

from pipeline import preprocess, runners
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.options import PreprocessConfig
from pipeline.records import image_ids
from pipeline.sources import decoding, images, open_sources


def write_tree(root, data, suffix=".png"):
    """Writes {"train": (images, labels), "test": ...} as a tree of PNG files; returns the root."""
    for part, (pixels, labels) in data.items():
        for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            path = root / part / str(label) / f"{i:05d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
    return root


def write_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


# Two classes in two parts, enough to be opened.
TREE = {f"{part}/{name}/good.png": GOOD for part in ("train", "test") for name in "ab"}


def open_images(root, **options):
    return open_sources([f"images:{root}"], **options)


def read_all(source):
    return [rows for block in source.blocks() for rows in source.read(block)]


def found(source):
    """Every row: (origin, label, pixels)."""
    return [
        (origin, label, pixels.tobytes())
        for rows in read_all(source)
        for origin, label, pixels in zip(
            rows.origins, rows.labels.tolist(), rows.pixels, strict=True
        )
    ]


def faults(source):
    return [fault for rows in read_all(source) for fault in rows.faults]


# What is found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "0"], ("0", "9", "10")),
        (["10", "9", "cat"], ("10", "9", "cat")),
        (["b", "a", "B"], ("B", "a", "b")),
        (["01", "1", "2"], ("01", "1", "2")),
    ],
)
def test_classes_in_order(tmp_path, names, expected):
    source = open_images(write_files(tmp_path, {f"train/{name}/x.png": GOOD for name in names}))
    assert source.class_names == expected
    assert [(origin, label) for origin, label, _ in found(source)] == [
        (f"train/{name}/x.png", label) for label, name in enumerate(expected)
    ]


def test_classes_of_either_part(tmp_path):
    files = {"train/a/x.png": GOOD, "test/b/y.png": GOOD, "test/c/z.png": GOOD}
    source = open_images(write_files(tmp_path, files))
    assert source.class_names == ("a", "b", "c")
    assert source.part_sizes == {"train": 1, "test": 2}
    assert [row[:2] for row in found(source)] == [
        ("train/a/x.png", 0),
        ("test/b/y.png", 1),
        ("test/c/z.png", 2),
    ]
    assert (source.default_split_by, source.has_order) == ("hash", False)


def test_files_that_are_images_by_name(tmp_path, caplog):
    array = grey(3)
    files = {
        "train/a/1.png": encoded(array),
        "train/a/2.PNG": encoded(array),
        "train/a/3.jpg": encoded(array, "JPEG"),
        "train/a/4.JPEG": encoded(array, "JPEG"),
        "train/a/.5.png": b"hidden",
        "train/a/.DS_Store": b"hidden",
        "train/a/6.gif": b"other",
        "train/a/labels.csv": b"other",
        "train/.hidden/x.png": b"hidden",
        "train/list.txt": b"beside the classes",
        "train/b/1.png": GOOD,
        "other/a/1.png": GOOD,
    }
    source = open_images(write_files(tmp_path, files))
    (warning,) = caplog.messages
    assert warning.endswith("train/a: 2 entries are not .png/.jpg/.jpeg and are left out")
    rows = {origin: pixels for origin, _, pixels in found(source)}
    assert sorted(rows) == [
        *("train/a/1.png", "train/a/2.PNG", "train/a/3.jpg", "train/a/4.JPEG", "train/b/1.png")
    ]
    assert rows["train/a/1.png"] == rows["train/a/2.PNG"] == array.tobytes()
    jpeg = np.asarray(Image.open(io.BytesIO(files["train/a/3.jpg"]))).tobytes()
    assert rows["train/a/3.jpg"] == rows["train/a/4.JPEG"] == jpeg
    assert faults(source) == []


@pytest.mark.parametrize("rows_per_block", [1, 3, 4, 7, 100])
def test_blocks_hold_every_file_once(tmp_path, monkeypatch, rows_per_block):
    monkeypatch.setattr(images, "ROWS_PER_BLOCK", rows_per_block)
    data = helpers.make_images(40, 20)
    source = pickle.loads(pickle.dumps(open_images(write_tree(tmp_path, data))))
    assert source.part_sizes == {"train": 40, "test": 20}
    blocks = source.blocks()
    assert len(blocks) == 10 * (-(-4 // rows_per_block) + -(-2 // rows_per_block))
    assert sum(block.size for block in blocks) == 60
    expected = {
        (f"{part}/{label}/{i:05d}.png", label, image.tobytes())
        for part, (pixels, labels) in data.items()
        for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True))
    }
    read = found(source)
    assert set(read) == expected and len(read) == 60
    for block in reversed(blocks):  # in any order, each alone
        (rows,) = source.read(block)
        assert rows.size == block.size and rows.part == block.part.split("/")[0]


def test_source_is_small_and_opens_again(tmp_path, monkeypatch):
    write_tree(tmp_path / "tree", helpers.make_images(200, 20))
    monkeypatch.chdir(tmp_path)
    source = open_images("tree")
    assert len(pickle.dumps(source)) < 5000
    monkeypatch.chdir("/")
    assert open_sources(source.specs) == source
    assert str(tmp_path) not in json.dumps([source.describe(), source.fingerprint()])


def test_fingerprint(tmp_path):
    root = write_files(tmp_path / "tree", TREE)
    path = root / "train/a/good.png"
    os.utime(path, ns=(10**18, 10**18))
    seen = [open_images(root).fingerprint()]
    assert open_images(root).fingerprint() == seen[0]

    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.append(open_images(root).fingerprint())
    path.rename(path.with_name("renamed.png"))
    seen.append(open_images(root).fingerprint())
    (root / "train/a/renamed.png").rename(root / "train/b/renamed.png")
    (root / "train/a/left.png").write_bytes(GOOD)
    seen.append(open_images(root).fingerprint())
    (root / "train/a/notes.txt").touch()  # not read, so no reason to read again
    assert open_images(root).fingerprint() == seen[-1]
    (root / "train/a/left.png").unlink()
    seen.append(open_images(root).fingerprint())
    assert len({json.dumps(each) for each in seen}) == len(seen)


# What is refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "0 class folders in train and test, expected 1 to 256"),
        ({"a/x.png": GOOD, "b/x.png": GOOD}, "0 class folders"),
        ({"train/x.png": GOOD}, "0 class folders"),
        ({"train/a/x.png": GOOD, "test/a/x.png": GOOD}, "1 class in all, expected 2 to 256$"),
        ({f"train/{i}/x.png": b"" for i in range(257)}, "257 class folders"),
    ],
    ids=["empty", "no parts", "no classes", "one class", "too many"],
)
def test_tree_without_the_right_folders(tmp_path, files, message):
    with pytest.raises(InputError, match=f"^--source images:{tmp_path}: {message}"):
        open_images(write_files(tmp_path, files))


@pytest.mark.parametrize(
    "name", ["a\nb", "\r", "tab\t", "a\x0bb", "\x7f", "\x85", "a\u2028b", "\u2029"], ids=repr
)
def test_class_folder_that_is_no_line(tmp_path, name):
    root = write_files(tmp_path / "tree", TREE | {f"test/{name}/x.png": GOOD})
    config = PreprocessConfig(sources=(f"images:{root}",), output_dir=tmp_path / "out")
    with pytest.raises(InputError) as caught:
        preprocess.execute(config)
    assert str(caught.value) == (
        f"--source images:{root}: class folder {name!r}: expected a name in UTF-8, of one line,"
        " without control characters"
    )
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="none: no such folder"):
        open_images(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: no such folder"):
        open_images(tmp_path / "file")
    (tmp_path / "train").touch()
    with pytest.raises(InputError, match="train: cannot be read: Not a directory"):
        open_images(tmp_path)


def test_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path):
    write_files(tmp_path, TREE)
    (tmp_path / "train/a/gone.png").symlink_to("nowhere.png")
    source = open_images(tmp_path)
    assert source.part_sizes == {"train": 3, "test": 2}
    ((reason, origin, _),) = faults(source)
    assert (reason, origin) == ("cannot be read: No such file or directory", "train/a/gone.png")


@pytest.mark.parametrize(
    ("part", "message"), [("train", "the train split would be empty"), ("test", "the test split")]
)
def test_missing_part(tmp_path, monkeypatch, part, message):
    monkeypatch.setattr(runners, "run", lambda *_: pytest.fail("was read"))
    left = {name: data for name, data in TREE.items() if not name.startswith(part)}
    root = write_files(tmp_path / "tree", left)
    config = PreprocessConfig(sources=(f"images:{root}",), output_dir=tmp_path / "out")
    with pytest.raises(InputError, match=message):
        preprocess.execute(config)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_positional_split_is_refused(tmp_path):
    root = write_files(tmp_path / "tree", TREE)
    config = PreprocessConfig(
        sources=(f"images:{root}",), output_dir=tmp_path / "out", split_by="positional"
    )
    with pytest.raises(InputError, match=r"--split_by positional: .* expected hash"):
        preprocess.execute(config)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_file_that_goes_missing(tmp_path):
    source = open_images(write_files(tmp_path, TREE))
    (tmp_path / "train/a/good.png").unlink()
    with pytest.raises(InputError, match="train/a: changed while it was read"):
        read_all(source)


# Images that cannot be used


def test_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", len(GOOD))
    write_files(tmp_path, TREE | {"train/a/long.png": GOOD + b"\0"})
    source = open_images(tmp_path)
    assert [(fault.reason, fault.origin) for fault in faults(source)] == [
        ("too large", "train/a/long.png")
    ]


def test_bad_images_are_set_aside(tmp_path):
    files = {f"train/a/{name}.png": data for name, (data, _) in BAD.items()}
    root = write_files(tmp_path / "tree", TREE | files)
    (root / "test/b/folder.png").mkdir()
    source = open_images(root)
    assert source.part_sizes == {"train": 2 + len(BAD), "test": 3}
    config = PreprocessConfig(
        sources=(f"images:{root}",), output_dir=tmp_path / "out", max_quarantined=0.9
    )
    assert preprocess.execute(config) == 0
    lines = (tmp_path / "out/quarantine/records.jsonl").read_text().splitlines()
    expected = [
        {
            "id": hashlib.sha256(data).hexdigest()[:32],
            "reason": reason,
            "origin": f"train/a/{name}.png",
            "part": "train",
        }
        for name, (data, reason) in BAD.items()
    ] + [
        {
            "id": hashlib.sha256(b"").hexdigest()[:32],
            "reason": "not a file",
            "origin": "test/b/folder.png",
            "part": "test",
        }
    ]
    expected.sort(key=lambda row: (row["part"], row["origin"]))
    assert [json.loads(line) for line in lines] == expected
    manifest = load_manifest(tmp_path / "out")
    assert manifest.quarantined == {
        "count": len(BAD) + 1,
        "by_reason": {
            reason: sum(row["reason"] == reason for row in expected)
            for reason in sorted({row["reason"] for row in expected})
        },
    }
    assert str(tmp_path) not in "".join(lines) + (tmp_path / "out/manifest.json").read_text()


# The same images from elsewhere


@pytest.mark.parametrize("rows_per_block", [1024, 7])
def test_a_tree_makes_the_same_bytes_as_idx_files(tmp_path, monkeypatch, caplog, rows_per_block):
    monkeypatch.setattr(images, "ROWS_PER_BLOCK", rows_per_block)
    caplog.set_level(logging.WARNING, logger="digits_pipeline")
    random = np.random.default_rng(1)
    data = helpers.make_images()
    # A copy with another label: the occurrence numbers must not depend on the order either.
    pixels, labels = data["train"]
    pixels[10], labels[10], labels[20] = pixels[20], 8, 3
    tree = write_tree(tmp_path / "tree", data)
    order = {part: random.permutation(len(labels)) for part, (_, labels) in data.items()}
    shuffled = {part: tuple(a[order[part]] for a in arrays) for part, arrays in data.items()}
    helpers.write_idx(tmp_path / "idx", shuffled)
    made = []
    for spec in (f"images:{tree}", f"idx:{tmp_path / 'idx'}"):
        out = tmp_path / f"out{len(made)}"
        config = PreprocessConfig(sources=(spec,), output_dir=out, num_shards=3, split_by="hash")
        assert preprocess.execute(config) == 0
        made.append((load_manifest(out), helpers.tree(out)))
    (one, files), (other, others) = made
    assert one.dataset_id == other.dataset_id and one.splits == other.splits
    assert one.duplicates == other.duplicates and one.duplicates["conflicting"] == 1
    shards = [name for name in files if name.endswith(".tfrecord")]
    assert len(shards) == 9
    assert [files[name] for name in shards] == [others[name] for name in shards]
    assert [r.getMessage() for r in caplog.records if r.name == "digits_pipeline"] == []
    assert one.duplicates["examples"]["conflicting"] == image_ids(pixels[20].reshape(1, 784))
