"""Reading what others keep, in local folders or in a bucket: a folder's files, a part of one.

Synopsis::

    for name, stamp in stamps(folder).items(): ...
    with opened(folder / name) as file:
        file.seek(first)
        file.read(size)
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

from pipeline.gcs import GcsPath
from pipeline.storage import Place

AT_ONCE = 8  # requests; the client keeps ten connections
RANGE_BYTES = 4 << 20  # the least that is asked of the server at once

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class NotAFileError(OSError):
    """A folder, a pipe or a device, which opening might wait for ever."""


class Stamp(NamedTuple):
    """What changes when the content of a file does.

    Attributes:
        size: in bytes.
        version: its modification time in nanoseconds, or the generation of an object.
    """

    size: int
    version: int


NO_FILE = Stamp(-1, -1)


def stamps(folder: Place) -> dict[str, Stamp]:
    """What is in a folder, by name; what is no file, or a link to nothing, has `NO_FILE`.

    In a bucket one listing tells it, and a folder that is not there is empty.
    """
    if not isinstance(folder, GcsPath):
        with os.scandir(folder) as entries:
            return {entry.name: _stamp(entry) for entry in entries}
    found: dict[str, Stamp] = {}
    for path, seen in folder.walk().items():
        name, inside, _ = path.partition("/")
        if not inside:
            found[name] = Stamp(seen.st_size, seen.generation)
        elif name:
            found.setdefault(name, NO_FILE)
    return found


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        found = entry.stat()
    except OSError:
        return NO_FILE
    return Stamp(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else NO_FILE


@contextlib.contextmanager
def opened(path: Place) -> Iterator[IO[bytes]]:
    """Opens a file to read parts of it; of an object, those of the content it has by now.

    Raises:
        FileNotFoundError: there is none.
    """
    with path.open("rb") if not isinstance(path, GcsPath) else _opened_object(path) as file:
        yield file


def _opened_object(path: GcsPath) -> IO[bytes]:
    found = path.stat()
    return io.BufferedReader(_Ranges(path, found.st_size, found.generation), RANGE_BYTES)


class _Ranges(io.RawIOBase):
    """An object's content, of one generation, asked for as it is read."""

    def __init__(self, path: GcsPath, size: int, generation: int) -> None:
        self._path = path
        self._size = size
        self._generation = generation
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._path.read_range(self._at, count, self._generation)
        self._at += count
        return count


def read_start(path: Place, size: int) -> bytes:
    """The first bytes of a file, at most so many: the whole of most.

    Raises:
        NotAFileError: it is none.
        OSError: it cannot be read, or is not there.
    """
    if not isinstance(path, GcsPath):
        if not stat.S_ISREG(path.stat().st_mode):
            raise NotAFileError(errno.EINVAL, "not a file", str(path))
        with path.open("rb") as file:
            return file.read(size)
    start = _Start(size)
    try:
        with contextlib.suppress(_EnoughError):
            path.download(start)
    except FileNotFoundError:
        if path.is_dir():
            raise NotAFileError(errno.EINVAL, "not a file", str(path)) from None
        raise
    return start.getvalue()


class _EnoughError(Exception):
    """No more of an object is wanted."""


class _Start(io.BytesIO):
    """Takes so many bytes and refuses what comes then."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._left = size

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        super().write(data[: self._left])
        self._left -= len(data)
        if self._left < 0:
            raise _EnoughError
        return len(data)


def each(
    folder: Place, action: Callable[[ItemT], ResultT], items: Iterable[ItemT]
) -> Iterator[ResultT]:
    """Yields what an action comes to for each item, in their order.

    Args:
        folder: what the action reads; in a bucket several are done at once, as each waits for
            the server.
        action: done once for each item.
        items: some.
    """
    if not isinstance(folder, GcsPath):
        yield from map(action, items)
        return
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield from pool.map(action, items)
    finally:
        pool.shutdown(cancel_futures=True)
