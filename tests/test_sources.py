import collections
import functools
import gzip
import json
import logging
import pickle
import shutil
import struct
import threading
import tracemalloc

import helpers
import memory_bucket
import numpy as np
import pytest
import requests

from benchmarks.preprocess import lay_out_downloads
from pipeline import gcs, options, preprocess, retrain
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.records import image_ids
from pipeline.sources import Block, digits, idx, open_sources, ranges, tfds

# A download of TensorFlow Datasets is kept under its address and the base64 of its SHA-256.


def read_all(source):
    """{part: (pixels, labels)}, after checking that every row comes once and in its place."""
    found = {}
    for part, size in source.part_sizes.items():
        rows = [
            rows for block in source.blocks() if block.part == part for rows in source.read(block)
        ]
        assert all(each.part == part for each in rows)
        assert all(each.pixels.shape == (len(each.labels), 784) for each in rows)
        assert all((each.pixels.dtype, each.labels.dtype) == (np.uint8, np.int64) for each in rows)
        positions = [int(i) for each in rows for i in each.positions]
        assert positions == list(range(size))
        assert all(each.size == len(each.labels) == len(each.origins) for each in rows)
        assert all(not each.faults for each in rows)
        found[part] = tuple(
            np.concatenate([getattr(each, name) for each in rows]) for name in ("pixels", "labels")
        )
    return found


def assert_holds(source, data):
    assert source.part_sizes == {part: len(labels) for part, (_, labels) in data.items()}
    for part, (pixels, labels) in read_all(source).items():
        np.testing.assert_array_equal(pixels, data[part][0].reshape(-1, 784))
        np.testing.assert_array_equal(labels, data[part][1])


# What every source promises


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ({"train": 5, "test": 2}, 2, [("train", 0, 2), ("train", 2, 2), ("train", 4, 1)]),
        ({"train": 4, "test": 2}, 2, [("train", 0, 2), ("train", 2, 2)]),
        ({"train": 1, "test": 2}, 9, [("train", 0, 1)]),
        ({"test": 2}, 2, []),
    ],
    ids=["rest", "even", "one block", "one part"],
)
def test_ranges(sizes, size, expected):
    assert ranges(sizes, size) == [Block(*each) for each in [*expected, ("test", 0, 2)]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown source; expected idx:DIR"),
        (
            "nosuch",
            "--source nosuch: unknown source; expected idx:DIR, tfds:NAME, images:DIR, digits or"
            " auto",
        ),
        ("IDX:/data", "unknown source"),
        (":", "unknown source"),
        (" digits", "unknown source"),
        ("auto:x", "--source auto:x: auto takes no argument; expected idx:DIR"),
        ("/data/mnist", "unknown source"),
        ("../sources/idx:x", "unknown source"),
        ("idx", "--source idx: expected something after the colon"),
        ("images", "--source images: expected something after the colon"),
        ("images:", "expected something after the colon"),
        ("idx:", "expected something after the colon"),
        ("tfds:", "expected something after the colon"),
        ("digits:8", "--source digits:8: digits takes no argument"),
        ("idx:http://x/y", "idx:http://x/y: expected a local folder or gs://bucket/folder"),
        ("images:https://x", "images:https://x: expected a local folder or gs://bucket/folder"),
        ("idx:/x/gs://bucket", "expected a local folder or gs://bucket/folder"),
        ("tfds:gs://bucket/mnist", "--source tfds:gs://bucket/mnist: expected a name"),
        ("idx:gs://x", "gs://x: expected gs://bucket/path, with the name of a bucket"),
        ("images:gs://bucket/a//b", "gs://bucket/a//b: has an empty part"),
        ("idx:/no/such/folder", "--source idx:/no/such/folder: no such folder"),
        ("idx:" + "x" * 300, "cannot be read: File name too long"),
    ],
)
def test_bad_spec(spec, message):
    with pytest.raises(InputError) as caught:
        open_sources([spec])
    assert message in str(caught.value)


