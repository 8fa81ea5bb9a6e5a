"""What the chain makes of stages that succeed, refuse, fail or are killed; here and in a bucket.

The stages are stood in for by what they leave in their folders; tests of the real ones are in
test_retrain.py and test_kill_chain.py.
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import helpers
import memory_bucket
import pytest
from test_comparison import hand_made

from pipeline import (
    chain,
    evaluate,
    gcs,
    gcs_publish,
    ledger,
    plan,
    promotion,
    pruning,
    registry,
    retrain,
    state,
    storage,
)
from pipeline.command import FailedError, InputError, LockedError, UnreachableError
from pipeline.dataset import load_manifest
from pipeline.gcs import GcsPath
from pipeline.stages import StageError, Training

BAD_INPUT, FAILED, FULL_DISK, LOCKED, TERMINATED, KEPT = 2, 1, 74, 75, 143, 3
ALL = ["preprocess", "task", "evaluate"]


class StandIn:
    """In place of the stages' processes: notes which ran, and leaves what they would leave.

    Attributes:
        ran: the last part of each stage's name.
        arguments: of the last one.
        by_stage: of each.
        accuracy: that the next model has.
        fails: {stage: exit code}.
        lock: of the root.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.ran = []
        self.arguments = {}
        self.by_stage = {}
        self.accuracy = 0.9
        self.fails = {}
        self.lock = 0

    def run(self, module, *arguments):
        stage = module.split(".")[-1]
        self.ran.append(stage)
        words = iter(map(str, arguments))
        self.arguments = {}
        for word in words:
            name, equals, value = word.partition("=")
            self.arguments[name] = value if equals else next(words)
        self.by_stage[stage] = self.arguments
        if stage in self.fails:
            raise StageError(module, self.fails[stage])
        getattr(self, stage)(**{name[2:]: value for name, value in self.arguments.items()})

    def hold(self):
        storage.hold(self.lock)

    def preprocess(self, output_dir, **_):
        for name, content in contents(self.dataset).items():
            put(storage.place(output_dir) / name, content)

    def task(self, run_dir, dataset_dir, initial_weights=None, **_):
        nothing_told = [{"dataset_id": None, "splits": []}]
        start = described(initial_weights) if initial_weights else {"learned_from": []}
        earlier = start.get("learned_from", nothing_told)
        manifest = load_manifest(storage.place(dataset_dir))
        put(storage.place(run_dir) / "checkpoints/1", "")
        export = storage.place(run_dir) / "export"
        if export.exists():
            return
        put(
            export / "model.json",
            json.dumps(
                {
                    "model_id": f"model of {Path(run_dir).name}",
                    "weights_sha256": "w",
                    "dataset_id": manifest.dataset_id,
                    "learned_from": [
                        *earlier,
                        {"dataset_id": manifest.dataset_id, "splits": ["train"]},
                    ],
                    "dataset": {"class_names": list(manifest.class_names)},
                    "accuracy": self.accuracy,
                }
            ),
        )

    def evaluate(self, model_dir, report_dir, dataset_dir, ledger, run_id, baseline_dir=None, **_):
        model = described(model_dir)
        baseline = baseline_dir and described(baseline_dir)
        right = round(model["accuracy"] * 100)  # of 100 rows, all but 9 of the first class
        rows = [{"label": 0, "support": 91, "accuracy": (right - 9) / 91}]
        rows += [{"label": label, "support": 1, "accuracy": 1.0} for label in range(1, 10)]
        names = model["dataset"]["class_names"]
        content = {
            "accuracy": model["accuracy"],
            "correct": right,
            "per_class": [row | {"name": name} for row, name in zip(rows, names, strict=False)],
            "model_id": model["model_id"],
            "dataset_id": model["dataset_id"],
            "test_id": rows_of(dataset_dir),
            "challengers_before": evaluate.count_challengers_before(
                storage.place(ledger), run_id, rows_of(dataset_dir)
            ),
            "baseline": None,
        }
        if baseline is not None:
            theirs = round(baseline["accuracy"] * 100)
            alone = {"only_model": max(0, right - theirs), "only_baseline": max(0, theirs - right)}
            both = {"both": min(right, theirs) - 9, "neither": 100 - max(right, theirs)}
            nobody_alone = {"both": 1, "only_model": 0, "only_baseline": 0, "neither": 0}
            content["baseline"] = {
                "correct": theirs,
                "model_id": baseline["model_id"],
                "paired": [
                    {"label": 0} | both | alone,
                    *({"label": label} | nobody_alone for label in range(1, 10)),
                ],
            }
        put(storage.place(report_dir) / "report.json", json.dumps(content))


def rows_of(dataset_dir):
    """Stands for the hash of the rows of test."""
    return " ".join(
        s.sha256 for s in load_manifest(storage.place(str(dataset_dir))).splits["test"].shards
    )


def described(model_dir):
    return json.loads((storage.place(str(model_dir)) / "model.json").read_text())


