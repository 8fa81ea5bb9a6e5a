import dataclasses
import gzip
import json
import logging
import pathlib
import re
import shutil
import sys
import threading

import helpers
import numpy as np
import pytest

from pipeline import dataset, existing, options, preprocess, progress, runners, shards, slices
from pipeline.command import InputError
from pipeline.dataset import SPLITS, load_manifest
from pipeline.options import PreprocessConfig
from pipeline.preprocess import execute, parse
from pipeline.records import SCALE_TABLE, image_ids, read_records, unscale
from pipeline.sources import idx, open_sources
from pipeline.splits import make_splitter
from pipeline.transforms import ROW

TRAIN_COUNTS = (50,) * 10  # of helpers.make_images, without its first 100 images


@pytest.fixture
def config(small_idx, tmp_path):
    """What `small_dataset` was made with, into a folder of its own."""
    return PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=tmp_path / "out", num_shards=3
    )


def changed(config, **values):
    return dataclasses.replace(config, **values)


def records(directory):
    """{split: records} of a dataset folder."""
    manifest = load_manifest(directory)
    return {
        split: [
            r for shard in manifest.splits[split].shards for r in read_records(directory, shard)
        ]
        for split in SPLITS
    }


def files_and_times(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in [folder, *folder.rglob("*")]
    }


# What is written


def test_records_read_back_by_tensorflow(small_dataset):
    tf = pytest.importorskip("tensorflow")
    features = {
        "image": tf.io.FixedLenFeature([784], tf.float32),
        "label": tf.io.FixedLenFeature([], tf.int64),
        "id": tf.io.FixedLenFeature([], tf.string),
    }
    (train, train_labels), (test, test_labels) = helpers.make_images().values()
    expected = {
        "train": (train[100:], train_labels[100:]),
        "validation": (train[:100], train_labels[:100]),  # the tutorial's: the first rows
        "test": (test, test_labels),
    }
    manifest = load_manifest(small_dataset)
    for split, (images, labels) in expected.items():
        files = [str(small_dataset / shard.file) for shard in manifest.splits[split].shards]
        batches = tf.data.TFRecordDataset(files).batch(1000)
        ((batch,),) = zip(batches.map(lambda rows: tf.io.parse_example(rows, features)))
        rows = dict(zip(batch["id"].numpy(), range(len(labels)), strict=True))
        order = [rows[name.encode()] for name in image_ids(images.reshape(-1, 784))]
        assert sorted(order) == list(range(len(labels)))
        scaled = images.reshape(-1, 784).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(batch["image"].numpy()[order], scaled)
        np.testing.assert_array_equal(batch["label"].numpy()[order], labels)


def test_manifest_and_files(small_dataset, small_idx):
    manifest = load_manifest(small_dataset)
    assert {name: split.num_examples for name, split in manifest.splits.items()} == {
        "train": 500,
        "validation": 100,
        "test": 120,
    }
    assert manifest.splits["train"].label_counts == TRAIN_COUNTS
    assert manifest.splits["validation"].label_counts == (10,) * 10
    assert manifest.splits["test"].label_counts == (12,) * 10
    assert (manifest.split_by, manifest.num_classes) == ("positional", 10)
    assert manifest.class_names == tuple("0123456789")
    assert manifest.source == {"kind": "idx", "title": "images from IDX files"}
    assert manifest.duplicates == {
        "images": 0,
        "copies": 0,
        "conflicting": 0,
        "leaked": 0,
        "held_out": 0,
        "examples": {"images": [], "conflicting": [], "leaked": [], "held_out": []},
    }
    assert manifest.quarantined == {"count": 0, "by_reason": {}}
    assert (manifest.dropped, manifest.flagged) == (0, {"blank": 0})
    every = [shard for split in SPLITS for shard in manifest.splits[split].shards]
    assert manifest.dataset_id == dataset.dataset_id(every, manifest.class_names)
    assert set(helpers.tree(small_dataset)) == {shard.file for shard in every} | {
        "manifest.json",
        "metrics.json",
        "quarantine/records.jsonl",
    }
    assert (small_dataset / "quarantine/records.jsonl").read_bytes() == b""
    for word in (small_idx, small_dataset, small_idx.parent.name):
        assert str(word) not in (small_dataset / "manifest.json").read_text()


def test_metrics(small_dataset, config):
    metrics = json.loads((small_dataset / "metrics.json").read_text())
    assert list(metrics) == ["fingerprint", "counters", "distributions", "statistics"]
    assert metrics["fingerprint"] == existing.read_fingerprint(small_dataset)
    assert metrics["fingerprint"] == options.fingerprint(config, open_sources(config.sources))
    assert metrics["counters"] == {
        "read-train": 600,
        "read-test": 120,
        "written-train": 500,
        "written-validation": 100,
        "written-test": 120,
        "written-bytes": sum(path.stat().st_size for path in small_dataset.glob("*.tfrecord")),
    }
    assert list(metrics["distributions"]) == [
        "shard-bytes",
        "shard-encode-msec",
        "shard-write-msec",
    ]
    sizes = [path.stat().st_size for path in small_dataset.glob("*.tfrecord")]
    assert metrics["distributions"]["shard-bytes"] == {
        "count": 9,
        "sum": sum(sizes),
        "min": min(sizes),
        "max": max(sizes),
    }
    for name in ("shard-encode-msec", "shard-write-msec"):
        times = metrics["distributions"][name]
        assert times["count"] == 3 and 0 <= times["min"] <= times["max"] <= times["sum"]


