"""Sources in a bucket, here one in memory: the dataset that the same local files make."""

import json
import logging
import pickle

import helpers
import memory_bucket
import numpy as np
import pytest
from test_decoding import BAD, GOOD
from test_images import TREE, faults, found, write_files, write_tree
from test_sources import assert_holds, read_all

from pipeline import gcs, options, preprocess
from pipeline.command import InputError
from pipeline.gcs import GcsPath
from pipeline.sources import idx, images, open_sources, tfds

ROOT = GcsPath("bucket", "in")


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.delenv("DIGITS_CACHE_DIR", raising=False)
    return memory


def make(spec, folder, **flags):
    """The files of the dataset that a source makes, but for those that name its fingerprint."""
    config = options.PreprocessConfig(
        sources=(spec,), output_dir=folder, num_shards=3, max_quarantined=0.9, **flags
    )
    assert preprocess.execute(config) == 0
    files = helpers.tree(folder)
    metrics = json.loads(files.pop("metrics.json"))
    return files, metrics["statistics"]


# IDX files


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("rows_per_block", [7, 16384])
def test_idx(bucket, tmp_path, monkeypatch, gz, rows_per_block):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", rows_per_block)
    data = helpers.make_images(25, 11)
    local = helpers.write_idx(tmp_path, data, gz=gz)
    here = open_sources([f"idx:{local}"])
    source = open_sources([f"idx:{memory_bucket.put_tree(bucket, local, 'in')}"])
    assert (source.blocks(), source.describe()) == (here.blocks(), here.describe())
    assert source.specs == ("idx:gs://bucket/in",)
    assert open_sources(source.specs) == source
    source = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000
    assert_holds(source, data)


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
def test_idx_makes_the_same_dataset(bucket, tmp_path, gz):
    local = helpers.write_idx(tmp_path / "idx", helpers.make_images(), gz=gz)
    memory_bucket.put_tree(bucket, local, "in")
    there = make("idx:gs://bucket/in", tmp_path / "there")
    assert there == make(f"idx:{local}", tmp_path / "here")
    assert len(there[0]) == 9 + 2


def test_idx_of_the_whole_bucket_and_of_the_variable(bucket, tmp_path):
    data = helpers.make_images(25, 11)
    for name, content in helpers.tree(helpers.write_idx(tmp_path, data)).items():
        bucket.store(bucket.blob(name), content)
    assert_holds(open_sources(["idx:gs://bucket"]), data)
    assert_holds(open_sources(["auto"], environ={"MNIST_IDX_DIR": "gs://bucket"}), data)


def test_idx_fingerprint_is_of_generations(bucket, tmp_path):
    data = helpers.make_images(25, 11)
    memory_bucket.put_tree(bucket, helpers.write_idx(tmp_path, data), "in")
    first = open_sources([f"idx:{ROOT}"]).fingerprint()
    assert open_sources([f"idx:{ROOT}"]).fingerprint() == first
    names = sorted(name for name, _, _ in first[:4])
    assert [name for name in names if name.startswith("gs://")] == []
    for name in names:
        before = open_sources([f"idx:{ROOT}"]).fingerprint()
        stat = (ROOT / name).stat()
        assert [name, stat.st_size, stat.generation] in before
        (ROOT / name).write_bytes((ROOT / name).read_bytes())
        assert open_sources([f"idx:{ROOT}"]).fingerprint() != before
    before = open_sources([f"idx:{ROOT}"]).fingerprint()
    (ROOT / "README.txt").write_bytes(b"not read")
    assert open_sources([f"idx:{ROOT}"]).fingerprint() == before


