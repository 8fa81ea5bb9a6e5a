"""--dry_run of the two Beam stages: all that would be read and written, and nothing is."""

import json

import helpers

DATASET = [
    f"{split}-{shard:05d}-of-00002.tfrecord.gz"
    for split in ("train", "validation", "test")
    for shard in range(2)
]


def test_preprocess(small_idx, tmp_path):
    flags = (f"--source=idx:{small_idx}", "--source=digits", "--num_shards=2", "--split_by=hash")
    output = tmp_path / "made" / "out"
    flags = (*flags, "--compression=gzip", f"--output_dir={output}")
    done = helpers.run_cli("pipeline.preprocess", *flags, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert json.loads(done.stdout) == {
        "already_there": False,
        "runner": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
        "reads": {
            "sources": [f"idx:{small_idx}", "digits"],
            "images": {"train": 600 + 1437, "test": 120 + 360},
            "in": 6,
        },
        "writes": {
            "folder": str(output),
            "files": [*DATASET, "quarantine/records.jsonl", "metrics.json", "manifest.json"],
        },
    }
    written = helpers.run_cli("pipeline.preprocess", *flags)
    assert written.returncode == 0, written.stderr
    before = helpers.tree(tmp_path)
    assert sorted(json.loads(done.stdout)["writes"]["files"]) == sorted(helpers.tree(output))
    again = helpers.run_cli("pipeline.preprocess", *flags, "--dry_run")
    assert json.loads(again.stdout)["already_there"] is True
    assert helpers.tree(tmp_path) == before


def test_preprocess_of_what_it_would_refuse(small_dataset, small_idx):
    flags = (f"--source=idx:{small_idx}", "--num_shards=5", f"--output_dir={small_dataset}")
    done = helpers.run_cli("pipeline.preprocess", *flags, "--dry_run")
    assert (done.returncode, done.stdout) == (2, "")
    assert str(small_dataset) in done.stderr.splitlines()[-1]


def test_evaluate(small_dataset, tmp_path):
    models = [helpers.export_linear_model(tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    report = tmp_path / "report"
    flags = (
        f"--model_dir={models[0]}",
        f"--compare_dir={models[1]}",
        f"--dataset_dir={small_dataset}",
        f"--report_dir={report}",
        "--save_predictions",
    )
    before = helpers.tree(tmp_path)
    done = helpers.run_cli("pipeline.evaluate", *flags, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert helpers.tree(tmp_path) == before
    found = json.loads(done.stdout)
    assert found["reads"] == {
        "models": [str(model) for model in models],
        "dataset": str(small_dataset),
        "images": 120,
        "files": [f"test-{shard:05d}-of-00003.tfrecord" for shard in range(3)],
    }
    assert found["writes"]["folder"] == str(report)
    assert helpers.run_cli("pipeline.evaluate", *flags).returncode == 0
    assert sorted(found["writes"]["files"]) == sorted(helpers.tree(report))
