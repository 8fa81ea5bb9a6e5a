"""Stage 3 with a tiny SavedModel, written here, whose answers can be computed by hand."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import export_linear_model, run_cli, tree

from pipeline import evaluate, inference, options, preprocess
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.records import read_records


@pytest.fixture(scope="module")
def export_model(tmp_path_factory):
    """Makes the folder of a model that knows only a weight matrix [784, C]."""

    @functools.cache
    def made(seed, num_classes, scale):
        folder = tmp_path_factory.mktemp("made")
        return export_linear_model(folder, seed, num_classes=num_classes, scale=scale)

    def make(seed, num_classes=10, scale=0.1):
        folder = tmp_path_factory.mktemp(f"model{seed}") / "model"
        return shutil.copytree(made(seed, num_classes, scale), folder)

    return make


@pytest.fixture(scope="module")
def alone(export_model, small_dataset, tmp_path_factory):
    """Gives the report of a model of this seed, evaluated without any other, once."""

    @functools.cache
    def of(seed):
        return run(export_model(seed), small_dataset, tmp_path_factory.mktemp("alone"))

    return of


def run(model, dataset, report, **options):
    config = evaluate.EvaluateConfig(
        model_dir=model, dataset_dir=dataset, report_dir=report, **options
    )
    assert evaluate.execute(config) == 0
    return json.loads((report / "report.json").read_text())


def by_hand(model, dataset, split):
    """Labels and probabilities of a split, computed by NumPy."""
    import tensorflow as tf

    weights = tf.saved_model.load(str(model)).weights.numpy().astype(np.float64)
    shards = load_manifest(dataset).splits[split].shards
    records = [record for shard in shards for record in read_records(dataset, shard)]
    logits = np.stack([record.image for record in records]).astype(np.float64) @ weights
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    labels = np.array([record.label for record in records])
    return labels, exponentials / exponentials.sum(axis=1, keepdims=True)


def test_report_equals_numpy(export_model, small_dataset, tmp_path, capsys):
    model = export_model(1)
    report = run(model, small_dataset, tmp_path / "report")
    labels, probabilities = by_hand(model, small_dataset, "test")
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, predicted), 1)
    assert report["confusion_matrix"] == confusion.tolist()
    assert report["num_examples"] == 120
    assert report["accuracy"] == (predicted == labels).mean()
    log_loss = -np.log(probabilities[np.arange(120), labels]).mean()
    assert report["log_loss"] == pytest.approx(log_loss, rel=1e-5)
    assert report["model_id"] == "m1"
    assert report["baseline"] is None
    out = capsys.readouterr().out
    assert f"test accuracy {report['accuracy']:.4f}" in out
    assert str(tmp_path / "report/report.html") in out


def test_files_and_another_split(export_model, small_dataset, tmp_path):
    report = run(export_model(1), small_dataset, tmp_path, split="validation")
    assert (report["split"], report["num_examples"]) == ("validation", 100)
    assert sorted(tree(tmp_path)) == [
        "confusion_matrix.csv", "per_class.csv", "report.html", "report.json",
    ]  # fmt: skip


def test_the_same_rows_in_other_files_are_the_same_test_set(
    export_model, alone, small_idx, small_dataset, tmp_path
):
    other = tmp_path / "other"
    flags = options.PreprocessConfig(sources=(f"idx:{small_idx}",), output_dir=other, num_shards=2)
    assert preprocess.execute(flags) == 0
    model, ledger = export_model(1), tmp_path / "runs.jsonl"
    first = alone(1)
    assert (len(first["test_id"]), first["challengers_before"]) == (32, None)
    assert first["judged_before"] is None
    assert evaluate.count_challengers_before(ledger, "r", first["test_id"]) == 0  # none yet
    judged = {"outcome": "kept", "test_id": first["test_id"], "run_id": "p", "model_id": "1"}
    lines = [
        judged, judged | {"outcome": "promoted"}, judged | {"run_id": "q", "model_id": "2"},
        judged | {"run_id": "r", "model_id": "3"},
        judged | {"run_id": "s", "model_id": "4", "test_id": "another"},
        judged | {"run_id": "t", "outcome": "failed"},
    ]  # fmt: skip
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run(model, other, tmp_path / "b", ledger=ledger, run_id="r")
    assert again["dataset_id"] != first["dataset_id"]
    assert (again["test_id"], again["challengers_before"]) == (first["test_id"], 2)
    other_rows = run(model, other, tmp_path / "b", split="validation", ledger=ledger, run_id="r")
    assert (again["judged_before"], other_rows["judged_before"]) == (3, 3)
    assert other_rows["challengers_before"] == 0


def test_models_in_one_pass_are_as_each_alone(export_model, alone, small_dataset, tmp_path):
    one, two, three = (export_model(seed) for seed in (1, 2, 3))
    report = run(
        one,
        small_dataset,
        tmp_path / "a",
        baseline_dir=two,
        compare_dirs=(three, one),
    )
    assert (report["challengers_before"], len(report["others"])) == (None, 2)
    assert report["correct"] == alone(1)["correct"] != alone(2)["correct"]
    for seed, found in ((2, report["baseline"]), *zip((3, 1), report["others"], strict=True)):
        for key in ("model_id", "correct", "accuracy_ci95", "log_loss", "calibration_error"):
            assert found[key] == alone(seed)[key]
        assert found["per_class"] == alone(seed)["per_class"]
        assert found["slices"] == alone(seed)["slices"]
    labels, ours = by_hand(one, small_dataset, "test")
    _, theirs = by_hand(two, small_dataset, "test")
    for row in report["baseline"]["paired"]:
        of_class = labels == row["label"]
        one_right, two_right = (p.argmax(axis=1)[of_class] == row["label"] for p in (ours, theirs))
        assert row["only_model"] == (one_right & ~two_right).sum()
        assert row["only_baseline"] == (~one_right & two_right).sum()
        assert row["both"] == (one_right & two_right).sum()
    itself = report["others"][1]["paired"]
    assert [row["only_model"] + row["only_baseline"] for row in itself] == [0] * 10


def test_data_of_the_splits_and_drift(export_model, small_dataset, tmp_path):
    model, champion = export_model(1), export_model(2)
    report = run(model, small_dataset, tmp_path / "a", baseline_dir=champion)
    statistics = json.loads((small_dataset / "metrics.json").read_text())["statistics"]
    assert report["data"]["splits"]["train"]["ink"] == statistics["train"]["ink"]
    assert report["baseline"]["drift"] is None
    # As the registry does, beside a champion that was judged on this very dataset.
    shutil.copy(tmp_path / "a/report.json", champion)
    again = run(model, small_dataset, tmp_path / "a", baseline_dir=champion)
    nothing = {"labels": 0, "ink": 0, "stroke_width": 0}
    assert again["baseline"]["drift"] == dict.fromkeys(("train", "validation", "test"), nothing)


def test_a_dataset_without_statistics(export_model, small_dataset, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset, dataset)
    (dataset / "metrics.json").unlink()
    report = run(export_model(1), dataset, tmp_path / "report")
    assert report["data"]["splits"]["test"]["ink"] is None
    for measure in ("ink", "stroke_width"):  # from the rows themselves
        assert sum(row["support"] for row in report["slices"][measure]) == 120


def test_saved_predictions_are_the_models(export_model, small_dataset, tmp_path):
    others = {"baseline_dir": export_model(2), "compare_dirs": (export_model(3),)}
    run(export_model(1), small_dataset, tmp_path, save_predictions=True, **others)
    files = tree(tmp_path)
    assert len(files) == 4 + 3
    lines = []
    for index, shard in enumerate(load_manifest(small_dataset).splits["test"].shards):
        text = files[f"predictions/predictions-0000{index}-of-00003.jsonl"]
        found = [json.loads(line) for line in text.splitlines()]
        assert [line["id"] for line in found] == [r.id for r in read_records(small_dataset, shard)]
        lines += found
    labels, probabilities = by_hand(export_model(1), small_dataset, "test")
    assert [line["label"] for line in lines] == labels.tolist()
    assert [line["class"] for line in lines] == probabilities.argmax(axis=1).tolist()
    saved = np.array([line["probabilities"] for line in lines])
    assert np.abs(saved - probabilities).max() < 1e-6
    report = json.loads(files["report.json"])
    assert sum(line["label"] == line["class"] for line in lines) == report["correct"]


def test_predictions_are_replaced_whole_or_taken_away(export_model, small_dataset, tmp_path):
    model = export_model(1)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/of-another-model.jsonl").write_text("{}\n")
    run(model, small_dataset, tmp_path, save_predictions=True)
    names = [f"predictions-0000{index}-of-00003.jsonl" for index in range(3)]
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == names
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    run(model, small_dataset, tmp_path)
    assert not (tmp_path / "predictions").exists()


def test_a_failed_evaluation_leaves_no_predictions_of_its_own(
    export_model, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "read_blocks", lambda *args: iter(()))
    with pytest.raises(RuntimeError):
        run(export_model(1), small_dataset, tmp_path / "report", save_predictions=True)
    assert tree(tmp_path) == {}


def test_the_same_bytes_in_whatever_order_blocks_come(
    export_model, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "ROWS_PER_BLOCK", 7)
    options = {"baseline_dir": export_model(2), "save_predictions": True}
    run(export_model(1), small_dataset, tmp_path / "a", **options)
    read = inference.read_blocks
    monkeypatch.setattr(inference, "read_blocks", lambda *args: list(read(*args))[::-1])
    run(export_model(1), small_dataset, tmp_path / "b", **options)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for numbered in enumerate(load_manifest(small_dataset).splits["test"].shards):
        firsts = [block.first for block in read(numbered, str(small_dataset))]
        assert firsts == list(range(0, numbered[1].num_examples, 7)) and len(firsts) > 3


def test_a_damaged_shard_is_one_clear_line(export_model, small_dataset, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset, dataset)
    shard = next(dataset.glob("test-00001*"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"{shard.name}: its checksum differs"):
        run(export_model(1), dataset, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("given_as", ["model_dir", "baseline_dir", "compare_dirs"])
def test_a_model_of_other_classes_is_one_clear_line(
    export_model, small_dataset, tmp_path, given_as
):
    good, bad = export_model(1), export_model(3, num_classes=7)  # neither names its classes
    options = {given_as: (bad,) if given_as == "compare_dirs" else bad}
    with pytest.raises(InputError, match=f"{bad}: answers with 7 classes, the dataset has 10"):
        run(options.pop("model_dir", good), small_dataset, tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("given_as", ["model_dir", "baseline_dir", "compare_dirs"])
def test_a_model_of_other_class_names_is_told_before_anything_runs(
    export_model, small_dataset, tmp_path, given_as, monkeypatch
):
    monkeypatch.setattr("pipeline.runners.run", None)
    good, bad = export_model(1), export_model(3)
    names = [*"012345678", "nine"]
    description = {"model_id": "m", "dataset": {"class_names": names}}
    (bad / "model.json").write_text(json.dumps(description))
    options = {given_as: (bad,) if given_as == "compare_dirs" else bad}
    with pytest.raises(InputError, match=f"{bad}: label 9 is 'nine', in the dataset it is '9'"):
        run(options.pop("model_dir", good), small_dataset, tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_answers_that_are_no_probabilities_are_one_clear_line(
    export_model, small_dataset, tmp_path
):
    bad = export_model(4, scale=np.inf)
    with pytest.raises(InputError, match=f"{bad}: answers with what are no probabilities"):
        run(bad, small_dataset, tmp_path / "report")


def test_a_model_whose_weights_are_damaged_is_one_clear_line(export_model, small_dataset, tmp_path):
    bad = export_model(5)
    weights = bad / "variables/variables.index"
    weights.write_bytes(weights.read_bytes()[:10])
    with pytest.raises(InputError, match=f"{bad}: cannot be loaded as a SavedModel: "):
        run(bad, small_dataset, tmp_path / "report")
    weights.unlink()
    with pytest.raises(InputError, match=f"{bad}: no variables/variables.index"):
        run(bad, small_dataset, tmp_path / "report")


@pytest.mark.parametrize("kept", [0, 0.5])
def test_weights_cut_short_are_one_clear_line(export_model, small_dataset, tmp_path, kept):
    bad = export_model(5)
    weights = bad / "variables/variables.data-00000-of-00001"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    said = f"{bad}: cannot be loaded as a SavedModel: Read less bytes than requested"
    with pytest.raises(InputError, match=f"^{said}$"):
        inference.load_checked(bad)
    done = run_cli(
        "pipeline.evaluate", "--model_dir", bad, "--dataset_dir", small_dataset,
        "--report_dir", tmp_path / "report",
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, f"python -m pipeline.evaluate: error: {said}",
    )  # fmt: skip
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a model that answers with nothing but its images, under this name."""
    import tensorflow as tf

    def make(output="probabilities", named="serving_default"):
        module = tf.Module()

        @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="images")])
        def answer(images):
            return {output: tf.cast(images, tf.float32) / 255}

        folder = tmp_path_factory.mktemp("model")
        tf.saved_model.save(module, str(folder), signatures={named: answer})
        (folder / "model.json").write_text('{"model_id": "m"}')
        return folder

    return make


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "scores"}, "expected a SavedModel whose serving_default gives probabilities"),
        ({"named": "other"}, "expected a SavedModel whose serving_default gives probabilities"),
        ({}, "answers with 4 dimensions, expected 2"),
    ],
)
def test_a_model_that_answers_otherwise_is_one_clear_line(
    save, small_dataset, tmp_path, options, said
):
    model = save(**options)
    with pytest.raises(InputError, match=f"^{model}: {said}$"):
        run(model, small_dataset, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_graph_cut_short_is_one_clear_line(export_model, keep):
    model = export_model(1)
    path = model / "saved_model.pb"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"^{model}: cannot be loaded as a SavedModel: [^\n]+$"):
        inference.load_checked(model)