def put(path, content):
    """Writes a file anywhere, folders to it included."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, content)


def contents(root):
    """{name: content} of all files under a folder anywhere."""
    return {name: (root / name).read_bytes() for name in storage.walk(root)}


@dataclasses.dataclass
class Job:
    """A root, a source of its own, and stages."""

    root: storage.Place
    source: Path
    stages: StandIn

    def __call__(self, *flags, day=1, seed=22, beam=(), weights=None):
        """The command, on the nth day; returns its exit code and the stages that ran."""
        argv = ["--root", str(self.root), f"--source=idx:{self.source}", f"--window=day{day}"]
        config = retrain.parse([*argv, *flags])
        champion = registry.champion(self.root)
        initial = {}
        if config.warm_start:
            initial = {"initial_weights": champion and champion.weights_sha256}
        given = ()
        if weights is not None:
            initial, given = {"initial_weights": str(weights)}, (f"--initial_weights={weights}",)
        training = Training(
            arguments=(f"--seed={seed}", *given),
            rest=beam,
            config={"preset": "core", "seed": seed} | initial,
        )
        source = retrain.resolve_source(config, champion)
        self.stages.ran = []
        return retrain.run(config, training, source, self.stages), self.stages.ran

    def lines(self):
        return ledger.read(self.root)

    def outcomes(self):
        return [line["outcome"] for line in self.lines()]

    def runs(self):
        return sorted(path.name.split("-")[0] for path in (self.root / "runs").iterdir())

    def last_run(self):
        return plan.run_folder(self.root, self.lines()[-1]["run_id"])

    def touch(self):
        """The same images, written again later."""
        for path in self.source.iterdir():
            later = path.stat().st_mtime + 1
            os.utime(path, (later, later))

    def change(self):
        helpers.write_idx(self.source, helpers.make_images(seed=len(self.lines()) + 1))
        self.touch()


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)
    return memory


@pytest.fixture
def make_job(tmp_path, small_idx, small_dataset, monkeypatch):
    # The stand-in's reports hold what the gate reads, and nothing to fill a table with.
    monkeypatch.setattr(chain.report, "text_table", lambda content: "the table")
    # What is drawn on the page takes ten times as long as all the rest.
    monkeypatch.setattr(retrain.index, "render", lambda *shown: repr(shown))
    source = shutil.copytree(small_idx, tmp_path / "source")
    return lambda root: Job(root, source, StandIn(small_dataset))


@pytest.fixture
def local_job(make_job, tmp_path):
    (tmp_path / "root").mkdir()
    return make_job(tmp_path / "root")


@pytest.fixture
def bucket_job(make_job, bucket):
    return make_job(GcsPath("bucket", "some/root"))


@pytest.fixture(params=["local", "bucket"])
def job(request):
    return request.getfixturevalue(f"{request.param}_job")


def test_a_run_is_judged_once(job, small_dataset):
    assert job() == (0, ALL)
    (line,) = job.lines()
    manifest = load_manifest(small_dataset)
    champion = registry.champion(job.root)
    assert line["run_id"] == champion.run_id == job.last_run().name
    assert line["run_id"].startswith("day1-core-")
    assert (line["outcome"], line["promoted"], line["version"]) == ("promoted", True, 1)
    assert (line["accuracy"], line["per_class_accuracy"]["0"]) == (0.9, 81 / 91)
    assert line["dataset_id"] == manifest.dataset_id
    assert line["test_id"] == rows_of(small_dataset)
    assert (job.root / "datasets" / line["fingerprint"]).is_dir()
    before = contents(job.root)
    assert job(day=1) == (0, [])
    assert job(day=2) == (0, [])
    assert contents(job.root) == before


def test_beam_options_reach_both_beam_stages_and_no_other(job):
    option = "--runner=FlinkRunner"
    assert job(beam=(option,)) == (0, ALL)
    given = {stage: each.get("--runner") for stage, each in job.stages.by_stage.items()}
    assert given == {"preprocess": "FlinkRunner", "task": None, "evaluate": "FlinkRunner"}
    assert job(beam=("--runner=PrismRunner",)) == (0, [])  # another runner makes the same


def test_what_was_kept_out_is_not_tried_again(job):
    job()
    job.stages.accuracy = 0.8
    assert job(day=2, seed=5) == (KEPT, ["task", "evaluate"])
    reason = job.lines()[1]["reason"]
    assert reason.startswith("correct answers, against the champion's: 80, required 90; class 0")
    assert job(day=3, seed=5) == (0, [])
    assert job.outcomes() == ["promoted", "kept"]


def test_how_many_challengers_the_rows_have_judged(job):
    counts = []
    for seed in range(3):
        job(seed=seed)
        counts.append(json.loads((job.last_run() / "decision.json").read_text()))
    assert [decision["challengers_before"] for decision in counts] == [0, 1, 2]
    assert {decision["test_id"] for decision in counts} == {job.lines()[0]["test_id"]}


def test_the_same_images_under_other_times_are_nothing_new(job):
    job()
    job.touch()
    assert job(day=2) == (0, ["preprocess"])
    assert job(day=3) == (0, [])
    assert job.outcomes() == ["promoted"]
    assert job.runs() == ["day1"]


@pytest.mark.parametrize("stage", ALL)
@pytest.mark.parametrize("code", [1, -9, 7])
def test_a_failure_is_gone_on_from_in_another_window(job, stage, code, caplog):
    job.stages.fails = {stage: code}
    assert job(day=1) == (FAILED, ALL[: ALL.index(stage) + 1])
    assert job.lines() == []
    assert "there is no champion yet; the same command goes on from here" in caplog.text
    how = "was killed by signal 9" if code == -9 else f"ended with exit code {code}"
    assert f"{stage} {how}" in caplog.text
    job.stages.fails = {}
    skipped = ALL.index(stage) and 1  # the trainer sees for itself that it is done
    assert job(day=2) == (0, ALL[skipped:])
    assert (job.outcomes(), job.runs()) == (["promoted"], ["day1"])


def test_a_run_that_fails_again_and_again_is_given_up(job, caplog):
    job.stages.fails = {"task": 1}
    assert [job(day=day)[0] for day in (1, 2)] == [FAILED] * 2
    assert job.lines() == []
    assert job(day=3)[0] == FAILED
    assert job.outcomes() == ["failed"]
    assert "given up after 3 attempts" in caplog.text
    job.stages.fails = {}
    assert job(day=4) == (0, ["task", "evaluate"])
    assert (job.outcomes(), job.runs()) == (["failed", "promoted"], ["day1", "day4"])


def test_a_full_disk_does_not_count(job, caplog):
    job.stages.fails = {"task": FULL_DISK}
    assert [job(day=day)[0] for day in range(1, 6)] == [FAILED] * 5
    assert "once there is room, the same command goes on from here" in caplog.text
    assert job.lines() == []
    job.stages.fails = {"task": 1}
    assert [job(day=day)[0] for day in range(6, 8)] == [FAILED] * 2
    job.stages.fails = {}
    assert job(day=8) == (0, ["task", "evaluate"])
    assert (job.outcomes(), job.runs()) == (["promoted"], ["day1"])


def test_wrong_input_ends_a_run_and_the_same_command_begins_it_anew(job):
    job.stages.fails = {"task": BAD_INPUT}
    assert job() == (BAD_INPUT, ["preprocess", "task"])
    assert job.outcomes() == ["failed"]
    job.stages.fails = {"evaluate": 1}  # on the way, it can be stopped and gone on from
    assert job() == (FAILED, ["task", "evaluate"])
    assert len(plan.unfinished(state.look(job.root))) == 1
    job.stages.fails = {}
    assert job(day=2) == (0, ["task", "evaluate"])
    assert job.outcomes() == ["failed", "promoted"]
    assert job.runs() == ["day1"]
    assert plan.unfinished(state.look(job.root)) == []


def test_a_damaged_file_closes_the_run_and_what_is_new_is_reached(job):
    job()
    job.stages.fails = {"evaluate": 1}
    assert job(day=2, seed=5)[0] == FAILED
    job.stages.fails = {}

    def refuses(*_):
        raise InputError("a file is damaged")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="is damaged"):
        patch.setattr(chain.ancestry, "starting_model", refuses)
        job(day=3, seed=6)
    assert job.outcomes() == ["promoted", "failed"]
    assert job.lines()[1]["reason"] == "a file is damaged"
    assert plan.unfinished(state.look(job.root)) == []
    assert job(day=3, seed=6) == (0, ["task", "evaluate"])
    assert job.outcomes() == ["promoted", "failed", "promoted"]


@pytest.mark.parametrize("error", [LockedError, UnreachableError])
def test_what_is_no_fault_of_the_run_leaves_it_open(job, monkeypatch, error):
    def refuses(*_):
        raise error("not now")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(chain.ancestry, "starting_model", refuses)
        job()
    assert job.lines() == []
    assert job() == (0, ["task", "evaluate"])


@pytest.mark.parametrize("damage", ["torn manifest", "missing", "short"])
def test_a_damaged_dataset_is_made_anew(job, damage, caplog):
    job()
    (dataset,) = (job.root / "datasets").iterdir()
    before = contents(dataset)
    shard = dataset / load_manifest(dataset).splits["train"].shards[0].file
    if damage == "torn manifest":
        put(dataset / "manifest.json", "{")
    elif damage == "missing":
        shard.unlink()
    else:
        put(shard, shard.read_bytes()[:-1])
    assert job(day=2) == (0, [])  # nothing is new, and nothing is looked at
    assert job(day=2, seed=5) == (0, ALL)
    (told,) = [each for each in caplog.messages if "made anew" in each]
    assert str(dataset) in told
    assert contents(dataset) == before
    assert job.outcomes() == ["promoted"] * 2


def test_a_flipped_bit_of_a_dataset_is_found(local_job, caplog):
    local_job()
    (dataset,) = (local_job.root / "datasets").iterdir()
    before = contents(dataset)
    shard = dataset / load_manifest(dataset).splits["validation"].shards[0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    put(shard, bytes(content))
    assert local_job(day=2, seed=5) == (0, ALL)
    assert f"{shard}: its checksum differs from the manifest's" in caplog.text
    assert contents(dataset) == before


def test_a_damaged_dataset_whose_source_changed_is_left_as_it_is(job):
    job.stages.fails = {"task": 1}
    job()
    job.stages.fails = {}
    (dataset,) = (job.root / "datasets").iterdir()
    put(dataset / "manifest.json", "{")
    job.change()
    assert job(day=2) == (0, ALL)
    assert job.outcomes() == ["abandoned", "promoted"]
    assert "has changed, and its dataset is damaged" in job.lines()[0]["reason"]
    assert (dataset / "manifest.json").read_bytes() == b"{"


@pytest.mark.parametrize(
    ("code", "stopped", "module"),
    [
        (TERMINATED, True, "trainer.task"),
        (TERMINATED, False, "pipeline.vertex"),  # somebody cancelled its job
    ],
)
def test_being_stopped_is_no_failure(job, monkeypatch, code, stopped, module, caplog):
    job()

    def stops(name, *_):
        raise StageError(module, code, stopped=stopped)

    with monkeypatch.context() as patch:
        patch.setattr(job.stages, "run", stops)
        for _ in range(4):
            assert job(day=2, seed=5)[0] == code
    assert job.outcomes() == ["promoted"]
    assert all(record.levelno <= logging.INFO for record in caplog.records)
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])


@pytest.mark.parametrize("stage", ["task", "evaluate"])
def test_a_locked_folder_of_a_stage_is_no_other_chain_at_work(job, stage, caplog):
    """Of a chain, 75 says that another one does the work: here none does it."""
    job.stages.fails = {stage: LOCKED}
    for day in range(1, 5):  # it is no fault of the run's, and does not count
        caplog.clear()
        assert job(day=day)[0] == FAILED
        (said,) = [line for line in caplog.messages if "ended with exit code 75" in line]
        assert said.endswith(
            ": another process or job is at work there; once it has ended, the same command goes"
            " on from here"
        )
    assert job.lines() == []
    job.stages.fails = {}
    assert job(day=5)[0] == 0
    assert job.outcomes() == ["promoted"]


def test_a_chain_that_lost_its_root_says_that_another_one_is_at_work(job, monkeypatch):
    job.stages.fails = {"task": LOCKED}

    def lost():
        if job.stages.ran:
            raise LockedError("the lock of this process has lapsed")

    monkeypatch.setattr(job.stages, "hold", lost)
    with pytest.raises(LockedError):
        job()


@pytest.mark.parametrize("code", [TERMINATED, -15])
def test_a_stage_that_somebody_else_ended_has_failed(job, code, caplog):
    job.stages.fails = {"task": code}
    assert [job(day=day)[0] for day in (1, 2)] == [FAILED] * 2
    assert job.lines() == []
    assert job(day=3)[0] == FAILED
    assert job.outcomes() == ["failed"]
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 3


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_whose_source_changed_is_abandoned(job, gone, tmp_path, caplog):
    job.stages.fails = {"preprocess": 1}
    job()
    job.stages.fails = {}
    if gone:
        job.source = job.source.rename(tmp_path / "elsewhere")
    else:
        job.change()
    assert job(day=2) == (0, ALL)
    assert job.outcomes() == ["abandoned", "promoted"]
    reason = "cannot be read any more" if gone else "has changed, and its dataset was not made"
    assert reason in job.lines()[0]["reason"]
    assert reason in caplog.text
    assert job.lines()[0]["accuracy"] is None
    assert job(day=3) == (0, [])


def test_a_run_whose_dataset_stands_is_finished_first(job):
    job.stages.fails = {"task": 1}
    job()
    job.stages.fails = {}
    job.change()
    # The dataset made of the other source is stood in for by the same one: so nothing new.
    assert job(day=2) == (0, ["task", "evaluate", "preprocess"])
    assert (job.outcomes(), job.runs()) == (["promoted"], ["day1"])
    job.change()
    assert job(day=2, seed=5) == (0, ALL)
    assert job.runs() == ["day1", "day2"]


def age(job, days, *, champion=True, ledger=True):
    """Lets the champion's promotion, or the ledger's lines, have been so many days ago."""
    then = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)).isoformat()
    path = job.root / "models/champion.json"
    if champion:
        times = {"promoted_at": then, "first_promoted_at": then}
        put(path, json.dumps(json.loads(path.read_text()) | times))
    if ledger:
        lines = [json.dumps(line | {"time": then}) for line in job.lines()]
        put(job.root / "runs.jsonl", "\n".join(lines) + "\n")


def test_an_old_champion_is_challenged_once_in_so_many_days(job):
    job()
    assert job("--max_age=1", day=2) == (0, [])
    age(job, 2)
    assert job("--max_age=2.1", day=2) == (0, [])
    job.stages.accuracy = 0.8
    assert job("--max_age=1.9", day=2) == (KEPT, ["task", "evaluate"])
    for day in (2, 3, 4):  # the answer is young, although the champion is not
        assert job("--max_age=1.9", day=day) == (0, [])
    age(job, 1.8, champion=False)
    assert job("--max_age=1.9", day=4) == (0, [])
    age(job, 2, champion=False)
    job.stages.accuracy = 0.9
    assert job("--max_age=1.9", day=4) == (0, ["task", "evaluate"])
    assert job("--max_age=1.9", day=5) == (0, [])  # the champion is young again
    age(job, 2, champion=False)
    assert job("--max_age=1.9", day=5) == (0, [])
    assert job.outcomes() == ["promoted", "kept", "promoted"]
    assert registry.champion(job.root).version == 2


@pytest.mark.parametrize("noted", [True, False])
def test_a_rollback_makes_no_champion_young(job, noted):
    job()
    job(day=2, seed=5)
    path = job.root / "models/1/version.json"
    old = "2026-01-02T03:04:05+00:00"
    times = {"promoted_at": old, "first_promoted_at": old if noted else ""}
    put(path, json.dumps(json.loads(path.read_text()) | times))
    registry.rollback(job.root, 1)
    champion = registry.champion(job.root)
    assert (champion.first_promoted_at, champion.promoted_at > old) == (old, True)
    age(job, 2, champion=False)
    assert job("--max_age=1.9", day=4) == (0, ["task", "evaluate"])
    champion = registry.champion(job.root)
    assert champion.first_promoted_at == champion.promoted_at > old


def test_how_long_ago():
    now = datetime.datetime(2026, 1, 11, tzinfo=datetime.UTC)
    assert plan.days_since("2026-01-10T12:00:00+00:00", now) == 0.5


def test_what_was_kept_out_can_be_forced_in(job, capsys):
    job()
    job.stages.accuracy = 0.7
    assert job(day=2, seed=5)[0] == KEPT
    assert job("--force_promote", "--reason=we must", day=3, seed=5) == (0, ["task"])
    assert "promoted: forced (we must) although" in capsys.readouterr().out
    decision = json.loads((job.last_run() / "decision.json").read_text())
    assert (decision["promoted"], decision["forced"]) == (True, True)
    assert decision["force_reason"] == "we must"
    assert sum(not check["passed"] for check in decision["checks"]) == 3
    assert [line["forced"] for line in job.lines()] == [False, False, True]
    assert decision["challengers_before"] == 1  # itself aside
    assert registry.champion(job.root).run_id == job.lines()[1]["run_id"]
    assert job("--force_promote", "--reason=we must", day=4, seed=5) == (0, [])


def test_other_rules_are_asked_of_what_was_kept_out(job):
    strict = "--min_accuracy=0.95"
    assert job(strict) == (KEPT, ALL)
    assert job(strict, day=2) == (0, [])
    assert job("--min_accuracy=0.92", day=2) == (KEPT, ["task"])  # the report stands
    assert job("--min_accuracy=0.92", day=3) == (0, [])
    assert job(day=3) == (0, ["task"])
    assert job.outcomes() == ["kept", "kept", "promoted"]
    assert (len(job.runs()), registry.champion(job.root).version) == (1, 1)
    decision = json.loads((job.last_run() / "decision.json").read_text())
    assert decision["rules"] == {
        "min_accuracy": 0.8, "min_class_accuracy": 0.5, "min_class_images": 1,
        "promote_if": "at_least_as_good", "alpha": 0.05,
    }  # fmt: skip
    before = contents(job.root)
    assert job(strict, day=4) == (0, [])  # what was promoted stays
    assert contents(job.root) == before


def test_other_rules_are_asked_although_the_source_was_touched_as_well(job):
    assert job("--min_accuracy=0.95") == (KEPT, ALL)
    job.touch()
    assert job("--min_accuracy=0.95", day=2) == (0, ["preprocess"])
    job.touch()
    assert job(day=3) == (0, ALL)
    assert job.outcomes() == ["kept", "promoted"]


def test_what_was_kept_out_can_be_forced_in_although_the_source_was_touched(job):
    assert job("--min_accuracy=0.95") == (KEPT, ALL)
    job.touch()
    force = ("--min_accuracy=0.95", "--force_promote", "--reason=we must")
    assert job(*force, day=2) == (0, ALL)
    job.touch()
    assert job(*force, day=3) == (0, ["preprocess"])  # what was promoted stays
    assert [line["forced"] for line in job.lines()] == [False, True]


def test_other_rules_after_another_champion_need_another_report(job):
    assert job("--min_accuracy=0.95") == (KEPT, ALL)
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])
    assert job(day=3) == (0, ["task", "evaluate"])
    assert job.stages.arguments["--baseline_dir"] == str(job.root / "models/1")
    assert job.outcomes() == ["kept", "promoted", "promoted"]
    storage.remove(job.last_run())
    assert job("--min_accuracy=0.95", day=4) == (0, [])


def test_what_is_unfinished_is_judged_by_its_own_rules_and_then_by_these(job):
    job.stages.fails = {"evaluate": 1}
    assert job("--min_accuracy=0.95")[0] == FAILED
    job.stages.fails = {}
    assert job(day=2) == (0, ["task", "evaluate", "task"])
    assert job.outcomes() == ["kept", "promoted"]


def test_models_that_were_lost_are_published_again(job):
    job()
    storage.remove(job.root / "models")
    assert job(day=2) == (0, ["task"])
    assert registry.champion(job.root).run_id == job.lines()[0]["run_id"]
    assert job(day=3) == (0, [])


def test_a_report_that_was_lost_is_made_again(job):
    job()
    (job.last_run() / "report/report.json").unlink()
    assert job(day=2) == (0, ["task", "evaluate"])
    assert job.runs() == ["day1"]
    assert registry.champion(job.root).version == 1
    assert job(day=3) == (0, [])


@pytest.mark.parametrize("text", ["", '{"promoted": tr', "[]", "3", "\udcff"])
@pytest.mark.parametrize("name", ["decision.json", "report/report.json"])
def test_what_is_torn_is_judged_again(job, monkeypatch, name, text, caplog):
    job()
    killed_before(job, monkeypatch, ledger, "append", day=2, seed=5)
    (run,) = [path for path in (job.root / "runs").iterdir() if path.name.startswith("day2")]
    put(run / name, text.encode(errors="surrogateescape"))
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])
    assert f"{run / name}: " in caplog.text
    assert job.outcomes() == ["promoted"] * 2
    assert registry.champion(job.root).version == 2
    json.loads((run / name).read_text())


@pytest.mark.parametrize("name", ["decision.json", "report/report.json"])
def test_nothing_new_is_said_although_a_file_is_torn(job, name, capsys):
    job()
    put(job.last_run() / name, "{")
    assert job(day=2) == (0, [])
    assert "champion: version 1, of run day1-core-" in capsys.readouterr().out


def changes_again(job, monkeypatch):
    """The source changes once more, between being opened and being read."""
    begin = plan.write_request

    def late(root, request):
        begin(root, request)
        job.change()

    job.change()
    monkeypatch.setattr(plan, "write_request", late)


@pytest.mark.parametrize(
    ("meanwhile", "seed", "accuracy", "code", "version"),
    [
        (lambda job, patch: None, 22, 0.9, 0, 1),  # settled
        (lambda job, patch: job.touch(), 22, 0.9, 0, 1),  # a twin
        (changes_again, 22, 0.9, 0, 1),  # abandoned
        (lambda job, patch: None, 5, 0.9, 0, 2),  # promoted
        (lambda job, patch: None, 5, 0.8, KEPT, 1),
    ],
    ids=["settled", "twin", "abandoned", "promoted", "kept"],
)
def test_what_comes_to_its_end_says_who_is_champion(
    job, meanwhile, seed, accuracy, code, version, monkeypatch, capsys
):
    job()
    job.stages.accuracy = accuracy
    meanwhile(job, monkeypatch)
    capsys.readouterr()
    assert job(day=2, seed=seed)[0] == code
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("champion")]
    assert said == [f"champion: version {version}, of run {registry.champion(job.root).run_id}"]


def test_what_fails_does_not(job, capsys):
    job()
    job.stages.fails = {"task": FAILED}
    capsys.readouterr()
    assert job(day=2, seed=5)[0] == FAILED
    assert "champion:" not in capsys.readouterr().out


def test_a_run_that_was_pruned_as_a_whole_is_still_judged(job):
    job()
    job.stages.accuracy = 0.8
    job(day=2, seed=5)
    storage.remove(job.last_run())
    assert job(day=3, seed=5) == (0, [])


def test_other_classes_than_the_champions_are_kept_out(job):
    job()
    path = job.root / "models/champion.json"
    content = json.loads(path.read_text())
    content["class_names"][0] = "o"
    put(path, json.dumps(content))
    assert job(day=2, seed=5)[0] == KEPT
    assert "--baseline_dir" not in job.stages.arguments
    assert job.lines()[1]["reason"] == (
        "labels of another class than the champion's: 1, required at most 0"
        " (label 0 is '0', the champion's 'o')"
    )
    (job.root / "models/1/model.json").unlink()
    with pytest.raises(InputError, match=r"the champion is damaged: .*model\.json"):
        job(day=2, seed=6)


def test_a_decision_outlives_a_kill_unless_the_champion_changed(job, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    job()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry, "publish", killed)
        job(day=2, seed=5)
    assert job(day=2, seed=5) == (0, ["task"])
    assert registry.champion(job.root).version == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ledger, "append", killed)
        job(day=3, seed=6)
    assert registry.champion(job.root).version == 3  # only the ledger's line is missing
    assert job(day=3, seed=6) == (0, ["task"])
    assert registry.champion(job.root).version == 3
    assert job.outcomes() == ["promoted"] * 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry, "publish", killed)
        job(day=4, seed=7)
    registry.rollback(job.root, 1)
    assert job(day=4, seed=7) == (0, ["task", "evaluate"])


def killed_before(job, monkeypatch, owner, name, *flags, **options):
    """Starts the command and kills it just before it calls a function."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, killed)
        job(*flags, **options)


