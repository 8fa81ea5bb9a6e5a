"""Runs whose folders are in a bucket: what is uploaded, in which order, and what is left of it.

The bucket is one in memory, as strict as Cloud Storage; the run is that of test_loop.py, whose
weights are a number that every step folds its rows into. Whole trainers are in
test_trainer_gcs.py.
"""

import datetime
import io
import itertools
import json
import os
import threading
import time

import memory_bucket
import numpy as np
import pytest
import test_loop
from google.api_core import exceptions
from memory_bucket import KilledError

from pipeline import gcs, gcs_publish, leases, storage
from pipeline.command import FailedError, InputError, LockedError
from pipeline.gcs import GcsPath
from trainer import data, job, loop, run_folder, uploads
from trainer.checkpoints import Checkpoints
from trainer.mirror import Mirror
from trainer.uploads import Background
from trainer.workers import Workers

PLACES = run_folder.places(GcsPath("bucket", "runs/r1"), {}, {})
CONTENT = test_loop.CONTENT
LATER = datetime.timedelta(seconds=leases.LAPSE_SECONDS + 1)
WAIT = 60  # seconds, for what takes milliseconds


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)  # so that the order of changes is one
    monkeypatch.setattr(loop, "VALIDATION_STEPS_PER_CALL", 1)
    monkeypatch.setattr(job, "_read", lambda *_: "read")
    monkeypatch.setattr(uploads, "PACE_SECONDS", 0)  # the bucket here takes all at once
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands; what counts is elsewhere
    return memory


class Counting(test_loop.Process):
    """A run that saves after every call, and whose event files are text."""

    def __init__(self, mirror, *, waits=True, **options):
        super().__init__(mirror.here.run, **options)
        self.mirror, self.waits = mirror, waits
        self.run.stop = test_loop.Stop(self)
        self.files = Checkpoints(
            mirror.here.checkpoints,
            self,
            run=CONTENT,
            seconds=0,
            after=self.after,
            shown=PLACES.checkpoints,
        )

    def after(self):
        self.mirror.saved()
        if self.waits:  # for one order of changes; what a kill leaves is a part of it
            self.mirror._uploads.wait()

    def write(self, line, weights):
        with (self.mirror.here.tensorboard / f"events.{id(self)}").open("a") as file:
            file.write(f"{line['epoch']} {line['loss']}\n")


def train(*, places=PLACES, **options):
    """One process of a run, from its start to its end."""
    with Mirror(places) as mirror:
        asked = job.Job(
            config=test_loop.CONFIG,
            manifest=None,
            content=CONTENT,
            places=places,
            mirror=mirror,
            strategy=None,
            workers=Workers(),
        )
        if job.begin(asked, None, None) is None:
            return None
        process = Counting(mirror, **options)
        if process.go() is None:
            return process
        export(mirror.here, process)
        mirror.publish()
    return process


def export(here, process):
    own = {name: CONTENT[name] for name in ("dataset_id", "devices")}
    model = own | {"config": CONTENT, "weights": process.state}
    (here.model / "variables").mkdir()
    (here.model / "variables" / "data").write_text(str(process.state))
    (here.model / "metrics.jsonl").write_bytes(here.metrics.read_bytes())
    (here.model / "model.json").write_text(json.dumps(model))


def timeless(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "examples_per_second")}
        for line in lines
    ]


def result(memory):
    """What a run comes to, whatever happened on the way."""
    found = {name.removeprefix("runs/r1/"): data for name, data in memory.contents().items()}
    events = [found.pop(name).decode() for name in list(found) if name.startswith("tensorboard/")]
    steps = sorted({line for text in events for line in text.splitlines()})
    for name in ("metrics.jsonl", "export/metrics.jsonl"):
        found[name] = timeless(found[name])
    *before, newest = sorted(name for name in found if name.startswith("checkpoints/"))
    for name in before:
        del found[name]  # which step it is of depends on where a run was cut
    found[newest] = None  # it holds how long training took
    return found, steps


@pytest.fixture
def whole(bucket):
    """What an undisturbed run comes to, and in how many changes; the bucket is empty again."""
    train()
    found, changes = result(bucket), bucket.changes
    bucket.objects.clear()
    bucket.changes = 0
    return found, changes


def step_of(name):
    return int(name.removeprefix("runs/r1/checkpoints/step-").removesuffix(".ckpt"))