def test_a_failed_evaluation_leaves_no_earlier_report(export_model, small_dataset, tmp_path):
    run(export_model(1), small_dataset, tmp_path, save_predictions=True)
    with pytest.raises(InputError, match="no probabilities"):
        run(export_model(4, scale=np.inf), small_dataset, tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert not (tmp_path / "predictions").exists()


def test_every_record_has_to_be_scored(export_model, small_dataset, tmp_path, monkeypatch):
    read = inference.read_blocks
    monkeypatch.setattr(inference, "read_blocks", lambda *args: list(read(*args))[:-1])
    shard = load_manifest(small_dataset).splits["test"].shards[0]
    said = rf"{shard.file}: 0 records scored \(none\); the manifest says {shard.num_examples}"
    with pytest.raises(RuntimeError, match=said):
        run(export_model(1), small_dataset, tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"model.json": '{"model_id": "x"}'},
        {"model.json": '{"model_id": "x"}', "saved_model.pb": ""},
        {"model.json": "{", "saved_model.pb": ""},
    ],
    ids=["empty", "no graph", "no weights", "not JSON"],
)
def test_what_is_no_model(small_dataset, tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        run(tmp_path, small_dataset, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_flags():
    required = ["--model_dir", "m", "--dataset_dir", "d", "--report_dir", "r"]
    plain = evaluate.EvaluateConfig(
        model_dir=Path("m"), dataset_dir=Path("d"), report_dir=Path("r"), split="test"
    )
    assert evaluate.parse(required) == plain
    assert plain.others == ()
    more = ["--split=train", "--baseline_dir=b", "--compare_dir=x", "--compare_dir=y"]
    given = evaluate.parse([*required, *more, "--ledger=l", "--run_id=i", "--save_predictions"])
    assert given == dataclasses.replace(
        plain,
        split="train",
        baseline_dir=Path("b"),
        compare_dirs=(Path("x"), Path("y")),
        ledger=Path("l"),
        run_id="i",
        save_predictions=True,
    )
    assert given.others == (Path("b"), Path("x"), Path("y"))


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--split", "dev"], "--split"),
        (["--report", "x"], "--report"),
        (["--nonsense"], "--nonsense"),
        (["--report_dir", "s3://bucket/x"], "s3://bucket/x"),
        (["--ledger", "s3://bucket/x"], "s3://bucket/x"),
        (["--compare_dir", "s3://bucket/x"], "s3://bucket/x"),
    ],
)
def test_bad_command_lines(argv, word, capsys):
    required = ["--model_dir", "m", "--dataset_dir", "d", "--report_dir", "r"]
    with pytest.raises((SystemExit, InputError)) as raised:
        evaluate.parse(required + argv)
    assert word in (capsys.readouterr().err or str(raised.value))


def test_a_folder_that_is_no_dataset(export_model, tmp_path):
    done = run_cli(
        "pipeline.evaluate", "--model_dir", tmp_path, "--dataset_dir", tmp_path,
        "--report_dir", tmp_path / "report",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no manifest.json" in done.stderr
    assert not (tmp_path / "report").exists()