def test_a_decision_is_on_the_model_that_stands_there(job, monkeypatch):
    job()
    killed_before(job, monkeypatch, registry, "publish", day=2, seed=5)
    (run,) = [path for path in (job.root / "runs").iterdir() if path.name.startswith("day2")]
    model = run / "export/model.json"
    worse = {"model_id": "another", "accuracy": 0.85}
    put(model, json.dumps(json.loads(model.read_text()) | worse))
    assert job(day=2, seed=5) == (KEPT, ["task", "evaluate"])
    assert json.loads((run / "decision.json").read_text())["model_id"] == "another"
    assert registry.champion(job.root).version == 1


@pytest.mark.parametrize("noted", [True, False], ids=["", "decision of an earlier version"])
def test_a_decision_is_on_the_files_that_stand_there(job, monkeypatch, noted):
    job()
    killed_before(job, monkeypatch, registry, "publish", day=2, seed=5)
    (run,) = [path for path in (job.root / "runs").iterdir() if path.name.startswith("day2")]
    decision = json.loads((run / "decision.json").read_text())
    files = {"model.json": (run / "export/model.json").read_bytes()}
    assert decision["model_files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    if noted:  # the same model, exported again
        put(run / "export/saved_model.pb", "another graph")
    else:
        del decision["model_files"]
        put(run / "decision.json", json.dumps(decision))
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 2
    assert json.loads((run / "decision.json").read_text())["model_files"].keys() == {
        "model.json", *(["saved_model.pb"] if noted else []),
    }  # fmt: skip


def test_what_changes_after_it_was_judged_is_not_published(job, monkeypatch):
    job()
    before = registry.champion(job.root)
    publish = chain._publish

    def late(root, request, decision, lock):
        put(plan.run_folder(root, request.run_id) / "export/saved_model.pb", "damaged")
        return publish(root, request, decision, lock)

    with monkeypatch.context() as patch, pytest.raises(FailedError) as failed:
        patch.setattr(chain, "_publish", late)
        job(day=2, seed=5)
    (run,) = [path for path in (job.root / "runs").iterdir() if path.name.startswith("day2")]
    assert str(failed.value) == (
        f"{run}/export/saved_model.pb: is not as it was when the model was judged; nothing was"
        " published, and the same command looks at it anew"
    )
    assert registry.champion(job.root) == before
    assert job.outcomes() == ["promoted"]
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).run_id == run.name