def test_a_source_that_changes_is_refused(bucket, tmp_path, monkeypatch):
    local = helpers.write_idx(tmp_path / "idx", helpers.make_images(60, 20))
    memory_bucket.put_tree(bucket, local, "in")
    read = idx.IdxSource.read

    def read_and_change(self, block):
        yield from read(self, block)
        (ROOT / "t10k-labels-idx1-ubyte").write_bytes(
            (ROOT / "t10k-labels-idx1-ubyte").read_bytes()
        )

    monkeypatch.setattr(idx.IdxSource, "read", read_and_change)
    with pytest.raises(InputError, match="idx:gs://bucket/in: changed while it was read; run it"):
        make("idx:gs://bucket/in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("train-images-idx3-ubyte", "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("train-labels-idx1-ubyte", "no train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz"),
        ("t10k-labels-idx1-ubyte", "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"),
    ],
)
def test_idx_with_a_missing_pair(bucket, tmp_path, gone, said):
    memory_bucket.put_tree(bucket, helpers.write_idx(tmp_path, helpers.make_images(25, 11)), "in")
    (ROOT / gone).unlink()
    with pytest.raises(InputError) as caught:
        open_sources([f"idx:{ROOT}"])
    assert str(caught.value) == f"gs://bucket/in: {said}"


@pytest.mark.parametrize("size", [0, 3, 13, 1000])
def test_idx_file_that_is_cut(bucket, tmp_path, size):
    memory_bucket.put_tree(bucket, helpers.write_idx(tmp_path, helpers.make_images(25, 11)), "in")
    path = ROOT / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"^gs://bucket/in/train-images-idx3-ubyte: "):
        open_sources([f"idx:{ROOT}"])


# Trees of images


@pytest.mark.parametrize("rows_per_block", [3, 1024])
def test_images(bucket, tmp_path, monkeypatch, rows_per_block):
    monkeypatch.setattr(images, "ROWS_PER_BLOCK", rows_per_block)
    local = write_tree(tmp_path, helpers.make_images(40, 20))
    memory_bucket.put_tree(bucket, local, "in")
    here, source = open_sources([f"images:{local}"]), open_sources([f"images:{ROOT}"])
    assert (source.class_names, source.folders) == (here.class_names, here.folders)
    assert (source.blocks(), source.describe()) == (here.blocks(), here.describe())
    assert open_sources(source.specs) == source and source.specs == ("images:gs://bucket/in",)
    assert found(pickle.loads(pickle.dumps(source))) == found(here)
    for block in reversed(source.blocks()):
        (rows,) = source.read(block)
        assert rows.size == block.size


def test_images_make_the_same_dataset(bucket, tmp_path, caplog):
    """Whatever else lies in the tree, and whichever images cannot be used."""
    caplog.set_level(logging.WARNING, logger="digits_pipeline")
    bad = {f"train/a/{name}.png": data for name, (data, _) in BAD.items()}
    local = write_files(
        tmp_path / "tree",
        TREE
        | bad
        | {
            "train/a/second.PNG": GOOD,
            "train/a/folder.png/x.png": GOOD,
            "train/b/sub/x.png": GOOD,
            "train/b/notes.txt": b"notes",
            "train/b/.hidden.png": GOOD,
            "train/.git/config": b"",
            "train/list.txt": b"beside the classes",
            "other/c/x.png": GOOD,
        },
    )
    memory_bucket.put_tree(bucket, local, "in")
    for name in ("in/", "in/train/", "in/train/a/"):  # as a console makes folders
        bucket.store(bucket.blob(name), b"")
    there = make("images:gs://bucket/in", tmp_path / "there")
    said = [each.getMessage() for each in caplog.records if "entries are not" in each.getMessage()]
    assert set(said) == {
        "gs://bucket/in/train/b: 2 entries are not .png/.jpg/.jpeg and are left out"
    }
    assert there == make(f"images:{local}", tmp_path / "here")
    lines = there[0]["quarantine/records.jsonl"].decode().splitlines()
    assert len(lines) == len(BAD) + 1
    reasons = {json.loads(line)["origin"]: json.loads(line)["reason"] for line in lines}
    assert reasons["train/a/folder.png"] == "not a file"
    assert reasons == {f"train/a/{name}.png": reason for name, (_, reason) in BAD.items()} | {
        "train/a/folder.png": "not a file"
    }


def test_images_that_are_too_large_are_not_read_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.decoding.MAX_FILE_BYTES", len(GOOD))
    files = TREE | {"train/a/long.png": GOOD + bytes(100_000)}
    memory_bucket.put_tree(bucket, write_files(tmp_path, files), "in")
    here, there = (faults(open_sources([f"images:{root}"])) for root in (tmp_path, ROOT))
    assert here == there and [fault.reason for fault in there] == ["too large"]


