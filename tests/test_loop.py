import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.util.event_pb2 import Event

from pipeline import storage
from pipeline.command import InputError
from pipeline.dataset import Shard, dataset_id, load_manifest
from trainer import data, loop
from trainer.checkpoints import Progress
from trainer.config import PRESETS
from trainer.gradients import Totals

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
    settings = {"dataset_dir": dataset, "run_dir": run_dir} | SETTINGS | changed
    return [f"--{name}={value}" for name, value in settings.items()]


def train(dataset, run_dir, **changed):
    return helpers.run_cli("trainer.task", *flags(dataset, run_dir, **changed), env=ENVIRONMENT)


def start(dataset, run_dir):
    """The same in the background; what it says goes beside the run folder."""
    with Path(f"{run_dir}.log").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.task", *flags(dataset, run_dir)],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(helpers.ROOT)},
            stdout=said,
            stderr=said,
        )


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
    """{(name, step): value} over all event files; a value written twice must be the same."""
    found = {}
    for path in sorted((run_dir / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                scalar = float(tf.make_ndarray(value.tensor))
                if value.tag != "examples_per_second":
                    assert found.get((value.tag, event.step), scalar) == scalar
                found[value.tag, event.step] = scalar
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
        "checkpoints/checkpoint",
        "checkpoints/ckpt-1197.data-00000-of-00001",
        "checkpoints/ckpt-1197.index",
        "checkpoints/ckpt-1260.data-00000-of-00001",
        "checkpoints/ckpt-1260.index",
        "config.json",
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
    assert json.loads((finished / "config.json").read_text()) == {
        "preset": "core",
        "hidden_units": [16, 12],
        "learning_rate": 1e-3,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "batch_size": 8,
        "epochs": EPOCHS,
        "seed": 22,
        "replicas": 2,
        "steps_per_call": 10,
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


def test_tensorboard_shows_the_lines_of_the_metrics(finished):
    (path,) = (finished / "tensorboard").iterdir()
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert Event.FromString(records[0]).file_version == "brain.Event:2"
    names = ("loss", "accuracy", "val_loss", "val_accuracy", "examples_per_second")
    expected = {
        (name, line["step"]): np.float32(line[name])
        for line in lines_of(finished)
        for name in names
    }
    assert events_of(finished) == expected
    assert len(records) == 1 + len(expected)


def test_again_is_already_trained_and_changes_nothing(finished, small_dataset):
    before = helpers.tree(finished)
    done = train(small_dataset, finished)
    assert done.returncode == 0, done.stderr
    assert "already trained" in done.stderr
    assert helpers.tree(finished) == before


def test_other_flags_on_the_same_folder_are_refused(finished, small_dataset):
    before = helpers.tree(finished)
    done = train(small_dataset, finished, seed=23)
    assert_one_line(done, 2, f"{finished}: holds a run with seed 22, not 23; expected a new folder")
    assert helpers.tree(finished) == before


# Stopped, killed


def test_sigterm_stops_after_saving_and_the_same_command_ends_the_same(
    finished, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    process = start(small_dataset, run_dir)
    wait_until(lambda: len(lines_of(run_dir)) >= 2, process, "the second line")
    process.terminate()
    assert process.wait(DEADLINE) == 143, Path(f"{run_dir}.log").read_text()
    assert "the same command goes on from here" in Path(f"{run_dir}.log").read_text()
    stopped_after = lines_of(run_dir)
    assert 2 <= len(stopped_after) < EPOCHS
    assert not (run_dir / "export").exists()

    done = train(small_dataset, run_dir)
    assert done.returncode == 0, done.stderr
    assert result_of(run_dir) == result_of(finished)
    assert lines_of(run_dir)[: len(stopped_after)] == stopped_after  # not trained once more
    assert {k: v for k, v in events_of(run_dir).items() if k[0] != "examples_per_second"} == {
        k: v for k, v in events_of(finished).items() if k[0] != "examples_per_second"
    }


def test_sigkill_in_the_middle_ends_the_same(finished, small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    process = start(small_dataset, run_dir)
    wait_until(lambda: len(lines_of(run_dir)) >= 2, process, "the second line")
    process.kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    assert len(lines_of(run_dir)) < EPOCHS

    done = train(small_dataset, run_dir)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/20" not in done.stderr  # it did go on, not begin again
    assert result_of(run_dir) == result_of(finished)


def test_two_processes_do_not_train_in_one_folder(small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    with storage.locked(run_dir):
        before = helpers.tree(run_dir)
        assert_one_line(train(small_dataset, run_dir), 75, str(run_dir), "another process")
        assert helpers.tree(run_dir) == before


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments_it_ends_the_same(finished, small_dataset, tmp_path, seed):
    """Three times stopped or killed, from before the first step to after the export."""
    run_dir = tmp_path / "run"
    chance = random.Random(seed)
    for _ in range(3):
        process = start(small_dataset, run_dir)
        log = Path(f"{run_dir}.log")
        wait_until(
            lambda p=process, log=log: p.poll() is not None or "500 examples" in log.read_text(),
            process,
            "the start",
        )
        try:
            process.wait(chance.uniform(0, 5))
        except subprocess.TimeoutExpired:
            process.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
        assert process.wait(DEADLINE) in (0, 143, -signal.SIGTERM, -signal.SIGKILL)
    done = train(small_dataset, run_dir)
    assert done.returncode == 0, done.stderr
    assert result_of(run_dir) == result_of(finished)


# Input that is wrong


def test_a_run_that_diverges_names_the_loss(small_dataset, tmp_path):
    """Even in its very last step, whose own loss is still that of good weights."""
    done = train(small_dataset, tmp_path / "run", learning_rate=1e30, epochs=1, batch_size=500)
    assert_one_line(
        done, 2, "the loss is nan on the validation split after epoch 1", "--learning_rate"
    )
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
        loop.execute(PRESETS["core"], dataset, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_a_dataset_without_train_examples_is_refused(small_dataset, tmp_path):
    dataset = shutil.copytree(small_dataset, tmp_path / "dataset")
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["splits"]["train"] = {"num_examples": 0, "label_counts": [0] * 10, "shards": []}
    left = [Shard(**shard) for split in manifest["splits"].values() for shard in split["shards"]]
    manifest["dataset_id"] = dataset_id(left, manifest["class_names"])
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its train split has no examples"):
        loop.execute(PRESETS["core"], dataset, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


# The config of a run folder


def mirrored(*devices):
    """As much of a strategy as a config needs."""
    names = [f"/job:localhost/replica:0/task:0/device:{device}" for device in devices]
    return SimpleNamespace(extended=SimpleNamespace(worker_devices=names))


def test_open_run_takes_the_same_run_again(small_dataset, tmp_path):
    manifest = load_manifest(small_dataset)
    loop.open_run(tmp_path, PRESETS["core"], mirrored("GPU:0"), manifest)
    before = helpers.tree(tmp_path)
    loop.open_run(tmp_path, PRESETS["core"], mirrored("GPU:0"), manifest)
    assert helpers.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 11}, "epochs 10, not 11"),
        ({"learning_rate": 2e-3}, "learning_rate 0.001, not 0.002"),
        ({"hidden_units": (700,)}, r"hidden_units \[700, 500\], not \[700\]"),
        ({"steps_per_call": 50}, "steps_per_call 100, not 50"),
        ({"devices": ["CPU:0"]}, r"devices \['GPU:0'\], not \['CPU:0'\]"),
        ({"dataset_id": "another"}, "dataset_id [0-9a-f]{32}, not another"),
    ],
)
def test_open_run_refuses_another_run(small_dataset, tmp_path, changed, message):
    manifest = load_manifest(small_dataset)
    loop.open_run(tmp_path, PRESETS["core"], mirrored("GPU:0"), manifest)
    changed = dict(changed)
    devices = changed.pop("devices", ["GPU:0"])
    other = dataclasses.replace(manifest, dataset_id=changed.pop("dataset_id", manifest.dataset_id))
    config = dataclasses.replace(PRESETS["core"], **changed)
    with pytest.raises(InputError, match=f"holds a run with {message}; expected a new folder"):
        loop.open_run(tmp_path, config, mirrored(*devices), other)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_open_run_refuses_what_is_no_config(small_dataset, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="not the config of a run"):
        loop.open_run(tmp_path, PRESETS["core"], mirrored("GPU:0"), load_manifest(small_dataset))


# The loop on its own, with steps that only count


class KilledError(Exception):
    pass


class CountingCheckpoints:
    """Keeps copies in a list; dies before the saves it is told."""

    def __init__(self, dies_before=()):
        self.saved, self.dies_before = [], set(dies_before)

    def restore(self):
        return copy.copy(self.saved[-1][1]) if self.saved else Progress()

    def save(self, progress, step):
        if step in self.dies_before:
            self.dies_before.remove(step)
            raise KilledError
        self.saved.append((step, copy.copy(progress)))


class CountingRun:
    """A run of 3 epochs of 5 steps, 2 in a call: its loss is the sum of the rows it is given."""

    def __init__(self, folder, *, dies_before=(), validates=True, **losses):
        self.calls, self.rows, self.events, self.stop = [], [], [], False
        self.losses = losses  # what comes out instead
        self.checkpoints = CountingCheckpoints(dies_before)
        self.metrics = folder / "metrics.jsonl"
        self.validates = validates
        self.stop_after = None

    def train(self, indices, mask):
        self.calls.append(len(indices))
        self.stop = len(self.calls) == self.stop_after
        rows = indices[mask == 1]
        self.rows.extend(rows)
        return Totals(self.losses.get("train", np.float64(rows.sum())), len(rows))

    def evaluate(self, indices, mask):
        return Totals(self.losses.get("validation", np.float64(indices[mask == 1].sum())), 3)

    def write(self, line):
        self.events.append(line)

    def run(self, stop_after=None):
        """Goes on from the last checkpoint; what `loop.train` returns."""
        self.stop, self.stop_after = False, stop_after and len(self.calls) + stop_after
        return loop.train(
            loop.Run(
                config=dataclasses.replace(
                    PRESETS["core"], batch_size=4, epochs=3, steps_per_call=2
                ),
                train=self.train,
                evaluate=self.evaluate if self.validates else None,
                evaluation_batch=3,
                train_size=17,
                validation_size=7,
                checkpoints=self.checkpoints,
                events=self,
                metrics=self.metrics,
                stop=lambda: self.stop,
            )
        )

    def lines(self):
        return lines_of(self.metrics.parent, timed=False)


@pytest.fixture
def whole(tmp_path_factory):
    run = CountingRun(tmp_path_factory.mktemp("whole"))
    assert run.run()
    return run


def test_every_row_of_every_epoch_is_seen_once_in_its_order(whole):
    assert whole.calls == [2, 2, 1] * 3
    orders = [data.epoch_order(22, epoch, 17) for epoch in range(3)]
    assert whole.rows == np.concatenate(orders).tolist()
    assert [line["loss"] for line in whole.lines()] == [sum(range(17)) / 17] * 3
    assert [line["accuracy"] for line in whole.lines()] == [1] * 3
    assert [line["val_loss"] for line in whole.lines()] == [sum(range(7)) / 7] * 3
    assert [line["val_accuracy"] for line in whole.lines()] == [3 / 7] * 3
    assert [line["step"] for line in whole.lines()] == [5, 10, 15]
    assert whole.checkpoints.saved == [(5 * e, Progress(epoch=e)) for e in (1, 2, 3)]
    assert [line["epoch"] for line in whole.events] == [1, 2, 3]


@pytest.mark.parametrize("calls", range(1, 9))
def test_stopped_after_any_call_it_goes_on_from_there(whole, tmp_path, calls):
    run = CountingRun(tmp_path)
    assert not run.run(stop_after=calls)
    assert sum(run.calls) == run.checkpoints.saved[-1][0]  # no step is taken twice
    assert len(run.lines()) == calls // 3
    assert run.run()
    assert run.calls == whole.calls
    assert run.rows == whole.rows
    assert run.lines() == whole.lines()
    steps = [step for step, _ in run.checkpoints.saved]
    assert steps == sorted(set(steps))  # no checkpoint takes the place of another


def test_stopped_after_the_last_call_it_is_done(whole, tmp_path):
    run = CountingRun(tmp_path)
    assert run.run(stop_after=9)
    assert run.lines() == whole.lines()


def test_stopped_again_and_again_it_gets_to_the_end(whole, tmp_path):
    run = CountingRun(tmp_path)
    attempts = 1
    while not run.run(stop_after=1):
        attempts += 1
    assert attempts == 9
    assert run.calls == whole.calls
    assert run.lines() == whole.lines()


@pytest.mark.parametrize("step", [5, 10, 15])
def test_killed_between_the_line_and_the_checkpoint_the_line_is_written_again(
    whole, tmp_path, step
):
    run = CountingRun(tmp_path, dies_before=[step])
    with pytest.raises(KilledError):
        run.run()
    assert len(run.lines()) == step // 5
    assert len(run.checkpoints.saved) == step // 5 - 1
    assert run.run()
    assert run.lines() == whole.lines()


def test_a_torn_line_is_dropped(whole, tmp_path):
    run = CountingRun(tmp_path, dies_before=[10])
    with pytest.raises(KilledError):
        run.run()
    text = run.metrics.read_text()
    run.metrics.write_text(text[: -len(text) // 4])
    assert run.run()
    assert run.lines() == whole.lines()


def test_without_validation_its_numbers_are_null(tmp_path):
    run = CountingRun(tmp_path, validates=False)
    assert run.run()
    for line in run.lines():
        assert line["val_loss"] is line["val_accuracy"] is None
    loop.describe_epoch(lines_of(tmp_path)[0], 3)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kind", "where"),
    [("train", "in epoch 1, steps 0 to 2;"), ("validation", "on the validation split after epoch")],
)
def test_a_loss_that_is_no_number_is_neither_saved_nor_written(tmp_path, kind, where, loss):
    run = CountingRun(tmp_path, **{kind: loss})
    with pytest.raises(InputError, match=f"the loss is {loss} {where}"):
        run.run()
    assert run.lines() == run.events == run.checkpoints.saved == []


def test_an_epoch_as_a_person_reads_it():
    line = dict.fromkeys(FIELDS) | {
        "epoch": 3,
        "loss": 0.12345,
        "accuracy": 0.98765,
        "seconds": 1.25,
        "examples_per_second": 48000.4,
    }
    assert (
        loop.describe_epoch(line, 10)
        == "epoch 3/10: loss 0.1235, accuracy 0.9877 (1.2 s, 48,000 examples/s)"
    )
    line |= {"val_loss": 0.2, "val_accuracy": 0.95}
    assert (
        loop.describe_epoch(line, 10) == "epoch 3/10: loss 0.1235, accuracy 0.9877,"
        " validation loss 0.2000, accuracy 0.9500 (1.2 s, 48,000 examples/s)"
    )


def test_a_second_sigterm_kills_unless_it_comes_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = loop.StopSignal()
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: the same one, handed on by a parent
        assert stop.received
        stop._since -= loop.SECOND_SIGNAL_SECONDS
        killed = []
        monkeypatch.setattr(signal, "raise_signal", killed.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert killed == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
