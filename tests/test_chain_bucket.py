"""The chain on a root in a bucket, killed or overtaken before every single change of it."""

import contextlib
import datetime
import signal
import threading

import helpers
import memory_bucket
import pytest
import test_stages
from google.api_core import exceptions
from memory_bucket import KilledError
from test_chain import (  # noqa: F401 - some are fixtures
    ALL,
    FAILED,
    bucket,
    bucket_job,
    contents,
    make_job,
    put,
)

from pipeline import (
    chain,
    command,
    gcs,
    inventory,
    leases,
    ledger,
    plan,
    registry,
    stages,
    state,
    storage,
)
from pipeline.command import InputError, LockedError, UnreachableError
from pipeline.gcs import GcsPath
from pipeline.ledger import Line
from pipeline.stages import Stages

LATER = datetime.timedelta(seconds=10 * leases.LAPSE_SECONDS)
UNREACHABLE = command.UNREACHABLE


@pytest.fixture
def job(bucket_job, bucket, monkeypatch):  # noqa: F811
    """The chain as a process runs it: under the lock of its root, whose time the tests let pass."""
    late = [0.0]
    monkeypatch.setattr(leases, "_now", lambda: late[0])

    def later():
        bucket.clock += LATER
        late[0] += LATER.total_seconds()

    def run(*flags, **options):
        with storage.locked(bucket_job.root, outlasts=True) as lease:
            held, bucket_job.stages.lock = bucket_job.stages.lock, lease
            try:
                return bucket_job(*flags, **options)
            finally:
                bucket_job.stages.lock = held

    bucket_job.locked, bucket_job.later = run, later
    return bucket_job


def result(job):
    """What does not depend on what happened on the way, nor on the time."""
    assert registry.champion(job.root).version == len(registry.versions(job.root))
    files = contents(job.root)
    lines = [line | {"time": None, "request": None} for line in job.lines()]
    return lines, {name for name in files if "/failures" not in name}


def undisturbed(job, **options):
    """What a run comes to, and how many changes of the bucket it takes, which is as it was."""
    memory = gcs.bucket("bucket")
    before, memory.changes = dict(memory.objects), 0
    assert job.locked(**options)[0] == 0
    changes, expected = memory.changes, result(job)
    memory.objects = dict(before)
    return expected, changes, before


def test_killed_before_every_change(job, bucket):  # noqa: F811
    job()
    expected, changes, before = undisturbed(job, day=2, seed=5)
    assert changes > 25
    for step in range(changes):
        bucket.objects, bucket.changes = dict(before), 0

        def killed(number, step=step):
            if number >= step:
                raise KilledError

        bucket.before = killed
        with pytest.raises(KilledError):
            job.locked(day=2, seed=5)
        bucket.before = lambda number: None
        assert registry.champion(job.root).version in (1, 2)
        job.later()
        assert job.locked(day=2, seed=5)[0] == 0
        assert result(job) == expected, step


def test_taken_for_dead_before_every_change(job, bucket):  # noqa: F811
    """Held until another has done the work, it then goes on: nothing is done or entered twice."""
    job()
    expected, changes, before = undisturbed(job, day=2, seed=5)
    lost = 0
    for step in range(changes):
        bucket.objects, bucket.changes = dict(before), 0

        def held(number, step=step):
            if number == step:
                job.later()
                assert job.locked(day=2, seed=5)[0] == 0
                job.later()

        bucket.before = held
        try:
            job.locked(day=2, seed=5)
        except LockedError:
            lost += 1
        bucket.before = lambda number: None
        assert [line["outcome"] for line in job.lines()] == ["promoted", "promoted"], step
        assert registry.champion(job.root).version == 2
        job.later()
        assert job.locked(day=2, seed=5) == (0, [])
        assert result(job) == expected, step
    assert lost > changes / 2


@pytest.mark.parametrize("is_first", [True, False])
def test_taken_for_dead_by_one_that_only_puts_the_root_in_order(job, bucket, is_first):  # noqa: F811
    """What it removes is named by no pointer, that of a process which goes on later included."""
    if not is_first:
        job()
    expected, changes, before = undisturbed(job, day=2, seed=5)
    lost = 0
    for step in range(changes):
        bucket.objects, bucket.changes = dict(before), 0

        def held(number, step=step):
            if number == step:
                bucket.before = lambda number: None
                job.later()
                with storage.locked(job.root, outlasts=True) as lease:
                    chain.put_in_order(job.root, lease)

        bucket.before = held
        try:
            job.locked(day=2, seed=5)
        except LockedError:
            lost += 1
        bucket.before = lambda number: None
        registry.champion(job.root)  # is whole
        job.later()
        assert job.locked(day=2, seed=5)[0] == 0
        assert result(job) == expected, step
        assert inventory.verify(job.root) == []
    assert lost > changes / 2