def test_other_weights_of_the_champions_own_run_are_published(job):
    job()
    first = registry.champion(job.root)
    run = job.last_run()
    put(run / "export/model.json", json.dumps(described(run / "export") | {"model_id": "another"}))
    for lost in (run / "decision.json", job.root / "runs.jsonl"):
        lost.unlink()
    assert job() == (0, ["task", "evaluate"])
    champion, (line,) = registry.champion(job.root), job.lines()
    assert (line["outcome"], line["version"], line["model_id"]) == ("promoted", 2, "another")
    assert (champion.version, champion.model_id) == (2, "another")
    assert (champion.run_id, first.model_id) == (first.run_id, f"model of {run.name}")


def test_rows_set_aside_are_held_to_the_flag_of_each_command(job):
    assert job("--max_quarantined=0.5") == (0, ALL)
    (dataset,) = (job.root / "datasets").iterdir()
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["quarantined"] = {"count": 80, "by_reason": {"label out of range": 80}}
    put(dataset / "manifest.json", json.dumps(manifest))
    said = (
        r"^80 of 800 rows cannot be used \(80 label out of range\), more than"
        r" --max_quarantined 0\.05 allows$"
    )
    with pytest.raises(InputError, match=said):
        job("--max_quarantined=0.05", day=2, seed=5)
    assert job.stages.ran == []
    assert job.outcomes() == ["promoted", "failed"]
    assert job("--max_quarantined=0.1", day=2, seed=5) == (0, ["task", "evaluate"])


