"""The chain on small images: every stage in its own process, under one root."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run_cli, tree

from pipeline import registry, retrain, storage
from pipeline.command import InputError
from pipeline.registry import Gate, Version

SMALL = (
    "--num_shards=2", "--hidden_units=32,16", "--epochs=3", "--batch_size=50",
    "--steps_per_call=2", "--min_class_accuracy=0",
)  # fmt: skip


def run_chain(root, source, *flags):
    return run_cli("pipeline.retrain", "--root", root, "--source", f"idx:{source}", *SMALL, *flags)


def ledger(root):
    return [json.loads(line) for line in (root / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first_run(small_idx, tmp_path_factory):
    """(root, completed process) of one undisturbed run. Read only."""
    root = tmp_path_factory.mktemp("first") / "root"
    return root, run_chain(root, small_idx)


@pytest.fixture
def root(first_run, tmp_path):
    """A copy of that root to work on."""
    return shutil.copytree(first_run[0], tmp_path / "root")


def test_first_run_promotes_and_lays_out_the_root(first_run):
    root, done = first_run
    assert done.returncode == 0, done.stderr
    champion = registry.champion(root)
    run = root / "runs" / champion.run_id
    decision = json.loads((run / "decision.json").read_text())
    report = json.loads((run / "report/report.json").read_text())
    assert decision["promoted"] is True
    assert decision["accuracy"] == report["accuracy"] == champion.accuracy
    assert champion.path == "models/1"
    exported = tree(run / "export")
    assert exported.items() <= tree(root / "models/1").items()
    assert len(ledger(root)) == 1
    assert ledger(root)[0]["version"] == 1
    assert sorted(path.name for path in root.iterdir()) == [
        ".lock", "datasets", "models", "runs", "runs.jsonl",
    ]  # fmt: skip
    hidden = [path.name for path in root.rglob(".*")]
    assert sorted(set(hidden)) == [".lock"]


def test_first_run_ends_with_what_a_newcomer_wants_to_see(first_run):
    root, done = first_run
    champion = registry.champion(root)
    page = root / "runs" / champion.run_id / "report/report.html"
    assert f"test accuracy {champion.accuracy:.4f}" in done.stdout
    assert f"report: {page}" in done.stdout
    assert page.is_file()
    verdict, served = done.stdout.splitlines()[-2:]
    assert verdict.startswith("promoted: ")
    assert served == f"champion: version 1, of run {champion.run_id}"
    table = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert [name for name in table if name.isdigit()] == [str(label) for label in range(10)]


def test_second_run_changes_nothing(root, small_idx):
    before = tree(root)
    done = run_chain(root, small_idx)
    assert done.returncode == 0
    assert "nothing new" in done.stderr
    assert "test accuracy" in done.stdout
    assert tree(root) == before


def test_a_challenger_below_the_floor_is_kept_out(root, small_idx):
    before = tree(root / "models")
    done = run_chain(root, small_idx, "--seed=5", "--min_accuracy=1", "--learning_rate=0.00001")
    assert done.returncode == 3, done.stderr
    assert tree(root / "models") == before
    entry = ledger(root)[1]
    assert (entry["promoted"], entry["version"]) == (False, None)
    assert "required 1" in entry["reason"]
    report = json.loads((root / "runs" / entry["run_id"] / "report/report.json").read_text())
    assert report["baseline"]["model_id"] == registry.champion(root).model_id
    assert (
        run_chain(
            root, small_idx, "--seed=5", "--min_accuracy=1", "--learning_rate=0.00001"
        ).returncode
        == 0
    )  # judged already: nothing to do


def start_chain(root, source):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.retrain", "--root", str(root), "--source",
         f"idx:{source}", *SMALL, "--epochs=400"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_an_epoch(root, runs):
    """Waits until this many runs have finished an epoch."""
    deadline = time.monotonic() + 120
    while sum(bool(path.stat().st_size) for path in root.glob("runs/*/metrics.jsonl")) < runs:
        assert time.monotonic() < deadline, "no epoch was finished"
        time.sleep(0.05)


def test_sigterm_reaches_the_stage_and_ends_in_143(root, small_idx):
    process = start_chain(root, small_idx)
    try:
        wait_for_an_epoch(root, runs=2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    with storage.locked(root):  # no stage is left that would hold it
        pass


def test_a_held_lock_ends_in_75(root, small_idx):
    with storage.locked(root):
        done = run_chain(root, small_idx)
    assert done.returncode == 75
    assert done.stderr.count("\n") == 1
    assert "another process" in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--nonsense=1"], "--nonsense"),
        (["--epochs=0"], "--epochs 0"),
        (["--run_dir=x"], "--run_dir"),
        (["--source=idx:/none/there"], "/none/there"),
        (["--source=floppy"], "floppy"),
        (["--num_shards=0"], "--num_shards"),
        (["--min_accuracy=2"], "--min_accuracy"),
        (["--batch_size=100", "--replicas=3"], "--batch_size 100"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, flags, word):
    done = run_cli("pipeline.retrain", "--root", tmp_path / "root", "--source=digits", *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert word in done.stderr
    assert not (tmp_path / "root").exists()


def parse(*argv):
    return retrain.parse(["--root", "r", *argv])


def test_flags_it_does_not_know_go_to_the_trainer():
    config = parse("--epochs=3", "--num_shards=4", "--seed", "7")
    assert config.trainer_arguments == ("--epochs=3", "--seed", "7")
    assert config.preprocess.num_shards == 4


def test_run_id_depends_on_data_and_training_alone():
    config = {"preset": "core", "seed": 1}
    name = retrain.make_run_id("d", config)
    assert name == retrain.make_run_id("d", {"seed": 1, "preset": "core"})
    assert name.startswith("core-")
    assert name != retrain.make_run_id("e", config)
    assert name != retrain.make_run_id("d", config | {"seed": 2})


def write_champion(root, **changes):
    version = Version(
        version=1, path="models/1", model_id="m", weights_sha256="w", dataset_id="d",
        run_id="r", accuracy=0.9, sources=["digits"],
    )  # fmt: skip
    fields = dataclasses.asdict(version) | changes
    storage.write_atomic(root / "models/champion.json", json.dumps(fields))


def test_auto_stays_what_it_was_for_the_champion(tmp_path, small_idx, monkeypatch):
    monkeypatch.setenv("MNIST_IDX_DIR", str(small_idx))
    config = retrain.parse(["--root", str(tmp_path)])
    assert retrain.resolve_source(config).specs == (f"idx:{small_idx}",)
    write_champion(tmp_path)
    assert retrain.resolve_source(config).specs == ("digits",)


def test_several_sources(tmp_path, small_idx, monkeypatch):
    monkeypatch.delenv("MNIST_IDX_DIR", raising=False)
    argv = ["--root", str(tmp_path), "--source=digits", f"--source=idx:{small_idx}"]
    config = retrain.parse(argv)
    expected = ("digits", f"idx:{small_idx}")
    assert retrain.resolve_source(config).specs == expected
    write_champion(tmp_path, sources=list(expected))
    assert retrain.resolve_source(retrain.parse(["--root", str(tmp_path)])).specs == expected
    assert retrain.resolve_source(retrain.parse([*argv[:2], "--source=digits"])).specs == (
        "digits",
    )


def test_the_ledger_survives_a_torn_line(tmp_path):
    assert retrain.judged(tmp_path) == set()
    (tmp_path / "runs.jsonl").write_text('{"run_id": "a"}\n{"run_id": "b"}\n{"run_')
    assert retrain.judged(tmp_path) == {"a", "b"}
    retrain.append_line(tmp_path / "runs.jsonl", {"run_id": "c"})
    assert retrain.judged(tmp_path) == {"a", "b", "c"}


def test_decide_writes_numbers_and_reason():
    report = {
        "accuracy": 0.9, "correct": 90, "model_id": "new", "dataset_id": "d",
        "per_class": [{"name": "0", "support": 100, "accuracy": 0.9}],
        "baseline": {"correct": 91, "model_id": "old"},
    }  # fmt: skip
    decision = retrain.decide(report, Gate(), "run", ("digits", "idx:/a"))
    assert decision["sources"] == ["digits", "idx:/a"]
    assert decision["promoted"] is False
    assert decision["champion_model_id"] == "old"
    assert decision["checks"][-1] == {
        "check": "correct answers, against the champion's",
        "value": 90, "required": 91, "passed": False,
    }  # fmt: skip


def test_ask_trainer_passes_its_complaint_on():
    with pytest.raises(InputError, match="--epochs 0"):
        retrain.ask_trainer(parse("--epochs=0"))
    assert retrain.ask_trainer(parse("--epochs=7"))["epochs"] == 7


@pytest.mark.parametrize("flag", ["--run_dir", "--model_dir", "--checkpoint_dir=x"])
def test_the_trainers_folders_are_the_chains(flag):
    config = retrain.parse(["--root", "r", "--source", "digits", flag, "x"])
    with pytest.raises(InputError, match=f"{flag}: is for trainer.task alone"):
        retrain.ask_trainer(config)


def test_a_clouds_folders_are_not_the_chains(monkeypatch):
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://bucket/model")
    config = retrain.parse(["--root", "r", "--source", "digits", "--epochs", "3"])
    assert retrain.ask_trainer(config)["epochs"] == 3
