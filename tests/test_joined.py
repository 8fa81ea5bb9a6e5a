import helpers
import numpy as np
import pytest
from test_images import encoded, write_tree

from pipeline import preprocess
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.options import PreprocessConfig
from pipeline.records import image_ids, read_records
from pipeline.sources import Block, idx, images, open_sources


@pytest.fixture
def two(tmp_path):
    """Two sets of IDX files: specs, and their data."""
    data = [helpers.make_images(30, 12, seed=1), helpers.make_images(25, 10, seed=2)]
    folders = [helpers.write_idx(tmp_path / str(i), each) for i, each in enumerate(data)]
    return [f"idx:{folder}" for folder in folders], data


def rows_of(source, part):
    return [rows for block in source.blocks() for rows in source.read(block) if rows.part == part]


def joined(parts, name):
    return np.concatenate([getattr(rows, name) for rows in parts])


def test_one_source_is_itself(two):
    (spec, _), _ = two
    assert isinstance(open_sources([spec]), idx.IdxSource)


@pytest.mark.parametrize("rows_per_block", [7, 16384])
def test_rows_come_one_after_the_other(two, monkeypatch, rows_per_block):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", rows_per_block)
    specs, data = two
    source = open_sources(specs)
    assert source.specs == tuple(specs) and open_sources(source.specs) == source
    assert source.part_sizes == {"train": 55, "test": 22}
    assert source.class_names == tuple("0123456789")
    assert (source.default_split_by, source.has_order) == ("positional", True)
    title = "images from IDX files"
    assert source.describe() == {
        "kind": "joined",
        "title": f"{title} and {title}",
        "sources": [{"kind": "idx", "title": title}] * 2,
    }
    assert sorted({block.source for block in source.blocks()}) == [0, 1]
    for part, size in source.part_sizes.items():
        parts = rows_of(source, part)
        assert joined(parts, "positions").tolist() == list(range(size))
        expected = [np.concatenate([each[part][i] for each in data]) for i in (0, 1)]
        np.testing.assert_array_equal(joined(parts, "pixels"), expected[0].reshape(-1, 784))
        np.testing.assert_array_equal(joined(parts, "labels"), expected[1])
    fingerprints = [source.fingerprint(), open_sources(specs[::-1]).fingerprint()]
    assert fingerprints[0] == [open_sources([spec]).fingerprint() for spec in specs]
    assert fingerprints[0] != fingerprints[1]


def test_a_block_is_read_from_its_source_alone(two):
    specs, data = two
    source = open_sources(specs)
    (rows,) = source.read(Block("test", 3, 4, source=1))
    assert rows.positions.tolist() == [15, 16, 17, 18]  # after the first source's twelve
    assert rows.labels.tolist() == data[1]["test"][1][3:7].tolist()
    assert rows.origins[0] == "2:t10k-images-idx3-ubyte#3"


def test_positional_split_is_of_the_whole(two, tmp_path):
    specs, data = two
    config = PreprocessConfig(
        sources=tuple(specs), output_dir=tmp_path / "out", validation_size=40, num_shards=1
    )
    assert preprocess.execute(config) == 0
    manifest = load_manifest(tmp_path / "out")
    pixels = np.concatenate([each["train"][0] for each in data]).reshape(-1, 784)
    for split, chosen in (("validation", pixels[:40]), ("train", pixels[40:])):
        (shard,) = manifest.splits[split].shards
        records = read_records(tmp_path / "out", shard)
        assert [record.id for record in records] == sorted(image_ids(chosen))


def tree_of(root, names, seed=0):
    """A tree with three train images and two test images of each class."""
    data = np.random.default_rng(seed).integers(0, 256, (len(names), 5, 28, 28), np.uint8)
    for name, pixels in zip(names, data, strict=True):
        for i, image in enumerate(pixels):
            path = root / ("train" if i < 3 else "test") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
    return dict(zip(names, data, strict=True))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["a", "b", "c"], ["c", "a"], ("a", "b", "c")),
        (["c", "a"], ["a", "b", "c"], ("a", "c", "b")),  # as the first has them
        (["10", "9"], ["2", "9"], ("2", "9", "10")),
        (["1", "2"], ["1", "x"], ("1", "2", "x")),
        (["a", "b"], ["c", "d"], ("a", "b", "c", "d")),
    ],
)
def test_classes_are_known_by_their_names(tmp_path, first, second, expected):
    trees = [tree_of(tmp_path / str(i), names, seed=i) for i, names in enumerate((first, second))]
    source = open_sources([f"images:{tmp_path / str(i)}" for i in (0, 1)])
    assert source.class_names == expected
    wanted = {
        (image.tobytes(), name)
        for tree in trees
        for name, pixels in tree.items()
        for image in pixels
    }
    read = [
        (pixels.tobytes(), expected[label])
        for part in ("train", "test")
        for rows in rows_of(source, part)
        for pixels, label in zip(rows.pixels, rows.labels, strict=True)
    ]
    assert set(read) == wanted and len(read) == len(wanted)
    assert (source.default_split_by, source.has_order) == ("hash", False)


