import dataclasses
import json
from pathlib import Path

import helpers
import pytest

from pipeline import checksums, storage
from pipeline.command import InputError
from pipeline.gcs import GcsPath
from trainer import run_folder, same_run
from trainer.checkpoints import Checkpoints, Progress
from trainer.config import PRESETS

CORE = dataclasses.replace(PRESETS["core"], schedule="constant")
GPU = ["GPU:0"]


def content(devices=GPU, dataset_id="d1", **changed):
    return run_folder.describe(
        dataclasses.replace(CORE, **{"replicas": 1, "input": "resident"} | changed),
        dataset_id,
        devices,
    )


def places(folder):
    return run_folder.places(folder, {}, {})


class Nothing:
    """What is trained, where nothing is."""

    def values(self):
        return []


def config_of(folder, **changed):
    (folder / "config.json").write_text(json.dumps(content(**changed)))


def checkpoint_of(folder, **changed):
    of_run = Checkpoints(folder / "checkpoints", Nothing(), run=content(**changed), seconds=0)
    of_run.save(Progress(), 10)


def model_of(folder, **changed):
    (folder / "export").mkdir()
    whole = content(**changed)
    own = {name: whole.pop(name) for name in ("dataset_id", "devices")}
    (folder / "export" / "model.json").write_text(json.dumps(own | {"config": whole}))


# What tells of a run that was begun, and the folder that it is in.
BEGUN = {
    "run": (config_of, "."),
    "checkpoints": (checkpoint_of, "checkpoints"),
    "model": (model_of, "export"),
}


def begun(folder, what="run", **changed):
    folder.mkdir(exist_ok=True)
    BEGUN[what][0](folder, **changed)
    return places(folder)


# Where things go


def test_everything_stands_in_the_run_folder(tmp_path):
    found = places(tmp_path)
    assert found.run == tmp_path
    assert found.config == tmp_path / "config.json"
    assert found.metrics == tmp_path / "metrics.jsonl"
    assert found.model == tmp_path / "export"
    assert found.checkpoints == tmp_path / "checkpoints"
    assert found.tensorboard == tmp_path / "tensorboard"


def test_vertex_names_folders_and_flags_come_before_it(tmp_path):
    environ = {
        "AIP_MODEL_DIR": str(tmp_path / "m/"),
        "AIP_CHECKPOINT_DIR": "/gcs/bucket/c",
        "AIP_TENSORBOARD_LOG_DIR": "",
    }
    flags = {"model_dir": None, "checkpoint_dir": "elsewhere"}
    found = run_folder.places(tmp_path, flags, environ)
    assert found.model == tmp_path / "m"
    assert str(found.checkpoints) == "elsewhere"
    assert found.tensorboard == tmp_path / "tensorboard"
    found = run_folder.places(tmp_path, {}, environ)
    assert str(found.checkpoints) == "/gcs/bucket/c"


VARIABLES = ["AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR"]


def test_vertex_names_folders_in_mounted_buckets(tmp_path):
    (tmp_path / "bucket").mkdir()
    environ = dict(
        zip(
            VARIABLES,
            ["gs://bucket/out/model", "gs://bucket/out/ckpt/", "gs://bucket"],
            strict=True,
        )
    )
    found = run_folder.places(Path("run"), {}, environ, mounts=tmp_path)
    assert found == run_folder.Places(
        run=Path("run"),
        model=tmp_path / "bucket" / "out" / "model",
        checkpoints=tmp_path / "bucket" / "out" / "ckpt",
        tensorboard=tmp_path / "bucket",
    )
    assert not any((tmp_path / "bucket").iterdir())


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket/../x", r"gs://bucket/../x: has an empty part, or \. or \.\. as one"),
        ("gs://", "gs://: expected gs://bucket/path"),
        ("s3://bucket/x", "s3://bucket/x: expected a local folder or gs://bucket/path"),
    ],
)
def test_what_is_no_folder_is_refused_by_its_variable(tmp_path, variable, text, message):
    (tmp_path / "bucket").mkdir()
    with pytest.raises(InputError, match=f"^{variable}: {message}"):
        run_folder.places(tmp_path, {}, {variable: text}, mounts=tmp_path)


def test_buckets_that_are_not_mounted_are_folders_themselves(tmp_path):
    (tmp_path / "mounted").mkdir()
    environ = {"AIP_MODEL_DIR": "gs://else/model/", "AIP_CHECKPOINT_DIR": "gs://mounted/c"}
    given = {"tensorboard_dir": "gs://mounted/t"}  # a flag means what it says
    found = run_folder.places(GcsPath("bucket", "run"), given, environ, mounts=tmp_path)
    assert found == run_folder.Places(
        run=GcsPath("bucket", "run"),
        model=GcsPath("else", "model"),
        checkpoints=tmp_path / "mounted" / "c",
        tensorboard=GcsPath("mounted", "t"),
    )
    inside = places(GcsPath("bucket", "run"))
    assert str(inside.model) == "gs://bucket/run/export"
    assert str(inside.metrics) == "gs://bucket/run/metrics.jsonl"


