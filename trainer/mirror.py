"""A run whose folders are in buckets: it works in a local folder, and a thread brings it there.

Synopsis::

    with Mirror(places) as mirror:
        mirror.hold()           # locks the run's folders: from here on, this process writes
        mirror.bring_down()     # what a run goes on from
        ...                     # trains in mirror.here; mirror.saved() after every checkpoint
        mirror.publish()        # the exported model, when everything else is there

The thread writes in an order in which every part of it can be gone on from: event files, the
metrics, the checkpoint, and only then it removes an older one. Folders that are local are used
as they are.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import command, storage
from pipeline.command import FailedError, InputError, LockedError
from pipeline.gcs import GcsPath
from pipeline.leases import Lease
from pipeline.storage import Place
from trainer import run_folder
from trainer.checkpoints import PATTERN
from trainer.run_folder import METRICS_FILE, MODEL_FILE, Places, holds_model
from trainer.uploads import Background, Copies, Pair

END_SECONDS = 20.0  # that a process which is told to end takes at most to upload the last


class Mirror:
    """The folders of a run as they are used on this machine.

    Attributes:
        here: where the run writes: its own folders where they are local, else folders that go
            with the process.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._scratch: Path | None = None
        self.here: Places[Path] = Places(
            run=self._local(places.run, "run"),
            model=self._local(places.model, "model"),
            checkpoints=self._local(places.checkpoints, "checkpoints"),
            tensorboard=self._local(places.tensorboard, "tensorboard"),
        )
        self._held = contextlib.ExitStack()
        self._leases: list[Lease] = []
        self._copies = Copies(self._check)
        self._uploads: Background | None = None
        self._ending = threading.Lock()
        self._ended = False

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Brings there what is left, and gives the locks back; raises as `saved`."""
        with self._ending, contextlib.ExitStack() as ends:
            self._ended = True
            ends.callback(self._remove_scratch)
            if self._uploads is not None:
                ends.callback(self._uploads.close)
            ends.enter_context(self._held)
            try:
                self._settle()
            except InputError:
                if error is None:  # else that is what there is to tell
                    raise

    def end(self) -> None:
        """Does the same from another thread, in about `END_SECONDS`, just before the process ends.

        From then on, `__exit__` waits for that end. A lock that is local goes with the process.
        """
        if not self._ending.acquire(timeout=END_SECONDS) or self._ended:
            return
        with contextlib.suppress(InputError):
            if self._uploads is not None:
                self._uploads.ask()
                done = self._uploads.wait(END_SECONDS)
                for lease in self._leases if done else ():
                    lease.end()
        self._remove_scratch()

    def scratch(self) -> Path:
        """A folder that goes with this process."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="digits-"))
        return self._scratch

    def hold(self) -> None:
        """Locks the run's folders, for this process to write.

        Raises:
            LockedError: another process holds one.
            InputError: the server refuses or does not answer.
        """
        for folder in run_folder.locked(self._places):
            lock: Any = self._held.enter_context(storage.locked(folder))
            if isinstance(lock, Lease):
                self._leases.append(lock)
        if self.here != self._places:
            self._uploads = Background(self._upload)

    def bring_down(self) -> None:
        """Brings the checkpoints here, and notes what else is there that will be replaced.

        Raises:
            InputError: the server refuses or does not answer.
        """
        there, metrics = self._places.checkpoints, self._places.metrics
        if isinstance(there, GcsPath):
            for path in list(there.glob(PATTERN)):
                stat, local = path.stat(), self.here.checkpoints / path.name
                storage.write_atomic(local, path.read_bytes())
                self._copies.learn(path, stat, local)
        if isinstance(metrics, GcsPath) and (found := metrics.find()):
            self._copies.learn(metrics, found)

    def saved(self) -> None:
        """Has what was saved brought there; does not wait for it.

        Raises:
            FailedError: what was saved before could not be.
            LockedError: another process has taken over.
        """
        if self._uploads is not None:
            self._uploads.ask()

    def publish(self) -> None:
        """Shows the exported model where it belongs, whole, once all else is there.

        Raises:
            FailedError: it cannot be brought there.
            LockedError: another process has taken over.
        """
        self._settle()
        final = self._places.model
        if isinstance(final, Path):
            return
        with _told():
            for lease in self._leases:
                lease.renew()
            again = holds_model(final)
            with storage.published_whole(final, replace=again, last=MODEL_FILE) as staging:
                for path, target in _pairs(self.here.model, staging, "*"):
                    self._check()
                    storage.write_atomic(target, path.read_bytes())

    def _local(self, place: Place, name: str) -> Path:
        if isinstance(place, Path):
            return place
        folder = self.scratch() / name
        folder.mkdir()
        return folder

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _check(self) -> None:
        """Makes sure that the locks are still ours: one not renewed in time may be, if nobody came.

        Raises:
            LockedError: one is not.
        """
        for lease in self._leases:
            try:
                lease.check()
            except LockedError:
                lease.renew()

    def _settle(self) -> None:
        """Waits until everything there is to upload is there."""
        if self._uploads is not None:
            self._uploads.ask()
            self._uploads.wait()

    def _upload(self) -> None:
        """Brings there what has changed since the last time."""
        here, there, copies = self.here, self._places, self._copies
        checkpoints = _pairs(here.checkpoints, there.checkpoints, PATTERN)
        # Read first and written last: what goes before a checkpoint is at least as new as it.
        saved = copies.read(reversed(checkpoints))
        with _told():
            copies.write(copies.read(_pairs(here.tensorboard, there.tensorboard, "*")))
            copies.write(copies.read(_pairs(here.run, there.run, METRICS_FILE)))
            copies.write(saved)
            if checkpoints and isinstance(there.checkpoints, GcsPath):
                copies.keep_only(there.checkpoints, {target for _, target in checkpoints})


def _pairs(here: Path, there: Place, pattern: str) -> list[Pair]:
    """The files under a folder whose names are of a form, and what they become in its bucket."""
    if isinstance(there, Path):
        return []
    files = sorted(path for path in here.rglob(pattern) if path.is_file())
    return [(path, there / path.relative_to(here).as_posix()) for path in files]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Makes whatever keeps a run from its bucket a failure of the job, not of its flags."""
    try:
        yield
    except InputError as error:
        if error.exit_code != command.BAD_INPUT:  # it says itself what it is
            raise
        raise FailedError(str(error)) from None
