import dataclasses
import json
from pathlib import Path

import helpers
import pytest

from pipeline import __version__
from trainer import run_folder, task
from trainer.config import PRESETS, TrainConfig

FOLDERS = ["--dataset_dir", "data", "--run_dir", "run"]
TUTORIAL = {
    "preset": "core",
    "hidden_units": (700, 500),
    "activation": "relu",
    "initializer": "xavier",
    "dropout": 0.0,
    "loss": "softmax",
    "labels": "integer",
    "label_smoothing": 0.0,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "momentum": 0.0,
    "rho": 0.9,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "decay_epochs": 10.0,
    "decay_factor": 0.1,
    "ema_decay": 0.0,
    "clip_norm": 0.0,
    "gradients": "tape",
    "rotate": 0.0,
    "scale": 0.0,
    "shear": 0.0,
    "shift": 0.0,
    "elastic_alpha": 0.0,
    "elastic_sigma": 0.0,
    "train_on": "train",
    "patience": 0,
    "calm_epochs": 0,
    "batch_size": 128,
    "epochs": 10,
    "seed": 22,
    "replicas": None,
    "reproducible": False,
    "input": "auto",
    "tf32": False,
    "steps_per_call": 100,
    "initial_weights": None,
}


SMOOTH = {"label_smoothing": 0.1, "ema_decay": 0.99}


def run(*flags, **options):
    return helpers.run_cli("trainer.task", *flags, **options)