@pytest.mark.parametrize("to", [1, 2])
def test_a_rollback_between_publication_and_ledger_stays(job, monkeypatch, to):
    job()
    job(day=2, seed=5)
    killed_before(job, monkeypatch, ledger, "append", day=3, seed=6)
    assert registry.champion(job.root).version == 3
    registry.rollback(job.root, to)
    assert job(day=3, seed=6) == (0, ["task"])
    champion = registry.champion(job.root)
    assert (champion.version, champion.rolled_back_from) == (4, to)
    assert [line["version"] for line in job.lines()] == [1, 2, 4, 3]  # the 4th by the rollback
    assert job(day=4, seed=6) == (0, [])
    # Nor does it count against it that its report was lost.
    (job.last_run() / "report/report.json").unlink()
    assert job(day=5, seed=6) == (0, ["task", "evaluate"])
    assert registry.champion(job.root) == champion
    assert job(day=6, seed=6) == (0, [])


@pytest.mark.parametrize("text", [None, "", '{"promoted": tr'])
def test_a_rollback_stays_although_the_decision_is_lost(job, text):
    job()
    job.stages.accuracy = 0.95
    job(day=2, seed=5)
    registry.rollback(job.root, 1)
    path = job.last_run().parent / job.lines()[1]["run_id"] / "decision.json"
    storage.remove(path)
    if text is not None:
        put(path, text)
    (path.parent / "report/report.json").unlink()  # a torn one alone is not looked at
    assert job(day=3, seed=5) == (0, ["task", "evaluate"])
    champion = registry.champion(job.root)
    assert (champion.version, champion.rolled_back_from) == (3, 1)
    assert [line["version"] for line in job.lines()] == [1, 2, 3, 2]
    decision = json.loads(path.read_text())
    assert decision["promoted"] is True
    assert decision["reason"] == (
        "was published as version 2, by a decision that is lost; against the present champion:"
        " rollbacks from this very model: 1, required at most 0"
        " (pipeline.registry rollback --version V brings it back)"
    )
    assert job(day=4, seed=5) == (0, [])