def test_images_fingerprint_is_of_generations(bucket, tmp_path):
    memory_bucket.put_tree(bucket, write_files(tmp_path, TREE), "in")
    seen = [open_sources([f"images:{ROOT}"]).fingerprint()]
    assert open_sources([f"images:{ROOT}"]).fingerprint() == seen[0]
    for name, content in (("train/a/good.png", GOOD), ("train/a/more.png", GOOD)):
        (ROOT / name).write_bytes(content)
        seen.append(open_sources([f"images:{ROOT}"]).fingerprint())
    (ROOT / "train/a/notes.txt").write_bytes(b"not read")
    assert open_sources([f"images:{ROOT}"]).fingerprint() == seen[-1]
    (ROOT / "train/a/good.png").unlink()
    seen.append(open_sources([f"images:{ROOT}"]).fingerprint())
    assert len({json.dumps(each) for each in seen}) == len(seen) == 4


def test_images_that_go_missing(bucket, tmp_path):
    memory_bucket.put_tree(bucket, write_files(tmp_path, TREE), "in")
    source = open_sources([f"images:{ROOT}"])
    (ROOT / "train/a/good.png").unlink()
    with pytest.raises(InputError, match=r"^gs://bucket/in/train/a: changed while it was read$"):
        found(source)


@pytest.mark.parametrize("kind", ["idx", "images"])
def test_no_such_folder(bucket, kind):
    with pytest.raises(InputError) as caught:
        open_sources([f"{kind}:gs://bucket/none"])
    assert str(caught.value) == f"--source {kind}:gs://bucket/none: no such folder"


# TensorFlow Datasets


@pytest.fixture
def library(bucket, monkeypatch):
    """tensorflow_datasets that knows one set, ``small_set``, and counts how often it is made."""
    import tensorflow_datasets

    data = helpers.make_images(25, 11)
    made = []

    class SmallSet(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tensorflow_datasets.features.Image(shape=(28, 28, 1)),
                "label": tensorflow_datasets.features.ClassLabel(num_classes=10),
            }
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            made.append(self)
            return {part: self._generate_examples(part) for part in data}

        def _generate_examples(self, part):
            for i, (image, label) in enumerate(zip(*data[part], strict=True)):
                yield i, {"image": image.reshape(28, 28, 1), "label": label}

    monkeypatch.setattr(
        tensorflow_datasets, "builder", lambda _, data_dir: SmallSet(data_dir=data_dir)
    )
    monkeypatch.setattr(tfds, "network_reachable", lambda: False)
    return made, SmallSet


def test_tfds_shares_a_set_through_a_bucket(library, bucket, tmp_path, monkeypatch):
    made, small_set = library
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tfds, "ROWS_PER_BLOCK", 10)
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    source = open_sources(["tfds:small_set"])
    assert source.data_path == "gs://bucket/tfds/small_set/1.0.0"
    contents = bucket.contents()
    assert {name.rpartition("/")[0] for name in contents} == {"tfds/small_set/1.0.0"}
    assert "tfds/small_set/1.0.0/dataset_info.json" in contents
    again = open_sources(["tfds:small_set"])
    assert (again, len(made)) == (source, 1)
    assert bucket.contents() == contents
    there = read_all(pickle.loads(pickle.dumps(source)))
    assert list((tmp_path / "temporary").glob("digits-*")) == []
    # The rows, and their order, of the same set in a local folder.
    monkeypatch.delenv("TFDS_DATA_DIR")
    own = small_set(data_dir=str(tmp_path / "own"))
    monkeypatch.setattr("tensorflow_datasets.builder", lambda _: own)
    local = open_sources(["tfds:small_set"])
    assert local.fingerprint() == source.fingerprint()
    assert (local.describe(), local.blocks()) == (source.describe(), source.blocks())
    for part, (pixels, labels) in read_all(local).items():
        np.testing.assert_array_equal(there[part][0], pixels)
        np.testing.assert_array_equal(there[part][1], labels)


def test_tfds_in_no_such_place(library, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://Bucket")
    with pytest.raises(InputError, match=r"^gs://Bucket: expected gs://bucket/path"):
        open_sources(["tfds:small_set"])