def test_idx_and_images(two, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ROWS_PER_BLOCK", 2)
    specs, data = two
    tree = write_tree(tmp_path / "tree", data[1])
    (tree / "train/3/broken.png").write_bytes(b"broken")
    made = []
    for second in (specs[1], f"images:{tree}"):
        out = tmp_path / f"out{len(made)}"
        config = PreprocessConfig(
            sources=(specs[0], second),
            output_dir=out,
            num_shards=2,
            split_by="hash",
            max_quarantined=0.1,
        )
        assert preprocess.execute(config) == 0
        made.append(load_manifest(out))
    assert made[0].dataset_id == made[1].dataset_id
    assert made[1].quarantined == {"count": 1, "by_reason": {"damaged": 1}}
    assert '"origin": "2:train/3/broken.png"' in (out / "quarantine/records.jsonl").read_text()
    # What is positional alone is not so together with what is not.
    source = open_sources([specs[0], f"images:{tree}"])
    assert (source.default_split_by, source.has_order) == ("hash", False)


def test_labels_out_of_range_stay_out_of_range(two, tmp_path):
    specs, _ = two
    tree_of(tmp_path / "tree", [str(label) for label in range(10)])
    source = open_sources([specs[0], f"images:{tmp_path / 'tree'}"], num_classes=4)
    assert source.class_names == tuple("0123456789")
    labels = joined(rows_of(source, "train"), "labels")
    # The IDX files' fives are beyond their own classes, though the tree knows a five.
    assert (labels[:30] >= 10).sum() == 18 and (labels[30:] < 10).all()


def test_too_many_classes_together(tmp_path):
    for i in range(2):
        for j in range(129):
            (tmp_path / str(i) / "train" / f"{i}-{j}").mkdir(parents=True)
    with pytest.raises(InputError, match="258 classes in all, expected 2 to 256"):
        open_sources([f"images:{tmp_path / str(i)}" for i in range(2)])


def of_one_class(tmp_path, kind):
    """Images all of class 0, none in test, as a source of their own: (spec, pixels)."""
    pixels = helpers.make_images(9, 1, seed=3)["train"][0]
    train = {"train": (pixels, np.zeros(9, np.uint8))}
    write = helpers.write_idx if kind == "idx" else write_tree
    return f"{kind}:{write(tmp_path / 'week', train)}", pixels


@pytest.mark.parametrize("week_first", [False, True])
@pytest.mark.parametrize("kind", ["idx", "images"])
def test_a_source_of_one_class_and_without_test(two, tmp_path, kind, week_first):
    (spec, _), (data, _) = two
    week, pixels = of_one_class(tmp_path, kind)
    specs = (week, spec) if week_first else (spec, week)
    source = open_sources(specs)
    assert source.class_names == tuple("0123456789")
    assert source.part_sizes == {"train": 39, "test": 12}
    assert open_sources(source.specs) == source
    config = PreprocessConfig(
        sources=specs, output_dir=tmp_path / "out", num_shards=1, split_by="hash"
    )
    assert preprocess.execute(config) == 0
    splits = load_manifest(tmp_path / "out").splits
    trained = [
        record.id
        for split in ("train", "validation")
        for record in read_records(tmp_path / "out", splits[split].shards[0])
    ]
    both = np.concatenate([data["train"][0], pixels]).reshape(-1, 784)
    assert sorted(trained) == sorted(image_ids(both))
    assert splits["test"].num_examples == 12


def test_an_idx_source_without_train(two, tmp_path):
    (spec, _), (data, _) = two
    folder = helpers.write_idx(
        tmp_path / "more", {"test": helpers.make_images(5, 7, seed=4)["test"]}
    )
    source = open_sources([spec, f"idx:{folder}"])
    assert source.part_sizes == {"train": 30, "test": 19}
    rows = rows_of(source, "test")
    assert joined(rows, "positions").tolist() == list(range(19))
    assert joined(rows_of(source, "train"), "labels").tolist() == data["train"][1].tolist()


@pytest.mark.parametrize("kind", ["idx", "images"])
def test_one_class_in_all(two, tmp_path, kind):
    week, _ = of_one_class(tmp_path, kind)
    with pytest.raises(InputError) as caught:
        open_sources([week, week])
    assert str(caught.value) == (
        f"--source {week} --source {week}: 1 class in all, expected 2 to 256"
    )


@pytest.mark.parametrize(
    ("gone", "alone", "message"),
    [
        (["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"], True, "no t10k-images-idx3-ubyte"),
        (["train-images-idx3-ubyte", "train-labels-idx1-ubyte"], True, "no train-images-idx3-"),
        (["t10k-labels-idx1-ubyte"], False, "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte."),
        (["train-images-idx3-ubyte"], False, "no train-images-idx3-ubyte or train-images-idx3-ub"),
        (None, False, "no train-images-idx3-ubyte"),
    ],
    ids=["test, alone", "train, alone", "half of test", "half of train", "all"],
)
def test_missing_idx_files_are_named(two, tmp_path, gone, alone, message):
    specs, _ = two
    for path in list((tmp_path / "1").iterdir()):
        if gone is None or path.name in gone:
            path.unlink()
    with pytest.raises(InputError, match=f"^{tmp_path / '1'}: {message}"):
        open_sources(specs[1:] if alone else specs)


def test_no_test_in_all(two, tmp_path):
    specs, _ = two
    for path in tmp_path.glob("[01]/t10k-*"):
        path.unlink()
    config = PreprocessConfig(sources=tuple(specs), output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="the test split would be empty"):
        preprocess.execute(config)
    assert not (tmp_path / "out").exists()