def test_a_decision_that_is_lost_before_the_ledgers_line_undoes_no_rollback(job, monkeypatch):
    job()
    job.stages.accuracy = 0.95
    killed_before(job, monkeypatch, ledger, "append", day=2, seed=5)
    registry.rollback(job.root, 1)
    (run,) = [path for path in (job.root / "runs").iterdir() if path.name.startswith("day2")]
    storage.remove(run / "decision.json")
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 3
    assert [line["version"] for line in job.lines()] == [1, 3, 2]
    age(job, 2)
    assert job("--max_age=1", day=3, seed=5) == (0, [])


def test_a_damaged_old_version_is_no_reason_to_judge_nothing(job):
    job()
    job(day=2, seed=5)
    put(job.root / "models/1/version.json", "{")
    assert job(day=3, seed=6) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 3


def remade(job):
    """Lets the trainer make a model of the same weights whatever run it is of."""
    task = job.stages.task

    def same(run_dir, dataset_dir, **more):
        task(run_dir, dataset_dir, **more)
        path = storage.place(str(run_dir)) / "export/model.json"
        model = json.loads(path.read_text())
        seed = plan.read_request(storage.place(str(run_dir))).trainer_arguments[0]
        put(path, json.dumps(model | {"model_id": f"model of {seed}"}))

    job.stages.task = same


@pytest.mark.parametrize("noted", [True, False])
def test_no_age_brings_back_what_was_rolled_back_from(job, monkeypatch, noted, caplog):
    caplog.set_level(logging.INFO)
    remade(job)
    job()
    job.stages.accuracy = 0.95
    job(day=2, seed=5)
    if noted:
        registry.rollback(job.root, 1)
    else:
        with monkeypatch.context() as patch, pytest.raises(LockedError):
            patch.setattr(ledger, "append", lambda *_, **__: (_ for _ in ()).throw(LockedError()))
            registry.rollback(job.root, 1)
    age(job, 9)
    before = contents(job.root / "models")
    judged = job.lines()[1]["run_id"]
    for day in (3, 4):
        caplog.clear()
        assert job("--max_age=5", day=day, seed=5) == (0, [])
        assert caplog.messages == [
            f"nothing new: run {judged} has been judged already (promoted, and rolled back since:"
            " no age brings it back)"
        ]
    assert contents(job.root / "models") == before
    # What came back is renewed as ever.
    job.stages.accuracy = 0.9
    assert job("--max_age=5", day=5) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 4


def test_a_warm_start_may_make_something_else_of_what_was_rolled_back_from(job):
    remade(job)
    job("--warm_start")
    job.stages.accuracy = 0.95
    job("--warm_start", day=2, seed=5)
    registry.rollback(job.root, 1)
    age(job, 9)
    assert job("--warm_start", "--max_age=5", day=3, seed=5) == (KEPT, ["task", "evaluate"])
    assert job.lines()[-1]["reason"].startswith("rollbacks from this very model: 1, required")
    assert registry.champion(job.root).version == 3
    del job.stages.task  # and now it comes to other weights
    age(job, 9)
    assert job("--warm_start", "--max_age=5", day=4, seed=5) == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 4


def test_what_was_rolled_back_from_does_not_come_back_by_another_name(job):
    """The source is touched, and what was decided is lost: nothing says that it is the same."""
    remade(job)
    job()
    job.stages.accuracy = 0.95
    job(day=2, seed=5)
    registry.rollback(job.root, 1)
    (job.root / "runs" / job.lines()[1]["run_id"] / "decision.json").unlink()
    job.touch()
    assert job(day=3, seed=5) == (KEPT, ALL)
    assert registry.champion(job.root).version == 3
    registry.rollback(job.root, 2)  # an operator's word again
    assert registry.champion(job.root).version == 4


def test_a_copy_that_the_pointer_never_named_is_published(job, monkeypatch):
    job()
    killed_before(job, monkeypatch, promotion, "_swap", day=2, seed=5)
    assert [version.version for version in registry.versions(job.root)] == [1, 2]
    assert registry.champion(job.root).version == 1
    assert job(day=2, seed=5) == (0, ["task"])
    assert registry.champion(job.root).version == 2
    assert [line["version"] for line in job.lines()] == [1, 2]


def test_a_force_reason_is_given_against_one_champion(job, monkeypatch):
    job()
    job(day=2, seed=5)
    job.stages.accuracy = 0.7
    forced = ("--force_promote", "--reason=we must")
    killed_before(job, monkeypatch, registry, "publish", *forced, day=3, seed=6)
    registry.rollback(job.root, 1)
    assert job(day=3, seed=7) == (KEPT, ["task", "evaluate", "task", "evaluate"])
    assert job.outcomes() == ["promoted", "promoted", "rolled_back", "kept", "kept"]
    assert registry.champion(job.root).rolled_back_from == 1
    assert job(*forced, day=4, seed=6) == (0, ["task"])
    assert registry.champion(job.root).run_id == job.lines()[3]["run_id"]


def test_a_force_reason_outlives_a_kill(job, monkeypatch):
    job()
    job.stages.accuracy = 0.7
    forced = ("--force_promote", "--reason=we must")
    killed_before(job, monkeypatch, registry, "publish", *forced, day=2, seed=6)
    assert job(day=3, seed=6) == (0, ["task"])
    assert (registry.champion(job.root).version, job.lines()[1]["forced"]) == (2, True)


