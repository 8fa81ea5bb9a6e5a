import collections
import hashlib
import tracemalloc

import helpers
import numpy as np
import pytest
from test_inspection import run

from pipeline import comparison, dataset, inspection, matching, preprocess, tables
from pipeline import records as codec
from pipeline.dataset import SPLITS, Shard, Split, load_manifest, manifest_json
from pipeline.preprocess import PreprocessConfig
from pipeline.records import image_ids

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


def test_describe_tells_long_names_of_classes_apart(tmp_path):
    names = (
        "a",
        "category_001",
        "category_002",
        "x" * 30 + "y" * 30 + "1",
        "x" * 50 + "y" * 10 + "2",
    )
    rows = list(enumerate(names))
    hand_made(tmp_path, {"train": rows[:4], "test": rows[4:]}, names)
    lines = comparison.describe(tmp_path).splitlines()
    table = lines[3:9] + lines[10:15]
    assert {len(line) for line in table} == {41 + 3 * 12}
    assert [(line[:41].rstrip(), line[41:].split()) for line in lines[10:15]] == [
        ("a", ["1", "0", "0"]),
        ("category_001", ["1", "0", "0"]),
        ("category_002", ["1", "0", "0"]),
        (f"{'x' * 19}...{'y' * 17}1", ["1", "0", "0"]),
        (f"{'x' * 19}...{'x' * 7}{'y' * 10}2", ["0", "0", "1"]),
    ]


def test_describe_an_empty_split(tmp_path):
    hand_made(tmp_path, {"train": [(0, "a")], "test": [(1, "b")]}, ("a", "b"))
    rows = comparison.describe(tmp_path).splitlines()
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
            codec.frame(codec.encode_record(pixels, label, name))
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
        split_by="positional",
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=(28, 28, 1),
        splits=made,
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={"blank": sum(split.num_examples for split in made.values())},
        duplicates=dict.fromkeys(dataset.DUPLICATES, 0)
        | {"examples": {kind: [] for kind in dataset.KINDS_OF_IMAGES}},
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
    # Classes cat 2/4 and dog 2/4 become ant 1/4, cat 2/4, dog 1/4: of their entropies in bits,
    # 1 and 3/2, the mean is taken from that of ant 1/8, cat 4/8, dog 3/8, which is
    # 1/8 log 8 + 1/2 log 2 + 3/8 log 8/3 = 1.4056. Of the four levels two are the same, and so
    # half of what there is. Means (0+51+102+153)/4/255 and (0+51+7+8)/4/255.
    assert drift["train"] == ["0.1556", "0.5000", "0.3000", "0.0647"]
    # dog 1/1 becomes dog 1/2 and cat 1/2, with entropies 0 and 1, of dog 3/4 and cat 1/4 0.8113;
    # 204 alone becomes 153 and 204.
    assert drift["validation"] == ["0.3113", "0.3113", "0.8000", "0.7000"]
    assert drift["test"] == ["0.0000", "0.0000", "0.5020", "0.5020"]


def test_diff_the_other_way(tmp_path):
    one = hand_made(tmp_path / "one", {"train": [(0, "a")], "test": [(5, "b")]}, ("a", "b"))
    other = hand_made(tmp_path / "other", {"train": [(9, "b")]}, ("a", "b"))
    found = [line.split() for line in comparison.diff(one, other).splitlines()]
    assert found[3:7] == [["added", "1"], ["removed", "2"], ["relabelled", "0"], ["moved", "0"]]
    assert ["train", "1.0000", "1.0000", "0.0000", "0.0353"] in found
    assert ["test", "-", "-", "0.0196", "-"] in found
    back = [line.split() for line in comparison.diff(other, one).splitlines()]
    assert back[3:7] == [["added", "2"], ["removed", "1"], ["relabelled", "0"], ["moved", "0"]]


def test_no_difference(small_dataset, small_idx, tmp_path):
    config = PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=tmp_path / "gz", compression="gzip", num_shards=2
    )
    assert preprocess.execute(config) == 0
    found = [line.split() for line in comparison.diff(small_dataset, tmp_path / "gz").splitlines()]
    assert [line[1] for line in found[3:7]] == ["0"] * 4
    assert all(line[1:3] == ["0.0000", "0.0000"] for line in found[9:12])
    assert [line[0] for line in found[9:12]] == list(SPLITS)


# Many records


def an_index(numbers, labels, splits):
    """Records whose hashes are numbers; in disorder, as they come."""
    hashes = np.frombuffer(b"".join(int(n).to_bytes(16, "little") for n in numbers), "S16")
    order = np.argsort(hashes, kind="stable")
    return matching.Index(hashes[order], labels[order], splits[order])


@pytest.mark.parametrize("rows_at_once", [1, 7, 1 << 18])
def test_matching_is_that_of_dictionaries(monkeypatch, rows_at_once):
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", rows_at_once)
    random = np.random.default_rng(5)
    for size_a, size_b in ((0, 0), (0, 5), (5, 0), (1, 1), (40, 60), (300, 200)):
        # Numbers of up to 512, so that keys end in zero bytes, which NumPy drops from strings.
        sides = [
            (
                random.permutation(512)[:size],
                random.integers(0, 3, size).astype(np.uint16),
                random.integers(0, 3, size).astype(np.uint8),
            )
            for size in (size_a, size_b)
        ]
        changes = matching.compare(*(an_index(*side) for side in sides))
        a, b = (
            {int(n): (int(label), int(split)) for n, label, split in zip(*side, strict=True)}
            for side in sides
        )
        shared = a.keys() & b.keys()
        assert (changes.added, changes.removed) == (len(b) - len(shared), len(a) - len(shared))
        for place, found in ((0, changes.relabels), (1, changes.moves)):
            expected = {}
            for n in shared:
                pair = (a[n][place], b[n][place])
                if pair[0] != pair[1]:
                    expected[pair] = expected.get(pair, 0) + 1
            assert dict(found) == expected