def changes_of(memory):
    """Records what every change of the bucket puts (+name) or removes (-name)."""
    made, before = [], {}

    def look(_=None):
        now = {name: blob.generation for name, blob in memory.objects.items()}
        made.extend(f"+{name}" for name in now if now[name] != before.get(name))
        made.extend(f"-{name}" for name in before if name not in now)
        before.clear()
        before.update(now)

    memory.before = look
    return made, look


# What a run leaves in its bucket


def test_a_run_in_a_bucket_is_one_in_a_folder(bucket, whole, tmp_path):
    (found, steps), _ = whole
    assert sorted(found) == [
        "checkpoints/step-00000015.ckpt",
        "config.json",
        "export/metrics.jsonl",
        "export/model.json",
        "export/variables/data",
        "metrics.jsonl",
    ]
    assert steps == [f"{epoch} 8.0" for epoch in (1, 2, 3)]
    assert json.loads(found["config.json"]) == CONTENT
    local = tmp_path / "run"
    local.mkdir()
    alone = test_loop.process(local)
    alone.go()
    assert json.loads(found["export/model.json"])["weights"] == alone.state
    assert found["metrics.jsonl"] == timeless((local / "metrics.jsonl").read_text())


def test_order_of_uploads(bucket):
    made, look = changes_of(bucket)
    train()
    look()
    names = [change.removeprefix("+runs/r1/") for change in made if ".lock" not in change]
    assert names[0] == "config.json"
    standing = set()
    for i, change in enumerate(made):
        if change.startswith("+runs/r1/checkpoints/"):
            assert step_of(change[1:]) >= max(standing, default=0)
            standing.add(step_of(change[1:]))
        if change.startswith("-runs/r1/checkpoints/"):  # once there are two newer ones
            assert len(standing) == 3
            assert step_of(change[1:]) == min(standing)
            standing.remove(min(standing))
        if change.startswith("+runs/r1/tensorboard/"):  # what a checkpoint holds stands before it
            assert made[i + 1] == "+runs/r1/metrics.jsonl"
            assert made[i + 2].startswith("+runs/r1/checkpoints/")
    final = [change for change in made if "runs/r1/export/" in change]
    assert final == [
        f"+runs/r1/export/{name}" for name in ("metrics.jsonl", "variables/data", "model.json")
    ]
    after = made[made.index(final[0]) :]
    assert not any("checkpoints" in change or "tensorboard" in change for change in after)


def test_cut_after_every_change_it_ends_the_same(bucket, whole):
    expected, count = whole
    assert count > 50

    def killed(number):
        if number >= cut:
            raise KilledError

    shown = set()
    for cut in range(count):
        bucket.objects.clear()
        bucket.changes, bucket.before = 0, killed
        with pytest.raises(KilledError):
            train()
        bucket.before = lambda number: None
        names = {name for name in bucket.objects if name.startswith("runs/r1/export/")}
        if "runs/r1/export/model.json" in names:
            assert len(names) == 3  # it is whole
            shown.add(cut)
        if "runs/r1/.lock" in bucket.objects:
            with pytest.raises(LockedError, match="gs://bucket/runs/r1: process"):
                train()
        bucket.clock += LATER
        train()
        assert result(bucket) == expected
    assert shown == set(range(min(shown), count))


def test_again_is_done_and_changes_nothing(bucket):
    train()
    before = bucket.contents()
    assert train() is None
    assert bucket.contents() == before


def test_training_does_not_wait_for_uploads(bucket, whole):
    released, trained = threading.Event(), []

    def slow(_):
        if threading.current_thread().name == "uploads":
            assert released.wait(WAIT)

    bucket.before = slow
    made = Counting.go

    def go(process):
        progress = made(process)
        trained.append(sorted(n for n in bucket.objects if "checkpoints" in n))
        released.set()
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "go", go)
        process = train(waits=False)
    assert trained == [[]]
    assert len(process.saved) > 10
    assert bucket.changes < whole[1] - 20  # of many states that were saved, few went up
    found, steps = result(bucket)
    assert sorted(found) == sorted(whole[0][0])
    assert (found["export/model.json"], steps) == (whole[0][0]["export/model.json"], whole[0][1])


def test_stopped_it_has_uploaded_everything_and_goes_on(bucket, whole):
    stopped = train(waits=False, stopped_at=6)
    names = [name.removeprefix("runs/r1/") for name in sorted(bucket.objects)]
    assert [name.split("/")[0] for name in names] == [
        "checkpoints",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]
    assert names[1] == f"checkpoints/step-{stopped.saved[-1]:08d}.ckpt"
    process = train()
    assert stopped.rows + process.rows == all_rows()
    assert result(bucket) == whole[0]