# IDX files


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("test_stem", ["t10k", "test"])
@pytest.mark.parametrize(
    ("rows_per_block", "rows_at_once"),
    [(7, 3), (5, 5), (3, 7), (1, 1), (16384, 2048)],
    ids=lambda value: str(value),
)
def test_idx(tmp_path, monkeypatch, gz, test_stem, rows_per_block, rows_at_once):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", rows_per_block)
    monkeypatch.setattr(idx, "ROWS_AT_ONCE", rows_at_once)
    data = helpers.make_images(25, 11)
    source = open_sources([f"idx:{helpers.write_idx(tmp_path, data, gz=gz, test_stem=test_stem)}"])
    assert_holds(source, data)
    at_least = {n: -(-n // idx.MAX_GZIP_BLOCKS) if gz else 0 for n in (25, 11)}
    assert len(source.blocks()) == sum(
        -(-n // max(rows_per_block, least)) for n, least in at_least.items()
    )
    for block in source.blocks():
        sizes = [len(rows.labels) for rows in source.read(block)]
        assert sum(sizes) == block.size and max(sizes) <= rows_at_once
    assert (source.default_split_by, source.class_names) == ("positional", tuple("0123456789"))


def test_idx_block_is_read_alone_and_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", 4)
    data = helpers.make_images(25, 11)
    source = pickle.loads(
        pickle.dumps(open_sources([f"idx:{helpers.write_idx(tmp_path, data, gz=True)}"]))
    )
    for block in reversed(source.blocks()):
        (rows,) = source.read(block)
        expected = data[block.part][1][block.first : block.first + block.size]
        np.testing.assert_array_equal(rows.labels, expected)


def test_idx_names_with_a_dot(tmp_path):
    helpers.write_idx(tmp_path, helpers.make_images(25, 11))
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert open_sources([f"idx:{tmp_path}"]).part_sizes == {"train": 25, "test": 11}


def test_idx_is_small_and_opens_again(tmp_path, monkeypatch):
    helpers.write_idx(tmp_path / "a", helpers.make_images(25, 11))
    monkeypatch.chdir(tmp_path)
    source = open_sources(["idx:a"])
    assert len(pickle.dumps(source)) < 2000
    monkeypatch.chdir("/")
    assert open_sources(source.specs) == source
    assert_holds(source, helpers.make_images(25, 11))
    assert "a" not in source.describe().values() and str(tmp_path) not in str(source.describe())


def test_idx_classes_are_those_of_both_parts(tmp_path):
    data = helpers.make_images(25, 11)
    data["train"][1][:] = np.arange(25) % 3
    data["test"][1][:] = 0
    data["test"][1][4] = 12
    source = open_sources([f"idx:{helpers.write_idx(tmp_path, data)}"])
    assert source.class_names == tuple(str(label) for label in range(13))


def test_idx_of_a_given_number_of_classes(tmp_path):
    data = helpers.make_images(25, 11)
    folder = helpers.write_idx(tmp_path, data)
    for num_classes in (2, 10, 256):
        source = open_sources([f"idx:{folder}"], num_classes=num_classes)
        assert source.class_names == tuple(str(label) for label in range(num_classes))
        assert_holds(source, data)  # a label beyond them is for validation to find


def test_idx_origins_name_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", 7)
    source = open_sources([f"idx:{helpers.write_idx(tmp_path, helpers.make_images(25, 11))}"])
    names = [
        name for block in source.blocks() for rows in source.read(block) for name in rows.origins
    ]
    assert names == [f"train-images-idx3-ubyte#{i}" for i in range(25)] + [
        f"t10k-images-idx3-ubyte#{i}" for i in range(11)
    ]


def test_idx_fingerprint_tells_a_change_but_not_a_place(tmp_path):
    folder = helpers.write_idx(tmp_path / "a", helpers.make_images(25, 11))
    first = open_sources([f"idx:{folder}"]).fingerprint()
    assert json.loads(json.dumps(first)) == first
    copy = shutil.copytree(folder, tmp_path / "b")  # with its times
    assert open_sources([f"idx:{copy}"]).fingerprint() == first
    for path in copy.iterdir():
        before = open_sources([f"idx:{copy}"]).fingerprint()
        path.write_bytes(path.read_bytes())
        assert open_sources([f"idx:{copy}"]).fingerprint() != before, path.name


def header(*shape, kind=8):
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape)


IMAGES = header(25, 28, 28) + bytes(25 * 784)
LABELS = header(25) + bytes(24) + b"\x01"

# name: (the file that is replaced, its content or None, what is said of it)
BAD_FILES = {
    "no images": ("train-images-idx3-ubyte", None, "no train-images-idx3-ubyte or train-images"),
    "no labels": ("train-labels-idx1-ubyte", None, "no train-labels-idx1-ubyte or train-labels"),
    "no test": ("t10k-images-idx3-ubyte", None, "no t10k-images-idx3-ubyte or t10k-images"),
    "empty": ("train-images-idx3-ubyte", b"", "magic number is 0x, expected 0x00000803"),
    "page": ("train-images-idx3-ubyte", b"<html>not found", "0x3c68746d, expected 0x00000803"),
    "labels for images": ("train-images-idx3-ubyte", LABELS, "0x00000801, expected 0x00000803"),
    "images for labels": ("train-labels-idx1-ubyte", IMAGES, "0x00000803, expected 0x00000801"),
    "floats": ("train-labels-idx1-ubyte", header(25, kind=13), "0x00000d01, expected 0x00000801"),
    "half a header": ("train-images-idx3-ubyte", IMAGES[:13], "ends inside its header"),
    "header alone": ("train-images-idx3-ubyte", IMAGES[:16], "0 bytes of data, its header says"),
    "cut": ("train-images-idx3-ubyte", IMAGES[:-1], "19599 bytes of data, its header says 25 x 28"),
    "too long": ("train-images-idx3-ubyte", IMAGES + b"\0", "19601 bytes of data"),
    "labels cut": ("t10k-labels-idx1-ubyte", LABELS[:-1], "24 bytes of data, its header says 25"),
    "huge": (
        "train-images-idx3-ubyte",
        header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(9),
        f"9 bytes of data, its header says {' x '.join(['4294967295'] * 3)} = {(2**32 - 1) ** 3}",
    ),
    "fewer labels": ("train-labels-idx1-ubyte", header(2) + b"\0\1", "2 labels for the 25 images"),
    "32x32": ("train-images-idx3-ubyte", header(1, 32, 32) + bytes(1024), "32x32, expected 28x28"),
    "an image a row": ("train-images-idx3-ubyte", header(25, 784, 1) + IMAGES[16:], "are 784x1"),
}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_idx_file(tmp_path, case, gz):
    name, content, message = case
    good = {"images-idx3-ubyte": IMAGES, "labels-idx1-ubyte": LABELS}
    for part in ("train", "t10k"):
        for suffix, data in good.items():
            path = tmp_path / (f"{part}-{suffix}" + ".gz" * gz)
            path.write_bytes(gzip.compress(data) if gz else data)
    open_sources([f"idx:{tmp_path}"])
    bad = tmp_path / (name + ".gz" * gz)
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(gzip.compress(content) if gz else content)
    with pytest.raises(InputError) as caught:
        open_sources([f"idx:{tmp_path}"])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path if content is None else bad) + ": ")


