"""Where the workers of a cluster wait for each other, before TensorFlow connects them.

TensorFlow's own wait cannot be ended: it holds Python's lock, takes SIGTERM for itself, and that
of the first worker knows no limit. So the first worker listens here, at the address where
TensorFlow listens after it; the others knock there until they hear that all have come. The
connections stay, for what cannot wait until all are between two calls.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterable

from pipeline.command import InputError, UnreachableError, log
from trainer.workers import Cluster

MEETING_SECONDS = 900.0  # machines of one job come up minutes apart
KNOCK_SECONDS = 0.5  # between two attempts
CONNECT_SECONDS = 10.0  # for one of them
KEEP_ALIVE_SECONDS = 60  # a firewall may forget a connection that is silent for ten minutes
HELLO = re.compile(rb"digits worker (\d+)\n")
ALL_HERE = b"digits: all here\n"
MISSING = b"digits: missing: "
STOP = b"digits: stop\n"


class Line:
    """On which a worker tells the others that it was told to stop.

    It runs from the first worker to each of the others: what the first one hears, it has to tell.

    Args:
        connections: to the others.
        heard: whether one of them has told it already.
    """

    def __init__(self, connections: Iterable[socket.socket], *, heard: bool = False) -> None:
        self._connections = list(connections)
        self._heard = heard
        for each in self._connections:
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):  # not everywhere
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_SECONDS)

    def tell(self) -> None:
        """Tells the others; one that has ended needs no telling."""
        for each in self._connections:
            with contextlib.suppress(OSError):
                each.send(STOP)

    def heard(self) -> bool:
        """Whether one of the others has told it; does not wait."""
        for each in list(self._connections):
            try:
                said = each.recv(64)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if not said:  # it has ended
                self._connections.remove(each)
                each.close()
            self._heard |= bool(said)
        return self._heard

    def close(self) -> None:
        """Hangs up."""
        for each in self._connections:
            each.close()


def meet(cluster: Cluster) -> Line:
    """Returns once every worker of a cluster is here, with the line that there is to them.

    Raises:
        UnreachableError: not all of them came in `MEETING_SECONDS`; the message says who did not.
        InputError: the first worker cannot listen at its address.
    """
    others = [each for each in range(len(cluster.addresses)) if each != cluster.rank]
    log.info(
        "worker %d: waiting for the other %d of %d workers: %s",
        cluster.rank,
        len(others),
        len(cluster.addresses),
        _names(cluster, others),
    )
    if cluster.rank == 0:
        return _receive(cluster, MEETING_SECONDS)
    return _knock(cluster, MEETING_SECONDS)


def _names(cluster: Cluster, ranks: Iterable[int]) -> str:
    return ", ".join(f"worker {rank} ({cluster.addresses[rank]})" for rank in ranks)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _receive(cluster: Cluster, seconds: float) -> Line:
    """As the first worker: waits until each of the others is here, and tells them all."""
    deadline = time.monotonic() + seconds
    with _Door(cluster.addresses[0]) as door:
        while missing := sorted(set(range(1, len(cluster.addresses))) - door.guests.keys()):
            left = deadline - time.monotonic()
            if left <= 0:
                said = f"{_names(cluster, missing)} did not come within {seconds:g} s"
                door.tell(MISSING + said.encode())
                raise UnreachableError(said)
            door.look(left)
        door.tell(ALL_HERE)
        return Line(door.leave())


def _knock(cluster: Cluster, seconds: float) -> Line:
    """As any other worker: waits until the first one says that all are here.

    It may come late itself, and then it is the one who knows how long to wait.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = b""
        with contextlib.ExitStack() as ends, contextlib.suppress(OSError):  # not here, or gone
            address = _place(cluster.addresses[0])
            first = ends.enter_context(socket.create_connection(address, CONNECT_SECONDS))
            first.settimeout(seconds + CONNECT_SECONDS)  # it gives up first, and says why
            first.sendall(b"digits worker %d\n" % cluster.rank)
            answer = first.recv(65536)
            if answer.startswith(ALL_HERE):  # and it may have told more, on the line
                line = Line([first], heard=answer != ALL_HERE)
                ends.pop_all()
                return line
        if answer.startswith(MISSING):
            raise UnreachableError(answer.removeprefix(MISSING).decode())
        time.sleep(KNOCK_SECONDS)
    raise UnreachableError(f"{_names(cluster, [0])} did not answer within {seconds:g} s")


class _Door:
    """Where the first worker listens; whoever says no rank is shown out.

    Attributes:
        guests: the connections of the workers that are here, by rank.
    """

    def __init__(self, address: str) -> None:
        self.guests: dict[int, socket.socket] = {}
        try:
            self._door = socket.create_server(("", _place(address)[1]))
        except OSError as error:
            reason = os.strerror(error.errno or 0)  # Python's own names the address as well
            raise InputError(f"worker 0 cannot listen at {address}: {reason}") from None
        self._selector = selectors.DefaultSelector()
        self._open: set[socket.socket] = set()
        self._watch(self._door, self._accept)

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *_: object) -> None:
        for each in list(self._open):
            self._close(each)
        self._selector.close()

    def look(self, seconds: float) -> None:
        """Waits so long, at most, for somebody to come, to speak or to go, and sees to it."""
        for key, _ in self._selector.select(seconds):
            key.data()

    def tell(self, said: bytes) -> None:
        """Tells all guests something short."""
        for guest in self.guests.values():
            with contextlib.suppress(OSError):
                guest.sendall(said)

    def leave(self) -> list[socket.socket]:
        """Lets the connections of the guests outlive the door."""
        for guest in self.guests.values():
            self._selector.unregister(guest)
            self._open.remove(guest)
        return list(self.guests.values())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again
            guest, _ = self._door.accept()
            self._watch(guest, lambda: self._hear(guest))

    def _hear(self, guest: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            said = guest.recv(64)
        self.guests = {rank: each for rank, each in self.guests.items() if each is not guest}
        if found := HELLO.fullmatch(said):
            self.guests[int(found[1])] = guest
        else:
            self._close(guest)

    def _watch(self, connection: socket.socket, see_to_it: Callable[[], None]) -> None:
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, see_to_it)
        self._open.add(connection)

    def _close(self, connection: socket.socket) -> None:
        self._open.remove(connection)
        self._selector.unregister(connection)
        connection.close()
