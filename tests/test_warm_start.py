"""A run that starts from the weights of an exported model."""

import dataclasses
import json
import shutil

import helpers
import memory_bucket
import numpy as np
import pytest
import tensorflow as tf

from pipeline import gcs
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.gcs import GcsPath
from trainer import job, run_folder, same_run, task, trained, warm_start
from trainer.checkpoints import Progress
from trainer.config import PRESETS
from trainer.export import ServedModel, describe, weights_sha256
from trainer.model import MLP

CONFIG = dataclasses.replace(
    PRESETS["core"], hidden_units=(6, 4), replicas=1, input="resident", batch_size=50, epochs=1
)


EARLIER = {"dataset_id": "e" * 32, "splits": ["train", "validation"]}


def weights_of(seed):
    model = MLP(784, CONFIG.hidden_units, 10, seed=seed)
    return [weight.numpy() + 0.25 for weight in model.weights]


@pytest.fixture(scope="module")
def exported(small_dataset, tmp_path_factory):
    """(folder, weights) of a model. Read only."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    weights = weights_of(3)
    model = MLP(784, CONFIG.hidden_units, 10, seed=0)
    tf.saved_model.save(ServedModel(model.apply, weights), str(folder))
    content = describe(
        weights, CONFIG, load_manifest(small_dataset), Progress(epoch=1), learned_from=[EARLIER]
    )
    (folder / "model.json").write_text(json.dumps(content))
    return folder, weights


@pytest.fixture(scope="module")
def replicas():
    return tf.distribute.MirroredStrategy(["CPU:0"])


@pytest.fixture
def model(exported, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(exported[0], tmp_path / "model")


def change(folder, **changed):
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(content | changed))


def parse(*flags):
    folders = ["--dataset_dir=d", "--run_dir=r", "--model_dir=m", "--checkpoint_dir=c"]
    return task.parse([*folders, "--hidden_units=6,4", *flags])


def test_the_config_holds_the_checksum(exported):
    folder, weights = exported
    config = parse(f"--initial_weights={folder}")
    assert config.train.initial_weights == weights_sha256(weights)
    assert config.initial_weights == folder
    other = parse()
    assert (other.train.initial_weights, other.initial_weights) == (None, None)
    contents = [run_folder.describe(each.train, "d", None) for each in (config, other)]
    assert same_run.difference(*contents) == "initial_weights"


def test_the_weights_are_read_back_bit_for_bit(exported):
    folder, weights = exported
    found = warm_start.load(folder, weights_sha256(weights))
    assert [weight.dtype for weight in found] == [np.float32] * 6
    for weight, expected in zip(found, weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_other_widths_are_refused_before_anything_is_read(exported):
    with pytest.raises(InputError, match=r"its hidden layers are 6,4 wide; expected 6,5"):
        task.parse(
            ["--dataset_dir=d", "--run_dir=r", "--hidden_units=6,5",
             f"--initial_weights={exported[0]}"]
        )  # fmt: skip


def test_a_model_in_a_bucket_is_one_in_a_folder(model, exported, monkeypatch):
    weights = exported[1]
    bucket = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: bucket)
    for name, content in helpers.tree(model).items():
        bucket.store(memory_bucket.Blob(bucket, f"models/m/{name}"), content)
    config = parse("--initial_weights=gs://bucket/models/m/")
    assert config.initial_weights == GcsPath("bucket", "models/m")
    assert config.train.initial_weights == weights_sha256(weights)
    found = warm_start.load(config.initial_weights, weights_sha256(weights))
    for weight, expected in zip(found, weights, strict=True):
        np.testing.assert_array_equal(weight, expected)
    del bucket.objects["models/m/variables/variables.index"]
    with pytest.raises(InputError) as refused:
        warm_start.load(config.initial_weights, weights_sha256(weights))
    said = str(refused.value)
    assert said.startswith("--initial_weights gs://bucket/models/m: its weights cannot be read: ")
    assert "gs://bucket/models/m/variables/variables" in said
    assert "/tmp" not in said
    del bucket.objects["models/m/model.json"]
    with pytest.raises(InputError, match=r"gs://bucket/models/m: no model\.json of a model there"):
        parse("--initial_weights=gs://bucket/models/m")
    assert bucket.changes == 0


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"weights_sha256": 1, "config": {}, "dataset": {}}']
)
def test_what_is_no_model_is_refused(model, content):
    path = model / "model.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(InputError, match=rf"--initial_weights {model}: no model.json of a model"):
        parse(f"--initial_weights={model}")


def test_weights_that_are_not_the_described_ones_are_refused(model):
    change(model, weights_sha256="0" * 64)
    checksum = parse(f"--initial_weights={model}").train.initial_weights
    with pytest.raises(InputError, match=r"its weights are not those that its model\.json names"):
        warm_start.load(model, checksum)
    shutil.rmtree(model / "variables")
    with pytest.raises(InputError, match="its weights cannot be read"):
        warm_start.load(model, checksum)


@pytest.mark.parametrize("kept", [0, 0.5])
def test_weights_cut_short_are_refused(model, kept):
    checksum = parse(f"--initial_weights={model}").train.initial_weights
    path = model / "variables/variables.data-00000-of-00001"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=f"^--initial_weights {model}: its weights cannot be read"):
        warm_start.load(model, checksum)


def test_other_classes_are_one_line_and_leave_nothing(model, small_dataset, tmp_path):
    content = json.loads((model / "model.json").read_text())
    change(model, dataset=content["dataset"] | {"class_names": list("abcdefghij")})
    done = helpers.run_cli(
        "trainer.task", "--dataset_dir", small_dataset, "--run_dir", tmp_path / "run",
        "--hidden_units=6,4", "--initial_weights", model,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"python -m trainer.task: error: --initial_weights {model}: its classes are"
        " a b c d e f g h i j; expected those of the dataset, 0 1 2 3 4 5 6 7 8 9\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_it_has_learned_from(model, small_dataset):
    own = {"dataset_id": load_manifest(small_dataset).dataset_id, "splits": ["train"]}
    assert warm_start.learned_from(model) == [EARLIER, own]
    manifest = load_manifest(small_dataset)
    both = dataclasses.replace(CONFIG, train_on="train+validation")
    known = warm_start.learned_from(model)
    made = describe(weights_of(3), both, manifest, Progress(epoch=1), learned_from=known)
    assert made["learned_from"] == [*known, own | {"splits": ["train", "validation"]}]
    again = describe(weights_of(3), CONFIG, manifest, Progress(epoch=1), learned_from=known)
    assert again["learned_from"] == known
    for nothing in (None, []):
        change(model, learned_from=nothing)
        assert warm_start.learned_from(model) == [{"dataset_id": None, "splits": []}]


def test_preset_xor_has_none():
    with pytest.raises(InputError, match="preset xor reads and writes no files"):
        task.parse(["--preset=xor", "--initial_weights=m"])


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_training_begins_with_them_and_so_does_their_moving_average(
    ema_decay, exported, replicas, small_dataset
):
    folder, weights = exported
    config = dataclasses.replace(CONFIG, ema_decay=ema_decay)
    splits = job.open_splits(config, small_dataset, load_manifest(small_dataset))
    built = trained.build(config, replicas, splits, 10, warm_start.load(
        folder, weights_sha256(weights)
    ))  # fmt: skip
    for found, expected in zip(built.evaluated(), weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    cold = trained.build(config, replicas, splits, 10)
    assert not np.array_equal(cold.evaluated()[0], weights[0])


def test_a_warm_run_is_resumed_and_refuses_another_start(exported, model, small_dataset, tmp_path):
    flags = (
        "--dataset_dir", small_dataset, "--run_dir", tmp_path / "run", "--hidden_units=6,4",
        "--epochs=2", "--batch_size=50", "--learning_rate=1e-12",
    )  # fmt: skip
    folder, weights = exported
    done = helpers.run_cli("trainer.task", *flags, "--initial_weights", folder)
    assert done.returncode == 0, done.stderr
    export = tmp_path / "run/export"
    description = json.loads((export / "model.json").read_text())
    assert description["config"]["initial_weights"] == weights_sha256(weights)
    own = {"dataset_id": load_manifest(small_dataset).dataset_id, "splits": ["train"]}
    assert description["learned_from"] == [EARLIER, own]
    ended = warm_start.load(export, description["weights_sha256"])
    for found, expected in zip(ended, weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    done = helpers.run_cli("trainer.task", *flags, "--initial_weights", folder)
    assert (done.returncode, done.stderr) == (0, f"{tmp_path}/run: already trained and exported\n")
    done = helpers.run_cli("trainer.task", *flags)
    assert done.returncode == 2
    assert f"holds a run with initial_weights {weights_sha256(weights)}, not None" in done.stderr