def test_idx_without_images(tmp_path):
    data = helpers.make_images(25, 11) | {"test": (np.zeros((0, 28, 28)), np.zeros(0))}
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte: holds no images"):
        open_sources([f"idx:{helpers.write_idx(tmp_path, data)}"])


def test_idx_of_one_class(tmp_path):
    data = helpers.make_images(25, 11)
    for _, labels in data.values():
        labels[:] = 0
    spec = f"idx:{helpers.write_idx(tmp_path, data)}"
    with pytest.raises(InputError) as caught:
        open_sources([spec])
    assert str(caught.value) == f"--source {spec}: 1 class in all, expected 2 to 256"


def test_idx_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no such folder"):
        open_sources([f"idx:{tmp_path / 'file'}"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-8] + bytes(8),
        lambda data: data[:20] + bytes([data[20] ^ 0xFF]) + data[21:],
        lambda data: data + b"more",
        lambda data: b"",
        lambda data: b"no gzip file",
        lambda data: data[:5],
    ],
    ids=["half", "no end", "checksum", "changed", "more", "empty", "text", "half a header"],
)
def test_broken_gzip(tmp_path, damage):
    helpers.write_idx(tmp_path, helpers.make_images(25, 11), gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        open_sources([f"idx:{tmp_path}"])
    assert str(caught.value).startswith(f"{path}: ")


def test_gzip_that_swells_is_not_held_in_memory(tmp_path):
    helpers.write_idx(tmp_path, helpers.make_images(25, 11), gz=True)
    size = 64 << 20
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(IMAGES[:16] + bytes(size), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"{size} bytes of data, its header says 25 x 28 x 28"):
            open_sources([f"idx:{tmp_path}"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 8


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
def test_idx_that_shrinks_later(tmp_path, gz):
    source = open_sources(
        [f"idx:{helpers.write_idx(tmp_path, helpers.make_images(25, 11), gz=gz)}"]
    )
    helpers.write_idx(tmp_path, helpers.make_images(24, 11), gz=gz)
    with pytest.raises(InputError, match="changed while it was read"):
        read_all(source)


# scikit-learn's digits


def test_digits():
    source = open_sources(["digits"])
    data = read_all(source)
    assert sum(source.part_sizes.values()) == 1797
    assert 300 < source.part_sizes["test"] < 420  # about a fifth
    for pixels, labels in data.values():
        assert set(labels.tolist()) == set(range(10))
        assert pixels.max() == 255 and pixels.min() == 0
    assert (source.default_split_by, source.class_names) == ("hash", tuple("0123456789"))
    assert "not MNIST" in source.describe()["title"] and source.describe()["kind"] == "digits"
    ids = {part: set(image_ids(pixels)) for part, (pixels, _) in data.items()}
    assert not ids["train"] & ids["test"]


def test_digits_are_the_same_each_time(monkeypatch):
    first = read_all(open_sources(["digits"]))
    digits._load.cache_clear()
    monkeypatch.setattr(digits, "ROWS_PER_BLOCK", 100)
    again = read_all(pickle.loads(pickle.dumps(open_sources(["digits"]))))
    for part in first:
        for one, two in zip(first[part], again[part], strict=True):
            np.testing.assert_array_equal(one, two)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = read_all(open_sources(["digits"]))
    counts = np.bincount(np.concatenate([labels for _, labels in data.values()]))
    assert counts.tolist() == np.bincount(labels).tolist()
    # Shrunk to 8x8 again they are the pictures they were made from.
    pixels = data["train"][0][:50].reshape(50, 28, 28).astype(float)
    bounds = np.linspace(0, 28, 9).round().astype(int)
    small = np.add.reduceat(np.add.reduceat(pixels, bounds[:-1], 1), bounds[:-1], 2)
    small /= np.outer(np.diff(bounds), np.diff(bounds)) * 255 / 16
    nearest = [np.abs(images - each.ravel()).mean(axis=1).argmin() for each in small]
    assert labels[nearest].tolist() == data["train"][1][:50].tolist()


@pytest.mark.parametrize("level", [0, 100, 255])
def test_resize_keeps_a_plain_image(level):
    resized = digits.resize(np.full((8, 8), level, np.uint8))
    assert (resized.shape, resized.dtype) == ((28, 28), np.uint8)
    assert (resized == level).all()


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def library(tfds_dir, monkeypatch):
    """tensorflow_datasets with a folder of its own, and no network."""
    import tensorflow_datasets

    builder = functools.partial(tensorflow_datasets.builder, data_dir=str(tfds_dir))
    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    monkeypatch.setattr(tfds, "network_reachable", lambda: False)
    return tensorflow_datasets


@pytest.fixture
def own_set(library, tmp_path, monkeypatch):
    """Makes ``tfds:small_set``, which needs no download."""

    def make(data=None, shape=(28, 28, 1), classes=10, key="label"):
        class SmallSet(library.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = library.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": library.features.Image(shape=shape),
                    key: library.features.ClassLabel(num_classes=classes),
                }
                return library.core.DatasetInfo(
                    builder=self, features=library.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {part: self._generate_examples(part) for part in data}

            def _generate_examples(self, part):
                for i, (image, label) in enumerate(zip(*data[part], strict=True)):
                    yield i, {"image": image.reshape(shape), key: label}

        own = str(tmp_path / "own")
        monkeypatch.setattr(library, "builder", lambda _, data_dir=own: SmallSet(data_dir=data_dir))
        return "small_set"

    return make


def test_tfds(own_set, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "ROWS_PER_BLOCK", 10)
    monkeypatch.setattr(tfds, "ROWS_AT_ONCE", 4)
    data = helpers.make_images(25, 11)
    source = open_sources([f"tfds:{own_set(data=data)}"])
    blocks = source.blocks()
    assert [block.size for block in blocks] == [10, 10, 5, 10, 1]
    assert [len(rows.labels) for rows in source.read(blocks[0])] == [4, 4, 2]
    assert_same_images(read_all(pickle.loads(pickle.dumps(source))), data)
    assert source.describe()["title"] == "small_set/1.0.0 from TensorFlow Datasets"
    assert str(tmp_path.parent) not in json.dumps([source.describe(), source.fingerprint()])
    assert (source.default_split_by, source.class_names) == ("positional", tuple("0123456789"))


def assert_same_images(found, data):
    """The same images with the same labels, in any order."""
    for part, (images, labels) in data.items():
        expected = zip(image_ids(images.reshape(-1, 784)), labels.tolist(), strict=True)
        pixels, got = found[part]
        assert collections.Counter(expected) == collections.Counter(
            zip(image_ids(pixels), got.tolist(), strict=True)
        )


@pytest.mark.parametrize("program", [retrain, preprocess])
def test_a_dry_run_publishes_no_set(program, own_set, tmp_path, monkeypatch, capsys):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setenv(tfds.VARIABLE, "gs://bucket/tfds")
    spec = f"tfds:{own_set(data=helpers.make_images())}"
    flag = "--root" if program is retrain else "--output_dir"
    argv = [f"{flag}={tmp_path / 'out'}", f"--source={spec}"]
    assert program.execute(program.parse([*argv, "--dry_run"])) == 0
    assert spec in capsys.readouterr().out
    assert memory.objects == {} and not (tmp_path / "out").exists()
    described = open_sources([spec], share=False)
    assert memory.objects == {}
    assert open_sources([spec]) == described  # which is published, and by a dry run the same
    assert f"tfds/small_set/1.0.0/{tfds.INFO_FILE}" in memory.objects
    assert open_sources([spec], share=False) == described


def test_tfds_and_idx_make_the_same_dataset(own_set, small_idx, tmp_path):
    made = []
    for spec in (f"idx:{small_idx}", f"tfds:{own_set(data=helpers.make_images())}"):
        folder = tmp_path / str(len(made))
        config = options.PreprocessConfig(
            sources=(spec,), output_dir=folder, num_shards=2, split_by="hash"
        )
        assert preprocess.execute(config) == 0
        made.append(load_manifest(folder))
    assert made[0].dataset_id == made[1].dataset_id
    assert made[0].splits == made[1].splits
    assert made[0].source != made[1].source


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": (32, 32, 3)}, "image is (32, 32, 3), expected (28, 28, 1)"),
        ({"shape": (28, 28, 3)}, "image is (28, 28, 3), expected (28, 28, 1)"),
        ({"classes": 300}, "expected a label of 2 to 256 classes"),
        ({"classes": 1}, "expected a label of 2 to 256 classes"),
        ({"key": "kind"}, "expected a label of 2 to 256 classes"),
        ({"data": {"train": helpers.make_images(3, 3)["train"]}}, "has no test split"),
    ],
    ids=["cifar", "coloured", "classes", "one class", "no label", "no test"],
)
def test_tfds_that_is_no_set_of_digits(own_set, kwargs, message):
    name = own_set(**kwargs)
    with pytest.raises(InputError) as caught:
        open_sources([f"tfds:{name}"])
    assert str(caught.value) == f"--source tfds:small_set: {message}"


@pytest.mark.parametrize(
    "name", ["no_such_set", "../mnist", "mnist:9.9.9", "mnist/some", "MNIST!", " ", "a:b"]
)
def test_tfds_that_is_not_there(library, name):
    with pytest.raises(InputError) as caught:
        open_sources([f"tfds:{name}"])
    assert str(caught.value).startswith(f"--source tfds:{name}: no such data set: ")
    assert "\n" not in str(caught.value)


def test_tfds_that_cannot_be_downloaded(library):
    with pytest.raises(InputError, match=r"cannot be prepared: storage.* cannot be reached$"):
        open_sources(["tfds:mnist"])


def test_tfds_that_fails_leaves_what_was_there(library, tfds_dir):
    half = tfds_dir / "downloads/mnist/half.gz"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    with pytest.raises(InputError, match=r"cannot be prepared: storage.* cannot be reached$"):
        open_sources(["tfds:mnist"])
    assert half.read_bytes() == b"half"
    assert [path.name for path in half.parent.iterdir()] == ["half.gz"]
    assert not (tfds_dir / "mnist").exists()
    half.unlink()


def broken_off(downloaded, beside):
    """Stands for TFDS's downloader: writes half a file, lets another process act, and fails."""

    def download(self, url, folder, verify):
        (folder / "half").write_bytes(b"half")
        downloaded.append(folder)
        beside()
        raise OSError("the line broke")

    return download


@pytest.fixture
def broken_line(library, tmp_path, monkeypatch):
    """Sets a folder of one test's own, and how a download fails; both are returned by a call."""
    from tensorflow_datasets.core.download import downloader

    def make(beside):
        downloaded = []
        download = broken_off(downloaded, beside)
        monkeypatch.setattr(downloader._Downloader, "download", download)
        monkeypatch.setitem(library.builder.keywords, "data_dir", str(tmp_path / "own"))
        return tmp_path / "own", downloaded

    return make


@pytest.mark.parametrize("name", ["mnist", "emnist/digits"])
def test_tfds_that_fails_leaves_what_others_make_meanwhile(name, broken_line):
    family = name.partition("/")[0]
    others = [
        "cifar10/3.0.2/features.json",
        "downloads/cifar10/whole.gz",
        "downloads/cifar10/part.gz.tmp.0123456789abcdef0123456789abcdef/part.gz",
        f"downloads/{family}/part.gz.tmp.0123456789abcdef0123456789abcdef/part.gz",
        f"downloads/{family}/whole.gz",
        f"{family}/incomplete.ABCDEF_3.0.1/part",
    ]

    def beside():
        for other in others:
            (own / other).parent.mkdir(parents=True, exist_ok=True)
            (own / other).write_bytes(b"theirs")

    own, downloaded = broken_line(beside)
    with pytest.raises(InputError, match="cannot be prepared: the line broke"):
        open_sources([f"tfds:{name}"])
    left = helpers.tree(own)
    left.pop(f"{family}/.config/metadata.json", None)  # the same, whoever wrote it
    assert left == dict.fromkeys(others, b"theirs")
    assert downloaded and not any(folder.exists() for folder in downloaded)


@pytest.mark.parametrize("name", ["mnist", "emnist/digits"])
def test_tfds_that_fails_alone_leaves_nothing(name, broken_line):
    own, downloaded = broken_line(lambda: None)
    with pytest.raises(InputError, match="cannot be prepared: the line broke"):
        open_sources([f"tfds:{name}"])
    assert downloaded and list(own.parent.rglob("*")) == []


def test_requests_fail_at_once_without_a_network():
    with tfds._no_requests(), pytest.raises(requests.ConnectionError, match="cannot be reached"):
        requests.get("https://example.invalid")


def test_network_reachable(monkeypatch):
    asked = []
    monkeypatch.setattr(requests, "head", lambda url, timeout: asked.append((url, timeout)))
    assert tfds.network_reachable()
    assert asked == [("https://storage.googleapis.com", tfds.PROBE_SECONDS)]


def test_network_not_reachable(monkeypatch):
    def refuse(*_, **__):
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(requests, "head", refuse)
    assert not tfds.network_reachable()


def test_network_that_does_not_answer(monkeypatch):
    released = threading.Event()
    answers = []

    def hang(*_, **__):
        answers.append(released.wait(5))
        raise requests.ConnectionError("late")

    monkeypatch.setattr(tfds, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(requests, "head", hang)
    assert not tfds.network_reachable()
    assert answers == []  # it was not waited for
    released.set()


READ_TFDS = """
import sys, numpy as np
from pipeline.records import image_ids
from pipeline.sources import open_sources, tfds
tfds.network_reachable = lambda: False
source = open_sources(["tfds:mnist"])
for part in source.part_sizes:
    rows = [r for block in source.blocks() if block.part == part for r in source.read(block)]
    ids = [name for r in rows for name in image_ids(r.pixels)]
    np.savez(f"{sys.argv[1]}/{part}.npz", ids=ids, labels=np.concatenate([r.labels for r in rows]))
print(source.class_names, source.describe()["name"])
"""


@pytest.mark.campaign
def test_tfds_mnist_from_downloads(mnist_dir, tmp_path):
    lay_out_downloads(mnist_dir, tmp_path / "tfds")
    done = helpers.run_python(
        "-c", READ_TFDS, tmp_path, env={"TFDS_DATA_DIR": tmp_path / "tfds"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tuple('0123456789')} mnist/3.0.1"
    for part, (pixels, labels) in read_all(open_sources([f"idx:{mnist_dir}"])).items():
        found = np.load(tmp_path / f"{part}.npz")
        assert collections.Counter(
            zip(found["ids"].tolist(), found["labels"].tolist(), strict=True)
        ) == collections.Counter(zip(image_ids(pixels), labels.tolist(), strict=True))


# auto


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="digits_pipeline")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "digits_pipeline"
    ]


def test_auto_takes_the_variable_first(small_idx, monkeypatch, lines):
    monkeypatch.setattr(tfds, "open_source", lambda _, share: pytest.fail("not asked"))
    source = open_sources(["auto"], environ={"MNIST_IDX_DIR": str(small_idx)})
    assert source == open_sources([f"idx:{small_idx}"])
    assert lines() == [("INFO", f"source auto: MNIST from $MNIST_IDX_DIR, {small_idx}")]


def test_auto_does_not_pass_over_a_wrong_variable(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "open_source", lambda _, share: pytest.fail("not asked"))
    with pytest.raises(InputError, match="no train-images-idx3-ubyte"):
        open_sources(["auto"], environ={"MNIST_IDX_DIR": str(tmp_path)})


def test_auto_takes_the_number_of_classes_for_idx_files_alone(small_idx, monkeypatch):
    monkeypatch.setattr(tfds, "open_source", lambda _, share: pytest.fail("not asked"))
    environ = {"MNIST_IDX_DIR": str(small_idx)}
    assert len(open_sources(["auto"], num_classes=12, environ=environ).class_names) == 12
    with pytest.raises(InputError, match="--num_classes 12: goes with idx: sources alone"):
        open_sources(["auto"], num_classes=12, environ={})


@pytest.mark.parametrize("environ", [{}, {"MNIST_IDX_DIR": ""}], ids=["unset", "empty"])
def test_auto_asks_tfds_next(monkeypatch, lines, environ):
    asked, opened = [], digits.open_source("")
    answer = lambda *args, share: asked.append((*args, share)) or opened  # noqa: E731
    monkeypatch.setattr(tfds, "open_source", answer)
    assert open_sources(["auto"], environ=environ) is opened
    assert asked == [("mnist", True)]
    assert lines() == [("INFO", "source auto: MNIST from TensorFlow Datasets")]


def test_auto_falls_back_to_digits_and_says_so(library, lines):
    source = open_sources(["auto"], environ={})
    assert source == open_sources(["digits"])
    ((level, line),) = lines()
    assert level == "WARNING" and "not MNIST" in line and "cannot be reached" in line
