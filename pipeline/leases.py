"""The lock of a folder in a bucket: an object that its owner keeps renewing.

Every change of it is an upload on the condition that the object is of the generation last seen
(the one condition that every server keeps), so of several processes one wins. An owner that has
not renewed it for `LAPSE_SECONDS` is taken for dead, and not before; when that is, the clock of
the server tells. `Lease.check`, `Lease.hold` and `Lease.renew` tell an owner that its lock is lost,
or was not renewed in time. One of them comes before every change of what is published; the chain
asks before each of its steps, whose removals state the generation that was found.

``DIGITS_LEASE_SECONDS`` of the environment names another time than `LAPSE_SECONDS`; the chain's
stages see the same. It is at least 6, for a renewal in a second: Cloud Storage takes one change of
an object in a second, and answers 429, after which the client waits, to more for long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from pipeline import gcs_client
from pipeline.command import InputError, LockedError, UnreachableError
from pipeline.gcs import ChangedError, GcsPath

LOCK_NAME = ".lock"
PROBE_NAME = ".lock-probe"
HEARTBEAT_SECONDS = 10.0
LAPSE_SECONDS = 60.0
VARIABLE = "DIGITS_LEASE_SECONDS"
BEATS = 6  # in the time that the variable names, as in the usual one
LEAST_SECONDS = 6.0  # that it may name
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


def times() -> tuple[float, float]:
    """Seconds from one renewal to the next, and until a lock lapses that is not renewed.

    Raises:
        InputError: the environment says something else than a number of at least 6.
    """
    if not (text := os.environ.get(VARIABLE)):
        return HEARTBEAT_SECONDS, LAPSE_SECONDS
    try:
        lapse = float(text)
    except ValueError:
        lapse = 0.0
    if not LEAST_SECONDS <= lapse < float("inf"):
        raise InputError(
            f"{VARIABLE} {text}: expected a number of seconds of at least {LEAST_SECONDS:g}"
        )
    return lapse / BEATS, lapse


def _now() -> float:
    """Seconds by a clock of this machine that goes on while it sleeps, where it has one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Lease:
    """A lock that this process holds."""

    def __init__(self, path: GcsPath, owner: Owner, generation: int, renewed: float) -> None:
        self.path = path
        self.owner = owner
        self._generation = generation
        self._renewed = renewed  # see `_now`
        self._unanswered = False  # whether the next beat was tried, and may have been written
        self._heartbeat, _ = times()
        self._lost = False
        self._silent = False  # the server, when it was last told
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
        if self._lost or self._age() >= self.owner.lapse_seconds:
            raise LockedError(
                f"{self.path.parent}: the lock of this process has lapsed, and another one may be"
                " at work here"
            )

    def hold(self) -> None:
        """Makes sure that the lock is ours, and for a while: renews it if half its time is over.

        Raises:
            LockedError: it is lost.
            InputError: the server does not answer.
        """
        if self._lost or self._age() >= self.owner.lapse_seconds / 2:
            self.renew()

    def renew(self) -> None:
        """Makes sure, by renewing it, that the lock is ours, be it late: nobody has taken it.

        Raises:
            LockedError: it is lost.
            InputError: the server does not answer.
        """
        # Each attempt is a short one: of a request that hangs, the next may get through in time.
        for _ in range(math.ceil(gcs_client.RETRY_SECONDS / self._heartbeat) - 1):
            with contextlib.suppress(UnreachableError):
                self._renew()
                return
        self._renew()

    def _renew(self) -> None:
        """Tries to once, which takes no more than a few heartbeats."""
        with self._renewing:
            if self._lost:
                self.check()
            if self._unanswered:  # it may have been there for long: that is no renewal
                self._beat(self._renewed)
            self._beat(_now())
            self._silent = False

    def end(self) -> None:
        """Gives the lock back, if it is still ours; to a silent server, nobody can."""
        self._ended.set()
        if self._silent:
            return
        with contextlib.suppress(InputError):
            self.renew()
            self._lost = True
            self.path.unlink(missing_ok=True, generation=self._generation)

    def _beat(self, renewed: float) -> None:
        """Writes the next beat; the lock counts as renewed when told."""
        owner = dataclasses.replace(self.owner, beat=self.owner.beat + 1)
        self._unanswered = True
        try:
            stat = self.path.put(owner_json(owner), self._generation, seconds=self._heartbeat)
        except ChangedError:
            self._lost = True
            self.check()
            raise
        self._unanswered = False
        self.owner, self._generation, self._renewed = owner, stat.generation, renewed

    def _age(self) -> float:
        return _now() - self._renewed

    def _keep(self) -> None:
        while not self._ended.wait(self._heartbeat):
            try:
                self._renew()
            except LockedError:
                return
            except InputError:  # `check` tells when that is for too long
                self._silent = True


@contextlib.contextmanager
def held(directory: GcsPath, *, outlasts: bool = False) -> Iterator[Lease]:
    """Holds the lock of a folder.

    Args:
        directory: the folder.
        outlasts: whether it lapses only after the locks of processes that this one has started,
            should all of them be killed at once: whoever takes this one over finds those lapsed.

    Raises:
        LockedError: another process holds it; says which, and when it lapses.
        InputError: the server refuses or does not answer.
    """
    lease = acquire(directory, outlasts=outlasts)
    try:
        lease.hold()  # the answer may have taken long to come
        yield lease
    finally:
        lease.end()


def acquire(directory: GcsPath, *, outlasts: bool = False) -> Lease:
    """Takes the lock of a folder; see `held`."""
    path = directory / LOCK_NAME
    heartbeat, lapse = times()
    owner = Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        token=secrets.token_hex(8),
        beat=0,
        # This one may have been renewed a heartbeat before those; one more for what takes time.
        lapse_seconds=lapse + (2 * heartbeat if outlasts else 0),
    )
    for _ in range(ATTEMPTS):
        began = _now()
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
    """The time by the server's clock: that of an object which is written beside a lock.

    One name, so that what a killed process leaves is written over; and of each one's own content,
    so that nobody takes an older object for his.
    """
    probe = path.parent / PROBE_NAME
    stat = probe.write_bytes(token.encode())
    with contextlib.suppress(ChangedError):  # another one looks as well, and removes it
        probe.unlink(missing_ok=True, generation=stat.generation)
    return stat.updated
