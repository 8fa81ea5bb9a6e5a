"""Folders behind the few verbs the job needs: write once, publish whole, lock.

A reader of a published folder or file sees the old content or the new one, never a part:
everything is written beside its final name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.command import InputError, LockedError

LOCK_NAME = ".lock"


class OccupiedError(InputError):
    """A folder that was to be written already holds files."""


def folder(text: str) -> Path:
    """Parses a flag that names a folder.

    Raises:
        InputError: the folder is in a bucket, where none can be so far, or cannot be looked at.
    """
    if "://" in text:
        raise InputError(f"{text}: expected a local folder; buckets are not supported yet")
    if not text:
        raise InputError("expected a folder, got an empty name")
    path = Path(text)
    try:
        path.exists()
        (path.parent / f".{path.name}.incomplete").exists()  # as `published_whole` will name it
    except OSError as error:  # no permission, or too long a name
        raise InputError(f"{text}: cannot be used: {error.strerror}") from None
    return path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a whole file; see `open_atomic`."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file under a temporary name; once written, flushes it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide it from other users
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_writable(directory: Path) -> None:
    """Makes sure that files can be written in a folder, or it can be made; leaves no trace.

    Raises:
        InputError: they cannot.
    """
    place = directory.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def published_whole(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `final` when the block ends well, else vanishes.

    What an earlier process left behind, killed in the middle, is removed first.

    Args:
        final: the folder.
        replace: whether it may take the place of one that holds files. That one is moved aside
            in the end: killed just then, neither stands under the name, and the next attempt
            brings the old one back.

    Raises:
        InputError: `final` cannot be created or replaced.
        OccupiedError: it already holds files.
        LockedError: another process is writing the same folder.
    """
    if not replace:
        require_absent(final)
    place, staging, aside = _places(final)
    if place.is_mount() or place == Path.cwd():
        raise InputError(
            f"{final}: a mount point or the current folder cannot be replaced as a whole;"
            " expected a folder inside it"
        )
    made = [folder for folder in staging.parents if not folder.exists()]
    with locked(staging):
        try:
            _settle(place, aside)
            if not replace:
                require_absent(final)  # again: it may have been published as we took the lock
            _clear(staging)
            yield staging
            if replace and place.exists():
                place.rename(aside)
            staging.rename(place)  # POSIX lets it replace an empty folder
            remove(aside)
            # Only now: without its lock, another process could take over the staging folder.
            (place / LOCK_NAME).unlink(missing_ok=True)
        except BaseException:
            if aside.exists() and not place.exists():
                aside.rename(place)
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process may be using them by now
                for folder in made:
                    folder.rmdir()
            raise


def recover(final: Path) -> None:
    """Puts in order what a process left that was killed inside `published_whole`.

    A folder that had been moved aside comes back, and nothing temporary remains. Does nothing
    while another process is at work there.
    """
    place, staging, aside = _places(final)
    if staging.exists() or aside.exists():
        with contextlib.suppress(LockedError), locked(staging):
            _settle(place, aside)
            _clear(staging)
            # What another process puts there, from the moment that the lock is gone, stays.
            shutil.rmtree(staging, ignore_errors=True)
    if (place / LOCK_NAME).exists():
        with contextlib.suppress(LockedError), locked(place):
            (place / LOCK_NAME).unlink()


def _places(final: Path) -> tuple[Path, Path, Path]:
    """Where a folder is, where it is made, and where the one before it waits."""
    place = final.resolve()  # a link to an empty folder cannot be renamed over, its target can
    return (
        place,
        place.parent / f".{place.name}.incomplete",
        place.parent / f".{place.name}.replaced",
    )


def _settle(place: Path, aside: Path) -> None:
    if aside.exists() and not place.exists():
        aside.rename(place)
    remove(aside)


def _clear(staging: Path) -> None:
    """Removes everything but the lock."""
    for leftover in staging.iterdir():
        if leftover.name != LOCK_NAME:
            remove(leftover)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, of which another process may remove parts too."""

    def failed(_: object, __: str, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=failed)
    else:
        path.unlink(missing_ok=True)


def require_absent(final: Path) -> None:
    """Raises OccupiedError if `final` is a file or a folder that holds anything."""
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise OccupiedError(f"{final}: already holds files; expected a new or empty folder")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Holds the lock of a folder, and yields its file descriptor.

    The kernel drops the lock when the last process that holds the descriptor ends, however it
    ends; a child that inherits the descriptor (``pass_fds``) therefore keeps it.

    Raises:
        LockedError: another process holds it.
        InputError: the folder cannot be created.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another has removed the folder that we just found or made
            raise LockedError(f"{directory}: another process is at work here") from None
    except OSError as error:
        raise InputError(f"{directory}: cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            ours = False
        if not ours:  # held by another, or removed with its folder as we opened it
            raise LockedError(f"{directory}: another process is at work here")
        yield descriptor
    finally:
        os.close(descriptor)