def test_whoever_has_lost_the_lock_swaps_no_pointer(job, bucket):  # noqa: F811
    """But for the change that was under way: its lock had been looked at already."""
    job()
    _, changes, before = undisturbed(job, day=2, seed=5)
    swaps = []
    for step in range(changes):
        bucket.objects, bucket.changes = dict(before), 0
        taken = []

        def held(number, step=step, taken=taken):
            if number == step:
                bucket.before = lambda number: None
                job.later()
                taken.append((leases.acquire(job.root), registry.champion(job.root)))

        bucket.before = held
        with contextlib.suppress(LockedError):
            job.locked(day=2, seed=5)
        bucket.before = lambda number: None
        ((lease, standing),) = taken
        lease.end()
        if registry.champion(job.root) != standing:
            swaps.append(step)
    assert len(swaps) == 1


@pytest.mark.parametrize("stage", ALL)
def test_what_has_lost_the_lock_in_a_stage_publishes_nothing(job, bucket, stage):  # noqa: F811
    assert job()[0] == 0
    job.change()
    before = contents(job.root)
    work = getattr(job.stages, stage)

    def slow(**arguments):
        work(**arguments)
        job.later()
        other.append(leases.acquire(job.root))
        bucket.changes = 0
        job.stages.hold()

    other = []
    setattr(job.stages, stage, slow)
    with pytest.raises(LockedError, match="the lock of this process has lapsed"):
        job.locked(day=2, seed=5)
    assert bucket.changes == 1  # a renewal that was refused
    other.pop().end()
    assert before.items() <= contents(job.root).items()
    added = contents(job.root).keys() - before.keys()
    assert not any(name.startswith("models") or "decision" in name for name in added)


def test_a_second_one_is_told_who_is_at_work(job, bucket):  # noqa: F811
    with storage.locked(job.root, outlasts=True) as lease:
        bucket.clock += datetime.timedelta(seconds=20)
        before = contents(job.root)
        with pytest.raises(LockedError) as refused:
            job.locked()
    assert str(refused.value) == (
        f"{job.root}: {lease.owner} is at work here; if it is dead, its lock lapses in 60 seconds"
    )
    assert before.keys() == {".lock"}
    assert job.locked() == (0, ALL)


def test_it_outlasts_the_locks_of_its_stages(job, bucket):  # noqa: F811
    """Renewed up to a heartbeat later than the chain's, they have lapsed when that has."""
    lease = leases.acquire(job.root, outlasts=True)
    bucket.clock += datetime.timedelta(seconds=leases.HEARTBEAT_SECONDS)
    of_stage = leases.acquire(job.root / "runs/one")
    bucket.clock += datetime.timedelta(seconds=leases.LAPSE_SECONDS)
    leases.acquire(job.root / "runs/one").end()
    with pytest.raises(LockedError, match="lapses in 10 seconds"):
        leases.acquire(job.root)
    bucket.clock += datetime.timedelta(seconds=10)
    leases.acquire(job.root).end()
    for ended in (of_stage, lease):
        with pytest.raises(LockedError):
            ended.renew()


@pytest.mark.parametrize("text", ["5.9", "1", "soon", "inf", "nan", "-1"])
def test_how_long_a_lock_holds(monkeypatch, text):
    assert leases.times() == (10, 60)
    monkeypatch.setenv("DIGITS_LEASE_SECONDS", "6")
    assert leases.times() == (1, 6)  # of one object, a bucket takes no more changes for long
    monkeypatch.setenv("DIGITS_LEASE_SECONDS", text)
    with pytest.raises(command.InputError, match=f"DIGITS_LEASE_SECONDS {text}: expected a number"):
        leases.times()


# How often the bucket is asked


def test_nothing_new_takes_as_many_requests_however_many_runs_there_are(job, bucket):  # noqa: F811
    def requests():
        bucket.looks = bucket.changes = 0
        assert job.locked(day=2) == (0, [])
        return bucket.looks, bucket.changes

    assert job.locked()[0] == 0
    of_one = requests()
    for seed in range(5):
        assert job.locked(seed=seed)[0] == 0
    assert len(job.runs()) == 6
    assert of_one == requests() == (26, 3)  # changes: the lock is taken, renewed, and goes


def test_a_run_that_was_begun_anew_is_seen_without_its_request_being_read(job):
    assert job()[0] == 0
    job.stages.fails = {"task": 1}
    assert job("--force_promote", "--reason=must", seed=5)[0] == FAILED
    job.stages.fails = {}
    seen = state.look(job.root)
    (begun,) = plan.unfinished(seen)
    assert begun.run_id not in {line["run_id"] for line in seen.lines}
    (closed,) = (line for line in seen.lines)
    assert closed["request"] == seen.runs[closed["run_id"]]["request.json"]
    put(job.root / "runs" / closed["run_id"] / "request.json", '{"attempt": 1}')
    files = state.look(job.root).runs[closed["run_id"]]
    folder = plan.run_folder(job.root, closed["run_id"])
    assert not plan.has_ended(folder, seen.lines, files)
    put(folder / "request.json", '{"attempt": 0}')
    assert plan.has_ended(folder, seen.lines, files)


# Twins, and the ledger