def test_statistics_are_of_the_records(small_dataset):
    statistics = metrics(small_dataset)["statistics"]
    for name, split in load_manifest(small_dataset).splits.items():
        records = [
            record for shard in split.shards for record in read_records(small_dataset, shard)
        ]
        pixels = unscale(np.stack([record.image for record in records]))
        means = pixels.astype(int).sum(axis=1) // 784
        assert statistics[name]["ink"] == np.bincount(means // 4, minlength=64).tolist()
        assert statistics[name] == slices.histograms(pixels)


def test_records_stand_in_their_shard_by_id(small_dataset):
    for split in load_manifest(small_dataset).splits.values():
        for index, shard in enumerate(split.shards):
            ids = [record.id for record in read_records(small_dataset, shard)]
            assert ids == sorted(ids)
            assert all(int(name[16:32], 16) % 3 == index for name in ids)


# The same images give the same bytes


def content(directory):
    """{relative name: bytes} of a dataset folder, its metrics excepted: they hold times."""
    return {name: data for name, data in helpers.tree(directory).items() if name != "metrics.json"}


def metrics(directory):
    return json.loads((directory / "metrics.json").read_text())


def assert_same_dataset(one, other):
    """The same bytes, made from the same source, and the same counted on the way."""
    assert content(one) == content(other)
    ours, theirs = metrics(one), metrics(other)
    for each in (ours, theirs):
        for name in ("shard-encode-msec", "shard-write-msec"):
            assert each["distributions"].pop(name)["count"] == 3
    assert ours == theirs


def test_same_bytes_whatever_the_blocks(small_dataset, config, monkeypatch):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", 37)
    monkeypatch.setattr(idx, "ROWS_AT_ONCE", 10)
    assert execute(config) == 0
    assert_same_dataset(config.output_dir, small_dataset)


def test_same_bytes_from_gzip_under_other_names(small_dataset, config, tmp_path):
    folder = helpers.write_idx(tmp_path / "gz", helpers.make_images(), gz=True, test_stem="test")
    assert execute(changed(config, sources=(f"idx:{folder}",))) == 0
    assert content(config.output_dir) == content(small_dataset)
    ours, theirs = metrics(config.output_dir), metrics(small_dataset)
    assert ours["fingerprint"] != theirs["fingerprint"]  # other files
    assert ours["counters"] == theirs["counters"]


def test_same_bytes_from_several_processes(small_dataset, small_idx, tmp_path):
    done = helpers.run_cli(
        "pipeline.preprocess",
        *(f"--source=idx:{small_idx}", "--output_dir=out", "--num_shards=3"),
        *("--direct_num_workers", "2", "--direct_running_mode", "multi_processing"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert_same_dataset(tmp_path / "out", small_dataset)


def test_an_error_in_worker_processes_is_one_line(tmp_path):
    data = helpers.make_images(60, 20)
    data["train"][1][:30] = 200
    helpers.write_idx(tmp_path / "odd", data)
    done = helpers.run_cli(
        "pipeline.preprocess",
        *("--source=idx:odd", "--output_dir=out", "--num_classes=10"),
        *("--direct_num_workers", "2", "--direct_running_mode", "multi_processing"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # What Beam's workers say of themselves depends on what else is installed.
    assert done.stderr.splitlines()[-1:] == [
        "python -m pipeline.preprocess: error: 30 of 80 rows cannot be used (30 label out of"
        " range), more than --max_quarantined 0.01 allows",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_hash_split_does_not_depend_on_the_order_of_the_source(config, tmp_path):
    data = helpers.make_images()
    order = np.random.default_rng(0).permutation(600)
    shuffled = data | {"train": tuple(array[order] for array in data["train"])}
    helpers.write_idx(tmp_path / "shuffled", shuffled)
    made = []
    for source in (config.sources[0], f"idx:{tmp_path / 'shuffled'}"):
        folder = tmp_path / str(len(made))
        execute(changed(config, sources=(source,), output_dir=folder, split_by="hash"))
        made.append((folder / "manifest.json").read_bytes())
    assert made[0] == made[1]
    found = records(tmp_path / "0")
    assert 60 < len(found["validation"]) < 150
    for split, limit in (("validation", range(2**32 // 6 + 1)), ("train", range(2**32))):
        assert all(int(record.id[:8], 16) in limit for record in found[split])
    assert all(int(record.id[:8], 16) > 2**32 // 6 for record in found["train"])


def test_copies_of_an_image(config, tmp_path):
    data = helpers.make_images()
    data["train"][0][300] = data["train"][0][200]  # a copy, with its label
    data["train"][1][300] = data["train"][1][200]
    data["train"][0][401] = data["train"][0][400]  # a copy with another label
    data["train"][1][400:402] = (4, 3)
    data["test"][0][7] = data["train"][0][5]  # in validation and in test
    data["test"][1][7] = data["train"][1][5]
    source = f"idx:{helpers.write_idx(tmp_path / 'copies', data)}"
    assert execute(changed(config, sources=(source,))) == 0
    manifest = load_manifest(config.output_dir)
    names = image_ids(data["train"][0][[200, 400, 5]].reshape(3, 784))
    assert manifest.duplicates == {
        "images": 3,
        "copies": 3,
        "conflicting": 1,
        "leaked": 1,
        "held_out": 0,
        "examples": {
            "images": sorted(names),
            "conflicting": [names[1]],
            "leaked": [names[2]],
            "held_out": [],
        },
    }
    assert progress.summary(config.output_dir, manifest).splitlines()[1:] == [
        "1 image with different labels",
        "1 image both in test and in train or validation",
    ]
    labels = {r.id: r.label for split in records(config.output_dir).values() for r in split}
    assert len(labels) == 720
    (name,) = image_ids(data["train"][0][400].reshape(1, 784))
    assert (labels[name], labels[f"{name}-1"]) == (3, 4)


def test_digits_end_to_end(tmp_path):
    config = parse(["--source=digits", f"--output_dir={tmp_path / 'out'}", "--num_shards=1"])
    assert execute(config) == 0
    manifest = load_manifest(tmp_path / "out")
    assert sum(split.num_examples for split in manifest.splits.values()) == 1797
    assert manifest.split_by == "hash" and "not MNIST" in manifest.source["title"]
    images = {split: {r.id[:32] for r in rows} for split, rows in records(tmp_path / "out").items()}
    assert not images["train"] & images["validation"]
    assert not (images["train"] | images["validation"]) & images["test"]


def test_no_validation(config):
    assert execute(changed(config, validation_size=0)) == 0
    splits = load_manifest(config.output_dir).splits
    assert (splits["train"].num_examples, splits["validation"].num_examples) == (600, 0)
    assert len(splits["validation"].shards) == 3
    assert records(config.output_dir)["validation"] == []


def test_mnist(mnist_dir, tmp_path):
    assert (
        execute(PreprocessConfig(sources=(f"idx:{mnist_dir}",), output_dir=tmp_path / "out")) == 0
    )
    manifest = load_manifest(tmp_path / "out")
    # Known for the tutorial's split; the id must not move between versions of this code.
    assert {name: split.label_counts for name, split in manifest.splits.items()} == {
        "train": (4922, 5615, 4967, 5099, 4862, 4558, 4904, 5195, 4907, 4971),
        "validation": (1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978),
        "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    }
    assert manifest.dataset_id == "912be8b10b1aa50c5078ab68a749afdb"
    (first,) = next(open_sources([f"idx:{mnist_dir}"]).read(idx.Block("train", 0, 1))).pixels
    validation = {record.id: record for record in records(tmp_path / "out")["validation"]}
    record = validation[image_ids(first[None])[0]]
    assert record.label == 5 and record.image.tobytes() == SCALE_TABLE[first].tobytes()


# What cannot be written, and what is odd


def mislabelled(folder, **labels):
    """IDX files of 60 train and 20 test images, some with other labels: {"train": {3: 11}}."""
    data = helpers.make_images(60, 20)
    for part, wrong in labels.items():
        for index, label in wrong.items():
            data[part][1][index] = label
    return helpers.write_idx(folder, data), data


def test_labels_out_of_range(tmp_path):
    folder, data = mislabelled(tmp_path / "idx", train={17: 10, 3: 255}, test={5: 12})
    config = PreprocessConfig(
        sources=(f"idx:{folder}",),
        output_dir=tmp_path / "out",
        num_classes=10,
        validation_size=20,
        max_quarantined=3 / 80,  # as many as there are
    )
    assert execute(config) == 0
    lines = (tmp_path / "out/quarantine/records.jsonl").read_text().splitlines()
    expected = [
        {
            "id": image_ids(data[part][0][index].reshape(1, 784))[0],
            "reason": "label out of range",
            "origin": f"{stem}-images-idx3-ubyte#{index}",
            "part": part,
        }
        for part, stem, index in (
            ("test", "t10k", 5),
            ("train", "train", 17),
            ("train", "train", 3),
        )
    ]
    assert [json.loads(line) for line in lines] == expected
    assert [list(json.loads(line)) for line in lines] == [["id", "reason", "origin", "part"]] * 3
    manifest = load_manifest(tmp_path / "out")
    assert manifest.quarantined == {"count": 3, "by_reason": {"label out of range": 3}}
    # The rows of the positional split are counted before any is set aside.
    assert {name: split.num_examples for name, split in manifest.splits.items()} == {
        "train": 40,
        "validation": 18,
        "test": 19,
    }
    found = {r.id for r in records(tmp_path / "out")["validation"]}
    kept = [i for i in range(20) if i not in (3, 17)]
    assert found == set(image_ids(data["train"][0][kept].reshape(-1, 784)))
    counters = metrics(tmp_path / "out")["counters"]
    assert counters["quarantined-label-out-of-range"] == 3
    assert counters["read-train"] + counters["read-test"] == 80
    assert sum(counters[f"written-{split}"] for split in SPLITS) == 77
    assert progress.summary(tmp_path / "out", manifest).splitlines()[1:] == [
        "3 rows set aside (3 label out of range), see quarantine/"
    ]


def test_order_of_the_quarantine_is_that_of_no_worker(tmp_path, monkeypatch):
    folder, _ = mislabelled(tmp_path / "idx", train=dict.fromkeys(range(30), 99))
    config = PreprocessConfig(
        sources=(f"idx:{folder}",), output_dir=tmp_path / "a", num_classes=10, max_quarantined=0.9
    )
    assert execute(config) == 0
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", 7)
    assert execute(changed(config, output_dir=tmp_path / "b")) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("wrong", "share", "allowed"),
    [(29, 0.2900, True), (30, 0.29, False), (7, 0.07, True), (1, 0.0, False), (0, 0.0, True)],
)
def test_max_quarantined(tmp_path, wrong, share, allowed):
    data = helpers.make_images(80, 20)
    data["train"][1][:wrong] = 10
    folder = helpers.write_idx(tmp_path / "idx", data)
    config = PreprocessConfig(
        sources=(f"idx:{folder}",),
        output_dir=tmp_path / "out",
        num_classes=10,
        max_quarantined=share,
    )
    if allowed:
        assert execute(config) == 0
        assert load_manifest(tmp_path / "out").quarantined["count"] == wrong
    else:
        with pytest.raises(InputError) as caught:
            execute(config)
        assert str(caught.value) == (
            f"{wrong} of 100 rows cannot be used ({wrong} label out of range), more than"
            f" --max_quarantined {share:g} allows"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_too_many_quarantined_in_its_own_process(tmp_path):
    folder, _ = mislabelled(tmp_path / "idx", train={0: 10, 1: 11})
    done = helpers.run_cli(
        "pipeline.preprocess",
        *(f"--source=idx:{folder}", "--output_dir=out", "--num_classes=10"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    # What Beam's workers say of themselves depends on what else is installed.
    assert done.stderr.splitlines()[-1:] == [
        "python -m pipeline.preprocess: error: 2 of 80 rows cannot be used (2 label out of range),"
        " more than --max_quarantined 0.01 allows",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_more_classes_than_there_are_labels(config):
    assert execute(changed(config, num_classes=256)) == 0
    manifest = load_manifest(config.output_dir)
    assert manifest.class_names == tuple(str(label) for label in range(256))
    assert manifest.splits["train"].label_counts == TRAIN_COUNTS + (0,) * 246


def leaky(folder):
    """Images that stand in test and elsewhere too: one in train, one twice in validation."""
    data = helpers.make_images(60, 20)
    pixels, labels = data["train"]
    data["test"][0][3], data["test"][1][3] = pixels[30], labels[30]  # of train
    data["test"][0][4], data["test"][1][4] = pixels[5], (labels[5] + 1) % 10  # of validation
    pixels[6] = pixels[5]
    return f"idx:{helpers.write_idx(folder, data)}", image_ids(pixels[[30, 5]].reshape(2, 784))


def test_leaks_are_counted_and_kept(tmp_path):
    source, names = leaky(tmp_path / "idx")
    config = PreprocessConfig(sources=(source,), output_dir=tmp_path / "out", num_shards=2)
    assert execute(config) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dropped == 0
    assert manifest.duplicates["leaked"] == 2
    assert manifest.duplicates["copies"] == 3
    assert manifest.duplicates["examples"]["leaked"] == sorted(names)
    assert manifest.duplicates["examples"]["conflicting"] == [names[1]]
    assert [manifest.splits[split].num_examples for split in SPLITS] == [50, 10, 20]


def test_leaks_are_dropped(tmp_path):
    source, names = leaky(tmp_path / "idx")
    config = PreprocessConfig(sources=(source,), output_dir=tmp_path / "out", drop_leaks=True)
    assert execute(config) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dropped == 3
    assert [manifest.splits[split].num_examples for split in SPLITS] == [49, 8, 20]
    counted = metrics(tmp_path / "out")["statistics"]  # of what was written alone
    assert [sum(counted[split]["stroke_width"]) for split in SPLITS] == [49, 8, 20]
    found = {split: {r.id[:32] for r in rows} for split, rows in records(tmp_path / "out").items()}
    assert set(names) <= found["test"]
    assert not set(names) & (found["train"] | found["validation"])
    assert metrics(tmp_path / "out")["counters"]["dropped-leaks"] == 3
    assert (
        "3 rows left out of train or validation, being in test as well"
        in progress.summary(tmp_path / "out", manifest).splitlines()
    )


def test_blank_images_are_written_and_flagged(tmp_path):
    data = helpers.make_images(60, 20)
    data["train"][0][12] = 0
    data["train"][0][40] = 255
    data["test"][0][1] = 7
    data["test"][0][2] = 7
    data["test"][0][2, 27, 27] = 8
    folder = helpers.write_idx(tmp_path / "idx", data)
    config = PreprocessConfig(sources=(f"idx:{folder}",), output_dir=tmp_path / "out")
    assert execute(config) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.flagged == {"blank": 3} and manifest.quarantined["count"] == 0
    assert sum(split.num_examples for split in manifest.splits.values()) == 80
    summary = progress.summary(tmp_path / "out", manifest)
    assert summary.splitlines()[1:] == ["3 blank images written"]


def test_compression(small_dataset, config):
    assert execute(changed(config, compression="gzip")) == 0
    plain, packed = load_manifest(small_dataset), load_manifest(config.output_dir)
    assert packed.dataset_id == plain.dataset_id
    made, expected = content(config.output_dir), content(small_dataset)
    assert {
        name.removesuffix(".gz"): gzip.decompress(data)
        for name, data in made.items()
        if name.endswith(".tfrecord.gz")
    } == {name: data for name, data in expected.items() if name.endswith(".tfrecord")}
    assert len(made) == len(expected)
    for split in SPLITS:
        for one, other in zip(plain.splits[split].shards, packed.splits[split].shards, strict=True):
            assert (other.file, other.sha256) == (f"{one.file}.gz", one.sha256)
            assert other.bytes == len(made[other.file]) < one.bytes
    assert records(config.output_dir)["test"][5].id == records(small_dataset)["test"][5].id


# Metrics on the way


def test_progress_lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="digits_pipeline")
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.001)
    said = threading.Event()
    info = progress.log.info

    def seen(*args):
        info(*args)
        if args[1] == "1,700":
            said.set()

    monkeypatch.setattr(progress.log, "info", seen)
    done = {"read-train": 9, "left": 5}  # of an earlier run
    with progress.lines(done):
        done |= {"read-train": 1000, "read-test": 700, "written-train": 20}
        done |= {"written-test": 3, "written-validation": 1, "written-bytes": 10**9}
        assert said.wait(60)
    assert "1,700 rows read, 24 written" in caplog.messages
    assert "left" not in done


def test_progress_lines_end_with_a_failure():
    before = threading.active_count()
    with pytest.raises(ValueError, match="stop"), progress.lines({}):
        assert threading.active_count() == before + 1
        raise ValueError("stop")
    assert threading.active_count() == before


def test_a_run_shows_its_progress(config, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="digits_pipeline")
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.001)
    said = threading.Event()
    info = progress.log.info

    def seen(*args):
        info(*args)
        if args[0] == "%s rows read, %s written" and args[1] == "720":
            said.set()

    write = shards.write

    def waiting(*args):
        assert said.wait(60)
        return write(*args)

    monkeypatch.setattr(progress.log, "info", seen)
    monkeypatch.setattr(shards, "write", waiting)
    assert execute(config) == 0
    assert "720 rows read, 0 written" in caplog.messages


# Again into the same folder


@pytest.fixture
def standing(small_dataset, config):
    """A copy of `small_dataset` where `config` would write it."""
    shutil.copytree(small_dataset, config.output_dir)
    return config.output_dir


def test_again_changes_nothing(standing, config, monkeypatch, caplog):
    monkeypatch.setattr(runners, "run", lambda *_: pytest.fail("was run"))
    caplog.set_level(logging.INFO, logger="digits_pipeline")
    before = files_and_times(standing.parent)
    assert execute(config) == 0
    assert [record.getMessage() for record in caplog.records] == [f"{standing}: already there"]
    assert files_and_times(standing.parent) == before


@pytest.mark.parametrize(
    "values",
    [{"num_shards": 4}, {"validation_size": 7}, {"split_by": "hash"}, {"sources": ("digits",)}],
    ids=lambda values: next(iter(values)),
)
def test_another_dataset_there_is_refused(standing, config, values):
    before = files_and_times(standing.parent)
    with pytest.raises(InputError, match="out: holds another dataset; expected a new or empty"):
        execute(changed(config, **values))
    assert files_and_times(standing.parent) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-00001-of-00003.tfrecord", None, "missing; the manifest names it; --overwrite"),
        ("test-00000-of-00003.tfrecord", b"short", "has 5 bytes, the manifest says .*--overwrite"),
        ("manifest.json", b"{", "not a dataset manifest"),
        ("metrics.json", None, "holds another dataset"),
        ("metrics.json", b"[]", "holds another dataset"),
        ("metrics.json", b"{}", "holds another dataset"),
    ],
)
def test_damaged_dataset_there_is_refused(standing, config, name, content, message):
    (standing / name).unlink()
    if content is not None:
        (standing / name).write_bytes(content)
    before = files_and_times(standing.parent)
    with pytest.raises(InputError, match=message):
        execute(config)
    assert files_and_times(standing.parent) == before


def test_other_files_there_are_refused(config):
    config.output_dir.mkdir()
    (config.output_dir / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="out: already holds files"):
        execute(config)
    assert helpers.tree(config.output_dir.parent) == {"out/thesis.txt": b"mine"}


# Another dataset in its place


def test_overwriting(standing, config, caplog):
    other = changed(config, split_by="hash", overwrite=True)
    assert execute(other) == 0
    assert load_manifest(standing).split_by == "hash"
    assert [path.name for path in standing.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="holds another dataset"):
        execute(config)
    assert execute(changed(config, overwrite=True)) == 0
    assert load_manifest(standing).split_by == "positional"


def test_overwriting_with_the_same_does_nothing(standing, config, monkeypatch):
    monkeypatch.setattr(runners, "run", lambda *_: pytest.fail("was run"))
    before = files_and_times(standing.parent)
    assert execute(changed(config, overwrite=True)) == 0
    assert files_and_times(standing.parent) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train-00001-of-00003.tfrecord", None, "--overwrite makes it anew"),
        ("manifest.json", "{", "not a dataset manifest"),
        ("manifest.json", '{"format_version": 2}', "again, with --overwrite or"),
        ("metrics.json", "[]", "or --overwrite"),
    ],
)
def test_overwriting_a_damaged_dataset(standing, config, small_dataset, name, text, message):
    (standing / name).unlink()
    if text is not None:
        (standing / name).write_text(text)
    with pytest.raises(InputError, match=message):
        execute(config)
    assert execute(changed(config, overwrite=True)) == 0
    assert_same_dataset(standing, small_dataset)


def test_other_format_says_what_to_do(standing, config, monkeypatch, capsys):
    raw = json.loads((standing / "manifest.json").read_text()) | {"format_version": 2}
    (standing / "manifest.json").write_text(json.dumps(raw))
    before = files_and_times(standing.parent)
    argv = [f"--source={config.sources[0]}", f"--output_dir={standing}", "--num_shards=3"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv])
    with pytest.raises(SystemExit) as caught:
        preprocess.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err == (
        f"python -m pipeline.preprocess: error: {standing / 'manifest.json'}: format_version is 2,"
        " expected 1; run pipeline.preprocess again, with --overwrite or into a new folder\n"
    )
    assert files_and_times(standing.parent) == before


def test_a_stricter_limit_is_held_against_a_standing_dataset(config, tmp_path):
    data = helpers.make_images(60, 20)
    data["train"][1][3] = 200
    source = f"idx:{helpers.write_idx(tmp_path / 'odd', data)}"
    lenient = changed(config, sources=(source,), num_classes=10, max_quarantined=0.5)
    assert execute(lenient) == 0
    with pytest.raises(InputError, match="1 of 80 rows cannot be used"):
        execute(changed(lenient, max_quarantined=0.0))


def test_overwriting_spares_what_only_looks_like_a_dataset(config):
    config.output_dir.mkdir()
    (config.output_dir / "manifest.json").write_text('{"manifest_version": 3}')
    (config.output_dir / "src").mkdir()
    with pytest.raises(InputError, match="holds src, which is no part of a dataset"):
        execute(changed(config, overwrite=True))
    assert (config.output_dir / "src").is_dir()


def test_overwriting_spares_what_is_no_dataset(config):
    config.output_dir.mkdir()
    (config.output_dir / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis\.txt, which is no part of a dataset"):
        execute(changed(config, overwrite=True))
    assert helpers.tree(config.output_dir.parent) == {"out/thesis.txt": b"mine"}


def test_a_source_that_changes_while_it_is_read(config, small_idx, tmp_path, monkeypatch):
    folder = shutil.copytree(small_idx, tmp_path / "idx")
    run = runners.run

    def changing(*arguments):
        metrics = run(*arguments)
        path = next(folder.glob("train-labels*"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x03")
        return metrics

    monkeypatch.setattr(runners, "run", changing)
    with pytest.raises(InputError, match=r"^idx:.*idx: changed while it was read; run it again$"):
        execute(changed(config, sources=(f"idx:{folder}",)))
    assert helpers.tree(config.output_dir.parent) == helpers.tree(tmp_path / "none") | {
        f"idx/{name}": content for name, content in helpers.tree(folder).items()
    }


def test_overwriting_spares_records_that_no_manifest_names(config):
    config.output_dir.mkdir()
    (config.output_dir / "train-00000-of-00001.tfrecord").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"out: holds files and no manifest\.json; --overwrite"):
        execute(changed(config, overwrite=True))
    assert len(helpers.tree(config.output_dir)) == 1


@pytest.mark.parametrize("nth", [1, 2])
def test_swap_that_fails_keeps_the_old_dataset(standing, config, monkeypatch, nth):
    before = helpers.tree(standing)
    rename = pathlib.Path.rename
    calls = []

    def failing(self, target):
        calls.append(self.name)
        if len(calls) == nth:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        execute(changed(config, split_by="hash", overwrite=True))
    assert len(calls) >= nth
    assert helpers.tree(standing) == before
    assert [path.name for path in standing.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("state", ["aside", "swapped", "published", "half"])
def test_run_after_one_that_was_killed(standing, config, monkeypatch, state):
    """Whatever a run leaves that is killed as it publishes, the next one puts in order."""
    monkeypatch.setattr(runners, "run", lambda *_: pytest.fail("was run"))
    before = helpers.tree(standing)
    parent = standing.parent
    if state == "aside":  # the old one is moved, the new one not yet
        shutil.copytree(standing, parent / ".out.incomplete/0123")
        (parent / ".out.incomplete/.lock").touch()
        standing.rename(parent / ".out.replaced")
    elif state == "swapped":  # the new one stands, the old one is not yet removed
        shutil.copytree(standing, parent / ".out.replaced")
        (parent / ".out.incomplete").mkdir()
        (parent / ".out.incomplete/.lock").touch()
    elif state == "published":
        (parent / ".out.incomplete").mkdir()
        (parent / ".out.incomplete/.lock").touch()
    else:
        (parent / ".out.incomplete/sub").mkdir(parents=True)
        (parent / ".out.incomplete/sub/half").touch()
    assert execute(config) == 0  # it is there already
    assert helpers.tree(standing) == before
    assert [path.name for path in parent.iterdir()] == ["out"]


# Failures leave nothing behind


def fail(*_, **__):
    raise OSError(28, "No space left on device")


FAILURES = {
    "no rows to train on": (
        {"split_by": "hash", "validation_fraction": 0.9999},
        None,
        "the train split would be empty",
    ),
    "reading": ({}, (idx, "_read_exactly", fail), "No space left"),
    "writing a shard": ({}, (shards, "open_atomic", fail), "No space left"),
    "writing the manifest": ({}, (preprocess, "manifest_json", fail), "No space left"),
    "at the very end": ({}, (preprocess, "load_manifest", fail), "No space left"),
    "runner": ({"beam_arguments": ("--runner=NoSuchRunner",)}, None, "Unexpected pipeline runner"),
}


@pytest.mark.parametrize(("values", "patch", "message"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "empty folder"])
def test_failure_leaves_nothing(config, monkeypatch, values, patch, message, exists):
    if exists:
        config.output_dir.mkdir()
    before = sorted(config.output_dir.parent.iterdir())
    if patch:
        monkeypatch.setattr(*patch)
    with pytest.raises((InputError, OSError, RuntimeError), match=message):
        execute(changed(config, **values))
    assert sorted(config.output_dir.parent.iterdir()) == before
    assert helpers.tree(config.output_dir.parent) == {}


def test_rows_that_were_lost_are_noticed(small_idx, tmp_path):
    source = open_sources([f"idx:{small_idx}"])
    job = preprocess.Job(
        source=source,
        splitter=make_splitter("hash", source, None, None),
        options=shards.ShardOptions(num_shards=1),
        directory=tmp_path,
    )
    for num_read, quarantined, message in (
        (720, {}, "720 rows in the source, 720 read, 0 written, 0 quarantined, 0 dropped"),
        (720, {"damaged": 719}, "720 read, 0 written, 719 quarantined, 0 dropped"),
        (720, {"damaged": 721}, "720 read, 0 written, 721 quarantined, 0 dropped"),
        (719, {"damaged": 719}, "720 rows in the source, 719 read, 0 written, 719 quarantined"),
    ):
        with pytest.raises(RuntimeError, match=message):
            preprocess.write_manifest(nothing_written(tmp_path / "x"), num_read, quarantined, job)
    assert not (tmp_path / "manifest.json").exists()
    preprocess.write_manifest(nothing_written(tmp_path), 720, {"damaged": 720}, job)
    assert load_manifest(tmp_path).quarantined["count"] == 720


def nothing_written(directory):
    return [shards.write(np.zeros(0, ROW), 0, shards.ShardOptions(num_shards=1), directory)]


@pytest.mark.parametrize("lost", ["read", "written"])
def test_row_that_is_lost_on_the_way_fails_the_run(config, monkeypatch, lost):
    if lost == "read":
        read = idx.IdxSource.read

        def one_less(self, block):
            for rows in read(self, block):
                yield rows._replace(
                    positions=rows.positions[1:], pixels=rows.pixels[1:], labels=rows.labels[1:]
                )

        monkeypatch.setattr(idx.IdxSource, "read", one_less)
    else:
        write = shards.write
        monkeypatch.setattr(shards, "write", lambda rows, *rest: write(rows[1:], *rest))
    with pytest.raises(Exception, match=r"720 rows in the source, 7\d\d read, 7\d\d written"):
        execute(config)
    assert helpers.tree(config.output_dir.parent) == {}


# The command line


def test_cli(small_idx, tmp_path):
    def run(*flags):
        return helpers.run_cli(
            "pipeline.preprocess",
            *("--source", "auto", "--output_dir", "a/out", "--num_shards=2", *flags),
            env={"MNIST_IDX_DIR": small_idx},
            cwd=tmp_path,
        )

    first = run("--runner=DirectRunner")
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    lines = first.stderr.splitlines()
    assert lines[0] == f"source auto: MNIST from $MNIST_IDX_DIR, {small_idx}"
    assert lines[1] == "reading images from IDX files"
    manifest = load_manifest(tmp_path / "a/out")
    assert lines[2] == (
        "a/out: 500 train, 100 validation, 120 test; 10 classes; 2.3 MB in 6 files; dataset "
        + manifest.dataset_id
    )
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    size = sum(shard.bytes for shard in shards)
    assert re.fullmatch(
        rf"720 rows read; {size:,} bytes written in \d+\.\d s of work, \d+\.\d s of it encoding",
        lines[3],
    )
    assert len(lines) == 4

    before = files_and_times(tmp_path)
    again = run()
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.splitlines()[1:] == ["a/out: already there"]
    other = run("--num_shards=3")
    assert (other.returncode, other.stdout) == (2, "")
    assert other.stderr.splitlines()[1:] == [
        "python -m pipeline.preprocess: error: a/out: holds another dataset;"
        " expected a new or empty folder, or --overwrite"
    ]
    assert files_and_times(tmp_path) == before


BAD = {
    "nothing": ([], "required: --source, --output_dir"),
    "no source": (["--output_dir=out"], "required: --source"),
    "no folder": (["--source=digits"], "required: --output_dir"),
    "unknown source": (["--source=nosuch", "--output_dir=out"], "--source nosuch: unknown source"),
    "missing folder": (["--source=idx:none", "--output_dir=out"], "idx:none: no such folder"),
    "empty folder": (["--source=idx:.", "--output_dir=out"], "no train-images-idx3-ubyte"),
    "unknown flag": (["--source=digits", "--output_dir=out", "--bogus=1"], "unknown flag --bogus"),
    "stray word": (["--source=digits", "--output_dir=out", "word"], "unknown flag word"),
    "beam value": (
        ["--source=digits", "--output_dir=out", "--direct_num_workers=many"],
        "--direct_num_workers: invalid int value",
    ),
    "shards": (["--source=digits", "--output_dir=out", "--num_shards=0"], "at least 1, got 0"),
    "many shards": (
        ["--source=digits", "--output_dir=out", "--num_shards=100000"],
        "--num_shards 100000: expected at most 99999",
    ),
    "shards as text": (
        ["--source=digits", "--output_dir=out", "--num_shards=x"],
        "--num_shards: expected an integer of at least 1, got x",
    ),
    "fraction as text": (
        ["--source=digits", "--output_dir=out", "--max_quarantined=few"],
        "--max_quarantined: expected a number from 0 to 1, got few",
    ),
    "classes": (
        ["--source=SMALL", "--output_dir=out", "--num_classes=1"],
        "--num_classes 1: expected 2 to 256",
    ),
    "many classes": (
        ["--source=SMALL", "--output_dir=out", "--num_classes=257"],
        "--num_classes 257: expected 2 to 256",
    ),
    "classes of digits": (
        ["--source=digits", "--output_dir=out", "--num_classes=10"],
        "--num_classes 10: goes with idx: sources alone",
    ),
    "resizing idx": (
        ["--source=SMALL", "--output_dir=out", "--resize"],
        "--resize: goes with images: sources alone",
    ),
    "compression": (
        ["--source=digits", "--output_dir=out", "--compression=zip"],
        "--compression: invalid choice",
    ),
    "one bad source of two": (
        ["--source=SMALL", "--source=idx:none", "--output_dir=out"],
        "idx:none: no such folder",
    ),
    "overwriting what is no dataset": (
        ["--source=SMALL", "--output_dir=file", "--overwrite"],
        "file: is a file; expected a folder",
    ),
    "negative size": (
        ["--source=digits", "--output_dir=out", "--validation_size=-1"],
        "--validation_size -1: expected at least 0",
    ),
    "large fraction": (
        ["--source=digits", "--output_dir=out", "--validation_fraction=1.5"],
        "--validation_fraction: expected a number from 0 to 1, got 1.5",
    ),
    "split": (["--source=digits", "--output_dir=out", "--split_by=random"], "invalid choice"),
    "bucket": (["--source=digits", "--output_dir=gs://b/out"], "gs://b/out: expected gs://"),
    "no name": (["--source=digits", "--output_dir="], "expected a folder, got an empty name"),
    "a file": (["--source=SMALL", "--output_dir=file"], "file: already holds files"),
    "in a file": (["--source=SMALL", "--output_dir=file/out"], "cannot be used: Not a directory"),
    "here": (["--source=SMALL", "--output_dir=."], ".: already holds files"),
    "size and fraction": (
        ["--source=SMALL", "--output_dir=out", "--validation_size=9", "--validation_fraction=0.1"],
        "--validation_fraction goes with --split_by hash",
    ),
    "size by hash": (
        ["--source=SMALL", "--output_dir=out", "--validation_size=9", "--split_by=hash"],
        "--validation_size goes with --split_by positional",
    ),
    "size of everything": (
        ["--source=SMALL", "--output_dir=out", "--validation_size=600"],
        "--validation_size 600: expected less than train's 600 rows",
    ),
}


def in_folder_with_a_file(folder, argv, small_idx):
    (folder / "file").touch()
    return [word.replace("SMALL", f"idx:{small_idx}") for word in argv]


def assert_refused(folder, code, stdout, stderr, message):
    assert (code, stdout) == (2, "")
    assert stderr.startswith("python -m pipeline.preprocess: error: ") and message in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD.keys())
def test_bad_command_line(argv, message, small_idx, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    argv = in_folder_with_a_file(tmp_path, argv, small_idx)
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv])
    with pytest.raises(SystemExit) as caught:
        preprocess.main()
    assert_refused(tmp_path, caught.value.code, *capsys.readouterr(), message)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["missing folder", "unknown flag", "in a file"])
def test_bad_command_line_in_its_own_process(name, small_idx, tmp_path):
    argv, message = BAD[name]
    argv = in_folder_with_a_file(tmp_path, argv, small_idx)
    done = helpers.run_cli("pipeline.preprocess", *argv, cwd=tmp_path)
    assert_refused(tmp_path, done.returncode, done.stdout, done.stderr, message)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("--help", "--validation_fraction"), ("--version", "pipeline.preprocess")],
)
def test_help_and_version(flag, expected, tmp_path):
    done = helpers.run_cli("pipeline.preprocess", flag, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


HEAVY = ["apache_beam", "tensorflow", "tensorflow_datasets", "sklearn", "PIL", "matplotlib"]


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys; from pipeline import dataset, metrics, preprocess, runners, sources, storage;"
        "preprocess.parse(['--source=idx:x', '--output_dir=y']);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = helpers.run_python("-c", code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_idx_needs_no_tensorflow(small_idx, tmp_path):
    code = (
        "import sys; from pipeline import preprocess;"
        f"preprocess.execute(preprocess.parse(['--source=idx:{small_idx}', '--output_dir=out']));"
        "print('apache_beam' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = helpers.run_python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_beam_options_reach_the_runner(config, monkeypatch):
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

    class SeenError(Exception):
        pass

    def seen(options, *_):
        assert options.view_as(DirectOptions).direct_num_workers == 5
        assert options.view_as(StandardOptions).runner == runners.IN_PROCESS
        raise SeenError

    monkeypatch.setattr(runners, "run", seen)
    argv = [f"--source={config.sources[0]}", f"--output_dir={config.output_dir}"]
    with pytest.raises(SeenError):
        execute(parse([*argv, "--direct_num_workers", "5", "--runner=DirectRunner"]))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_shards=3"],
        ["--split_by=hash", "--validation_fraction=0.1"],
        ["--split_by=positional", "--validation_size=0"],
        ["--validation_fraction=0.0"],
        ["--validation_fraction=1"],
        ["--validation_size=1"],
        ["--num_shards=1"],
        ["--max_quarantined=0"],
        ["--max_quarantined=1"],
        ["--compression=gzip", "--drop_leaks", "--resize"],
        ["--num_classes=12"],
    ],
    ids=lambda flags: " ".join(flags) or "none",
)
def test_dataset_arguments_make_the_config_again(flags, tmp_path):
    base = ["--source=digits", f"--output_dir={tmp_path}"]
    config = parse([*base, *flags])
    assert parse([*base, *options.dataset_arguments(config)]) == config
    assert {word.split("=")[0] for word in flags} <= {
        word.split("=")[0] for word in options.dataset_arguments(config)
    }


def test_fingerprint(config, tmp_path):
    source = open_sources(config.sources)
    base = options.fingerprint(config, source)
    same = [
        changed(config, output_dir=tmp_path / "other"),
        changed(config, beam_arguments=("--direct_num_workers=2",)),
        changed(config, split_by="positional"),  # what it is anyway
        changed(config, validation_size=100),
        changed(config, max_quarantined=0.5),
        changed(config, overwrite=True),
    ]
    assert {options.fingerprint(each, source) for each in same} == {base}
    others = [
        changed(config, num_shards=4),
        changed(config, split_by="hash"),
        changed(config, validation_size=7),
        changed(config, split_by="hash", validation_fraction=0.5),
        changed(config, compression="gzip"),
        changed(config, drop_leaks=True),
    ]
    found = [options.fingerprint(each, source) for each in others]
    found.append(options.fingerprint(config, open_sources(["digits"])))
    classes = changed(config, num_classes=11)
    found.append(options.fingerprint(classes, options.open_sources_of(classes)))
    assert len({base, *found}) == 9
    hashed = changed(config, split_by="hash", validation_fraction=1 / 6)
    assert options.fingerprint(hashed, source) == found[1]
