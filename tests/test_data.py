import dataclasses
import json
import shutil
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.client import device_lib

from pipeline import options, preprocess
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.records import read_records
from trainer import job, run_folder, sources, stream
from trainer.checkpoints import Checkpoints, Progress
from trainer.config import PRESETS
from trainer.data import cut, epoch_order, load_split, shards_of
from trainer.sources import open_source, resolve_input

# A split from its files


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_load_split_gives_every_record_in_the_order_of_its_shards(small_dataset, split):
    manifest = load_manifest(small_dataset)
    records = [
        record
        for shard in manifest.splits[split].shards
        for record in read_records(small_dataset, shard)
    ]
    images, labels = load_split(small_dataset, manifest, split)
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    assert len(records) == manifest.splits[split].num_examples > 0
    np.testing.assert_array_equal(images, np.stack([record.image for record in records]))
    np.testing.assert_array_equal(labels, [record.label for record in records])


def test_load_split_of_no_examples(small_dataset):
    manifest = load_manifest(small_dataset)
    empty = dataclasses.replace(manifest.splits["validation"], num_examples=0, shards=())
    manifest = dataclasses.replace(manifest, splits={"validation": empty})
    images, labels = load_split(small_dataset, manifest, "validation")
    assert (images.shape, labels.shape) == ((0, 784), (0,))


@pytest.fixture(scope="module")
def compressed(small_idx, tmp_path_factory):
    """`small_dataset` with compressed files. Read only."""
    directory = tmp_path_factory.mktemp("compressed") / "small"
    config = options.PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=directory, num_shards=3, compression="gzip"
    )
    assert preprocess.execute(config) == 0
    return directory


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_load_split_reads_compressed_files(small_dataset, compressed, split):
    plain = load_split(small_dataset, load_manifest(small_dataset), split)
    packed = load_split(compressed, load_manifest(compressed), split)
    for one, other in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_load_split_refuses_a_damaged_compressed_file(compressed, tmp_path):
    copy = shutil.copytree(compressed, tmp_path / "copy")
    manifest = load_manifest(copy)
    flip_a_bit(copy / manifest.splits["train"].shards[1].file)
    with pytest.raises(InputError, match=r"train-00001-of-00003\.tfrecord\.gz: "):
        load_split(copy, manifest, "train")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the manifest says"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (flip_a_bit, "checksum differs"),
    ],
)
def test_load_split_refuses_a_damaged_file(small_dataset_copy, damage, message):
    manifest = load_manifest(small_dataset_copy)
    shard = manifest.splits["train"].shards[1]
    damage(small_dataset_copy / shard.file)
    with pytest.raises(InputError, match=message) as error:
        load_split(small_dataset_copy, manifest, "train")
    assert shard.file in str(error.value)
    load_split(small_dataset_copy, manifest, "validation")  # is whole, and does not mind


@pytest.mark.parametrize("off_by", [-1, 1])
def test_load_split_refuses_another_number_of_records(small_dataset, off_by):
    manifest = load_manifest(small_dataset)
    train = manifest.splits["train"]
    wrong = dataclasses.replace(train, num_examples=train.num_examples + off_by)
    manifest = dataclasses.replace(manifest, splits={"train": wrong})
    with pytest.raises(InputError, match=f"{train.num_examples} records in train"):
        load_split(small_dataset, manifest, "train")


@pytest.fixture
def small_dataset_copy(small_dataset, tmp_path):
    return shutil.copytree(small_dataset, tmp_path / "dataset")


# The order of an epoch


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 50_000])
def test_epoch_order_is_a_permutation(size):
    order = epoch_order(22, 0, size)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_epoch_order_depends_on_seed_and_epoch_alone():
    orders = {
        (seed, epoch): epoch_order(seed, epoch, 100).tobytes()
        for seed in (0, 1, 22, 2**31 - 1)
        for epoch in (0, 1, 22)
    }
    assert len(set(orders.values())) == len(orders)
    np.random.default_rng().random(5)  # no state is shared
    assert all(epoch_order(*key, 100).tobytes() == order for key, order in orders.items())


def test_epoch_order_has_not_changed():
    """Runs that were begun with another order could not go on from their checkpoints."""
    first = [22951, 42617, 38678, 34063, 32363, 44347, 13649, 38095]
    assert epoch_order(22, 0, 50_000)[:8].tolist() == first
    assert epoch_order(22, 1, 10).tolist() == [7, 3, 0, 9, 2, 5, 1, 4, 8, 6]


