"""The lock of a folder in a bucket: an object that its owner keeps renewing.

Every change of it is an upload on the condition that the object is of the generation last seen
(the one condition that every server keeps), so of several processes one wins. An owner that has
not renewed it for `LAPSE_SECONDS` is taken for dead, and not before; when that is, the clock of
the server tells. `Lease.check` and `Lease.renew`, one of which comes before every change of what
is published, tell an owner that its lock is lost, or was not renewed in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from pipeline.command import InputError, LockedError
from pipeline.gcs import ChangedError, GcsPath

LOCK_NAME = ".lock"
HEARTBEAT_SECONDS = 10.0
LAPSE_SECONDS = 60.0
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """What a lock says of the process that holds it.

    Attributes:
        host: its machine.
        pid: its process number there.
        token: random; no other lock has it.
        beat: how often it has been renewed.
        lapse_seconds: how long after the last renewal it holds.
    """

    host: str
    pid: int
    token: str
    beat: int
    lapse_seconds: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def owner_json(owner: Owner) -> bytes:
    """The content of a lock."""
    return json.dumps(dataclasses.asdict(owner)).encode()


def parse_owner(data: bytes) -> Owner:
    """Reads `owner_json` back; of anything else, an owner of whom nothing is known."""
    try:
        owner = Owner(**json.loads(data))
        return dataclasses.replace(owner, lapse_seconds=max(0.0, float(owner.lapse_seconds)))
    except (ValueError, TypeError):
        return Owner(host="?", pid=0, token="", beat=0, lapse_seconds=LAPSE_SECONDS)


def seconds_left(owner: Owner, renewed: datetime.datetime, now: datetime.datetime) -> float:
    """How long a lock still holds; 0 or less: it has lapsed. Both times by the server's clock."""
    return owner.lapse_seconds - (now - renewed).total_seconds()


class Lease:
    """A lock that this process holds."""

    def __init__(self, path: GcsPath, owner: Owner, generation: int, renewed: float) -> None:
        self.path = path
        self.owner = owner
        self._generation = generation
        self._renewed = renewed  # by the monotonic clock of this process
        self._lost = False
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken the lock."""
        return self._lost

    def check(self) -> None:
        """Makes sure, without asking the server, that the lock should still be ours.

        Raises:
            LockedError: it is lost, or has not been renewed in time.
        """
        if self._lost or time.monotonic() - self._renewed >= self.owner.lapse_seconds:
            raise LockedError(
                f"{self.path.parent}: the lock of this process has lapsed, and another one may be"
                " at work here"
            )

    def renew(self) -> None:
        """Makes sure, by renewing it, that the lock is ours, be it late: nobody has taken it.

        Raises:
            LockedError: it is lost.
            InputError: the server does not answer.
        """
        with self._renewing:
            if self._lost:
                self.check()
            began = time.monotonic()
            owner = dataclasses.replace(self.owner, beat=self.owner.beat + 1)
            try:
                stat = self.path.put(owner_json(owner), self._generation)
            except ChangedError:
                self._lost = True
                self.check()
                raise
            self.owner, self._generation, self._renewed = owner, stat.generation, began

    def end(self) -> None:
        """Gives the lock back, if it is still ours."""
        self._ended.set()
        with contextlib.suppress(InputError):
            self.renew()
            self._lost = True
            self.path.unlink(missing_ok=True, generation=self._generation)

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self.renew()
            except LockedError:
                return
            except InputError:  # the server is silent: `check` tells when that is for too long
                continue


@contextlib.contextmanager
def held(directory: GcsPath) -> Iterator[Lease]:
    """Holds the lock of a folder.

    Raises:
        LockedError: another process holds it; says which, and when it lapses.
        InputError: the server refuses or does not answer.
    """
    lease = acquire(directory)
    try:
        yield lease
    finally:
        lease.end()


def acquire(directory: GcsPath) -> Lease:
    """Takes the lock of a folder; see `held`."""
    path = directory / LOCK_NAME
    owner = Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        token=secrets.token_hex(8),
        beat=0,
        lapse_seconds=LAPSE_SECONDS,
    )
    for _ in range(ATTEMPTS):
        began = time.monotonic()
        try:
            stat = path.put(owner_json(owner), _generation_to_replace(path, owner.token))
            return Lease(path, owner, stat.generation, began)
        except (ChangedError, FileNotFoundError):  # another was faster, or has just ended
            continue
    raise LockedError(f"{directory}: other processes are at work here")


def _generation_to_replace(path: GcsPath, token: str) -> int:
    """The generation of a lock that has lapsed; 0 where there is none."""
    if (stat := path.find()) is None:
        return 0
    owner = parse_owner(path.read_bytes())
    left = seconds_left(owner, stat.updated, _server_time(path, token))
    if left > 0:
        raise LockedError(
            f"{path.parent}: {owner} is at work here; if it is dead, its lock lapses in"
            f" {left:.0f} seconds"
        )
    return stat.generation


def _server_time(path: GcsPath, token: str) -> datetime.datetime:
    """The time by the server's clock: that of an object which is written beside a lock."""
    probe = path.parent / f"{path.name}-{token}"
    updated = probe.put(b"", 0).updated
    probe.unlink(missing_ok=True)
    return updated
