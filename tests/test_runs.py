import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.util.event_pb2 import Event

from pipeline import storage
from pipeline.command import InputError
from pipeline.dataset import Shard, dataset_id, load_manifest
from trainer import data, run_folder, start
from trainer.config import PRESETS
from trainer.events import histogram

EPOCHS = 20
STEPS = 63  # 500 examples in batches of 8
SETTINGS = {
    "hidden_units": "16,12",
    "batch_size": 8,
    "epochs": EPOCHS,
    "replicas": 2,
    "steps_per_call": 10,
}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1"}
DEADLINE = 120  # seconds; for what takes a few
# The command, where TensorFlow cannot be loaded.
WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
from trainer import task
task.main()
"""
FIELDS = [
    "epoch",
    "step",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "examples_per_second",
]


def flags(dataset, run_dir, **changed):
    folders = {"dataset_dir": dataset, "run_dir": run_dir}
    settings = folders | SETTINGS | {"checkpoint_seconds": 1000} | changed
    return [f"--{name}={value}" for name, value in settings.items()]


def train(dataset, run_dir, **changed):
    return helpers.run_cli("trainer.task", *flags(dataset, run_dir, **changed), env=ENVIRONMENT)


def begin(dataset, run_dir, **changed):
    """The same in the background; what it says goes beside the run folder."""
    with Path(f"{run_dir}.log").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.task", *flags(dataset, run_dir, **changed)],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(helpers.ROOT)},
            stdout=said,
            stderr=said,
        )


def execute(dataset, run_dir, **changed):
    """In this process; for what is refused before any device is used."""
    config = dataclasses.replace(PRESETS["core"], **changed)
    places = run_folder.places(run_dir, {}, {})
    start.execute(config, dataset, places, None, checkpoint_seconds=10, profile=False)


def wait_until(condition, process, what):
    """Polls until something is so, while the process lives."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.001)


def lines_of(run_dir, *, timed=True):
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    drop = () if timed else ("seconds", "examples_per_second")
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def result_of(run_dir):
    """What must not depend on how often a run was stopped."""
    model = json.loads((run_dir / "export" / "model.json").read_text())
    exported = (run_dir / "export" / "metrics.jsonl").read_text()
    assert exported == (run_dir / "metrics.jsonl").read_text()
    return model, lines_of(run_dir, timed=False)


