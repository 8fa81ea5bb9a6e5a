import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from pipeline import locks, storage
from pipeline.command import InputError, LockedError


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# Flags


@pytest.mark.parametrize("text", ["a", "a/b", "/tmp/x", ".", "a b"])
def test_folder(text):
    assert storage.folder(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a folder, got an empty name"),
        ("gs://bucket/path", "gs://bucket/path: expected a local folder"),
        ("s3://bucket/path", "expected a local folder"),
        ("x" * 300, "cannot be used: File name too long"),
    ],
    ids=["empty", "gs", "s3", "too long"],
)
def test_folder_refuses(text, message):
    with pytest.raises(InputError) as caught:
        storage.folder(text)
    assert message in str(caught.value)


# One file


@pytest.mark.parametrize("data", [b"\x00\xff", "één\n", b"", ""], ids=repr)
def test_write_atomic(tmp_path, data):
    path = tmp_path / "new" / "file"
    storage.write_atomic(path, b"before, and longer")
    storage.write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(path.parent) == ["file"]


def test_walk(tmp_path):
    assert storage.walk(tmp_path / "none") == storage.walk(tmp_path) == {}
    for name, content in (("b", "1"), ("a/c/d", "22"), ("a/.e", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert storage.walk(tmp_path) == {"a/.e": 0, "a/c/d": 2, "b": 1}


def test_discard(tmp_path):
    (tmp_path / "set/sub").mkdir(parents=True)
    (tmp_path / "set/first").touch()
    (tmp_path / "settings").mkdir()
    storage.discard(tmp_path / "set", "first")
    assert names(tmp_path) == ["settings"]
    (tmp_path / ".set.removed/sub").mkdir(parents=True)
    storage.discard_leftovers(tmp_path)
    assert names(tmp_path) == ["settings"]


@pytest.mark.parametrize("broken", ["fsync", "fdopen"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(os, broken, fail)
        storage.write_atomic(path, b"after")
    assert helpers.tree(tmp_path) == {"file": b"before"}


def test_readers_of_a_replaced_file_keep_the_old_one(tmp_path):
    path = tmp_path / "file"
    storage.write_atomic(path, b"before")
    with path.open("rb") as file:
        storage.write_atomic(path, b"after")
        assert file.read() == b"before"


def test_write_over_a_folder(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write_atomic(tmp_path / "file", b"x")
    assert names(tmp_path) == ["file"]


# A folder, whole or not at all


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_published_whole(tmp_path, exists):
    final = tmp_path / "a" / "final"
    if exists:
        final.mkdir(parents=True)
    with storage.published_whole(final) as staging:
        (staging / "file").write_bytes(b"1")
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"2")
        assert not (final / "file").exists()
        assert staging.parent.parent == final.parent  # so that a rename is all there is to do
    assert helpers.tree(final) == {"file": b"1", "sub/file": b"2"}
    assert names(tmp_path / "a") == ["final"]


@pytest.mark.parametrize("replace", [False, True])
def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch, replace):
    final = tmp_path / "final"
    if replace:
        final.mkdir()
        (final / "old").touch()
    flushed, flush = [], os.fsync

    def note(descriptor):
        assert not (final / "file").exists()
        flushed.append(os.fstat(descriptor).st_ino)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with storage.published_whole(final, replace=replace) as staging:
        (staging / "file").write_bytes(b"1")
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"2")
    assert helpers.tree(final) == {"file": b"1", "sub/file": b"2"}
    assert {(final / name).stat().st_ino for name in ("file", "sub/file")} <= set(flushed)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path, exists, error):
    final = tmp_path / "final"
    if exists:
        final.mkdir()
    with pytest.raises(error), storage.published_whole(final) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"half")
        raise error
    assert names(tmp_path) == (["final"] if exists else [])
    assert helpers.tree(tmp_path) == {}


@pytest.mark.parametrize("occupied", ["file", "folder", "link"])
def test_what_is_there_is_never_replaced(tmp_path, occupied):
    final = tmp_path / "final"
    if occupied == "file":
        final.write_bytes(b"mine")
    elif occupied == "folder":
        (final / ".hidden").mkdir(parents=True)
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").write_bytes(b"mine")
        final.symlink_to("other")
    before = (names(tmp_path), helpers.tree(tmp_path))
    with (
        pytest.raises(InputError, match="final: already holds files; expected a new or empty"),
        storage.published_whole(final),
    ):
        pytest.fail("entered")
    assert (names(tmp_path), helpers.tree(tmp_path)) == before