def test_a_bucket_itself_is_no_place_for_a_model(tmp_path):
    found = run_folder.places(tmp_path, {"model_dir": "gs://bucket"}, {})
    with pytest.raises(InputError, match=r"^gs://bucket: is not replaced as a whole; expected"):
        run_folder.require_writable(found)


@pytest.mark.parametrize("name", ["run", "model", "checkpoints", "tensorboard"])
def test_where_nothing_can_be_written_is_told(tmp_path, name):
    (tmp_path / "file").write_text("x")
    found = dataclasses.replace(places(tmp_path), **{name: tmp_path / "file" / "x" / "y"})
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        run_folder.require_writable(found)
    run_folder.require_writable(places(tmp_path / "a" / "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("run", "checkpoints", "apart"),
    [
        ("run", "run/checkpoints", False),
        ("run", "run/a/b", False),
        ("run", "run", False),
        ("run", "linked/checkpoints", False),
        ("run", "run2", True),
        ("run/a", "run", True),
        ("gs://bucket/run", "gs://bucket/run/checkpoints", False),
        ("gs://bucket/run", "gs://bucket/run2", True),
        ("gs://bucket", "gs://bucket/c", False),
        ("gs://bucket/run", "run", True),
        ("run", "gs://bucket/run", True),
    ],
)
def test_checkpoints_apart_from_the_run_have_a_lock_of_their_own(
    tmp_path, monkeypatch, run, checkpoints, apart
):
    monkeypatch.chdir(tmp_path)
    Path("linked").symlink_to("run")
    found = run_folder.places(storage.place(run), {"checkpoint_dir": checkpoints}, {})
    assert run_folder.locked(found) == ([found.checkpoints] if apart else []) + [found.run]


# Which run it is


SAME = [
    {},
    {"epochs": 11},
    {"replicas": None, "devices": None, "input": "auto"},  # as they are before TensorFlow loads
]
REPRODUCIBLE = [
    {"replicas": 2, "devices": ["GPU:0", "GPU:1"]},
    {"replicas": 4, "devices": ["GPU:0", "GPU:1", "GPU:2", "GPU:3"], "epochs": 20},
]
OTHER = [
    ({"epochs": 9}, "epochs 10, not 9"),
    ({"learning_rate": 2e-3}, "learning_rate 0.001, not 0.002"),
    ({"hidden_units": (700,)}, r"hidden_units \[700, 500\], not \[700\]"),
    ({"steps_per_call": 50}, "steps_per_call 100, not 50"),
    ({"devices": ["CPU:0"]}, r"devices \['GPU:0'\], not \['CPU:0'\]"),
    ({"replicas": 2}, "replicas 1, not 2"),
    ({"input": "stream"}, "input resident, not stream"),
    ({"dataset_id": "d2"}, "dataset_id d1, not d2"),
    ({"reproducible": True}, "reproducible False, not True"),
    ({"patience": 3}, "patience 0, not 3"),
]


@pytest.mark.parametrize("what", BEGUN)
@pytest.mark.parametrize("changed", SAME)
def test_the_same_run_is_taken_on(tmp_path, what, changed):
    run_folder.check_same_run(begun(tmp_path, what), content(**changed))


@pytest.mark.parametrize("what", BEGUN)
@pytest.mark.parametrize("changed", REPRODUCIBLE)
def test_with_reproducible_the_replicas_may_change(tmp_path, what, changed):
    run_folder.check_same_run(
        begun(tmp_path / "a", what, reproducible=True), content(reproducible=True, **changed)
    )
    with pytest.raises(InputError, match=r"holds a run with devices \['GPU:0'\], not"):
        run_folder.check_same_run(begun(tmp_path / "b", what), content(**changed))


def test_but_not_the_kind_of_device(tmp_path):
    asked = content(reproducible=True, devices=["CPU:0"])
    with pytest.raises(InputError, match="holds a run with devices"):
        run_folder.check_same_run(begun(tmp_path, reproducible=True), asked)


@pytest.mark.parametrize("what", BEGUN)
@pytest.mark.parametrize(("changed", "message"), OTHER)
def test_another_run_is_refused_by_its_difference(tmp_path, what, changed, message):
    found, folder = begun(tmp_path, what), tmp_path / BEGUN[what][1]
    whole = f"^{folder}: holds a run with {message}; expected a new folder, or the flags it was"
    with pytest.raises(InputError, match=whole):
        run_folder.check_same_run(found, content(**changed))


@pytest.mark.parametrize("what", BEGUN)
@pytest.mark.parametrize(
    ("began", "expected"), [("stream", "stream"), ("resident", "resident"), ("auto", None)]
)
def test_how_a_run_began_to_read_is_told_by_any_of_its_folders(tmp_path, what, began, expected):
    assert run_folder.earlier_input(places(tmp_path)) is None
    assert run_folder.earlier_input(begun(tmp_path, what, input=began)) == expected


@pytest.mark.parametrize(
    ("schedule", "calm_epochs", "allowed"),
    [("constant", 0, 1), ("step", 0, 1), ("cosine", 0, 0), ("constant", 1, 0), ("step", 3, 0)],
)
def test_more_epochs_are_another_run_where_something_ends_with_them(schedule, calm_epochs, allowed):
    settings = {"schedule": schedule, "calm_epochs": calm_epochs, "shift": 2.0}
    before, asked = content(**settings), content(**settings, epochs=20)
    assert same_run.difference(before, asked) == (None if allowed else "epochs")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"epochs": "x"}'])