def all_rows():
    orders = [data.epoch_order(22, epoch, test_loop.ROWS) for epoch in range(test_loop.EPOCHS)]
    return np.concatenate(orders).tolist()


def test_damaged_checkpoint_is_passed_over(bucket, whole, caplog):
    train(stopped_at=6)
    names = sorted(name for name in bucket.objects if "checkpoints" in name)
    blob = bucket.objects[names[-1]]
    bucket.store(blob, blob.content[:-1] + b"x")
    with caplog.at_level("WARNING"):
        train()
    assert f"gs://bucket/{names[-1]}: damaged (its checksum is wrong)" in caplog.text
    assert result(bucket) == whole[0]


def test_checkpoint_of_another_run_is_named_as_the_bucket_names_it(bucket):
    train(stopped_at=6)
    del bucket.objects["runs/r1/config.json"]
    before = bucket.contents()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTENT, "input", "stream")
        with pytest.raises(
            InputError, match=r"^gs://bucket/runs/r1/checkpoints: holds a run with input auto, not"
        ):
            train()
    assert bucket.contents() == before


# Others, and a server that fails


def test_two_at_once_one_is_refused(bucket):
    with storage.locked(PLACES.run):
        before = bucket.contents()
        with pytest.raises(LockedError, match=r"^gs://bucket/runs/r1: process \d+ on .* at work"):
            train()
        assert bucket.contents() == before


def test_taken_over_in_the_middle_it_stops_and_publishes_nothing(bucket, whole):
    taken = []

    def take(number):
        if number == 30:
            bucket.before = lambda _: None
            bucket.clock += LATER
            taken.append(leases.acquire(PLACES.run))

    bucket.before = take
    with pytest.raises(LockedError, match=r"^gs://bucket/runs/r1: the lock of this process has"):
        train()
    assert not any("export" in name for name in bucket.objects)
    taken[0].end()
    train()
    assert result(bucket) == whole[0]


@pytest.mark.parametrize("name", ["step-", "metrics.jsonl", "export"])
def test_server_that_is_gone_for_good_fails_the_job(name, bucket):
    upload = memory_bucket.Blob.upload_from_file
    gone = []

    def refuse(blob, file, **options):
        if gone or name in blob.name:
            gone.append(blob.name)
            raise exceptions.ServiceUnavailable("secret")
        upload(blob, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bucket.Blob, "upload_from_file", refuse)
        with pytest.raises(InputError, match=r"^gs://bucket/.* answered HTTP 503$") as failed:
            train()
    assert failed.value.exit_code not in (0, 2)
    assert "runs/r1/export/model.json" not in bucket.objects


def test_right_to_write_that_is_lost_fails_the_job(bucket):
    def refuse(number):
        if number == 20:
            raise exceptions.Forbidden("secret")

    bucket.before = refuse
    with pytest.raises(FailedError, match=r"^gs://bucket/.*: access denied \(HTTP 403\)") as failed:
        train()
    assert failed.value.exit_code == 1
    assert not any("export" in name for name in bucket.objects)


def test_worker_that_is_not_the_chief_reads_and_writes_nothing(bucket):
    train(stopped_at=9)
    before, changes = bucket.contents(), bucket.changes
    with Mirror(PLACES) as mirror:
        mirror.bring_down()
        found = sorted(mirror.here.checkpoints.iterdir())
        assert [path.read_bytes() for path in found] == [
            content for name, content in before.items() if "checkpoints" in name
        ]
        mirror.saved()
    assert not mirror.here.run.parent.exists()
    assert (bucket.contents(), bucket.changes) == (before, changes)


def test_ended_from_another_thread_it_uploads_the_last_and_gives_back_the_lock(bucket):
    mirror = Mirror(PLACES)
    mirror.hold()
    (mirror.here.checkpoints / "step-00000001.ckpt").write_bytes(b"1")
    mirror.end()
    assert bucket.contents() == {"runs/r1/checkpoints/step-00000001.ckpt": b"1"}
    assert not mirror.here.run.parent.exists()
    with Mirror(PLACES) as other:
        other.hold()
    other.end()  # too late to do anything


def test_local_folders_are_used_as_they_are(bucket, tmp_path):
    places = run_folder.places(tmp_path / "run", {}, {})
    with Mirror(places) as mirror:
        assert mirror.here == places
        mirror.hold()
        mirror.bring_down()
        mirror.saved()
        with pytest.raises(LockedError), Mirror(places) as other:
            other.hold()
        mirror.publish()
    assert [path.name for path in places.run.iterdir()] == [".lock"]
    assert bucket.changes == 0