@pytest.mark.parametrize("target_exists", [True, False])
def test_publishing_through_a_link(tmp_path, target_exists):
    if target_exists:
        (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/target")
    with storage.published_whole(tmp_path / "link") as staging:
        (staging / "file").write_bytes(b"1")
    assert helpers.tree(tmp_path / "disk" / "target") == {"file": b"1"}
    assert (tmp_path / "link").is_symlink()
    assert (names(tmp_path), names(tmp_path / "disk")) == (["disk", "link"], ["target"])


@pytest.mark.parametrize("name", [".", "../here"])
def test_current_folder_is_refused_before_any_work(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(InputError, match="cannot be replaced as a whole; expected a folder inside"),
        storage.published_whole(Path(name)),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == ["here"]


def test_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "volume")
    with (
        pytest.raises(InputError, match="volume: a mount point or"),
        storage.published_whole(tmp_path / "volume"),
    ):
        pytest.fail("entered")
    with storage.published_whole(tmp_path / "volume" / "inside"):
        pass
    assert names(tmp_path / "volume") == ["inside"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"mine")
    leftover = tmp_path / ".final.incomplete"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "sub" / "old").write_bytes(b"old")
    (leftover / ".old").write_bytes(b"old")
    (leftover / ".lock").touch()
    (leftover / "link").symlink_to(tmp_path / "mine")
    with storage.published_whole(tmp_path / "final") as staging:
        assert names(staging) == [] and names(leftover) == sorted([".lock", staging.name])
        (staging / "new").write_bytes(b"new")
    assert helpers.tree(tmp_path) == {"final/new": b"new", "mine/file": b"mine"}
    assert names(tmp_path) == ["final", "mine"]


def test_two_writers_of_one_folder(tmp_path):
    final = tmp_path / "final"
    with storage.published_whole(final) as staging:
        (staging / "file").write_bytes(b"first")
        with pytest.raises(LockedError) as caught, storage.published_whole(final):
            pytest.fail("entered")
        assert caught.value.exit_code == 75
        assert (staging / "file").read_bytes() == b"first"
    assert helpers.tree(tmp_path) == {"final/file": b"first"}


def test_folder_published_by_another_just_before_the_lock(tmp_path, monkeypatch):
    final = tmp_path / "final"
    locked = storage.locked

    @contextlib.contextmanager
    def late(directory):
        final.mkdir()
        (final / "file").write_bytes(b"theirs")
        with locked(directory) as descriptor:
            yield descriptor

    monkeypatch.setattr(storage, "locked", late)
    with pytest.raises(InputError, match="already holds files"), storage.published_whole(final):
        pytest.fail("entered")
    assert helpers.tree(tmp_path) == {"final/file": b"theirs"}
    assert names(tmp_path) == ["final"]


