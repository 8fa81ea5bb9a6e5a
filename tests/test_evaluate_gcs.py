"""Stage 3 with its folders in a bucket, here one in memory: the report of a local run."""

import dataclasses
import json
import shutil

import helpers
import memory_bucket
import numpy as np
import pytest

from pipeline import checksums, evaluate, gcs, inference, storage, versions
from pipeline.command import InputError, LockedError
from pipeline.gcs import GcsPath

ROOT = GcsPath("bucket", "root")
LEDGER = [{"run_id": run, "outcome": "kept", "test_id": "other"} for run in "ab"]


def promote(folder):
    """Puts beside a model what the registry notes of it."""
    version = versions.Version(
        version=3, path="models/3", model_id="m2", weights_sha256="w", dataset_id="d", run_id="r",
        accuracy=0.5, class_names=list("0123456789"), sources=["digits"],
        files={
            name: checksums.file_sum(content) for name, content in helpers.tree(folder).items()
        },
    )  # fmt: skip
    (folder / versions.VERSION_FILE).write_text(versions.version_json(version))


@pytest.fixture(scope="module")
def here(small_dataset, tmp_path_factory):
    """A local root with all that an evaluation reads, and its report. Read only."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(small_dataset, root / "dataset")
    for seed, name in enumerate(("export", "champion", "third"), start=1):
        helpers.export_linear_model(root / name, seed)
    promote(root / "champion")
    (root / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LEDGER))
    assert evaluate.execute(config_of(root)) == 0
    return root


def config_of(root, **changed):
    config = evaluate.EvaluateConfig(
        model_dir=root / "export",
        dataset_dir=root / "dataset",
        report_dir=root / "report",
        baseline_dir=root / "champion",
        compare_dirs=(root / "third",),
        ledger=root / "runs.jsonl",
        run_id="r",
        save_predictions=True,
    )
    return dataclasses.replace(config, **changed)


def alone(root, **changed):
    """One model, and nothing beside its report."""
    plain = {"baseline_dir": None, "compare_dirs": (), "ledger": None, "save_predictions": False}
    return config_of(root, **plain | changed)


@pytest.fixture
def bucket(here, monkeypatch):
    """A bucket that has the same root, but for the report."""
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.delenv("DIGITS_CACHE_DIR", raising=False)
    memory_bucket.put_tree(memory, here, "root")
    for name in list(memory.objects):
        if name.startswith("root/report/"):
            del memory.objects[name]
    return memory


def report_in(memory):
    prefix = "root/report/"
    found = memory.contents().items()
    return {name.removeprefix(prefix): data for name, data in found if name.startswith(prefix)}


def test_everything_in_a_bucket(here, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = bucket.contents()
    assert evaluate.execute(config_of(ROOT)) == 0
    found = report_in(bucket)
    assert found == helpers.tree(here / "report")
    assert len(found) == 4 + 3
    after = {f"root/report/{name}": content for name, content in found.items()}
    assert bucket.contents() == before | after
    assert list(tmp_path.iterdir()) == []  # of the models' copies, none is left
    assert "report: gs://bucket/root/report/report.html (" in capsys.readouterr().out
    for content in found.values():
        assert b"gs://" not in content and str(here).encode() not in content


@pytest.mark.parametrize("local", ["model_dir", "dataset_dir", "report_dir"])
def test_a_mixture(local, here, bucket, tmp_path):
    place = tmp_path / "report" if local == "report_dir" else getattr(config_of(here), local)
    assert evaluate.execute(config_of(ROOT, **{local: place})) == 0
    found = helpers.tree(place) if local == "report_dir" else report_in(bucket)
    assert found == helpers.tree(here / "report")


def test_models_are_kept_in_the_cache(here, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("DIGITS_CACHE_DIR", str(tmp_path / "kept"))
    for _ in range(2):
        assert evaluate.execute(config_of(ROOT)) == 0
        assert report_in(bucket) == helpers.tree(here / "report")
        kept = list((tmp_path / "kept").iterdir())
        assert len(kept) == 3
        assert helpers.tree(here / "export") in [helpers.tree(folder) for folder in kept]


def test_a_report_appears_with_its_last_file(bucket):
    seen = []
    bucket.before = lambda _: seen.append(report_in(bucket))
    for name in ("old.jsonl", "predictions-00000-of-00003.jsonl"):
        storage.write_atomic(ROOT / "report/predictions" / name, b"old")
    storage.write_atomic(ROOT / "report/report.json", b"old")
    assert evaluate.execute(alone(ROOT, save_predictions=True)) == 0
    final = report_in(bucket)
    assert len(final) == 4 + 3 and final["report.json"] != b"old"
    at = next(i for i, found in enumerate(seen) if "report.json" not in found and i > 3)
    assert all(found.get("report.json") in (None, b"old") for found in seen[:at])
    for found in seen[at:]:
        assert "report.json" not in found or found == final


def spoil(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    storage.write_atomic(path, bytes(content))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("dataset/test-00001-of-00003.tfrecord", "its checksum differs from the manifest's"),
        ("champion/saved_model.pb", "has another checksum than it was published with"),
        (
            "champion/variables/variables.data-00000-of-00001",
            "has another checksum than it was published with",
        ),
    ],
)
def test_what_is_damaged_in_a_bucket_is_one_clear_line(bucket, file, said):
    storage.write_atomic(ROOT / "report/report.json", b"old")
    spoil(ROOT / file)
    with pytest.raises(InputError) as caught:
        evaluate.execute(config_of(ROOT))
    assert f"gs://bucket/root/{file}: {said}" in str(caught.value)
    assert report_in(bucket) == {}
    assert not [name for name in bucket.objects if ".incomplete" in name]


def test_a_model_that_cannot_be_loaded_is_named_as_the_user_does(bucket):
    (ROOT / "third/variables/variables.index").write_bytes(b"short")
    with pytest.raises(InputError) as caught:
        inference.SavedModelsHandler([ROOT / "third"], 10).load_model()
    said = str(caught.value)
    assert said.startswith("gs://bucket/root/third: cannot be loaded as a SavedModel: ")
    assert "digits-" not in said and len(said.splitlines()) == 1


def test_a_local_promoted_model_is_held_to_its_checksums_too(here, tmp_path):
    folder = shutil.copytree(here / "champion", tmp_path / "3")
    inference.load_checked(folder)
    (folder / "report.json").write_text("{}")
    with pytest.raises(InputError, match=f"{folder}/report.json: belongs to no model"):
        inference.load_checked(folder)
    (folder / "version.json").write_text("{}")
    with pytest.raises(InputError, match=f"{folder}/version.json: cannot be read as a version"):
        inference.load_checked(folder)


def test_weights_are_those_that_the_description_names(bucket, tmp_path):
    import tensorflow as tf

    from trainer.export import ServedModel, weights_sha256

    weights = [np.full((784, 10), 0.5, np.float32), np.arange(10, dtype=np.float32)]
    model = ServedModel(lambda given, x: x @ given[0] + given[1], weights)
    folder = tmp_path / "model"
    signatures = {"serving_default": model.serve_images}
    tf.saved_model.save(model, str(folder), signatures=signatures)
    description = {"model_id": "m", "weights_sha256": weights_sha256(weights)}
    (folder / "model.json").write_text(json.dumps(description))
    place = memory_bucket.put_tree(bucket, folder, "export")
    loaded = inference.load_checked(place)
    assert [each.numpy().tolist() for each in loaded.weights] == [w.tolist() for w in weights]
    description["weights_sha256"] = weights_sha256(weights[::-1])
    storage.write_atomic(place / "model.json", json.dumps(description))
    (folder / "model.json").write_text(json.dumps(description))
    for each in (place, folder):
        with pytest.raises(InputError) as caught:
            inference.load_checked(each)
        assert str(caught.value) == (f"{each}: its weights are not those that its model.json names")


# What is refused


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_a_folder_that_holds_more_than_a_report(kind, here, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runners.run", None)
    folder = tmp_path / "report" if kind == "local" else ROOT / "report"
    if kind == "local":
        folder.mkdir()
    for name in ("report.json", "notes.txt"):
        storage.write_atomic(folder / name, b"mine")
    with pytest.raises(InputError) as caught:
        evaluate.execute(alone(here, report_dir=folder))
    assert str(caught.value) == (
        f"{folder}: holds notes.txt, which is no part of a report; expected a folder of its own,"
        " which is replaced as a whole"
    )
    assert storage.walk(folder) == {"notes.txt": 4, "report.json": 4}
    with pytest.raises(InputError, match=rf"{folder / 'notes.txt'}: is a file; expected a folder"):
        evaluate.require_only_ours(folder / "notes.txt")


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_two_at_one_report(kind, here, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runners.run", None)
    folder = tmp_path / "report" if kind == "local" else ROOT / "report"
    for name in ("report.json", "report.html"):
        path = folder / name
        storage.write_atomic(path, b"whole")
    with storage.locked(folder.parent / ".report.incomplete"), pytest.raises(LockedError) as caught:
        evaluate.execute(alone(here, report_dir=folder))
    assert caught.value.exit_code == 75
    assert storage.walk(folder) == {"report.html": 5, "report.json": 5}


@pytest.mark.parametrize("flag", ["model_dir", "baseline_dir", "dataset_dir"])
def test_what_is_not_there(flag, here, bucket, monkeypatch):
    monkeypatch.setattr("pipeline.runners.run", None)
    with pytest.raises(InputError, match="gs://bucket/none: no ") as caught:
        evaluate.execute(config_of(ROOT, **{flag: GcsPath("bucket", "none")}))
    assert len(str(caught.value).splitlines()) == 1
    assert report_in(bucket) == {}


def test_flags():
    given = evaluate.parse(
        [
            *("--model_dir=gs://b-1/m", "--dataset_dir=gs://b-2/d", "--report_dir=gs://b-3/r/"),
            *("--baseline_dir=gs://b-4/b", "--compare_dir=c", "--ledger=gs://b-5/runs.jsonl"),
        ]
    )
    assert (given.model_dir, given.dataset_dir) == (GcsPath("b-1", "m"), GcsPath("b-2", "d"))
    assert (given.report_dir, given.baseline_dir) == (GcsPath("b-3", "r"), GcsPath("b-4", "b"))
    assert str(given.compare_dirs[0]) == "c"
    assert given.ledger == GcsPath("b-5", "runs.jsonl")


@pytest.mark.parametrize("text", ["http://b/m", "https://b/m", "gs://b/m", "gs://bucket/a//b"])
def test_folders_of_other_kinds(text):
    for flag in ("model_dir", "dataset_dir", "report_dir", "baseline_dir", "compare_dir", "ledger"):
        flags = {"model_dir": "m", "dataset_dir": "d", "report_dir": "r", flag: text}
        with pytest.raises(InputError, match=f"^{text}: "):
            evaluate.parse([f"--{name}={value}" for name, value in flags.items()])
