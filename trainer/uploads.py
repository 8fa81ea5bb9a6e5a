"""Files brought to a bucket in the background, each on the condition that nobody else wrote it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.gcs import GcsPath, Stat

# From one beginning to the next: Cloud Storage takes one change of an object in a second.
PACE_SECONDS = 1.0

# A file, and the object that it is to become.
Pair = tuple[Path, GcsPath]


class Background:
    """Does one thing again whenever it is asked to, in a thread; nobody waits for it.

    Asked several times while it is at work, it does it once more, `PACE_SECONDS` after it last
    began. An error ends it, and is raised where it is next asked or waited for.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._asked = 0
        self._done = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def ask(self) -> None:
        """Has it done again."""
        with self._changed:
            self._raise()
            self._asked += 1
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all that was asked for is done; False where that takes too long."""
        with self._changed:
            asked = self._asked
            done = self._changed.wait_for(lambda: self._error or self._done >= asked, seconds)
            self._raise()
        return bool(done)

    def close(self) -> None:
        """Ends the thread, once it is idle."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        next_at = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._done or self._closed)
                self._changed.wait_for(lambda: self._closed, max(0.0, next_at - time.monotonic()))
                if self._closed:
                    return
                asked = self._asked
            next_at, error = time.monotonic() + PACE_SECONDS, None
            try:
                self._action()
            except BaseException as raised:  # whatever it is, it belongs to whoever asks
                error = raised
            with self._changed:
                self._done, self._error = asked, error
                self._changed.notify_all()
            if error is not None:
                return


class Snapshot(NamedTuple):
    """A file as it was read, and the object that it is to become."""

    target: GcsPath
    version: tuple[int, ...]
    content: bytes


class Copies:
    """The objects of a bucket that are copies of local files, as this process knows them.

    Args:
        check: called before every change; raises where this process may no longer write.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._stats: dict[GcsPath, Stat] = {}  # of what is there
        self._versions: dict[GcsPath, tuple[int, ...]] = {}  # of the files that were written there

    def learn(self, target: GcsPath, stat: Stat, path: Path | None = None) -> None:
        """Takes note of an object that is there already; `path` is a copy of it."""
        self._stats[target] = stat
        if path is not None:
            self._versions[target] = _version(path)

    def read(self, pairs: Iterable[Pair]) -> list[Snapshot]:
        """Reads the files that are not there as they are; one that has just gone is left out."""
        found = []
        for path, target in pairs:
            try:
                version = _version(path)
                if self._versions.get(target) != version:
                    found.append(Snapshot(target, version, path.read_bytes()))
            except FileNotFoundError:
                continue
        return found

    def write(self, snapshots: Iterable[Snapshot]) -> None:
        """Writes objects, one after the other.

        Raises:
            LockedError: another process writes there.
            InputError: the server refuses or does not answer.
        """
        for target, version, content in snapshots:
            known = self._stats.get(target)
            self._check()
            self._stats[target] = target.put(content, known.generation if known else 0)
            self._versions[target] = version

    def keep_only(self, folder: GcsPath, targets: set[GcsPath]) -> None:
        """Removes the others of a folder, once all of these are there; raises as `write`."""
        if not targets <= self._stats.keys():
            return
        for target in [each for each in self._stats if each.parent == folder]:
            if target not in targets:
                self._check()
                target.unlink(missing_ok=True, generation=self._stats[target].generation)
                del self._stats[target]
                self._versions.pop(target, None)


def _version(path: Path) -> tuple[int, ...]:
    """Tells a file from what it was before; FileNotFoundError if there is none."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
