import dataclasses
import json
import logging
import shutil
import sys

import helpers
import numpy as np
import pytest

from pipeline import dataset, preprocess, runners, shards
from pipeline.command import InputError
from pipeline.dataset import SCALE_TABLE, SPLITS, image_ids, load_manifest, read_records
from pipeline.preprocess import PreprocessConfig, execute, parse
from pipeline.sources import idx, open_source

TRAIN_COUNTS = (50,) * 10  # of helpers.make_images, without its first 100 images


@pytest.fixture
def config(small_idx, tmp_path):
    """What `small_dataset` was made with, into a folder of its own."""
    return PreprocessConfig(source=f"idx:{small_idx}", output_dir=tmp_path / "out", num_shards=3)


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
    assert manifest.duplicates == {"images": 0, "copies": 0, "conflicting": 0, "leaked": 0}
    every = [shard for split in SPLITS for shard in manifest.splits[split].shards]
    assert manifest.dataset_id == dataset.dataset_id(every, manifest.class_names)
    assert set(helpers.tree(small_dataset)) == {shard.file for shard in every} | {
        "manifest.json",
        "metrics.json",
    }
    for word in (small_idx, small_dataset, small_idx.parent.name):
        assert str(word) not in (small_dataset / "manifest.json").read_text()


def test_metrics_hold_the_counters(small_dataset, config):
    metrics = json.loads((small_dataset / "metrics.json").read_text())
    assert metrics["fingerprint"] == preprocess.read_fingerprint(small_dataset)
    assert metrics["fingerprint"] == preprocess.fingerprint(config, open_source(config.source))
    assert metrics["counters"] == {
        "read-train": 600,
        "read-test": 120,
        "written-train": 500,
        "written-validation": 100,
        "written-test": 120,
        "written-bytes": sum(path.stat().st_size for path in small_dataset.glob("*.tfrecord")),
    }


def test_records_stand_in_their_shard_by_id(small_dataset):
    for split in load_manifest(small_dataset).splits.values():
        for index, shard in enumerate(split.shards):
            ids = [record.id for record in read_records(small_dataset, shard)]
            assert ids == sorted(ids)
            assert all(int(name[16:32], 16) % 3 == index for name in ids)


# The same images give the same bytes


def test_same_bytes_whatever_the_blocks(small_dataset, config, monkeypatch):
    monkeypatch.setattr(idx, "ROWS_PER_BLOCK", 37)
    monkeypatch.setattr(idx, "ROWS_AT_ONCE", 10)
    assert execute(config) == 0
    assert helpers.tree(config.output_dir) == helpers.tree(small_dataset)


def test_same_bytes_from_gzip_under_other_names(small_dataset, config, tmp_path):
    folder = helpers.write_idx(tmp_path / "gz", helpers.make_images(), gz=True, test_stem="test")
    assert execute(changed(config, source=f"idx:{folder}")) == 0
    made, expected = helpers.tree(config.output_dir), helpers.tree(small_dataset)
    assert made.pop("metrics.json") != expected.pop("metrics.json")  # other files: fingerprint
    assert made == expected