@pytest.mark.parametrize("folder", ["gs://bucket", None])
def test_two_runs_do_not_share_checkpoints_at_once(bucket, tmp_path, folder):
    folder = folder or tmp_path

    def places(name):
        run_dir = storage.place(f"{folder}/{name}")
        return run_folder.places(run_dir, {"checkpoint_dir": f"{folder}/shared"}, {})

    with Mirror(places("a")) as mirror:
        mirror.hold()
        with (
            pytest.raises(LockedError, match=rf"^{folder}/shared: .*at work here") as raised,
            Mirror(places("b")) as other,
        ):
            other.hold()
        assert raised.value.exit_code == 75
        assert not places("b").run.exists()
    with Mirror(places("b")) as other:
        other.hold()
        mirror.end()  # has given back its own alone
        with pytest.raises(LockedError), Mirror(places("a")) as third:
            third.hold()
    assert bucket.contents() == {}


def test_lock_of_checkpoints_that_is_taken_over_stops_the_run(bucket, tmp_path):
    given = {"checkpoint_dir": "gs://bucket/shared"}
    places = run_folder.places(tmp_path / "run", given, {})
    with pytest.raises(LockedError, match=r"^gs://bucket/shared: "), Mirror(places) as mirror:
        mirror.hold()
        bucket.clock += LATER
        taken = leases.acquire(places.checkpoints)
        (mirror.here.checkpoints / "step-00000001.ckpt").write_bytes(b"1")
        mirror._leases[0]._renewed -= 2 * leases.LAPSE_SECONDS
        mirror.saved()
        mirror._uploads.wait()
    assert list(bucket.contents()) == ["shared/.lock"]
    taken.end()


def test_a_bucket_for_the_model_alone(bucket, tmp_path):
    places = run_folder.places(tmp_path / "run", {"model_dir": "gs://bucket/models/m"}, {})
    with Mirror(places) as mirror:
        assert (mirror.here.run, mirror.here.checkpoints) == (places.run, places.checkpoints)
        mirror.hold()
        (mirror.here.model / "model.json").write_text("{}")
        mirror.publish()
    assert bucket.contents() == {"models/m/model.json": b"{}"}


def test_model_that_a_process_may_still_be_publishing_is_left_to_it(bucket, whole):
    """Its lock there was taken, and so lapses, later than that of the run."""
    publishing = leases.acquire(PLACES.model.parent / ".export.incomplete")
    memory_bucket.Blob(bucket, "runs/r1/export/variables/data").upload_from_file(
        io.BytesIO(b"1"), if_generation_match=0
    )
    journal = {"last": "model.json", "names": ["variables/data"]}
    (publishing.path.parent / ".moving").put(json.dumps(journal).encode(), 0)
    assert not run_folder.is_finished(PLACES, CONTENT)
    with pytest.raises(LockedError, match=r"^gs://bucket/runs/r1/export: another process"):
        train()
    bucket.clock += LATER
    train()
    assert result(bucket) == whole[0]
    storage.write_atomic(PLACES.model / "mine.txt", "mine")
    (PLACES.model / "model.json").unlink()
    with pytest.raises(InputError, match=r"^gs://bucket/runs/r1/export: already holds files"):
        train()


# The thread


def test_an_object_is_not_written_more_often_than_a_bucket_takes_it(monkeypatch):
    assert uploads.PACE_SECONDS >= 1  # of Cloud Storage
    monkeypatch.setattr(uploads, "PACE_SECONDS", 0.05)
    began = []
    background = Background(lambda: began.append(time.monotonic()))
    for _ in range(5):
        background.ask()
        background.wait(WAIT)
    background.close()
    assert len(began) == 5
    assert min(later - one for one, later in itertools.pairwise(began)) > 0.04


def test_asked_while_at_work_it_does_it_once_more():
    began, go_on, done = threading.Semaphore(0), threading.Semaphore(0), []

    def action():
        began.release()
        assert go_on.acquire(timeout=WAIT)
        done.append(1)

    background = Background(action)
    background.ask()
    assert began.acquire(timeout=WAIT)
    for _ in range(5):
        background.ask()
    assert not background.wait(0.01)
    go_on.release(2)
    assert background.wait(WAIT)
    assert len(done) == 2
    background.close()


def test_its_error_is_told_to_whoever_asks_next():
    def action():
        raise InputError("gone")

    background = Background(action)
    background.ask()
    for _ in range(2):
        with pytest.raises(InputError, match="gone"):
            background.wait(WAIT)
    with pytest.raises(InputError, match="gone"):
        background.ask()