def assert_one_line(done, *parts):
    """Exit code 2, and one line on stderr that has every part."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("python -m trainer.task: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


# Flags to config


def test_defaults_are_the_tutorials():
    config = task.parse(FOLDERS)
    assert dataclasses.asdict(config.train) == TUTORIAL
    assert str(config.dataset_dir) == "data"
    assert config.places == run_folder.places(Path("run"), {}, {})
    assert (config.checkpoint_seconds, config.profile) == (10, False)
    assert not config.dry_run
    assert task.parse([*FOLDERS, "--preset", "core"]) == config


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--hidden_units", "64"], {"hidden_units": (64,)}),
        (["--hidden_units=30,20,10"], {"hidden_units": (30, 20, 10)}),
        (["--learning_rate", "3e-4"], {"learning_rate": 3e-4}),
        (["--beta_1", "0"], {"beta_1": 0.0}),  # zero is a value, not an absence
        (["--beta_2", "0.99"], {"beta_2": 0.99}),
        (["--epsilon", "1e-8"], {"epsilon": 1e-8}),
        (["--batch_size", "96", "--replicas", "3"], {"batch_size": 96, "replicas": 3}),
        (["--epochs", "1"], {"epochs": 1}),
        (["--seed", "0"], {"seed": 0}),
        (["--steps_per_call", "7"], {"steps_per_call": 7}),
        (["--activation", "tanh", "--initializer=he"], {"activation": "tanh", "initializer": "he"}),
        (["--dropout", "0.5", "--clip_norm", "1"], {"dropout": 0.5, "clip_norm": 1.0}),
        (["--loss", "sigmoid", "--labels", "one_hot"], {"loss": "sigmoid", "labels": "one_hot"}),
        (["--label_smoothing", ".1", "--ema_decay", ".99"], SMOOTH),
        (["--optimizer", "sgd", "--momentum", "0.9"], {"optimizer": "sgd", "momentum": 0.9}),
        (["--optimizer=rmsprop", "--rho=0.5"], {"optimizer": "rmsprop", "rho": 0.5}),
        (
            ["--optimizer", "adamw", "--weight_decay", "0.1"],
            {"optimizer": "adamw", "weight_decay": 0.1},
        ),
        (
            ["--schedule=step", "--decay_epochs=2.5", "--decay_factor=0.5", "--warmup_epochs=1"],
            {"schedule": "step", "decay_epochs": 2.5, "decay_factor": 0.5, "warmup_epochs": 1.0},
        ),
        (["--gradients", "manual"], {"gradients": "manual"}),
        (
            ["--rotate=15", "--scale=0.1", "--shear=0.2", "--shift=2"],
            {"rotate": 15.0, "scale": 0.1, "shear": 0.2, "shift": 2.0},
        ),
        (
            ["--elastic_alpha", "8", "--elastic_sigma", "4"],
            {"elastic_alpha": 8.0, "elastic_sigma": 4.0},
        ),
        (["--train_on", "train+validation"], {"train_on": "train+validation"}),
        (["--patience", "3"], {"patience": 3}),
        (["--reproducible"], {"reproducible": True}),
        (["--tf32", "--input", "stream"], {"tf32": True, "input": "stream"}),
    ],
)
def test_a_flag_replaces_the_presets_value_and_no_other(flags, changed):
    assert dataclasses.asdict(task.parse([*FOLDERS, *flags]).train) == TUTORIAL | changed


def test_where_and_how_a_run_writes(monkeypatch):
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "c")
    monkeypatch.setenv("AIP_MODEL_DIR", "other")
    flags = ["--model_dir=m", "--checkpoint_seconds=2.5", "--profile"]
    config = task.parse([*FOLDERS, *flags])
    given = {"model_dir": "m", "checkpoint_dir": "c"}
    assert config.places == run_folder.places(Path("run"), given, {})
    assert (config.checkpoint_seconds, config.profile) == (2.5, True)
    assert dataclasses.asdict(config.train) == TUTORIAL


def test_every_setting_has_a_flag():
    text = " ".join(run("--help").stdout.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in text
        if field.name != "preset":
            assert field.metadata["about"] in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_taken_as_it_is_and_overridden(name):
    folders = [] if name == "xor" else FOLDERS
    config = task.parse(["--preset", name, *folders])
    assert config.train == PRESETS[name]
    config = task.parse([*folders, "--epochs", "3", "--preset", name, "--dropout", "0.25"])
    calm = min(PRESETS[name].calm_epochs, 3)
    changed = {"epochs": 3, "dropout": 0.25, "calm_epochs": calm}
    assert config.train == dataclasses.replace(PRESETS[name], **changed)


def test_only_xor_has_no_folders():
    config = task.parse(["--preset", "xor"])
    assert (config.dataset_dir, config.places) == (None, None)


# The command


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--dataset_dir, --run_dir", "--help"]),
        ([*FOLDERS, "--epochs", "0"], ["--epochs 0"]),
        ([*FOLDERS, "--epochs", "1.5"], ["--epochs", "'1.5'"]),
        ([*FOLDERS, "--batch_size", "128", "--replicas", "3"], ["--batch_size 128", "3 replicas"]),
        ([*FOLDERS, "--learning_rate=-1"], ["--learning_rate -1"]),
        ([*FOLDERS, "--hidden_units", "x"], ["--hidden_units", "'x'", "700,500"]),
        ([*FOLDERS, "--preset", "huge"], ["--preset", "'huge'", "core"]),
        (["--dataset_dir", "d"], ["required: --run_dir ", "--help"]),
        (["--preset", "compact", "--run_dir", "r"], ["required: --dataset_dir "]),
        (["--preset", "xor", "--run_dir", "r"], ["--run_dir r: preset xor reads and writes no"]),
        (["--preset", "xor", "--model_dir", "m"], ["--model_dir m: preset xor reads and writes"]),
        (["--preset", "xor", "--checkpoint_seconds", "10"], ["--checkpoint_seconds 10.0: preset"]),
        (
            ["--preset", "xor", "--checkpoint_seconds", "0"],
            ["--checkpoint_seconds 0.0: preset xor"],
        ),
        (["--preset", "xor", "--profile"], ["--profile: preset xor reads and writes no files"]),
        ([*FOLDERS, "--preset", "accurate", "--tf32"], ["--tf32: expected no deformations"]),
        ([*FOLDERS, "--checkpoint_seconds", "-1"], ["--checkpoint_seconds", "at least 0, got -1"]),
        ([*FOLDERS, "--checkpoint_seconds", "inf"], ["at least 0, got inf"]),
        ([*FOLDERS, "--checkpoint_seconds", "x"], ["at least 0, got x"]),
        ([*FOLDERS, "--model_dir", "gs://b/m"], ["--model_dir: gs://b/m", "expected gs://bucket"]),
        ([*FOLDERS, "--model_dir", "s3://b/m"], ["--model_dir: s3://b/m", "local folder or gs://"]),
        (["--preset", "xor", "--replicas", "2"], ["--replicas 2: cannot be changed in preset xor"]),
        (["--preset", "xor", "--epochs", "0"], ["--epochs 0: expected 1 to 1000000"]),
        ([*FOLDERS, "--learning_rate", "1e39"], ["--learning_rate 1e+39: expected a number above"]),
        ([*FOLDERS, "--optimizer", "lion"], ["--optimizer lion: expected sgd, rmsprop, adam or"]),
        ([*FOLDERS, "--dropout", "1"], ["--dropout 1.0: expected at least 0 and below 1"]),
        ([*FOLDERS, "--dropout", "nan"], ["--dropout nan: expected at least 0 and below 1"]),
        ([*FOLDERS, "--momentum", "0.9"], ["--momentum 0.9: only --optimizer sgd or rmsprop"]),
        ([*FOLDERS, "--warmup_epochs", "11"], ["--warmup_epochs 11.0: expected at most the 10"]),
        ([*FOLDERS, "--reproducible", "yes"], ["yes"]),
        ([*FOLDERS, "--no_such_flag", "1"], ["--no_such_flag"]),
        ([*FOLDERS, "--epoch", "3"], ["--epoch"]),  # no abbreviations
        ([*FOLDERS, "stray"], ["stray"]),
        (
            ["--dataset_dir", "gs://b/d", "--run_dir", "r"],
            ["gs://b/d", "expected gs://bucket/path"],
        ),
        (
            ["--dataset_dir", "d", "--run_dir", "gs://b/r"],
            ["gs://b/r", "expected gs://bucket/path"],
        ),
        (["--dataset_dir", "d", "--run_dir", ""], ["empty name"]),
        (FOLDERS, ["data: no such folder"]),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(flags, parts, tmp_path):
    assert_one_line(run(*flags, cwd=tmp_path), *parts)
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    assert_one_line(run(*FOLDERS, cwd=tmp_path), "data: no manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_help_and_version():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m trainer.task")
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"trainer.task {__version__}\n"


def test_dry_run_prints_the_config_and_touches_nothing(tmp_path):
    done = run(*FOLDERS, "--dry_run", "--seed", "7", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == TUTORIAL | {"hidden_units": [700, 500], "seed": 7}
    done = run("--preset", "xor", "--dry_run", cwd=tmp_path)
    assert json.loads(done.stdout)["hidden_units"] == [4]
    assert not any(tmp_path.iterdir())
    assert_one_line(run(*FOLDERS, "--dry_run", "--epochs", "0", cwd=tmp_path), "--epochs 0")


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("trainer.task", ["apache_beam", "tensorflow"]),
        ("trainer.xor", ["apache_beam"]),
        ("trainer.start", ["apache_beam"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, banned):
    code = f"import sys, {module}; print([m for m in {banned} if m in sys.modules])"
    done = helpers.run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
