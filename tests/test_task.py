import dataclasses
import json

import helpers
import pytest

from pipeline import __version__
from pipeline.command import InputError
from trainer import task
from trainer.config import PRESETS, TrainConfig, check

FOLDERS = ["--dataset_dir", "data", "--run_dir", "run"]
TUTORIAL = {
    "preset": "core",
    "hidden_units": (700, 500),
    "learning_rate": 1e-3,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "batch_size": 128,
    "epochs": 10,
    "seed": 22,
    "replicas": None,
    "steps_per_call": 100,
}


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
    assert (str(config.dataset_dir), str(config.run_dir)) == ("data", "run")
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
    ],
)
def test_a_flag_replaces_the_presets_value_and_no_other(flags, changed):
    assert dataclasses.asdict(task.parse([*FOLDERS, *flags]).train) == TUTORIAL | changed


def test_every_setting_has_a_flag():
    text = run("--help").stdout
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"batch_size": -1}, "--batch_size -1: expected at least 1"),
        ({"steps_per_call": 0}, "--steps_per_call 0: expected at least 1"),
        ({"hidden_units": ()}, "--hidden_units : expected widths of at least 1"),
        ({"hidden_units": (5, 0)}, "--hidden_units 5,0: expected widths of at least 1"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0: expected a number above 0"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0: expected a number above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: expected a number above 0"),
        ({"learning_rate": float("inf")}, "--learning_rate inf: expected a number above 0"),
        ({"beta_1": 1.0}, "--beta_1 1.0: expected at least 0 and below 1"),
        ({"beta_2": -0.1}, "--beta_2 -0.1: expected at least 0 and below 1"),
        ({"beta_2": float("nan")}, "--beta_2 nan: expected at least 0 and below 1"),
        ({"epsilon": 0.0}, "--epsilon 0.0: expected a number above 0"),
        ({"epsilon": float("nan")}, "--epsilon nan: expected a number above 0"),
        ({"seed": -1}, "--seed -1: expected 0 to 2147483647"),
        ({"seed": 2**31}, "--seed 2147483648: expected 0 to 2147483647"),
        ({"replicas": 0}, "--replicas 0: expected at least 1"),
        ({"replicas": 3}, "--batch_size 128: expected a multiple of the 3 replicas"),
    ],
)
def test_a_value_without_sense_is_named(changed, message):
    with pytest.raises(InputError) as error:
        check(dataclasses.replace(PRESETS["core"], **changed))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 1, "batch_size": 1, "steps_per_call": 1, "hidden_units": (1,)},
        {"seed": 2**31 - 1, "beta_1": 0.0, "beta_2": 0.0, "epsilon": 1e-30},
        {"replicas": 128, "learning_rate": 1e-30},
    ],
)
def test_values_at_the_edge_make_sense(changed):
    config = dataclasses.replace(PRESETS["core"], **changed)
    assert check(config) is config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_sense_and_know_their_names(name):
    assert check(PRESETS[name]).preset == name


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
        ([*FOLDERS, "--no_such_flag", "1"], ["--no_such_flag"]),
        ([*FOLDERS, "--epoch", "3"], ["--epoch"]),  # no abbreviations
        ([*FOLDERS, "stray"], ["stray"]),
        (["--dataset_dir", "gs://b/d", "--run_dir", "r"], ["gs://b/d", "local folder"]),
        (["--dataset_dir", "d", "--run_dir", "gs://b/r"], ["gs://b/r", "local folder"]),
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
    assert not any(tmp_path.iterdir())
    assert_one_line(run(*FOLDERS, "--dry_run", "--epochs", "0", cwd=tmp_path), "--epochs 0")


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("trainer.task", ["apache_beam", "tensorflow"]),
        ("trainer.loop", ["apache_beam"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, banned):
    code = f"import sys, {module}; print([m for m in {banned} if m in sys.modules])"
    done = helpers.run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
