"""Locks and publishing in a bucket, against one in memory that keeps every precondition.

`test_gcs.py` goes over the wire; here a process can be ended or held before each single change
of the bucket.
"""

import datetime
import functools
import itertools
import threading

import memory_bucket
import pytest
from memory_bucket import KilledError

from pipeline import gcs, gcs_publish, leases, storage
from pipeline.command import InputError, LockedError, UnreachableError
from pipeline.gcs import ChangedError, GcsPath
from pipeline.leases import Owner

FINAL = GcsPath("bucket", "data/set")
LAST = "manifest"
LOCK = "data/.set.incomplete/.lock"
OLD = {"data/set/manifest": b"old", "data/set/a": b"old a", "data/set/b": b"old b"}
NEW = {
    "data/set/manifest": b"new",
    "data/set/a": b"new a",
    "data/set/sub/c": b"new c",
    "data/set/d": b"",
}
OTHERS = {
    "data/set2/a": b"not ours",
    "data/.set.incompleteness": b"nor this",
    "data/settings": b"nor this",
}
LATER = datetime.timedelta(seconds=leases.LAPSE_SECONDS + 1)


@pytest.fixture
def bucket(monkeypatch):
    """A bucket that holds only what concerns nobody here."""
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)  # so that the order of changes is one
    put(memory, OTHERS)
    return memory


def put(memory, files):
    for name, content in files.items():
        memory.store(memory.blob(name), content)


def publish(files=NEW, *, replace=False):
    with storage.published_whole(FINAL, replace=replace, last=LAST) as staging:
        for name, content in files.items():
            storage.write_atomic(staging / name.removeprefix("data/set/"), content)


def standing(memory):
    """What is in the bucket beside what concerns nobody."""
    contents = memory.contents()
    assert contents.items() >= OTHERS.items()
    return {name: content for name, content in contents.items() if name not in OTHERS}


def visible(memory):
    """What a reader finds: of a folder without its last file, nothing."""
    found = {n: c for n, c in standing(memory).items() if n.startswith("data/set/")}
    return found if "data/set/manifest" in found else {}


# Paths


def test_reading_and_writing(bucket):
    path = FINAL / "a"
    assert (path.exists(), path.is_file(), path.is_dir()) == (False, False, False)
    storage.write_atomic(path, "ä")
    assert (path.exists(), path.is_file(), path.is_dir()) == (True, True, False)
    assert (FINAL.exists(), FINAL.is_file(), FINAL.is_dir()) == (True, False, True)
    assert (path.read_bytes(), path.read_text(), path.stat().st_size) == (b"\xc3\xa4", "ä", 2)
    storage.write_atomic(FINAL / "sub/b", b"1")
    storage.write_atomic(path, b"again")
    assert sorted(map(str, FINAL.iterdir())) == [
        "gs://bucket/data/set/a",
        "gs://bucket/data/set/sub",
    ]
    assert [p.name for p in FINAL.glob("s*")] == ["sub"]
    assert FINAL.walk().keys() == {"a", "sub/b"}
    assert storage.sizes(FINAL) == {"a": 5}
    storage.remove(FINAL)
    assert standing(bucket) == {}
    for absent in (path.read_bytes, path.stat, path.unlink):
        with pytest.raises(FileNotFoundError, match="gs://bucket/data/set/a"):
            absent()


def test_walk_and_discard(bucket):
    publish()
    assert storage.walk(FINAL) == {"a": 5, "d": 0, "manifest": 3, "sub/c": 5}
    gone = []
    bucket.before = lambda _: gone.append(visible(bucket) == {})
    storage.discard(FINAL, LAST)
    assert gone == [False] + [True] * (len(gone) - 1)  # from the first change on, no reader
    assert standing(bucket) == {}
    storage.discard_leftovers(FINAL.parent)
    assert standing(bucket) == {}


def test_placeholder_of_a_folder_is_no_file(bucket):
    put(bucket, {"data/set/": b""})
    assert (list(FINAL.iterdir()), FINAL.walk(), FINAL.is_dir()) == ([], {}, True)
    publish()
    assert standing(bucket) == NEW | {"data/set/": b""}


