"""Folders behind the few verbs the job needs: write once, publish whole, lock.

A reader of a published folder or file sees the old content or the new one, never a part:
everything is written beside its final name and renamed. Folders are local, or ``gs://``: see
`gcs_publish` on how the same is held to where nothing can be renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, Union, overload

from pipeline import command, gcs, locks
from pipeline.command import InputError
from pipeline.gcs import GcsPath

if TYPE_CHECKING:
    from pipeline.leases import Lease

REMOVED = ".removed"
SPOOL_BYTES = 32 << 20  # of an object that is being written: in memory, beyond that on the disk

Place = Path | GcsPath
Lock = Union[int, "Lease"]  # as `locked` yields it
PlaceT = TypeVar("PlaceT", bound=Place)


class OccupiedError(InputError):
    """A folder that was to be written already holds files."""


def place(text: str) -> Place:
    """Reads back what ``str`` made of a folder or file."""
    return gcs.parse(text) if text.startswith(gcs.SCHEME) else Path(text)


@overload
def folder(text: str) -> Path: ...
@overload
def folder(text: str, *, buckets: bool) -> Place: ...
def folder(text: str, *, buckets: bool = False) -> Place:
    """Parses a flag that names a folder, which may be in a bucket where `buckets` says so.

    Raises:
        InputError: it is of another kind, or cannot be looked at.
    """
    if buckets and text.startswith(gcs.SCHEME):
        return gcs.parse(text)
    if "://" in text:
        expected = "a local folder or gs://bucket/path" if buckets else "a local folder"
        raise InputError(f"{text}: expected {expected}")
    if not text:
        raise InputError("expected a folder, got an empty name")
    path = Path(text)
    try:
        path.exists()
        (path.parent / f".{path.name}.incomplete").exists()  # as `published_whole` will name it
    except OSError as error:  # no permission, or too long a name
        raise InputError(f"{text}: cannot be used: {error.strerror}") from None
    return path


def sizes(directory: Place) -> dict[str, int]:
    """{name: size in bytes} of the files in a folder, from one listing where it is in a bucket."""
    if isinstance(directory, GcsPath):
        return {name: stat.st_size for name, stat in directory.walk().items() if "/" not in name}
    return _sizes({path.name: path for path in directory.iterdir()})


def walk(directory: Place) -> dict[str, int]:
    """{name, seen from there: size in bytes} of every file under a folder; none where none is.

    Another process may be removing files meanwhile: what is gone is left out.
    """
    if isinstance(directory, GcsPath):
        return {name: stat.st_size for name, stat in directory.walk().items()}
    found = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return _sizes({path.relative_to(directory).as_posix(): path for path in sorted(found)})


def _sizes(paths: Mapping[str, Path]) -> dict[str, int]:
    found = {}
    for name, path in paths.items():
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            if path.is_file():
                found[name] = path.stat().st_size
    return found


def write_atomic(path: Place, data: bytes | str) -> None:
    """Writes a whole file; see `open_atomic`."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def open_atomic(path: Place) -> Iterator[IO[bytes]]:
    """Opens a file under a temporary name; once written, flushes it to the disk and renames it.

    An object is kept aside until it is written, and then uploaded, which shows it whole.
    """
    if isinstance(path, GcsPath):
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            yield spool
            path.write_bytes(spool)
        return
    # Not its parents: a worker of a killed run must not make anew what the next run removed.
    path.parent.mkdir(exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with named(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide it from other users
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def flush(folder: Path) -> None:
    """Has every file under a folder on the disk, by whomever it was written."""
    for path in (folder / name for name in walk(folder)):
        with named(path), path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the name of a file to what goes wrong with it, where the system leaves it out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def require_writable(directory: Place) -> None:
    """Makes sure that files can be written in a folder, or it can be made; leaves no trace.

    Raises:
        InputError: they cannot.
    """
    if isinstance(directory, GcsPath):
        probe = directory / ".probe"  # one name: the next process removes what a killed one left
        probe.put(b"", 0)
        probe.unlink(missing_ok=True)
        return
    place = directory.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in command.NO_ROOM:  # no fault of the flag's
            raise
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None


def published_whole(
    final: PlaceT,
    *,
    replace: bool = False,
    last: str = "",
    resume: bool = False,
    cleared: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> AbstractContextManager[PlaceT]:
    """Yields an empty folder that becomes `final` when the block ends well, else vanishes.

    What an earlier process left behind, killed in the middle, is removed first. The files of a
    local folder are on the disk before it has its name: a power cut leaves no empty ones in it.

    Args:
        final: the folder.
        replace: whether it may take the place of one that holds files. That one is moved aside
            in the end: killed just then, neither stands under the name, and the next attempt
            brings the old one back. In a bucket it is removed in the end, and killed just then,
            the next attempt removes what is left of both; so it is where a file system renames
            no folders, as that of a mounted bucket.
        last: the file without which the folder is nothing to its readers; where nothing can be
            renamed it comes last and goes first.
        resume: whether a folder in a bucket may be one that an earlier process left to a job,
            with all that is in it; see `gcs_publish.keep`.
        cleared: files and folders in the one that is replaced which go before the block begins.
        left_out: files of the new one that are for the block alone.

    Raises:
        InputError: `final` cannot be created or replaced.
        OccupiedError: it already holds files.
        LockedError: another process is writing the same folder.
    """
    if isinstance(final, GcsPath):
        from pipeline import gcs_publish

        published: Any = gcs_publish.published_whole(
            final, replace=replace, last=last, resume=resume, cleared=cleared, left_out=left_out
        )
        return published
    from pipeline import local_publish

    local: Any = local_publish.published_whole(
        final, replace=replace, last=last, cleared=cleared, left_out=left_out
    )
    return local


def recover(final: Place) -> None:
    """Puts in order what a process left that was killed inside `published_whole`.

    A folder that had been moved aside comes back, and nothing temporary remains. Does nothing
    while another process is at work there.
    """
    if isinstance(final, GcsPath):
        from pipeline import gcs_publish

        gcs_publish.recover(final)
        return
    from pipeline import local_publish

    local_publish.recover(final)


def is_unsettled(final: Place) -> bool:
    """Whether a process is at work in `published_whole`, or was killed there, of this folder."""
    if isinstance(final, GcsPath):
        from pipeline import gcs_publish

        return gcs_publish.is_unsettled(final)
    from pipeline import local_publish

    return local_publish.is_unsettled(final)


def recover_all(parent: Place) -> None:
    """Does for every folder in another what `recover` does for one."""
    found = [path.name for path in parent.glob(".*")]
    for ending in (".incomplete", ".replaced"):
        for name in found:
            if name.endswith(ending):
                recover(parent / name.removeprefix(".").removesuffix(ending))


def remove(path: Place) -> None:
    """Removes a file, a link or a whole folder, of which another process may remove parts too."""
    if isinstance(path, GcsPath):
        from pipeline import gcs_publish

        gcs_publish.remove(path)
        return

    def failed(_: object, __: str, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=failed)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Place, first: str = "", *, last: str = "", lock: Lock | None = None) -> None:
    """Removes a folder in such a way that no reader takes a rest of it for a whole.

    It is moved aside, and `discard_leftovers` removes what a process left there that was killed.
    In a bucket, mounted or not, where nothing can be moved, the order of its files counts.

    Args:
        folder: the folder.
        first: the file without which it is nothing to its readers.
        last: the file that tells whoever comes next to remove the rest.
        lock: one in a bucket is looked at before every removal there.

    Raises:
        LockedError: that lock is lost.
    """
    hold(lock)
    if isinstance(folder, GcsPath):
        from pipeline import gcs_publish

        gcs_publish.discard(folder, first, last, None if isinstance(lock, int) else lock)
        return
    from pipeline import local_publish

    local_publish.discard(folder, first, last)


def discard_leftovers(parent: Place) -> None:
    """Ends what `discard` began in a folder; in a bucket it leaves nothing beside others."""
    if isinstance(parent, GcsPath):
        return
    for leftover in parent.glob(f".*{REMOVED}"):
        remove(leftover)


def tidy(*folders: Place) -> None:
    """Removes the files that `open_atomic` was writing when the process was killed."""
    for folder in folders:
        if isinstance(folder, Path):  # an object that was not written whole is not there
            for leftover in folder.glob(".*.*"):  # a lock has no second dot
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)


def require_absent(final: Place) -> None:
    """Raises OccupiedError if `final` is a file or a folder that holds anything."""
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise OccupiedError(f"{final}: already holds files; expected a new or empty folder")


@overload
def locked(directory: Path, *, outlasts: bool = False) -> AbstractContextManager[int]: ...
@overload
def locked(directory: GcsPath, *, outlasts: bool = False) -> AbstractContextManager[Lease]: ...
def locked(
    directory: Place, *, outlasts: bool = False
) -> AbstractContextManager[int] | AbstractContextManager[Lease]:
    """Holds the lock of a folder, and yields its file descriptor, or a lease in a bucket.

    The kernel drops the lock when the last process that holds the descriptor ends, however it
    ends; a child that inherits the descriptor (``pass_fds``) therefore keeps it.

    Args:
        directory: the folder.
        outlasts: whether processes that hold locks of their own are started under it; see
            `leases.held`.

    Raises:
        LockedError: another process holds it.
        InputError: the folder cannot be created.
    """
    if isinstance(directory, GcsPath):
        from pipeline import leases

        return leases.held(directory, outlasts=outlasts)
    return locks.held(directory)


def hold(lock: Lock | None) -> None:
    """Makes sure that a lock is still held, and for a while; comes before every change.

    A local one is held to its end.

    Raises:
        LockedError: another process has taken over, which is possible in a bucket alone.
    """
    if lock is not None and not isinstance(lock, int):
        lock.hold()
