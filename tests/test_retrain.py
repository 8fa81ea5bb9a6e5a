"""The chain on small images: every stage in its own process, under one root."""

import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run_cli, tree

from pipeline import inference, plan, registry, retrain, stages, storage
from pipeline.command import InputError, LockedError
from pipeline.registry import Version

SMALL = (
    "--num_shards=2", "--hidden_units=32,16", "--epochs=3", "--batch_size=50",
    "--steps_per_call=2", "--min_class_accuracy=0",
)  # fmt: skip
AT_ONCE = 8


def chain_arguments(root, source, *flags):
    return ("pipeline.retrain", "--root", root, "--source", f"idx:{source}", *SMALL, *flags)


def run_chain(root, source, *flags):
    return run_cli(*chain_arguments(root, source, *flags))


def start_chain(root, source, *flags, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, chain_arguments(root, source, *flags))],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams,
    )  # fmt: skip


def ledger(root):
    return [json.loads(line) for line in (root / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def all_at_once(small_idx, tmp_path_factory):
    """A root and what became of the processes that were started on it at once. Read only."""
    root = tmp_path_factory.mktemp("first") / "root"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [start_chain(root, small_idx, **pipes) for _ in range(AT_ONCE)]
    ended = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess((), process.returncode, stdout, stderr))
    return root, sorted(ended, key=lambda done: done.returncode)


@pytest.fixture(scope="module")
def first_run(all_at_once):
    """(root, completed process) of the one that worked. Read only."""
    root, ended = all_at_once
    return root, ended[0]


@pytest.fixture
def root(first_run, tmp_path):
    """A copy of that root to work on."""
    return shutil.copytree(first_run[0], tmp_path / "root")


def test_of_many_at_once_one_works(all_at_once):
    root, ended = all_at_once
    assert [done.returncode for done in ended] == [0] + [75] * (AT_ONCE - 1)
    for done in ended[1:]:
        assert done.stderr.count("\n") == 1, done.stderr
        assert "another process is at work here" in done.stderr
    assert len(ledger(root)) == len(registry.versions(root)) == 1


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
        ".lock", "datasets", "index.html", "models", "runs", "runs.jsonl",
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


def wait_for_an_epoch(root, runs):
    """Waits until this many runs have finished an epoch."""
    deadline = time.monotonic() + 120
    while sum(bool(path.stat().st_size) for path in root.glob("runs/*/metrics.jsonl")) < runs:
        assert time.monotonic() < deadline, "no epoch was finished"
        time.sleep(0.05)


def test_sigterm_reaches_the_stage_and_ends_in_143(root, small_idx):
    process = start_chain(root, small_idx, "--epochs=400")
    try:
        wait_for_an_epoch(root, runs=2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    with storage.locked(root):  # no stage is left that would hold it
        pass


def test_killed_it_takes_its_stage_along_and_ends_the_same(first_run, root, small_idx):
    (run,) = (root / "runs").iterdir()
    day = ledger(root)[0]["window"]
    for name in ("runs", "models"):
        shutil.rmtree(root / name)
    (root / "runs.jsonl").unlink()
    process = start_chain(root, small_idx, f"--window={day}")
    try:
        wait_for_an_epoch(root, runs=1)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while True:
        try:
            with storage.locked(root), storage.locked(run):
                break
        except LockedError:
            assert time.monotonic() < deadline, "the stage goes on"
            time.sleep(0.01)
    assert not (run / "export").exists()  # which the stage would have made, had it gone on
    assert not (root / "runs.jsonl").exists()
    # Another day, another window; but what was begun is finished first, and then nothing is new.
    done = run_chain(root, small_idx, "--window=another")
    assert done.returncode == 0, done.stderr
    assert f"going on with run {run.name}" in done.stderr
    (expected,) = registry.versions(first_run[0])
    (found,) = registry.versions(root)
    # The model's graph names its functions in the order of their making, which a resumed run has
    # fewer of, and the curves hold seconds: what it computes with and what it says are equal.
    for name in ("model_id", "weights_sha256", "dataset_id", "run_id", "accuracy", "version"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("model.json", "report.json", "variables/variables.data-00000-of-00001"):
        assert found.files[name] == expected.files[name]
    report = run.relative_to(root) / "report/report.json"
    assert (root / report).read_bytes() == (first_run[0] / report).read_bytes()
    assert sorted({path.name for path in root.rglob(".*")}) == [".lock"]


@pytest.mark.parametrize("name", ["variables/variables.data-00000-of-00001", "model.json"])
def test_a_model_that_lost_a_file_as_it_was_published_is_made_anew(root, small_idx, name):
    (version,) = registry.versions(root)
    decision = root / "runs" / version.run_id / "decision.json"
    noted = json.loads(decision.read_text())["model_files"]
    for lost in ("models", "runs.jsonl"):
        storage.remove(root / lost)
    file = decision.parent / "export" / name
    size = file.stat().st_size
    file.write_bytes(b"")
    done = run_chain(root, small_idx)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert said.endswith(
        f"the exported model is damaged and is made anew: {file}: has 0 bytes, expected {size}"
    )
    champion = registry.champion(root)
    assert (champion.version, champion.weights_sha256) == (1, version.weights_sha256)
    inference.load_checked(root / champion.path)
    files = json.loads(decision.read_text())["model_files"]
    assert files[name] == noted[name] == dataclasses.asdict(champion.files[name])
    assert files.items() <= dataclasses.asdict(champion)["files"].items()


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
        (["--preset=xor"], "--preset xor"),
        (["--preset", "nonsense"], "nonsense"),
        (["--window=a/b"], "--window"),
        (["--max_age=0"], "--max_age"),
        (["--force_promote"], "--reason"),
        (["--reason=x"], "--force_promote"),
        (["--warm_start", "--initial_weights=x"], "--initial_weights"),
        (["--runner=Nonsense"], "--runner Nonsense"),
        (["--direct_num_workers=x"], "--direct_num_workers"),
        (["--initial_weights=/none/there"], "/none/there"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, flags, word):
    argv = ["retrain", f"--root={tmp_path / 'root'}", "--source=digits", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        retrain.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert word in said
    assert not (tmp_path / "root").exists()


def test_bad_input_in_its_own_process(tmp_path):
    done = run_cli("pipeline.retrain", "--root", tmp_path / "root", "--source=floppy")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "floppy" in done.stderr
    assert not (tmp_path / "root").exists()


def parse(*argv):
    return retrain.parse(["--root", "r", *argv])


def test_flags_it_does_not_know_are_the_trainers_or_else_beams():
    config = parse(
        "--epochs=3", "--num_shards=4", "--runner", "FnApiRunner", "--labels=one_hot",
        "--seed", "7", "--direct_num_workers=2", "--preset=compact",
    )  # fmt: skip
    assert config.preprocess.num_shards == 4
    training = stages.ask_trainer(config.others)
    # Of --labels, which Beam has as well, the trainer's is meant.
    assert training.arguments == (
        "--preset=compact", "--epochs=3", "--labels=one_hot", "--seed", "7",
    )  # fmt: skip
    assert training.rest == ("--runner", "FnApiRunner", "--direct_num_workers=2")
    asked = ("preset", "epochs", "labels", "seed")
    assert [training.config[name] for name in asked] == ["compact", 3, "one_hot", 7]


def test_a_flag_of_nobody_is_refused_after_those_of_somebody():
    training = stages.ask_trainer(parse("--epochs=3", "--nonsense", "7", "--seed=1").others)
    assert training.arguments == ("--epochs=3", "--seed=1")
    assert training.rest == ("--nonsense", "7")


@pytest.mark.parametrize(
    ("arguments", "unknown", "left"),
    [
        ([], [], ()),
        (["a", "b"], [], ("a", "b")),
        (["--a", "1", "--b", "1"], ["--b", "1"], ("--a", "1")),
        (["--b", "1", "--a", "1"], ["--b", "1"], ("--a", "1")),
        (["--b=1", "--a", "--b=1"], ["--b=1", "--b=1"], ("--a",)),
    ],
)
def test_without(arguments, unknown, left):
    assert stages.without(arguments, unknown) == left


def test_a_dry_run_prints_the_plan_and_writes_nothing(root, small_idx, tmp_path):
    flags = ("--direct_num_workers=1", "--job_name=ours", "--dry_run")
    before = tree(root)
    done = run_chain(root, small_idx, "--seed=3", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skip     preprocess: ")
    done = run_chain(root, small_idx, *flags)
    assert done.stdout.startswith("skip     all of it; nothing new: run ")
    assert tree(root) == before
    done = run_chain(tmp_path / "nowhere", small_idx, *flags)
    assert done.stdout.startswith(f"read     idx:{small_idx}\nmake     the dataset ")
    assert not (tmp_path / "nowhere").exists()


def test_the_window_is_the_date_unless_given():
    before = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert before <= parse().window <= datetime.datetime.now(datetime.UTC).date().isoformat()
    assert parse("--window=2026w47").window == "2026w47"


@pytest.mark.parametrize("text", ["", ".", "..", "a b", "a/b", "-a", ".a", "a" * 65, "é", "a\n"])
def test_a_window_has_to_be_part_of_a_folders_name(text, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(f"--window={text}")
    assert caught.value.code == 2
    assert "--window" in capsys.readouterr().err


def test_force_and_its_reason_go_together():
    assert parse("--force_promote", "--reason=must").force_reason == "must"
    assert parse("--reason=").force_reason is None
    for flags in (["--force_promote"], ["--force_promote", "--reason="], ["--reason=must"]):
        with pytest.raises(
            InputError, match=r"--force_promote.*--reason|--reason.*--force_promote"
        ):
            parse(*flags)


def test_run_id_depends_on_window_data_and_training_alone():
    config = {"preset": "core", "seed": 1, "initial_weights": None}
    train = plan.make_config_id(config, warm_start=False)
    name = plan.make_run_id("day", "core", "data", train)
    assert name.startswith("day-core-")
    assert len(name) == len("day-core-") + 12
    same = plan.make_config_id(dict(reversed(config.items())), warm_start=False)
    assert name == plan.make_run_id("day", "core", "data", same)
    others = {
        plan.make_run_id("day", "core", "other", train),
        plan.make_run_id("other", "core", "data", train),
        *(
            plan.make_run_id("day", "core", "data", plan.make_config_id(each, warm_start=warm))
            for each, warm in (
                (config | {"seed": 2}, False),
                (config | {"initial_weights": "x"}, False),
                (config, True),
            )
        ),
    }
    assert len(others | {name}) == 6
    # Which champion a warm start begins with does not make another training of it.
    ids = {
        plan.make_config_id(config | {"initial_weights": x}, warm_start=True) for x in (None, "x")
    }
    assert len(ids) == 1


def test_a_warm_start_is_refused_for_another_network_or_other_classes(root, small_idx):
    before = tree(root)
    done = run_chain(root, small_idx, "--warm_start", "--hidden_units=32,8")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "its hidden layers are 32,16 wide; expected 32,8" in done.stderr
    done = run_chain(root, small_idx, "--warm_start", "--num_classes=11")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--warm_start: the champion has other classes: label 10 is '10'" in done.stderr
    assert tree(root) == before


def publish_champion(root, sources):
    model = root / "model"
    model.mkdir()
    (model / "model.json").write_text("{}")
    version = Version(
        model_id="m", weights_sha256="w", dataset_id="d", run_id="r", accuracy=0.9,
        class_names=["a", "b"], sources=sources,
    )  # fmt: skip
    registry.publish(root, model, version)


def specs(*argv):
    config = retrain.parse(list(argv))
    return retrain.resolve_source(config, registry.champion(config.root)).specs


def test_auto_stays_what_it_was_for_the_champion(tmp_path, small_idx, monkeypatch):
    monkeypatch.setenv("MNIST_IDX_DIR", str(small_idx))
    root = f"--root={tmp_path}"
    assert specs(root) == (f"idx:{small_idx}",)
    publish_champion(tmp_path, ["digits"])
    assert specs(root) == ("digits",)


def test_several_sources(tmp_path, small_idx, monkeypatch):
    monkeypatch.delenv("MNIST_IDX_DIR", raising=False)
    root = f"--root={tmp_path}"
    argv = [root, "--source=digits", f"--source=idx:{small_idx}"]
    expected = ("digits", f"idx:{small_idx}")
    assert specs(*argv) == expected
    publish_champion(tmp_path, list(expected))
    assert specs(root) == expected
    assert specs(root, "--source=digits") == ("digits",)


def test_ask_trainer_passes_its_complaint_on():
    with pytest.raises(InputError, match="--epochs 0"):
        stages.ask_trainer(parse("--epochs=0").others)
    assert stages.ask_trainer(parse("--epochs=7").others).config["epochs"] == 7


@pytest.mark.parametrize("flag", ["--run_dir", "--model_dir", "--checkpoint_dir=x"])
def test_the_trainers_folders_are_the_chains(flag):
    config = retrain.parse(["--root", "r", "--source", "digits", flag, "x"])
    with pytest.raises(InputError, match=f"{flag}: is for trainer.task alone"):
        stages.ask_trainer(config.others)


def test_a_clouds_folders_are_not_the_chains(monkeypatch):
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://bucket/model")
    config = retrain.parse(["--root", "r", "--source", "digits", "--epochs", "3"])
    assert stages.ask_trainer(config.others).config["epochs"] == 3