def test_a_twin_killed_before_every_change_leaves_nothing(job, bucket):  # noqa: F811
    job()
    job.touch()
    job.stages.fails = {"preprocess": 1}
    assert job(day=2)[0] == FAILED  # so that its folder holds a note of it as well
    job.stages.fails = {}
    (run,) = (name for name in job.runs() if name == "day2")
    before, bucket.changes = dict(bucket.objects), 0
    assert job(day=2) == (0, ["preprocess"])
    changes = bucket.changes
    assert run not in job.runs()
    for step in range(changes):
        bucket.objects, bucket.changes = dict(before), 0

        def killed(number, step=step):
            if number >= step:
                raise KilledError

        bucket.before = killed
        with pytest.raises(KilledError):
            job(day=2)
        bucket.before = lambda number: None
        assert job(day=2)[0] == 0
        assert job.runs() == ["day1"]
        assert job.outcomes() == ["promoted"]


def line(**changed):
    return Line(**{"run_id": "r", "outcome": "kept", "reason": "why"} | changed)


def test_a_line_whose_answer_was_lost_is_not_written_twice(bucket, monkeypatch):  # noqa: F811
    """The client tries again what it had no answer to, and is told that the object has changed."""
    root = GcsPath("bucket", "root")
    ledger.append(root, line(run_id="a"))
    upload = memory_bucket.Blob.upload_from_file

    def answered_late(blob, file, **options):
        upload(blob, file, **options)
        raise exceptions.PreconditionFailed("tried again")

    monkeypatch.setattr(memory_bucket.Blob, "upload_from_file", answered_late)
    ledger.append(root, line(run_id="b"))
    assert [each["run_id"] for each in ledger.read(root)] == ["a", "b"]


def test_an_end_is_entered_once(bucket, tmp_path):  # noqa: F811
    for root in (GcsPath("bucket", "root"), tmp_path):
        ledger.append(root, line(), attempt=0)
        ledger.append(root, line(run_id="s"), attempt=0)
        ledger.append(root, line(), attempt=1)
        before = contents(root)
        with pytest.raises(LockedError, match="another process has entered the end of run r"):
            ledger.append(root, line(), attempt=1)
        assert contents(root) == before


# Stages


def test_a_stage_is_killed_when_the_lock_is_lost(bucket, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "a_stage.py").write_text(test_stages.STAGE)
    monkeypatch.setenv("PYTHONPATH", f"{helpers.ROOT}:{tmp_path}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "LOOK_SECONDS", 0.01)
    root = GcsPath("bucket", "root")

    def take_over():
        test_stages.until((tmp_path / "ready").exists)
        bucket.clock += LATER
        taken.append(leases.acquire(root))
        with contextlib.suppress(LockedError):
            lease.renew()  # as the next heartbeat does

    taken = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        with storage.locked(root) as lease, Stages(lease) as running:
            running.run("a_stage", "0")
            (tmp_path / "ready").unlink()
            thread = threading.Thread(target=take_over)
            thread.start()
            with pytest.raises(LockedError, match="the lock of this process has lapsed"):
                running.run("a_stage", "save")
            thread.join()
            assert not (tmp_path / "saved").exists()  # as by a SIGTERM, which would cancel a job
            assert running._process.returncode == -signal.SIGKILL
            (tmp_path / "pid").unlink()
            with pytest.raises(LockedError):
                running.run("a_stage", "0")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "pid").exists()
    assert (root / ".lock").is_file()  # the other's
    taken.pop().end()


# A silent server


def test_a_silent_server_does_not_count_against_a_run(job, caplog):
    job.stages.fails = {"task": UNREACHABLE}
    assert [job(day=day)[0] for day in range(1, 6)] == [FAILED] * 5
    assert "once the server answers or has room, the same command goes on from here" in caplog.text
    assert job.lines() == []
    job.stages.fails = {}
    assert job(day=6) == (0, ["task", "evaluate"])
    assert job.runs() == ["day1"]


def test_a_silent_server_is_no_change_of_the_source(job, monkeypatch):
    def silent(_):
        raise UnreachableError("gs://other/images: no answer")

    job.stages.fails = {"preprocess": 1}
    assert job()[0] == FAILED
    with monkeypatch.context() as patch, pytest.raises(UnreachableError):
        patch.setattr(chain.options, "open_sources_of", silent)
        (begun,) = plan.unfinished(state.look(job.root))
        chain.finish(job.root, begun, job.stages)
    assert job.lines() == []
    job.stages.fails = {}
    assert job() == (0, ALL)
    assert job.outcomes() == ["promoted"]


def test_a_root_that_lost_its_pointer_promotes_nothing(job):
    """Else whatever is above the floors would be served, as where there never was a champion."""
    job()
    storage.remove(job.root / "models/champion.json")
    job.later()
    with pytest.raises(InputError, match=r"champion\.json: missing, although .* rollback"):
        job.locked(day=2, seed=5)
    assert [line["outcome"] for line in job.lines()] == ["promoted"]
    assert registry.champion(job.root) is None
