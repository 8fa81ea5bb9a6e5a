"""Datasets of a bucket brought to this machine; the bucket is one in memory."""

import threading

import helpers
import memory_bucket
import pytest

from pipeline import cache, gcs, options, preprocess
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.gcs import GcsPath
from trainer import staging
from trainer.data import shards_of

DATASET = GcsPath("bucket", "data/set")


class Read(memory_bucket.Bucket):
    """A bucket that notes which objects were read."""

    def __init__(self):
        super().__init__()
        self.read = []

    def blob(self, name):
        blob = super().blob(name)
        download = blob.download_as_bytes

        def noted(**options):
            self.read.append(name)
            return download(**options)

        blob.download_as_bytes = noted
        return blob


@pytest.fixture
def bucket(monkeypatch, small_dataset):
    """A bucket that holds the small dataset."""
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    memory = Read()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    put(memory, small_dataset)
    return memory


def put(memory, folder):
    for name, content in helpers.tree(folder).items():
        memory.store(memory_bucket.Blob(memory, f"data/set/{name}"), content)


def bring(folder, *splits):
    manifest = load_manifest(DATASET)
    shards = [shard for split in splits or ("train",) for shard in shards_of(manifest, split)]
    return staging.bring_dataset(DATASET, manifest, shards, lambda: folder)


def test_shards_are_brought_once_and_no_more_of_them_than_asked_for(
    bucket, small_dataset, tmp_path
):
    brought = bring(tmp_path)
    assert brought == tmp_path / "datasets" / load_manifest(small_dataset).dataset_id
    assert helpers.tree(brought) == {
        name: content
        for name, content in helpers.tree(small_dataset).items()
        if name.startswith("train-")
    }
    bucket.read.clear()
    assert bring(tmp_path, "train", "validation") == brought
    assert sorted(bucket.read) == [
        "data/set/manifest.json",
        *(f"data/set/validation-{i:05d}-of-00003.tfrecord" for i in range(3)),
    ]
    assert not any("test" in name for name in helpers.tree(brought))


def test_a_local_dataset_is_used_where_it_is(small_dataset):
    assert staging.bring_dataset(small_dataset, None, [], None) == small_dataset


def test_the_cache_is_where_the_environment_says(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "a" / "cache"))
    brought = bring(tmp_path / "scratch")
    assert brought.parent == tmp_path / "a" / "cache" / "datasets"
    assert len(helpers.tree(brought)) == 3
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("named", ["file/x", "gs://bucket/cache"])
def test_a_cache_that_cannot_be_used_is_told_by_its_variable(bucket, tmp_path, monkeypatch, named):
    (tmp_path / "file").write_text("x")
    named = named if "://" in named else str(tmp_path / named)
    monkeypatch.setenv(cache.VARIABLE, named)
    with pytest.raises(InputError, match=f"^{cache.VARIABLE}: {named}: "):
        bring(tmp_path)


DAMAGES = {
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_cache_is_fetched_again_and_no_other(bucket, tmp_path, damage):
    brought = bring(tmp_path)
    whole = helpers.tree(brought)
    name = "train-00001-of-00003.tfrecord"
    DAMAGES[damage](brought / name)
    assert helpers.tree(brought) != whole
    bucket.read.clear()
    bring(tmp_path)
    assert helpers.tree(brought) == whole
    assert bucket.read == ["data/set/manifest.json", f"data/set/{name}"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1] + b"x", "its checksum differs from the manifest's"),
        (lambda content: content[:-1], r"has \d+ bytes, the manifest says \d+"),
        (None, "missing; the manifest names it"),
    ],
)
def test_what_the_bucket_has_damaged_never_enters_the_cache(bucket, tmp_path, damage, said):
    name = "data/set/train-00002-of-00003.tfrecord"
    blob = bucket.objects.pop(name)
    if damage is not None:
        bucket.store(memory_bucket.Blob(bucket, name), damage(blob.content))
    with pytest.raises(InputError, match=f"^gs://bucket/{name}: {said}$"):
        bring(tmp_path)
    assert not any("00002" in name for name in helpers.tree(tmp_path))


def test_two_at_once_leave_one_whole_cache(bucket, small_dataset, tmp_path):
    both, found = threading.Barrier(2), []

    def one():
        both.wait(60)
        found.append(bring(tmp_path, "train", "validation"))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert helpers.tree(found[0]) == {
        name: content
        for name, content in helpers.tree(small_dataset).items()
        if name.startswith(("train-", "validation-"))
    }


def test_compressed_shards_are_kept_as_they_are(bucket, small_idx, tmp_path):
    config = options.PreprocessConfig(
        sources=(f"idx:{small_idx}",),
        output_dir=tmp_path / "set",
        num_shards=3,
        compression="gzip",
    )
    assert preprocess.execute(config) == 0
    bucket.objects.clear()
    put(bucket, tmp_path / "set")
    brought = bring(tmp_path / "cache")
    whole = helpers.tree(brought)
    assert whole == {
        name: content
        for name, content in helpers.tree(tmp_path / "set").items()
        if name.startswith("train-")
    }
    (brought / "train-00000-of-00003.tfrecord.gz").write_bytes(b"\x1f\x8b")
    bring(tmp_path / "cache")
    assert helpers.tree(brought) == whole