def test_file_that_is_not_finished_is_not_there(bucket):
    with pytest.raises(RuntimeError), storage.open_atomic(FINAL / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert standing(bucket) == {}


def test_put_follows_on_a_generation(bucket):
    path = FINAL / "a"
    first = path.put(b"1", 0)
    with pytest.raises(ChangedError, match="gs://bucket/data/set/a: was changed by another"):
        path.put(b"2", 0)
    assert path.put(b"1", 0) == first  # the answer to the first attempt may have been lost
    second = path.put(b"2", first.generation)
    with pytest.raises(ChangedError):
        path.unlink(generation=first.generation)
    (FINAL / "b").copy(path, second)
    (FINAL / "b").copy(path, second)
    with pytest.raises(ChangedError):
        (FINAL / "c").copy(path, first)
    with pytest.raises(ChangedError):
        (FINAL / "b").copy(path, (FINAL / "a").put(b"3", second.generation))
    assert standing(bucket) == {"data/set/a": b"3", "data/set/b": b"2"}


def test_writable_leaves_no_trace(bucket):
    storage.require_writable(FINAL)
    assert (standing(bucket), bucket.changes) == ({}, 2)


# The lock


def owner(**changes):
    return Owner(
        **{"host": "h", "pid": 7, "token": "t", "beat": 3, "lapse_seconds": 60.0} | changes
    )


def test_owner_round_trip():
    assert leases.parse_owner(leases.owner_json(owner())) == owner()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[]", b"{}", b'{"host": 1}', leases.owner_json(owner(lapse_seconds="soon"))],
)
def test_lock_that_says_nothing_lapses_as_any(data):
    unknown = leases.parse_owner(data)
    assert (unknown.token, unknown.lapse_seconds) == ("", leases.LAPSE_SECONDS)


@pytest.mark.parametrize(
    ("age", "lapse", "left"),
    [(0, 60, 60), (59.5, 60, 0.5), (60, 60, 0), (61, 60, -1), (-5, 60, 65)],
)
def test_seconds_left(age, lapse, left):
    renewed = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    now = renewed + datetime.timedelta(seconds=age)
    assert leases.seconds_left(owner(lapse_seconds=lapse), renewed, now) == left


def test_second_holder_is_told_who_is_first(bucket):
    with storage.locked(FINAL) as lease:
        bucket.clock += datetime.timedelta(seconds=20)
        with pytest.raises(LockedError) as refused, storage.locked(FINAL):
            pytest.fail("entered")
        assert str(refused.value) == (
            f"gs://bucket/data/set: process {lease.owner.pid} on {lease.owner.host} is at work"
            " here; if it is dead, its lock lapses in 40 seconds"
        )
        assert set(standing(bucket)) == {"data/set/.lock"}
    assert standing(bucket) == {}


def test_taken_over_when_it_has_lapsed_and_not_before(bucket):
    first = leases.acquire(FINAL)
    bucket.clock += datetime.timedelta(seconds=50)
    first.renew()
    bucket.clock += datetime.timedelta(seconds=leases.LAPSE_SECONDS - 0.001)
    with pytest.raises(LockedError):
        leases.acquire(FINAL)
    bucket.clock += datetime.timedelta(seconds=0.001)
    second = leases.acquire(FINAL)
    with pytest.raises(LockedError, match="the lock of this process has lapsed"):
        first.renew()
    with pytest.raises(LockedError):
        first.check()
    first.end()  # takes nothing from the other
    second.renew()
    second.end()
    assert standing(bucket) == {}