def test_epoch_order_mixes_evenly():
    """Where a row comes in the order does not depend on where it lies in the split."""
    orders = np.stack([epoch_order(22, epoch, 500) for epoch in range(40)])
    first_half = (orders[:, :250] < 250).sum(axis=1)  # hypergeometric: mean 125, deviation 5.6
    assert abs(first_half.mean() - 125) < 5 * 5.6 / np.sqrt(40)
    assert 2 < first_half.std() < 12


# Batches


@pytest.mark.parametrize(
    ("size", "batch_size", "steps"),
    [(10, 5, 2), (10, 4, 3), (9, 4, 3), (8, 4, 2), (3, 4, 1), (1, 1, 1), (5, 1, 5), (0, 4, 0)],
)
def test_cut_gives_every_row_exactly_once(size, batch_size, steps):
    order = epoch_order(1, 2, size) + 7  # so that the rows differ from the padding
    indices, mask = cut(order, batch_size)
    assert indices.shape == mask.shape == (steps, batch_size)
    assert (indices.dtype, mask.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(indices[mask == 1], order)  # all, once, in order
    assert not indices[mask == 0].any()
    assert mask.sum() == size
    assert mask[:-1].all()  # only the last batch is padded


def test_cut_by_hand():
    indices, mask = cut(np.array([3, 1, 4, 0, 2], np.int32), 3)
    assert indices.tolist() == [[3, 1, 4], [0, 2, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


# Streamed


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 64)


@pytest.mark.parametrize("sizes", [[500], [1], [3, 1], [170, 165, 165], [9, 300, 1, 64, 7, 120]])
@pytest.mark.parametrize("seed", [None, 22])
def test_a_plan_gives_every_row_exactly_once(small_windows, sizes, seed):
    lanes, order, picks = stream.make_plan(sizes, seed, 3)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    assert sorted(shard for lane in lanes for shard in lane) == list(range(len(sizes)))
    assert len(lanes) == (1 if seed is None else min(4, len(sizes)))
    assert sum(map(len, picks)) == sum(sizes)
    assert max(map(len, picks)) <= 64
    if seed is None:
        np.testing.assert_array_equal(order, np.arange(sum(sizes)))


def test_a_plan_depends_on_seed_and_epoch_alone(small_windows):
    orders = [stream.make_plan([50, 60], *key).order.tolist() for key in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert stream.make_plan([50, 60], 1, 0).order.tolist() == orders[0]


@pytest.mark.parametrize("which", ["small_dataset", "compressed"])
@pytest.mark.parametrize("own", [slice(0, 16), slice(0, 8), slice(8, 16)])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 31])
def test_a_stream_goes_on_from_any_step(request, small_windows, which, own, start):
    """From any step of one epoch into the next: the rows of `load_split` in the plan's order."""
    directory = request.getfixturevalue(which)
    manifest = load_manifest(directory)
    kept = load_split(directory, manifest, "train")
    source = stream.Streamed(directory, shards_of(manifest, "train"), 22)
    reader = stream._Reader(source, 16, own)
    for epoch, steps in ((4, range(start, 32, 3)), (5, range(0, 32, 3))):
        indices, mask = cut(source.order(epoch), 16)
        for step in steps:
            images, labels = reader.read(indices[step : step + 3], epoch, 4)
            rows, use = (values[step : step + 3, own].ravel() for values in (indices, mask))
            wanted = rows[use == 1]
            np.testing.assert_array_equal(images[: len(wanted)], kept.images[wanted])
            np.testing.assert_array_equal(labels[: len(wanted)], kept.labels[wanted])
            assert not images[len(wanted) :].any()
            assert len(labels) == 4 * (own.stop - own.start)


def test_a_stream_refuses_files_that_are_not_whole(small_dataset_copy):
    manifest = load_manifest(small_dataset_copy)
    flip_a_bit(small_dataset_copy / manifest.splits["train"].shards[1].file)
    with pytest.raises(InputError, match="checksum differs"):
        open_source(small_dataset_copy, manifest, "train", 22, "stream")


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_stream_refuses_another_number_of_records(small_dataset, off_by):
    shards = shards_of(load_manifest(small_dataset), "train")
    wrong = dataclasses.replace(shards[0], num_examples=shards[0].num_examples + off_by)
    source = stream.Streamed(small_dataset, [wrong, *shards[1:]], None)
    with pytest.raises(InputError, match="not what its manifest says"):
        list(source.windows(0, 0, 16, slice(0, 16)))


def test_several_splits_are_joined(small_dataset):
    manifest = load_manifest(small_dataset)
    parts = [load_split(small_dataset, manifest, name) for name in ("train", "validation")]
    joined = load_split(small_dataset, manifest, "train+validation")
    np.testing.assert_array_equal(joined.images, np.concatenate([part.images for part in parts]))
    np.testing.assert_array_equal(joined.labels, np.concatenate([part.labels for part in parts]))


SIZE = 600 * 3144  # bytes of the train and validation images of `small_dataset`


@pytest.mark.parametrize(
    ("wanted", "replicas", "memory", "expected"),
    [
        ("auto", 1, 8 * 3 * SIZE, "resident"),  # as read, as a tensor, and on the replica
        ("auto", 1, 8 * 3 * SIZE - 8, "stream"),
        ("auto", 3, 8 * 5 * SIZE, "resident"),
        ("auto", 3, 8 * 5 * SIZE - 8, "stream"),
        ("resident", 1, 1, "resident"),
        ("stream", 4, 1 << 40, "stream"),
    ],
)
def test_input_by_the_size_of_the_set(
    small_dataset, monkeypatch, wanted, replicas, memory, expected
):
    monkeypatch.setattr(sources, "memory", lambda: memory)
    devices = [f"/replica:0/task:0/device:CPU:{i}" for i in range(replicas)]
    assert resolve_input(wanted, load_manifest(small_dataset), devices) == expected


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ([8 * SIZE, 8 * SIZE], [1], "resident"),
        ([8 * SIZE, 8 * SIZE - 8], [1 << 40], "stream"),  # the smallest decides
    ],
)
def test_input_by_the_memory_of_gpus(small_dataset, monkeypatch, own, others, expected):
    monkeypatch.setattr(sources, "memory", lambda: 1 << 40)
    limits = {f"/device:GPU:{i}": limit for i, limit in enumerate(own + others)}
    listed = [
        SimpleNamespace(name=name, memory_limit=limit)
        for name, limit in {"/device:CPU:0": 1, **limits}.items()
    ]
    monkeypatch.setattr(device_lib, "list_local_devices", lambda: listed)
    devices = [f"/job:localhost/replica:0/task:0/device:GPU:{i}" for i in range(len(own))]
    assert resolve_input("auto", load_manifest(small_dataset), devices) == expected


