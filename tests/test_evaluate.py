"""Stage 3 with a tiny SavedModel, written here, whose answers can be computed by hand."""

import json
import shutil

import numpy as np
import pytest
from helpers import run_cli, tree

from pipeline import evaluate, inference
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.records import SCALE_TABLE, read_records


@pytest.fixture(scope="module")
def export_model(tmp_path_factory):
    """Makes the folder of a model that knows only a weight matrix [784, C]."""
    import tensorflow as tf

    class Linear(tf.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = tf.Variable(weights)
            self.table = tf.constant(SCALE_TABLE)

        @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="images")])
        def serve(self, images):
            x = tf.gather(self.table, tf.cast(tf.reshape(images, [-1, 784]), tf.int32))
            probabilities = tf.nn.softmax(x @ self.weights)
            return {"classes": tf.argmax(probabilities, -1), "probabilities": probabilities}

    def make(seed, num_classes=10):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        weights = np.random.default_rng(seed).normal(0, 0.1, (784, num_classes))
        module = Linear(weights.astype(np.float32))
        tf.saved_model.save(module, str(folder), signatures=module.serve)
        (folder / "model.json").write_text(json.dumps({"model_id": f"m{seed}"}))
        return folder

    return make


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


def test_baseline_is_scored_on_the_same_rows(export_model, small_dataset, tmp_path):
    one, other = export_model(1), export_model(2)
    report = run(one, small_dataset, tmp_path / "a", baseline_dir=other)
    alone = run(other, small_dataset, tmp_path / "b")
    assert report["baseline"]["model_id"] == "m2"
    assert report["baseline"]["correct"] == alone["correct"]
    assert report["correct"] != alone["correct"]


def test_the_same_bytes_however_the_rows_are_spread(export_model, small_dataset, tmp_path):
    model = export_model(1)
    run(model, small_dataset, tmp_path / "a")
    done = run_cli(
        "pipeline.evaluate", "--model_dir", model, "--dataset_dir", small_dataset,
        "--report_dir", tmp_path / "b", "--direct_num_workers=2",
        "--direct_running_mode=multi_processing",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


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


def test_a_model_of_other_classes_is_one_clear_line(export_model, small_dataset, tmp_path):
    with pytest.raises(InputError, match="answers with 7 classes, the dataset has 10"):
        run(export_model(3, num_classes=7), small_dataset, tmp_path / "report")


def test_a_failed_evaluation_leaves_no_earlier_report(export_model, small_dataset, tmp_path):
    run(export_model(1), small_dataset, tmp_path)
    with pytest.raises(InputError):
        run(export_model(3, num_classes=7), small_dataset, tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_every_record_has_to_be_scored(export_model, small_dataset, tmp_path, monkeypatch):
    read = inference.read_blocks
    monkeypatch.setattr(inference, "read_blocks", lambda *args: list(read(*args))[:-1])
    with pytest.raises(RuntimeError, match="0 records scored, the manifest says 120"):
        run(export_model(1), small_dataset, tmp_path)


@pytest.mark.parametrize(
    "files",
    [{}, {"model.json": '{"model_id": "x"}'}, {"model.json": "{", "saved_model.pb": ""}],
    ids=["empty", "no graph", "not JSON"],
)
def test_what_is_no_model(small_dataset, tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        run(tmp_path, small_dataset, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--split", "dev"], "--split"),
        (["--report", "x"], "--report"),
        (["--nonsense"], "--nonsense"),
        (["--report_dir", "s3://bucket/x"], "s3://bucket/x"),
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