def match_in_turn(a, b):
    """What `compare` is to find, one image at a time: two {image: [(label, split)]}."""
    added = removed = 0
    moves, relabels = collections.Counter(), collections.Counter()
    for image in a.keys() | b.keys():
        left, right = sorted(a.get(image, [])), sorted(b.get(image, []))
        for alike in (lambda x, y: x == y, lambda x, y: x[0] == y[0], lambda x, y: True):
            for x in list(left):
                y = next((y for y in right if alike(x, y)), None)
                if y is not None:
                    left.remove(x)
                    right.remove(y)
                    relabels[x[0], y[0]] += x[0] != y[0]
                    moves[x[1], y[1]] += x[1] != y[1]
        added += len(right)
        removed += len(left)
    return added, removed, +moves, +relabels


@pytest.mark.parametrize("rows_at_once", [1, 7, 1 << 18])
@pytest.mark.parametrize("images", [1, 3, 40, 400])
def test_matching_of_copies(monkeypatch, images, rows_at_once):
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", rows_at_once)
    random = np.random.default_rng(images)
    for size_a, size_b in ((0, 5), (5, 0), (1, 3), (60, 60), (200, 300)):
        sides = [
            (
                random.integers(0, images, size),
                random.choice([0, 1, 255, 256, 511], size).astype(np.uint16),
                random.integers(0, 3, size).astype(np.uint8),
            )
            for size in (size_a, size_b)
        ]
        groups = []
        for side in sides:
            groups.append(collections.defaultdict(list))
            for image, label, split in zip(*(each.tolist() for each in side), strict=True):
                groups[-1][image].append((label, split))
        found = matching.compare(*(an_index(*side) for side in sides))
        assert tuple(found) == match_in_turn(*groups)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # A copy of a lower label than what is there, and one in train of what is in test.
        ("0b 9a", "0a 0b 9a 5a", ["2", "0", "0", "0"]),
        ("0a 0b", "0a 0c", ["0", "0", "1", "0"]),
        ("0a 5a 5b", "0a 5b", ["0", "1", "0", "0"]),
        ("0a 0b 0c", "0b", ["0", "2", "0", "0"]),
    ],
    ids=["added", "relabelled", "removed", "removed around"],
)
def test_diff_of_copies(tmp_path, one, other, expected):
    """Sets whose train rows are grey levels and classes; test has one row, 5 of class a."""
    made = []
    for name, rows in (("one", one), ("other", other)):
        levels, labels = zip(
            *((int(row[0]), "abc".index(row[1])) for row in rows.split()), strict=True
        )
        data = {
            part: (np.zeros((len(some), 28, 28), np.uint8) + np.reshape(some, (-1, 1, 1)), classes)
            for part, some, classes in (("train", levels, labels), ("test", [5], [0]))
        }
        config = PreprocessConfig(
            sources=(f"idx:{helpers.write_idx(tmp_path / f'{name}-idx', data)}",),
            output_dir=tmp_path / name,
            num_shards=1,
            num_classes=3,
            validation_size=0,
        )
        assert preprocess.execute(config) == 0
        made.append(tmp_path / name)
    lines = comparison.diff(*made).splitlines()
    assert [line.split()[1] for line in lines[3:7]] == expected
    back = comparison.diff(*made[::-1]).splitlines()
    assert [line.split()[1] for line in back[3:7]] == [expected[i] for i in (1, 0, 2, 3)]


def test_memory_of_a_comparison():
    """Of each record no more than a few dozen bytes, where a dictionary takes hundreds."""
    size = 200_000
    random = np.random.default_rng(6)
    tracemalloc.start()
    try:
        sides = []
        for _ in range(2):
            table = np.zeros(size, tables.ENTRY)
            table["key"] = np.frombuffer(random.bytes(20 * size), "S20")
            order = np.argsort(table["key"], kind="stable")
            sides.append(
                matching.Index(
                    table["key"].astype("S16")[order], table["label"][order].astype(np.uint16),
                    table["split"][order],
                )
            )  # fmt: skip
            del table, order
        changes = matching.compare(*sides)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (changes.added, changes.removed) == (size, size)
    assert peak / (2 * size) < 80


def test_ids_that_are_none_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    hand_made(tmp_path / "set", {"train": [(0, "a")], "test": [(1, "b")]}, ("a", "b"))
    shard = load_manifest(tmp_path / "set").splits["train"].shards[0]
    record = codec.read_records(tmp_path / "set", shard)[0]
    monkeypatch.setattr(codec, "decode_record", lambda _: record._replace(id="zz"))
    for action in (["describe", tmp_path / "set"], ["diff", *[tmp_path / "set"] * 2]):
        assert run(monkeypatch, *action) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"{shard.file}: an id is not a hash and the number of a copy" in err