def test_lock_is_held_until_the_folder_stands(tmp_path, monkeypatch):
    final = tmp_path / "final"
    rename = Path.rename
    refused = []

    def while_renaming(self, target):
        try:
            with storage.locked(self.parent):
                pass
        except LockedError:
            refused.append(self.parent.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", while_renaming)
    with storage.published_whole(final):
        pass
    assert refused == [".final.incomplete"] and names(final) == []


@pytest.mark.parametrize("final", ["file/x", "file/x/y", "y" * 250], ids=["x", "y", "long"])
def test_folder_that_cannot_be_made(tmp_path, final):
    (tmp_path / "file").write_bytes(b"mine")
    with (
        pytest.raises(InputError, match=r"cannot be used: (Not a directory|File name too long)"),
        storage.published_whole(tmp_path / final),
    ):
        pytest.fail("entered")
    assert helpers.tree(tmp_path) == {"file": b"mine"} and names(tmp_path) == ["file"]


# Locks


def test_lock(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with storage.locked(folder):
            with pytest.raises(LockedError, match="b: another process is at work here"):
                storage.locked(folder).__enter__()
            with storage.locked(tmp_path):  # another folder
                pass
    with pytest.raises(ValueError), storage.locked(folder):
        raise ValueError
    with storage.locked(folder):
        pass


def test_lock_is_held_by_a_child_until_it_is_killed(tmp_path):
    with storage.locked(tmp_path) as descriptor:
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    try:
        with pytest.raises(LockedError):
            storage.locked(tmp_path).__enter__()
    finally:
        child.kill()
        child.communicate()
    with storage.locked(tmp_path):
        pass


def test_lock_of_a_folder_that_was_removed_as_it_was_taken(tmp_path, monkeypatch):
    flock = locks.fcntl.flock

    def late(descriptor, operation):
        (tmp_path / ".lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with pytest.raises(LockedError), storage.locked(tmp_path):
        pytest.fail("entered")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_in_a_line(tmp_path, monkeypatch, number):
    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    with pytest.raises(InputError, match="cannot be locked: ") as caught, storage.locked(tmp_path):
        pytest.fail("entered")
    assert caught.value.exit_code == 2


# Small verbs


def test_remove(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("link", "file", "folder", "nothing"):
        storage.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["file"]


@pytest.mark.parametrize(
    ("name", "refused"), [("none", False), ("empty", False), ("file", True), ("full", True)]
)
def test_require_absent(tmp_path, name, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "sub").mkdir(parents=True)
    with pytest.raises(InputError) if refused else contextlib.nullcontext():
        storage.require_absent(tmp_path / name)


# Replacing a folder


@pytest.fixture
def old(tmp_path):
    return put_old(tmp_path / "final")


OLD, NEW = {"file": b"old", "sub/file": b"old"}, {"file": b"new", "other": b"new"}


def put_old(final):
    (final / "sub").mkdir(parents=True)
    for name, content in OLD.items():
        (final / name).write_bytes(content)
    return final


def put_new(final):
    with storage.published_whole(final, replace=True) as staging:
        for name, content in NEW.items():
            (staging / name).write_bytes(content)
        if final.exists():
            assert helpers.tree(final) == OLD  # until the end


def test_replacing(old):
    put_new(old)
    assert helpers.tree(old) == NEW
    assert names(old.parent) == ["final"]


def test_replacing_nothing(tmp_path):
    put_new(tmp_path / "final")
    assert helpers.tree(tmp_path) == {f"final/{name}": data for name, data in NEW.items()}


def test_replacing_what_a_link_leads_to(old, tmp_path):
    (tmp_path / "link").symlink_to("final")
    put_new(tmp_path / "link")
    assert helpers.tree(old) == NEW and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["final", "link"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_old_folder(old, error):
    with pytest.raises(error), storage.published_whole(old, replace=True) as staging:
        (staging / "file").write_bytes(b"half")
        raise error
    assert helpers.tree(old) == OLD and names(old.parent) == ["final"]


@pytest.mark.parametrize("nth", [0, 1])
def test_rename_that_fails_keeps_the_old_folder(old, monkeypatch, nth):
    rename = Path.rename
    calls = []

    def failing(self, target):
        calls.append((self.parent.name, target.name))
        if len(calls) == nth + 1:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        put_new(old)
    assert calls[0] == (old.parent.name, ".final.replaced")
    assert calls[1:2] == [(".final.incomplete", "final")][:nth]
    assert helpers.tree(old) == OLD and names(old.parent) == ["final"]


STEPS = ((Path, "rename"), (Path, "unlink"), (os, "unlink"), (os, "rmdir"))


def killed_at(nth, final, after):
    """Replaces `final` in a child that ends at its nth step; tells whether it came to the end."""
    return ended_at(nth, after, STEPS, lambda: put_new(final))


def ended_at(nth, after, found, work):
    """Does something in a child that ends at its nth step; tells whether it came to the end."""
    child = os.fork()
    if child == 0:
        steps = 0

        def ending(function):
            def step(*args, **kwargs):
                nonlocal steps
                steps += 1
                chosen = steps == nth
                try:
                    return os._exit(9) if chosen and not after else function(*args, **kwargs)
                finally:
                    if chosen:
                        os._exit(9)

            return step

        try:
            for owner, name in found:
                setattr(owner, name, ending(getattr(owner, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("after", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("again", [False, True], ids=["put in order", "tried again"])
def test_killed_while_replacing(tmp_path, after, again):
    seen = []
    for nth in range(1, 100):
        final = put_old(tmp_path / str(nth) / "final")
        if killed_at(nth, final, after):
            break
        if final.exists():
            found = helpers.tree(final)
            found.pop(".lock", None)
            assert found in (OLD, NEW)
        seen.append(final.exists() and found)
        if again:
            put_new_over(final)
        else:
            storage.recover(final)
        assert helpers.tree(final) == (NEW if again or seen[-1] == NEW else OLD)
        assert names(final.parent) == ["final"]
    assert OLD in seen and NEW in seen and False in seen


def put_new_over(final):
    with storage.published_whole(final, replace=True) as staging:
        for name, content in NEW.items():
            (staging / name).write_bytes(content)


# Where folders cannot be renamed, as in a bucket that Cloud Storage FUSE has mounted

RENAME = Path.rename
REFUSALS = ("EMFILE", "ENOSYS", "EXDEV", "ENOTSUP")
LAST = "file"  # without which the folders of these tests are nothing


@pytest.fixture(params=REFUSALS)
def refused(request, monkeypatch):
    refuse_folders(request.param, monkeypatch.setattr)


def refuse_folders(name, patch):
    number = getattr(errno, name)

    def rename(self, target):
        if self.is_dir():
            raise OSError(number, os.strerror(number), str(self), None, str(target))
        return RENAME(self, target)

    patch(Path, "rename", rename)


def put_newer(final, **options):
    with storage.published_whole(final, last=LAST, **options) as staging:
        (staging / "deep/er").mkdir(parents=True)
        (staging / "deep/er/other").write_bytes(b"new")
        (staging / LAST).write_bytes(b"new")
        (staging / "left").write_bytes(b"out")


NEWER = {LAST: b"new", "deep/er/other": b"new"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_published_where_none_is_renamed(refused, tmp_path, exists):
    final = tmp_path / "final"
    if exists:
        final.mkdir()
    put_newer(final, left_out=("left",))
    assert helpers.tree(final) == NEWER and names(tmp_path) == ["final"]


def test_a_folder_is_replaced_where_none_is_renamed(refused, old):
    put_newer(old, replace=True, left_out=("left",))
    assert helpers.tree(old) == NEWER and names(old.parent) == ["final"]


def test_what_names_a_copied_folder_goes_first_and_comes_last(old, monkeypatch):
    refuse_folders("EMFILE", monkeypatch.setattr)
    copyfile, remove, seen = storage.shutil.copyfile, storage.remove, []

    def looks(function):
        def step(*args):
            seen.append((function.__name__, (old / LAST).exists()))
            return function(*args)

        return step

    monkeypatch.setattr(storage.shutil, "copyfile", looks(copyfile))
    monkeypatch.setattr(storage, "remove", looks(remove))
    put_newer(old, replace=True)
    at = seen.index(("remove", False))  # the first after it is gone
    assert ("copyfile", True) not in seen and ("copyfile", False) in seen[at:]
    assert ("remove", True) in seen[:at]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_nothing_of_itself(tmp_path, monkeypatch, error):
    refuse_folders("EMFILE", monkeypatch.setattr)

    def broken(*_):
        raise error

    monkeypatch.setattr(storage.shutil, "copyfile", broken)
    with pytest.raises(type(error)):
        put_newer(tmp_path / "final")
    assert names(tmp_path) == []


def test_a_copy_that_fails_brings_back_what_could_be_moved_aside(old, monkeypatch):
    """As where folders with few files are renamed, and those with many are not."""

    def rename(self, target):
        if self.parent.name == ".final.incomplete":
            raise OSError(errno.EMFILE, "Too many open files")
        return RENAME(self, target)

    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "rename", rename)
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "copyfile", broken)
        with pytest.raises(OSError, match="broken"):
            put_newer(old, replace=True)
    assert helpers.tree(old) == OLD and names(old.parent) == ["final"]
    put_newer(old, replace=True, left_out=("left",))
    assert helpers.tree(old) == NEWER and names(old.parent) == ["final"]


def test_what_a_failing_disk_cannot_rename_is_not_removed(old, monkeypatch):
    refuse_folders("EIO", monkeypatch.setattr)
    with pytest.raises(OSError, match="Errno 5"):
        put_newer(old, replace=True)
    assert helpers.tree(old) == OLD and names(old.parent) == ["final"]


def test_a_copy_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    final, fsync, synced = tmp_path / "final", os.fsync, []

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    refuse_folders("EMFILE", monkeypatch.setattr)
    monkeypatch.setattr(storage.os, "fsync", noted)
    put_newer(final, left_out=("left",))
    assert final / "deep/er/other" in synced
    assert synced[-1].parent == final and synced[-1].name.startswith(f".{LAST}.")


def test_one_that_nothing_names_cannot_be_copied(old, monkeypatch):
    refuse_folders("EMFILE", monkeypatch.setattr)
    with pytest.raises(InputError, match="final: folders cannot be renamed there"):
        put_new(old)
    assert helpers.tree(old) == OLD and names(old.parent) == ["final"]


def copy_killed_at(nth, final, after):
    """Like `killed_at`, where folders cannot be renamed."""

    def replace():
        refuse_folders("EMFILE", setattr)
        put_newer(final, replace=True, left_out=("left",))

    steps = ((storage.shutil, "copyfile"), (Path, "replace"), (Path, "mkdir"), *STEPS)
    return ended_at(nth, after, steps, replace)


@pytest.mark.parametrize("after", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("again", [False, True], ids=["put in order", "tried again"])
def test_killed_while_copying(tmp_path, after, again):
    seen = []
    for nth in range(1, 100):
        final = put_old(tmp_path / str(nth) / "final")
        if copy_killed_at(nth, final, after):
            break
        stands = (final / LAST).exists()
        if stands:  # readers take it for whole
            seen.append(helpers.tree(final))
            assert seen[-1] in (OLD, NEWER)
        else:
            seen.append(None)
        if again:
            with pytest.MonkeyPatch.context() as patch:
                refuse_folders("EMFILE", patch.setattr)
                put_newer(final, replace=True, left_out=("left",))
            assert helpers.tree(final) == NEWER
        else:
            storage.recover(final)
            assert final.exists() == stands
            assert not stands or helpers.tree(final) == seen[-1]
        assert names(final.parent) == ["final"] * final.exists()
    assert OLD in seen and NEWER in seen and None in seen


def test_discard_where_no_folder_is_renamed(refused, tmp_path, monkeypatch):
    gone, remove = [], storage.remove
    monkeypatch.setattr(storage, "remove", lambda path: (gone.append(path.name), remove(path)))
    (tmp_path / "set/sub").mkdir(parents=True)
    for name in ("first", "last", "other"):
        (tmp_path / "set" / name).touch()
    storage.discard(tmp_path / "set", "first", last="last")
    assert names(tmp_path) == []
    assert gone[:2] == [".set.removed", "first"]
    assert (sorted(gone[2:4]), gone[4:]) == (["other", "sub"], ["set"])


def test_recovering_where_nothing_is_amiss(old, tmp_path):
    before = (old.stat().st_mtime_ns, old.stat().st_ino, tmp_path.stat().st_mtime_ns)
    storage.recover(old)
    storage.recover(tmp_path / "none" / "below")
    assert (old.stat().st_mtime_ns, old.stat().st_ino, tmp_path.stat().st_mtime_ns) == before
    assert helpers.tree(old) == OLD and names(tmp_path) == ["final"]


def test_recovering_leaves_another_process_at_its_work(old):
    with storage.published_whole(old, replace=True) as staging:
        (staging / "file").write_bytes(b"new")
        storage.recover(old)
        assert helpers.tree(staging) == {"file": b"new"}
    assert helpers.tree(old) == {"file": b"new"} and names(old.parent) == ["final"]


def test_worker_of_a_killed_run_cannot_write_into_the_next(tmp_path):
    program = (
        "import os, pathlib; from pipeline import storage;"
        "publishing = storage.published_whole(pathlib.Path('final'));"
        "print(publishing.__enter__(), flush=True); os._exit(1)"
    )
    orphans = Path(helpers.run_python("-c", program, cwd=tmp_path).stdout.strip())
    assert orphans.is_dir()
    with storage.published_whole(tmp_path / "final") as staging:
        with pytest.raises(FileNotFoundError):
            storage.write_atomic(orphans / "sub/file", b"old")
        storage.write_atomic(orphans / "file", b"old")  # beside what is made, and swept away
        storage.write_atomic(staging / "sub/file", b"new")
    with pytest.raises(FileNotFoundError):
        storage.write_atomic(orphans / "file", b"old")
    assert helpers.tree(tmp_path) == {"final/sub/file": b"new"}


def test_folder_is_removed_though_another_process_removes_it_too(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (folder / name).touch()
    unlink = os.unlink

    def twice(path, **kwargs):
        unlink(path, **kwargs)
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "unlink", twice)
    storage.remove(folder)
    assert names(tmp_path) == []


def test_folder_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()

    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError, match="no"):
        storage.remove(tmp_path / "folder")


def test_what_is_removed_as_it_is_listed_is_left_out(tmp_path, monkeypatch):
    for name in ("a/one", "b/two", "three"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    stat = Path.stat

    def removed(path, **flags):
        found = stat(path, **flags)
        if path.name == "two":
            shutil.rmtree(path.parent)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", removed)
        assert storage.walk(tmp_path) == {"a/one": 5, "three": 5}
    (tmp_path / "three").unlink()
    assert storage.walk(tmp_path) == {"a/one": 5}
    assert storage.walk(tmp_path / "none") == {}


def test_all_folders_of_one_are_put_in_order(tmp_path):
    for name, inside in (("a", "whole"), (".a.replaced", "old"), (".b.replaced", "whole")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).touch()
    (tmp_path / ".c.d.incomplete/part").mkdir(parents=True)
    storage.recover_all(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["a", "a/whole", "b", "b/whole"]
    storage.recover_all(tmp_path / "none")