def test_what_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"not as this version of the program|holds a run with"):
        run_folder.check_same_run(places(tmp_path), content())


def test_nothing_tells_of_a_run_that_was_not_begun(tmp_path):
    for folder in ("none", "file/run"):
        (tmp_path / "file").write_text("x")
        assert list(run_folder.begun(places(tmp_path / folder))) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 7}', "{}"])
def test_a_description_of_a_model_that_is_none_is_refused(tmp_path, text):
    found = begun(tmp_path, "model")
    path = found.model / "model.json"
    path.write_text(text)
    for check in (run_folder.check_same_run, run_folder.is_finished):
        with pytest.raises(InputError, match=f"^{path}: not as this version of the program writes"):
            check(found, content())


# Whether it is done


def test_a_run_is_finished_when_its_model_is_there(tmp_path):
    assert not run_folder.is_finished(places(tmp_path), content())
    (tmp_path / "export").mkdir()
    assert not run_folder.is_finished(places(tmp_path), content())
    (tmp_path / "export").rmdir()
    found = begun(tmp_path, "model")
    assert run_folder.is_finished(found, content())
    assert run_folder.is_finished(found, content(replicas=None, devices=None, input="auto"))
    assert not run_folder.is_finished(found, content(epochs=11))


def test_a_run_whose_model_is_damaged_is_not_finished(tmp_path):
    found = begun(tmp_path, "model")
    weights = found.model / "weights"
    weights.write_text("weights")
    noted = checksums.plain(checksums.sums(found.model))
    (found.model / "checksums.json").write_text(json.dumps(noted))
    assert run_folder.is_finished(found, content())
    weights.write_text("")
    assert not run_folder.is_finished(found, content())
    weights.write_text("weights")
    (found.model / "model.json").unlink()
    assert not run_folder.is_finished(found, content())
    assert run_folder.holds_model(found.model)
    (found.model / "model.json").write_text("")  # the other files of the run say whose it is
    assert not run_folder.is_finished(found, content())
    config_of(tmp_path)
    run_folder.check_same_run(found, content())
    with pytest.raises(InputError, match="holds a run with seed 22, not 23"):
        run_folder.check_same_run(found, content(seed=23))


def test_the_place_of_the_model_must_be_free_or_ours(tmp_path):
    found = begun(tmp_path, "model", input="stream")
    with pytest.raises(InputError, match=r"export: holds a run with input stream, not resident"):
        run_folder.is_finished(found, content())
    (found.model / "model.json").unlink()
    assert not run_folder.holds_model(found.model)
    (found.model / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds files"):
        run_folder.is_finished(found, content())
    assert helpers.tree(found.model) == {"mine.txt": b"mine"}


# Its files


def test_lines_are_those_given_whatever_the_file_held(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_folder.write_lines(path, ())
    assert path.read_text() == ""
    for epoch in (1, 2, 3):
        run_folder.append_line(path, {"epoch": epoch, "loss": 0.1})
    whole = path.read_text()
    kept = '{"epoch": 1, "loss": 0.1}\n{"epoch": 2, "loss": 0.1}\n'
    assert whole == kept + '{"epoch": 3, "loss": 0.1}\n'
    for torn in (whole[:-4], kept[:9], ""):
        path.write_text(torn)
        run_folder.write_lines(path, [json.loads(line) for line in kept.splitlines()])
        assert path.read_text() == kept


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    keep = {"config.json", "metrics.jsonl", ".lock", "checkpoints/step-00000010.ckpt", ".mine"}
    litter = {".config.json.x1", ".metrics.jsonl.abc", "checkpoints/.step-00000020.ckpt.q"}
    (tmp_path / "checkpoints").mkdir()
    for name in keep | litter:
        (tmp_path / name).write_text("x")
    (tmp_path / ".export.replaced").mkdir()  # killed as it took the place of this one
    (tmp_path / ".export.replaced" / "model.json").write_text("x")
    (tmp_path / ".export.incomplete").mkdir()
    run_folder.tidy(places(tmp_path))
    assert set(helpers.tree(tmp_path)) == keep | {"export/model.json"}