def assert_one_line(done, code, *parts):
    assert done.returncode == code, done.stderr
    assert done.stderr.count("python -m trainer.task: error: ") == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("python -m trainer.task: error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def events_of(run_dir):
    """{(name, step): value} over all event files; a value written twice must be the same.

    Histograms, whose names have a slash, are lists of numbers.
    """
    found = {}
    for path in sorted((run_dir / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                plugin = value.metadata.plugin_data.plugin_name
                assert plugin == ("histograms" if "/" in value.tag else "scalars")
                given = tf.make_ndarray(value.tensor).tolist()
                if value.tag != "examples_per_second":
                    assert found.get((value.tag, event.step), given) == given
                found[value.tag, event.step] = given
    return found


@pytest.fixture(scope="module")
def finished(small_dataset, tmp_path_factory):
    """A run that nothing disturbed. Read only."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = train(small_dataset, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


# A whole run


def test_a_run_folder_holds_what_the_contract_says(finished):
    names = [
        "tensorboard/events" if name.startswith("tensorboard/events.out.tfevents.") else name
        for name in helpers.tree(finished)
    ]
    assert sorted(names) == [
        ".lock",
        "checkpoints/step-00001260.ckpt",
        "config.json",
        "export/assets.extra/tf_serving_warmup_requests",
        "export/checksums.json",
        "export/fingerprint.pb",
        "export/metrics.jsonl",
        "export/model.json",
        "export/saved_model.pb",
        "export/variables/variables.data-00000-of-00001",
        "export/variables/variables.index",
        "metrics.jsonl",
        "tensorboard/events",
    ]


def test_config_json_has_every_setting_resolved(finished, small_dataset):
    usual = dataclasses.asdict(PRESETS["core"])
    assert json.loads((finished / "config.json").read_text()) == usual | SETTINGS | {
        "hidden_units": [16, 12],
        "input": "resident",
        "dataset_id": load_manifest(small_dataset).dataset_id,
        "devices": ["CPU:0", "CPU:1"],
    }


def test_metrics_jsonl_is_consistent(finished):
    lines = lines_of(finished)
    assert [list(line) for line in lines] == [FIELDS] * EPOCHS
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines] == [STEPS * e for e in range(1, EPOCHS + 1)]
    for line in lines:
        for name, size in (("accuracy", 500), ("val_accuracy", 100)):
            assert line[name] == round(line[name] * size) / size  # a count over a size
            assert 0 <= line[name] <= 1
        assert line["seconds"] > 0
        assert line["examples_per_second"] == pytest.approx(500 / line["seconds"], rel=0.01)
    assert lines[0]["loss"] == pytest.approx(np.log(10), rel=0.5)  # begins by guessing
    assert lines[-1]["loss"] < 0.1
    assert lines[-1]["val_accuracy"] > 0.9


def test_the_export_is_the_network_that_was_validated(finished, small_dataset):
    manifest = load_manifest(small_dataset)
    images, labels = data.load_split(small_dataset, manifest, "validation")
    serve = tf.saved_model.load(str(finished / "export")).signatures["serving_default"]
    pixels = np.round(images * 255).astype(np.uint8).reshape(-1, 28, 28, 1)
    answer = serve(images=tf.constant(pixels))
    line = lines_of(finished)[-1]
    assert np.mean(answer["classes"].numpy() == labels) == line["val_accuracy"]
    of_label = answer["probabilities"].numpy()[np.arange(len(labels)), labels]
    assert np.mean(-np.log(of_label)) == pytest.approx(line["val_loss"], rel=1e-4)
    model = json.loads((finished / "export" / "model.json").read_text())
    assert model["dataset_id"] == manifest.dataset_id


def test_tensorboard_shows_the_lines_of_the_metrics_and_the_weights(finished):
    (path,) = (finished / "tensorboard").iterdir()
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert Event.FromString(records[0]).file_version == "brain.Event:2"
    found = events_of(finished)
    assert len(records) == 1 + len(found)
    scalars = ("loss", "accuracy", "val_loss", "val_accuracy", "examples_per_second")
    assert {key: value for key, value in found.items() if "/" not in key[0]} == {
        (name, line["step"]): np.float32(line[name])
        for line in lines_of(finished)
        for name in scalars
    }
    histograms = {key: value for key, value in found.items() if "/" in key[0]}
    names = [f"layer_{i}/{part}" for i in range(3) for part in "wb"]
    assert set(histograms) == {(n, STEPS * e) for n in names for e in range(1, EPOCHS + 1)}
    for name, weight in zip(names, weights_of(finished), strict=True):
        assert histograms[name, STEPS * EPOCHS] == histogram(weight).tolist()


def weights_of(run_dir):
    return [weight.numpy() for weight in tf.saved_model.load(str(run_dir / "export")).weights]


def test_again_is_already_trained_and_changes_nothing(finished, small_dataset):
    before = helpers.tree(finished)
    left = finished / ".export.incomplete"  # killed between the model's renaming and the end
    left.mkdir()
    (left / ".lock").touch()
    done = helpers.run_python(
        "-c", WITHOUT_TENSORFLOW, *flags(small_dataset, finished), env=ENVIRONMENT
    )
    assert (done.returncode, done.stderr) == (0, f"{finished}: already trained and exported\n")
    assert helpers.tree(finished) == before
    assert not left.exists()


def test_other_flags_on_the_same_folder_are_refused(finished, small_dataset):
    before = helpers.tree(finished)
    arguments = flags(small_dataset, finished, seed=23)
    done = helpers.run_python("-c", WITHOUT_TENSORFLOW, *arguments, env=ENVIRONMENT)
    assert_one_line(done, 2, f"{finished}: holds a run with seed 22, not 23; expected a new folder")
    assert helpers.tree(finished) == before


def test_by_hand_a_run_comes_to_what_it_comes_to_by_the_tape(finished, small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    done = train(small_dataset, run_dir, gradients="manual")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "config.json").read_text())["gradients"] == "manual"
    for line, other in zip(lines_of(run_dir), lines_of(finished), strict=True):
        for name in ("epoch", "step", "accuracy", "val_accuracy"):
            assert line[name] == other[name]
        for name in ("loss", "val_loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-5)
    for weight, other in zip(weights_of(run_dir), weights_of(finished), strict=True):
        np.testing.assert_allclose(weight, other, rtol=0, atol=1e-5)


# Stopped, killed


def handles_sigterm(process):
    """Whether a process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> signal.SIGTERM - 1 & 1)


def stop(process, run_dir):
    """Stops a run before its export; what it has said."""
    process.terminate()
    text = Path(f"{run_dir}.log")
    assert process.wait(DEADLINE) == 143, text.read_text()
    assert "Traceback" not in text.read_text()
    assert not (run_dir / "export").exists()
    return text.read_text()


@pytest.mark.campaign
def test_sigterm_before_anything_is_trained(small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    log = Path(f"{run_dir}.log")

    process = begin(small_dataset, run_dir)
    wait_until(lambda: handles_sigterm(process), process, "the handler")
    # As it is about to load TensorFlow, or as it does, with stderr held back.
    said = "stopped by SIGTERM; the same command goes on from the last checkpoint\n"
    assert stop(process, run_dir) in ("", said)
    assert not run_dir.exists()

    process = begin(small_dataset, run_dir)
    wait_until(lambda: "500 examples" in log.read_text(), process, "the first call")
    assert "goes on from the last checkpoint" in stop(process, run_dir)  # as it compiles
    assert lines_of(run_dir) == []


def test_sigterm_while_it_trains_and_exports_and_the_same_command_ends_the_same(
    finished, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    log = Path(f"{run_dir}.log")

    process = begin(small_dataset, run_dir)
    wait_until(lambda: len(lines_of(run_dir)) >= 2, process, "the second line")
    assert "stopped by SIGTERM after saving; the same command goes on from here" in stop(
        process, run_dir
    )
    stopped_after = lines_of(run_dir)
    assert 2 <= len(stopped_after) < EPOCHS
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert 2 * STEPS <= int(saved.stem[5:]) < EPOCHS * STEPS

    process = begin(small_dataset, run_dir)
    pattern = ".export.incomplete/*/saved_model.pb"
    wait_until(lambda: any(run_dir.glob(pattern)), process, "the export")
    assert "goes on from the last checkpoint" in stop(process, run_dir)
    assert "epoch 1/20" not in log.read_text()  # it did go on, not begin again
    assert lines_of(run_dir)[: len(stopped_after)] == stopped_after

    done = train(small_dataset, run_dir)
    assert done.returncode == 0, done.stderr
    assert "epoch 20/20" not in done.stderr  # nothing was left but the export
    assert result_of(run_dir) == result_of(finished)
    assert {k: v for k, v in events_of(run_dir).items() if k[0] != "examples_per_second"} == {
        k: v for k, v in events_of(finished).items() if k[0] != "examples_per_second"
    }
    assert not [name for name in helpers.tree(run_dir) if "incomplete" in name]


def test_sigkill_in_the_middle_ends_the_same(finished, small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    process = begin(small_dataset, run_dir, checkpoint_seconds=0)
    wait_until(lambda: len(lines_of(run_dir)) >= 3, process, "the third line")
    process.kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    assert len(lines_of(run_dir)) < EPOCHS

    done = train(small_dataset, run_dir, checkpoint_seconds=0)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/20" not in done.stderr  # it did go on, not begin again
    assert result_of(run_dir) == result_of(finished)


def test_two_processes_do_not_train_in_one_folder(small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    with storage.locked(run_dir):
        before = helpers.tree(run_dir)
        assert_one_line(train(small_dataset, run_dir), 75, str(run_dir), "another process")
        assert helpers.tree(run_dir) == before


# Input that is wrong


def test_a_run_that_diverges_names_the_loss(small_dataset, tmp_path):
    """Even in its very last step, whose own loss is still that of good weights."""
    done = train(small_dataset, tmp_path / "run", learning_rate=1e30, epochs=1, batch_size=500)
    where = "on the validation split after step 1, epoch 1"
    assert_one_line(done, 2, f"the loss is nan {where}", "--learning_rate")
    assert not (tmp_path / "run" / "export").exists()
    assert lines_of(tmp_path / "run") == []


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_dataset_is_refused_and_nothing_is_left(small_dataset, tmp_path):
    dataset = shutil.copytree(small_dataset, tmp_path / "dataset")
    flip_a_bit(dataset / "validation-00002-of-00003.tfrecord")
    done = train(dataset, tmp_path / "run")
    assert_one_line(done, 2, "validation-00002-of-00003.tfrecord", "checksum differs")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "missing"), (lambda path: path.write_bytes(b"x"), "has 1 bytes")],
)
def test_a_missing_or_cut_file_is_told_before_any_device_is_used(
    small_dataset, tmp_path, split, damage, message
):
    dataset = shutil.copytree(small_dataset, tmp_path / "dataset")
    damage(dataset / f"{split}-00001-of-00003.tfrecord")
    with pytest.raises(InputError, match=f"{split}-00001-of-00003.tfrecord: {message}"):
        execute(dataset, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


# Folders apart from the run folder


@pytest.fixture(scope="module")
def apart(small_dataset, tmp_path_factory):
    """Flags that name folders apart from a run folder, which such a run has filled. Read only."""
    folder = tmp_path_factory.mktemp("apart")
    given = {f"{name}_dir": folder / name / "a" / "b" for name in ("model", "checkpoint")}
    given |= {"tensorboard_dir": folder / "t" / "a" / "b", "epochs": 1}
    done = train(small_dataset, folder / "run" / "a" / "b", **given)
    assert done.returncode == 0, done.stderr
    return given


def test_folders_are_made_with_those_that_they_are_in(apart):
    assert list((apart["checkpoint_dir"]).glob("*.ckpt")) == [
        apart["checkpoint_dir"] / "step-00000063.ckpt"
    ]
    assert (apart["model_dir"] / "model.json").is_file()
    (events,) = apart["tensorboard_dir"].iterdir()
    assert events.name.startswith("events.out.tfevents.")


@pytest.mark.parametrize("kept", ["checkpoint_dir", "model_dir"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "stream"}, "input resident, not stream"),
        ({"seed": 23}, "seed 22, not 23"),
        ({"replicas": 1}, "replicas 2, not 1"),
    ],
)
def test_what_another_run_left_there_is_refused_and_nothing_is_written(
    apart, small_dataset, tmp_path, kept, changed, message
):
    before = helpers.tree(apart[kept])
    arguments = flags(small_dataset, tmp_path / "run", **{kept: apart[kept], "epochs": 1} | changed)
    done = helpers.run_python("-c", WITHOUT_TENSORFLOW, *arguments, env=ENVIRONMENT)
    assert_one_line(done, 2, f"{apart[kept]}: holds a run with {message}; expected a new folder")
    assert helpers.tree(apart[kept]) == before
    assert not (tmp_path / "run").exists()


def test_what_this_machine_decides_is_compared_before_anything_is_written(
    apart, small_dataset, tmp_path
):
    changed = {"checkpoint_dir": apart["checkpoint_dir"], "epochs": 1}
    arguments = flags(small_dataset, tmp_path / "run", **changed)
    arguments.remove("--replicas=2")
    done = helpers.run_cli("trainer.task", *arguments, env=ENVIRONMENT)
    assert_one_line(done, 2, f"{apart['checkpoint_dir']}: holds a run with devices ['CPU:0', 'C")
    assert not (tmp_path / "run").exists()


def without_examples(small_dataset, folder, split):
    """A copy of a dataset, whole but for one split that has no records."""
    dataset = shutil.copytree(small_dataset, folder)
    manifest = json.loads((dataset / "manifest.json").read_text())
    changed = manifest["splits"][split]
    changed |= {"num_examples": 0, "label_counts": [0] * 10}
    changed["shards"] = [shard | {"num_examples": 0} for shard in changed["shards"]]
    left = [Shard(**shard) for each in manifest["splits"].values() for shard in each["shards"]]
    manifest["dataset_id"] = dataset_id(left, manifest["class_names"])
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    return dataset


def test_a_dataset_without_train_examples_is_refused(small_dataset, tmp_path):
    dataset = without_examples(small_dataset, tmp_path / "dataset", "train")
    with pytest.raises(InputError, match="its train split has no examples"):
        execute(dataset, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_patience_without_a_validation_split_is_refused(small_dataset, tmp_path):
    dataset = without_examples(small_dataset, tmp_path / "dataset", "validation")
    with pytest.raises(InputError, match=r"--patience 2: expected 0, as .* has no validation"):
        execute(dataset, tmp_path / "run", patience=2)