def test_a_warm_start_goes_on_from_the_model_it_began_with(job):
    assert job("--warm_start", seed=1) == (0, ALL)
    job.stages.fails = {"task": 1}
    assert job("--warm_start", day=2, seed=2) == (FAILED, ["task"])
    assert job.stages.arguments["--initial_weights"] == str(job.root / "models/1")
    other = job.root.parent / "other"
    model = described(job.root / "models/1") | {"model_id": "other"}
    put(other / "model.json", json.dumps(model))
    known = registry.champion(job.root)
    changed = dataclasses.replace(known, run_id="other", model_id="other", files={})
    registry.publish(job.root, other, changed)
    assert registry.champion(job.root).version == 2
    job.stages.fails = {"evaluate": 1}
    assert job("--warm_start", day=3, seed=2) == (FAILED, ["task", "evaluate"])
    (begun,) = plan.unfinished(state.look(job.root))
    assert (begun.initial_weights, begun.window) == ("models/1", "day2")
    job.stages.fails = {}
    assert job(seed=2, day=3)[0] == 0  # a cold start is another training: both are done
    assert [line["window"] for line in job.lines()] == ["day1", "day2", "day3"]
    assert "--initial_weights" not in job.stages.arguments


def digits_dataset(folder, train, test):
    rows = {"train": [(each, "1") for each in train], "test": [(each, "2") for each in test]}
    return hand_made(folder, rows, tuple("0123456789"))


def last_decision(job):
    return json.loads((job.last_run() / "decision.json").read_text())


def test_a_warm_start_that_would_know_images_of_test_begins_with_new_weights(job, tmp_path, caplog):
    def dataset(name, train, test):
        return digits_dataset(tmp_path / name, train, test)

    def decided():
        return last_decision(job)

    first = dataset("first", train=[1, 2, 3], test=[4, 5])
    job.stages.dataset = first
    assert job("--warm_start")[0] == 0
    assert decided()["warm_start"] is None  # there was nothing to start from
    (old,) = (job.root / "datasets").iterdir()

    job.change()
    job.stages.dataset = dataset("moved", train=[1, 4], test=[2, 3, 5])
    job.stages.fails = {"evaluate": 1}
    assert job("--warm_start", day=2)[0] == FAILED
    storage.remove(old)  # what was found goes for the whole of the run
    job.stages.fails = {}
    assert job("--warm_start", day=2) == (0, ["task", "evaluate"])
    assert "--initial_weights" not in job.stages.by_stage["task"]
    said = "trained from new weights: models/1 has learned from 2 of the images of test"
    assert decided()["reason"].endswith(f"no class significantly worse; {said}")
    assert job.lines()[-1]["reason"] == decided()["reason"]
    assert [message for message in caplog.messages if "new weights" in message] == [said]
    assert decided()["warm_start"] == {
        "model": "models/1",
        "images": 2,
        "datasets": [load_manifest(first).dataset_id],
        "unknown": [],
    }

    job.change()
    moved, job.stages.dataset = job.stages.dataset, dataset("grown", train=[1, 4, 6], test=[2, 3])
    assert job("--warm_start", day=3) == (0, ALL)
    assert job.stages.by_stage["task"]["--initial_weights"] == str(job.root / "models/2")
    ids = [load_manifest(each).dataset_id for each in (moved, job.stages.dataset)]
    assert decided()["warm_start"] == {
        "model": "models/2", "images": 0, "datasets": ids[:1], "unknown": [],
    }  # fmt: skip
    assert decided()["reason"].endswith("no class significantly worse")

    for folder in (job.root / "datasets").iterdir():
        if load_manifest(folder).dataset_id == ids[0]:
            storage.remove(folder)
    job.change()
    job.stages.dataset = dataset("last", train=[1, 4, 6, 7], test=[2, 3])
    assert job("--warm_start", day=4) == (0, ALL)
    assert "--initial_weights" not in job.stages.by_stage["task"]
    assert decided()["warm_start"] == {
        "model": "models/3", "images": 0, "datasets": ids[1:], "unknown": ids[:1],
    }  # fmt: skip
    assert decided()["reason"].endswith(
        "; trained from new weights: whether models/3 has learned from images of test is not known"
        f" of all datasets that it was trained on: {ids[0]} cannot be read"
    )
    assert decided()["inherited"] == {"images": 0, "datasets": [], "unknown": []}

    job.change()
    job.stages.dataset = dataset("after", train=[1, 4, 6, 7, 8], test=[2, 3])
    assert job("--warm_start", day=5) == (0, ALL)  # the new weights know of nothing before
    assert job.stages.by_stage["task"]["--initial_weights"] == str(job.root / "models/4")


def test_images_of_test_that_came_in_by_initial_weights_keep_the_champion(job, tmp_path):
    job.stages.dataset = digits_dataset(tmp_path / "first", train=[2, 3, 5], test=[9])
    assert job()[0] == 0
    (first,) = (job.root / "datasets").iterdir()
    identity = load_manifest(first).dataset_id

    job.change()
    job.stages.dataset = digits_dataset(tmp_path / "moved", train=[1], test=[2, 3, 4])
    given = {"day": 2, "weights": job.root / "models/1"}
    assert job(**given) == (KEPT, ALL)
    decision = last_decision(job)
    assert (
        decision["reason"]
        == job.lines()[-1]["reason"]
        == (
            "images of test in what it had learned from before: 2, required at most 0"
            " (by the weights that it began from)"
        )
    )
    assert decision["inherited"] == {"images": 2, "datasets": [identity], "unknown": []}
    assert decision["warm_start"] is None
    assert registry.champion(job.root).version == 1
    assert job("--force_promote", "--reason=we must", **given) == (0, ["task"])
    assert last_decision(job)["forced"] is True

    storage.remove(first)
    job.stages.accuracy = 0.95
    assert job(**given, seed=5) == (KEPT, ["task", "evaluate"])
    assert last_decision(job)["reason"] == (
        "datasets that it had learned from before and that cannot be read:"
        f" 1, required at most 0 ({identity})"
    )


def test_initial_weights_of_a_model_that_says_nothing_of_itself_keep_the_champion(job, tmp_path):
    job()
    foreign = tmp_path / "foreign"
    put(foreign / "model.json", json.dumps({"model_id": "foreign"}))
    job.stages.accuracy = 0.95
    assert job(day=2, weights=foreign) == (KEPT, ["task", "evaluate"])
    assert last_decision(job)["reason"] == (
        "datasets that it had learned from before and that cannot be read: 1, required at most 0"
        " (those that its description does not name)"
    )


def test_initial_weights_that_know_nothing_of_test_win(job):
    job()
    assert job(day=2, weights=job.root / "models/1") == (0, ["task", "evaluate"])
    assert registry.champion(job.root).version == 2
    assert all(check["passed"] for check in last_decision(job)["checks"])


def test_a_warm_start_every_night_goes_on_although_old_datasets_are_pruned(job, tmp_path):
    for day in range(1, 6):
        job.change()
        levels = list(range(10, 10 + day))
        job.stages.dataset = digits_dataset(tmp_path / f"day{day}", train=levels, test=[2, 3])
        assert job("--warm_start", day=day)[0] == 0
        list(pruning.prune(job.root, 1))
        assert len(list((job.root / "datasets").iterdir())) == day  # all in its lineage
        begun_from = job.stages.by_stage["task"].get("--initial_weights")
        assert begun_from == (None if day == 1 else str(job.root / f"models/{day - 1}"))
        assert [each["passed"] for each in last_decision(job)["checks"] if not each["passed"]] == []
    job.change()
    job.stages.dataset = digits_dataset(tmp_path / "day6", train=[50], test=[2, 3])
    assert job(day=6)[0] == 0  # new weights: a lineage of its own
    list(pruning.prune(job.root, 1))
    assert len(list((job.root / "datasets").iterdir())) == 1