def test_lapse_that_the_owner_promised_counts(bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(leases, "LAPSE_SECONDS", 1000.0)
        lease = leases.acquire(FINAL)
    bucket.clock += LATER
    with pytest.raises(LockedError, match="in 939 seconds"):
        leases.acquire(FINAL)
    lease.end()


def test_renewed_by_itself(bucket, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    beaten = threading.Event()
    bucket.before = lambda number: beaten.set() if number > 5 else None
    with storage.locked(FINAL) as lease:
        assert beaten.wait(60)
        lease.check()
    assert lease.owner.beat >= 5
    assert standing(bucket) == {}


def test_not_renewed_in_time_is_not_trusted(bucket, monkeypatch):
    monkeypatch.setattr(leases, "LAPSE_SECONDS", 0.0)
    first = leases.acquire(FINAL)
    with pytest.raises(LockedError, match="has lapsed"):
        first.check()
    first.renew()  # late, but nobody has taken it
    second = leases.acquire(FINAL)
    assert not first.lost
    with pytest.raises(LockedError, match="has lapsed"):
        first.renew()
    assert first.lost
    first.end()
    assert set(standing(bucket)) == {"data/set/.lock"}
    second.end()
    assert standing(bucket) == {}


@pytest.fixture
def pass_time(bucket, monkeypatch):
    """Lets time pass, by the clock of the server and by that of a lock's owner."""
    now = [0.0]
    monkeypatch.setattr(leases, "_now", lambda: now[0])

    def wait(seconds):
        now[0] += seconds
        bucket.clock += datetime.timedelta(seconds=seconds)

    return wait


def test_a_renewal_that_was_written_long_ago_is_none(bucket, monkeypatch, pass_time):
    lease = leases.acquire(FINAL)
    pass_time(10)
    with monkeypatch.context() as patch:
        upload = memory_bucket.Blob.upload_from_file

        def written_without_an_answer(*given, **options):
            upload(*given, **options)
            raise ConnectionError

        patch.setattr(memory_bucket.Blob, "upload_from_file", written_without_an_answer)
        with pytest.raises(UnreachableError):
            lease._renew()  # as a heartbeat does
    pass_time(59)
    lease.renew()  # finds that beat, 59 seconds old, and writes the next
    assert lease.owner.beat == 2
    assert lease.path.stat().updated == bucket.clock
    pass_time(leases.LAPSE_SECONDS - 1)
    lease.check()
    with pytest.raises(LockedError, match="lapses in 1 seconds"):
        leases.acquire(FINAL)
    lease.end()


def test_one_request_that_hangs_does_not_let_a_lock_lapse(bucket, monkeypatch, pass_time):
    lease = leases.acquire(FINAL)
    upload, waited = memory_bucket.Blob.upload_from_file, []

    def hang(*_, retry, timeout, **__):
        monkeypatch.setattr(memory_bucket.Blob, "upload_from_file", upload)
        waited.append(retry.timeout + timeout)  # the last attempt begins before the retry's end
        pass_time(waited[0])
        raise TimeoutError

    monkeypatch.setattr(memory_bucket.Blob, "upload_from_file", hang)
    pass_time(leases.HEARTBEAT_SECONDS)
    with pytest.raises(UnreachableError):
        lease._renew()  # as a heartbeat does
    assert waited == [2 * leases.HEARTBEAT_SECONDS]
    pass_time(leases.HEARTBEAT_SECONDS)
    lease.check()
    with pytest.raises(LockedError, match="lapses in 20 seconds"):
        leases.acquire(FINAL)
    lease._renew()
    monkeypatch.setattr(memory_bucket.Blob, "upload_from_file", hang)
    lease.renew()  # which tries again by itself
    assert len(waited) == 2
    lease.check()
    assert lease.path.stat().updated == bucket.clock
    lease.end()


def test_a_lock_whose_answer_took_long_is_renewed_first(bucket, monkeypatch, pass_time):
    def slow(number):
        bucket.before = lambda number: None
        pass_time(leases.LAPSE_SECONDS)

    bucket.before = slow
    with storage.locked(FINAL) as lease:
        lease.check()
        assert lease.owner.beat == 1


def test_what_is_left_of_a_look_at_the_time_is_written_over(bucket, pass_time):
    first = leases.acquire(FINAL)

    def kill(number):
        if len(standing(bucket)) == 2:  # the lock, and what tells the server's time
            raise KilledError

    bucket.before = kill
    with pytest.raises(KilledError):
        leases.acquire(FINAL)
    bucket.before = lambda number: None
    assert len(standing(bucket)) == 2
    pass_time(leases.LAPSE_SECONDS)
    leases.acquire(FINAL).end()
    assert standing(bucket) == {}
    first.end()


def test_two_that_look_at_the_time_at_once(bucket):
    def look():
        with pytest.raises(LockedError, match="lapses in 60 seconds"):
            leases.acquire(FINAL)

    for step in (0, 1):  # before the first writes, and before it removes
        lease = leases.acquire(FINAL)
        bucket.changes = 0

        def other(number, step=step):
            if number == step:
                look()

        bucket.before = other
        look()
        bucket.before = lambda number: None
        assert set(standing(bucket)) == {"data/set/.lock"}
        lease.end()


def test_of_two_at_once_one_wins(bucket):
    bucket.before = lambda number: bucket.changes == 1 and leases.acquire(FINAL)
    with pytest.raises(LockedError, match="is at work here"):
        leases.acquire(FINAL)


# Publishing


def test_published_whole(bucket):
    publish()
    assert standing(bucket) == NEW
    with pytest.raises(storage.OccupiedError, match="gs://bucket/data/set: already holds files"):
        publish()
    assert standing(bucket) == NEW


def test_replaced_whole(bucket):
    put(bucket, OLD)
    publish(replace=True)
    assert standing(bucket) == NEW


def test_what_is_to_go_goes_first_and_under_the_lock(bucket, pass_time):
    old = OLD | {"data/set/sub/c": b"old c", "data/set/subs": b"old"}
    put(bucket, old)
    cleared = functools.partial(
        storage.published_whole, FINAL, replace=True, last=LAST, cleared=("b", "manifest", "sub")
    )
    taken = []

    def take_over(number):
        if number == 1:  # the first, the lock, is taken
            pass_time(leases.LAPSE_SECONDS)
            taken.append(leases.acquire(FINAL.parent / ".set.incomplete"))

    bucket.changes, bucket.before = 0, take_over
    with pytest.raises(LockedError, match="has lapsed"), cleared():
        pytest.fail("entered")
    bucket.before = lambda number: None
    del old["data/set/manifest"]  # which was on its way
    assert standing(bucket).keys() == {*old, LOCK}
    taken.pop().end()
    with pytest.raises(ValueError, match="no good"), cleared():
        del old["data/set/b"], old["data/set/sub/c"]
        assert standing(bucket).keys() == {*old, LOCK}
        raise ValueError("no good")
    assert standing(bucket) == old


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [{}, OLD], ids=["none", "old"])
def test_failure_leaves_what_was_there(bucket, before, error):
    put(bucket, before)
    with (
        pytest.raises(error),
        storage.published_whole(FINAL, replace=True, last=LAST) as staging,
    ):
        storage.write_atomic(staging / LAST, b"new")
        raise error
    assert standing(bucket) == before


def test_without_its_last_file_nothing_is_published(bucket):
    with pytest.raises(ValueError, match="no manifest was written"):
        publish({"data/set/a": b"1"})
    assert standing(bucket) == {}


def test_whole_bucket_is_refused(bucket):
    with (
        pytest.raises(InputError, match="gs://bucket: a bucket is not replaced as a whole"),
        storage.published_whole(GcsPath("bucket"), last=LAST),
    ):
        pytest.fail("entered")
    storage.recover(GcsPath("bucket"))
    assert bucket.changes == 0


def test_files_of_others_are_no_litter(bucket):
    put(bucket, {"data/set/mine.txt": b"mine"})
    with pytest.raises(storage.OccupiedError):
        publish()
    assert standing(bucket) == {"data/set/mine.txt": b"mine"}


def test_file_that_comes_from_elsewhere_meanwhile(bucket):
    def add(number):
        if "data/set/a" in bucket.objects:  # the first of several that are copied
            bucket.before = lambda number: None
            put(bucket, {"data/set/mine.txt": b"mine"})

    bucket.before = add
    with pytest.raises(ChangedError, match="gs://bucket/data/set: was changed by another process"):
        publish()
    assert standing(bucket) == {"data/set/mine.txt": b"mine"}


def test_journal_that_is_damaged_is_left_alone(bucket):
    put(bucket, {"data/.set.incomplete/.moving": b"{}"})
    with pytest.raises(InputError, match=r"\.moving: not a list of names; remove it by hand"):
        publish()
    assert standing(bucket) == {"data/.set.incomplete/.moving": b"{}"}


def changes_of(bucket, before, replace):
    """How many changes publishing takes where nothing disturbs it; the bucket is as it was."""
    put(bucket, before)
    bucket.changes = 0
    publish(replace=replace)
    count, bucket.changes = bucket.changes, 0
    for name in standing(bucket):
        del bucket.objects[name]
    put(bucket, before)
    return count


CASES = pytest.mark.parametrize(
    ("before", "replace"), [({}, False), (OLD, True)], ids=["none", "old"]
)


@CASES
def test_killed_before_every_change(bucket, before, replace):
    def killed(step, number):
        if number >= step:
            raise KilledError

    count = changes_of(bucket, before, replace)
    assert count > 3 * len(NEW)
    seen = []
    for step in range(count):
        bucket.before, bucket.changes = functools.partial(killed, step), 0
        with pytest.raises(KilledError):
            publish(replace=replace)
        bucket.before = lambda number: None
        assert visible(bucket) in (before, {}, NEW)
        seen.append(visible(bucket))
        if LOCK in bucket.objects:
            with pytest.raises(LockedError):
                publish(replace=True)
            bucket.clock += LATER
        storage.recover(FINAL)
        assert standing(bucket) == seen[-1]
        if not replace and seen[-1] == NEW:
            with pytest.raises(storage.OccupiedError):
                publish()
        else:
            publish(replace=replace)
        assert standing(bucket) == NEW
        for name in NEW:
            del bucket.objects[name]
        put(bucket, before)
    # In this order: what was there, nothing where that was replaced, the new one.
    order = [before, {}, NEW] if replace else [{}, NEW]
    assert [state for state, _ in itertools.groupby(seen)] == order


@CASES
def test_taken_for_dead_before_every_change(bucket, before, replace):
    """Held until another has done the same work, it then goes on: the other's result stands."""
    theirs = {"data/set/manifest": b"theirs", "data/set/a": b"theirs", "data/set/e": b"e"}

    def held(step, number):
        if number == step:
            bucket.clock += LATER
            try:
                publish(theirs, replace=replace)
            except storage.OccupiedError:  # what was held had been published already
                assert visible(bucket) == NEW

    count = changes_of(bucket, before, replace)
    lost = 0
    for step in range(count):
        bucket.before, bucket.changes = functools.partial(held, step), 0
        try:
            publish(replace=replace)
        except (LockedError, storage.OccupiedError):
            lost += 1
            assert visible(bucket) in (theirs, NEW)
        bucket.before = lambda number: None
        result = visible(bucket)
        assert result in (theirs, NEW)
        bucket.clock += LATER
        storage.recover(FINAL)
        assert standing(bucket) == result
        for name in result:
            del bucket.objects[name]
        put(bucket, before)
    assert lost > count / 2


# What a job goes on with


class Left(BaseException):
    """The process leaves its work to a job."""


def leave(name="data/set/a"):
    """Leaves a folder half written to a job; returns that folder."""
    with pytest.raises(Left), storage.published_whole(FINAL, last=LAST, resume=True) as staging:
        storage.write_atomic(staging / name.removeprefix("data/set/"), NEW[name])
        gcs_publish.keep(staging, {"job": "j"})
        raise Left
    return staging


def test_what_is_kept_is_taken_up_again(bucket):
    left = leave()
    content = {f"data/.set.incomplete/{left.name}/a": b"new a"}
    assert standing(bucket).items() > content.items()
    assert set(standing(bucket)) == {*content, "data/.set.incomplete/.kept"}
    storage.recover(FINAL)  # which others may do at any time
    assert standing(bucket).items() > content.items()
    with storage.published_whole(FINAL, last=LAST, resume=True) as staging:
        assert (staging, gcs_publish.kept(staging)) == (left, {"job": "j"})
        for name in NEW.keys() - {"data/set/a"}:
            storage.write_atomic(staging / name.removeprefix("data/set/"), NEW[name])
    assert standing(bucket) == NEW


def test_what_is_kept_outlives_a_failure_until_it_is_let_go(bucket):
    left = leave()
    for is_let_go in (False, True):
        with (
            pytest.raises(InputError, match="no room"),
            storage.published_whole(FINAL, last=LAST, resume=True) as staging,
        ):
            assert staging == left
            if is_let_go:
                gcs_publish.let_go(staging)
            raise InputError("no room")
        assert bool(standing(bucket)) is not is_let_go


@pytest.mark.parametrize("order", [list, reversed], ids=["as listed", "reversed"])
@CASES
def test_killed_before_every_change_a_job_is_paid_for_once(
    bucket, before, replace, order, monkeypatch
):
    """Its note stays until its result is published, and no longer; in whatever order files go."""
    jobs = []
    monkeypatch.setattr(
        gcs_publish, "_all", lambda action, names: [action(name) for name in order(list(names))]
    )

    def command():
        with storage.published_whole(
            FINAL, replace=replace, last=LAST, resume=True, left_out=["tally"]
        ) as staging:
            if gcs_publish.kept(staging) is None:
                gcs_publish.keep(staging, {"job": "j"})
                jobs.append(staging)
                put(bucket, {f"{staging.key}/{name[9:]}": NEW[name] for name in NEW})
                put(bucket, {f"{staging.key}/tally": b"of the block"})
            assert (staging / "tally").read_bytes() == b"of the block"

    def killed(step, number):
        if number >= step:
            raise KilledError

    put(bucket, before)
    bucket.changes = 0
    command()
    count = bucket.changes
    assert (len(jobs), standing(bucket)) == (1, NEW)
    published = 0
    for step in range(count):
        for name in standing(bucket):
            del bucket.objects[name]
        put(bucket, before)
        jobs.clear()
        bucket.before, bucket.changes = functools.partial(killed, step), 0
        with pytest.raises(KilledError):
            command()
        bucket.before = lambda number: None
        bucket.clock += LATER
        storage.recover(FINAL)
        if visible(bucket) == NEW:
            published += 1
        else:
            command()
        assert (len(jobs), standing(bucket)) == (1, NEW)
    assert len(NEW) < published < count - len(NEW)


def test_who_takes_up_nothing_sweeps_what_is_kept(bucket):
    left = leave()
    with storage.published_whole(FINAL, last=LAST) as staging:
        assert staging != left
        assert gcs_publish.kept(staging) is None
        assert set(standing(bucket)) == {LOCK}
        for name, content in NEW.items():
            storage.write_atomic(staging / name.removeprefix("data/set/"), content)
    assert standing(bucket) == NEW


def test_nothing_is_kept_of_another_folder(bucket):
    with storage.published_whole(FINAL, last=LAST, resume=True) as staging:
        gcs_publish.keep(staging.parent / "other", {"job": "j"})
        assert gcs_publish.kept(staging) is None
        storage.write_atomic(staging / LAST, b"m")
    assert standing(bucket) == {"data/set/manifest": b"m"}


def test_a_note_that_is_none(bucket):
    put(bucket, {"data/.set.incomplete/.kept": b"[]"})
    with (
        pytest.raises(InputError, match=r"\.set\.incomplete/\.kept: not a note; remove it by hand"),
        storage.published_whole(FINAL, last=LAST, resume=True),
    ):
        pytest.fail("was taken up")