@pytest.mark.parametrize(
    ("asked", "began", "expected"),
    [
        ("auto", None, "stream"),  # so little memory as this machine has
        ("auto", "resident", "resident"),
        ("auto", "stream", "stream"),
        ("stream", "stream", "stream"),
        ("stream", "resident", None),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_auto_is_what_a_run_began_with(
    small_dataset, tmp_path, monkeypatch, asked, began, expected, elsewhere
):
    monkeypatch.setattr(sources, "memory", lambda: 1)
    places = run_folder.places(tmp_path, {}, {})
    manifest, core = load_manifest(small_dataset), dataclasses.replace(PRESETS["core"], replicas=1)
    earlier = dataclasses.replace(core, input=began)
    content = run_folder.describe(earlier, manifest.dataset_id, ["CPU:0"])
    if began is not None and elsewhere:  # its checkpoints alone are where this run's are
        trained = SimpleNamespace(values=list)
        Checkpoints(places.checkpoints, trained, run=content, seconds=0).save(Progress(), 1)
    elif began is not None:
        places.config.write_text(json.dumps(content))
    config = dataclasses.replace(core, input=asked)
    alone = SimpleNamespace(is_chief=True)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])

    def settled():
        return job.settle(config, manifest, places, None, strategy, alone)

    if expected is None:
        before = helpers.tree(tmp_path)
        with pytest.raises(InputError, match=r": holds a run with input resident, not stream;"):
            settled()
        assert helpers.tree(tmp_path) == before
    else:
        made = settled()
        assert (made.config.input, made.content["input"]) == (expected, expected)