def test_what_a_kill_left_is_cleared_away(local_job):
    local_job()
    left = [
        local_job.root / "models/.champion.json.abc",
        local_job.last_run() / ".decision.json.abc",
        local_job.last_run() / "report/.report.html.abc",
    ]
    empty = local_job.root / "runs/day0-core-x"
    empty.mkdir()
    (empty / ".request.json.abc").touch()
    (local_job.last_run() / "decision.json").unlink()
    for path in left:
        path.touch()
    published = local_job.root / "models/.1.incomplete"  # killed after it was renamed
    (published / "abc").mkdir(parents=True)
    (published / ".lock").touch()
    assert local_job(day=2)[0] == 0
    assert not any(path.exists() for path in [*left, empty, published])
    assert (local_job.root / "models/1/model.json").exists()


def test_a_twin_that_is_killed_as_it_goes_leaves_nothing(local_job, monkeypatch):
    local_job()
    local_job.touch()
    remove, removed = chain.storage.remove, []

    def killed(path):
        if path.exists():  # moved aside, but not removed
            removed.append(path.name)
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chain.storage, "remove", killed)
        local_job(day=2)
    (name,) = removed
    assert (local_job.root / "runs" / name / "request.json").exists()
    assert name.startswith(".day2-core-")
    assert plan.unfinished(state.look(local_job.root)) == []
    assert local_job(day=2) == (0, [])
    assert local_job.runs() == ["day1"]


def test_folders_of_others_are_left_alone(local_job):
    other = local_job.root / "runs/other"
    other.mkdir(parents=True)
    (other / "config.json").touch()
    (local_job.root / "runs/note.txt").touch()
    assert local_job()[0] == 0
    assert (other / "config.json").exists()


def test_the_page_is_brought_up_to_date_even_where_nothing_is_new(job, monkeypatch):
    job()
    page = job.root / "index.html"
    job.stages.accuracy = 0.85
    killed_before(job, monkeypatch, retrain.index, "write_index", day=2, seed=5)
    assert job.outcomes() == ["promoted", "kept"]
    assert job.last_run().name not in page.read_text()
    assert job(day=2, seed=5) == (0, [])
    assert job.last_run().name in page.read_text()
    before = page.stat()
    assert job(day=3, seed=5) == (0, [])
    assert page.stat() == before
    job.stages.fails = {"task": 1}
    assert job(day=3, seed=6) == (FAILED, ["task"])
    assert "day3-core-" in page.read_text()


def test_a_trainer_that_cannot_be_asked_is_a_failure(job, monkeypatch, caplog):
    def crashes(*_, **__):
        raise StageError("trainer.task --dry_run", -9)

    monkeypatch.setattr(retrain, "ask_trainer", crashes)
    before = contents(job.root)
    config = retrain.parse(["--root", str(job.root), f"--source=idx:{job.source}"])
    assert retrain.execute(config) == FAILED
    assert "trainer.task --dry_run was killed by signal 9; nothing was begun" in caplog.text
    assert contents(job.root) == before


UNREADABLE = ["", "{", "[]", "{}", "3", '{"run_id": 1}']


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_request_that_cannot_be_read_is_named(job, text):
    job.stages.fails = {"task": 1}
    assert job()[0] == FAILED
    (run,) = (job.root / "runs").iterdir()
    put(run / "request.json", text)
    with pytest.raises(InputError, match=r"request.json: not the request of a run"):
        job(day=2, seed=5)


@pytest.mark.parametrize("text", UNREADABLE)
def test_of_what_came_to_an_end_no_request_is_asked(job, text):
    job()
    put(job.last_run() / "request.json", text)
    assert job(day=2, seed=5) == (0, ["task", "evaluate"])


def test_a_request_of_another_version_is_read(job):
    job.stages.fails = {"task": 1}
    assert job()[0] == FAILED
    (run,) = (job.root / "runs").iterdir()
    before = plan.read_request(run)
    content = json.loads((run / "request.json").read_text())
    content["rules"] = content["rules"] | {"later": 1}
    del content["rules"]["alpha"]  # has a default
    put(run / "request.json", json.dumps(content | {"later": 1}))
    assert plan.read_request(run) == before
    job.stages.fails = {}
    assert job() == (0, ["task", "evaluate"])


def test_the_plan_says_what_is_made_and_skipped_and_writes_nothing(job):
    def described(*flags, day=1, seed=22):
        argv = ["--root", str(job.root), f"--source=idx:{job.source}", f"--window=day{day}"]
        config = retrain.parse([*argv, *flags])
        training = Training(
            arguments=(f"--seed={seed}",), rest=(), config={"preset": "core", "seed": seed}
        )
        seen = state.look(job.root)
        source = retrain.resolve_source(config, None)
        request = retrain.make_request(config, training, source, seen)
        before = contents(job.root)
        text = plan.describe(seen, request, None)
        assert contents(job.root) == before
        return text.splitlines()

    read, made, trained, compared, gate = described()
    assert read == f"read     idx:{job.source}"
    assert made.startswith(f"make     the dataset {job.root}/datasets/")
    assert made.endswith("(--num_shards=8 --compression=none --max_quarantined=0.01)")
    assert trained.startswith("make     train run day1-core-")
    assert trained.endswith(" (--seed=22)")
    assert compared == "compare  with the floors alone: there is no champion"
    assert gate == (
        "gate     min_accuracy 0.8, min_class_accuracy 0.5, min_class_images 1,"
        " promote_if at_least_as_good, alpha 0.05"
    )
    job()
    skipped, _, compared, _ = described(seed=5, day=2)
    assert skipped.startswith("skip     preprocess: ")
    assert compared == f"compare  with the champion, version 1 of run {job.last_run().name}"
    job.stages.fails = {"evaluate": 1}
    job(seed=5, day=2)
    first, *_ = described(seed=6, day=3)
    assert first.startswith("first    finish run day2-core-")
    _, trained, *_ = described(seed=5, day=2)
    assert trained.startswith("skip     training: ")
    # In another window it is that run all the same, and no other training.
    for flags, left in (
        ((), "nothing is new"),
        (("--min_accuracy=0.7",), "the rules of this command are asked, if its own keep it out"),
        (
            ("--force_promote", "--reason=must"),
            "it is promoted by force, if the gate keeps it out",
        ),
    ):
        first, skipped = described(*flags, seed=5, day=3)
        assert first.startswith("first    finish run day2-core-")
        assert skipped == (
            f"skip     all of it; it is this very training, and once it is finished {left}"
        )
    job.stages.fails = {}
    assert job(seed=5, day=3) == (0, ["task", "evaluate"])