def test_same_bytes_from_several_processes(small_dataset, small_idx, tmp_path):
    done = helpers.run_cli(
        "pipeline.preprocess",
        *(f"--source=idx:{small_idx}", "--output_dir=out", "--num_shards=3"),
        *("--direct_num_workers", "2", "--direct_running_mode", "multi_processing"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert helpers.tree(tmp_path / "out") == helpers.tree(small_dataset)


def test_hash_split_does_not_depend_on_the_order_of_the_source(config, tmp_path):
    data = helpers.make_images()
    order = np.random.default_rng(0).permutation(600)
    shuffled = data | {"train": tuple(array[order] for array in data["train"])}
    helpers.write_idx(tmp_path / "shuffled", shuffled)
    made = []
    for source in (config.source, f"idx:{tmp_path / 'shuffled'}"):
        folder = tmp_path / str(len(made))
        execute(changed(config, source=source, output_dir=folder, split_by="hash"))
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
    assert execute(changed(config, source=source)) == 0
    manifest = load_manifest(config.output_dir)
    assert manifest.duplicates == {"images": 3, "copies": 3, "conflicting": 1, "leaked": 1}
    assert "1 images stand both in test" in preprocess.summary(config.output_dir, manifest)
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
    assert execute(PreprocessConfig(source=f"idx:{mnist_dir}", output_dir=tmp_path / "out")) == 0
    manifest = load_manifest(tmp_path / "out")
    # Known for the tutorial's split; the id must not move between versions of this code.
    assert {name: split.label_counts for name, split in manifest.splits.items()} == {
        "train": (4922, 5615, 4967, 5099, 4862, 4558, 4904, 5195, 4907, 4971),
        "validation": (1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978),
        "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    }
    assert manifest.dataset_id == "912be8b10b1aa50c5078ab68a749afdb"
    (first,) = next(open_source(f"idx:{mnist_dir}").read(idx.Block("train", 0, 1))).pixels
    validation = {record.id: record for record in records(tmp_path / "out")["validation"]}
    record = validation[image_ids(first[None])[0]]
    assert record.label == 5 and record.image.tobytes() == SCALE_TABLE[first].tobytes()


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
    [{"num_shards": 4}, {"validation_size": 7}, {"split_by": "hash"}, {"source": "digits"}],
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
        ("train-00001-of-00003.tfrecord", None, "missing or not of"),
        ("test-00000-of-00003.tfrecord", b"short", "missing or not of"),
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


# Failures leave nothing behind


def fail(*_, **__):
    raise OSError(28, "No space left on device")


FAILURES = {
    "no rows to train on": (
        {"split_by": "hash", "validation_fraction": 1.0},
        None,
        "the train split would be empty",
    ),
    "reading": ({}, (idx, "_read_exactly", fail), "No space left"),
    "writing a shard": ({}, (shards, "write_atomic", fail), "No space left"),
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
    source = open_source(f"idx:{small_idx}")
    with pytest.raises(RuntimeError, match="720 rows in the source, 0 written"):
        preprocess.write_manifest([], source, "hash", tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    assert lines[2].startswith("a/out: 500 train, 100 validation, 120 test; 10 classes; dataset ")
    assert len(lines) == 3

    before = files_and_times(tmp_path)
    again = run()
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.splitlines()[1:] == ["a/out: already there"]
    other = run("--num_shards=3")
    assert (other.returncode, other.stdout) == (2, "")
    assert other.stderr.splitlines()[1:] == [
        "python -m pipeline.preprocess: error: a/out: holds another dataset;"
        " expected a new or empty folder"
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
    "shards as text": (["--source=digits", "--output_dir=out", "--num_shards=x"], "--num_shards"),
    "negative size": (
        ["--source=digits", "--output_dir=out", "--validation_size=-1"],
        "--validation_size -1: expected at least 0",
    ),
    "large fraction": (
        ["--source=digits", "--output_dir=out", "--validation_fraction=1.5"],
        "--validation_fraction: expected a number from 0 to 1, got 1.5",
    ),
    "split": (["--source=digits", "--output_dir=out", "--split_by=random"], "invalid choice"),
    "bucket": (["--source=digits", "--output_dir=gs://b/out"], "gs://b/out: expected a local"),
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
def test_bad_command_line(argv, message, small_idx, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    argv = in_folder_with_a_file(tmp_path, argv, small_idx)
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv])
    with pytest.raises(SystemExit) as caught:
        preprocess.main()
    assert_refused(tmp_path, caught.value.code, *capfd.readouterr(), message)
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

    def seen(options, _):
        assert options.view_as(DirectOptions).direct_num_workers == 5
        assert options.view_as(StandardOptions).runner == runners.IN_PROCESS
        raise SeenError

    monkeypatch.setattr(runners, "run", seen)
    argv = [f"--source={config.source}", f"--output_dir={config.output_dir}"]
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
    ],
    ids=lambda flags: " ".join(flags) or "none",
)
def test_dataset_arguments_make_the_config_again(flags, tmp_path):
    base = ["--source=digits", f"--output_dir={tmp_path}"]
    config = parse([*base, *flags])
    assert parse([*base, *preprocess.dataset_arguments(config)]) == config
    assert {word.split("=")[0] for word in flags} <= {
        word.split("=")[0] for word in preprocess.dataset_arguments(config)
    }


def test_fingerprint(config, tmp_path):
    source = open_source(config.source)
    base = preprocess.fingerprint(config, source)
    same = [
        changed(config, output_dir=tmp_path / "other"),
        changed(config, beam_arguments=("--direct_num_workers=2",)),
        changed(config, split_by="positional"),  # what it is anyway
    ]
    assert {preprocess.fingerprint(each, source) for each in same} == {base}
    others = [
        changed(config, num_shards=4),
        changed(config, split_by="hash"),
        changed(config, validation_size=7),
        changed(config, validation_fraction=0.5),
    ]
    found = [preprocess.fingerprint(each, source) for each in others]
    found.append(preprocess.fingerprint(config, open_source("digits")))
    assert len({base, *found}) == 6
