"""A proxy before a Cloud Storage in memory that fails, as networks and servers do, by a seed.

Synopsis::

    with FaultyProxy("http://127.0.0.1:4443", seed=0) as proxy:
        ...  # STORAGE_EMULATOR_HOST=proxy.address
        proxy.requests, proxy.faults

What becomes of the n-th request follows from the seed alone, but for a fault that has to wait for
a request that it can happen to: only one with a body can be cut on its way there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

SHARE = 0.1  # of the requests that fail
UNAVAILABLE = "503"
TOO_MANY = "429"
RESET = "reset"  # before anything is passed on
LOST = "lost answer"  # to a request that the server has done
CUT_UPLOAD = "cut upload"  # half of it reaches the server, or nothing
CUT_DOWNLOAD = "cut download"  # half of the answer reaches the client, and a neat end
FORBIDDEN = "403"  # never by chance
KINDS = (UNAVAILABLE, TOO_MANY, RESET, LOST, CUT_UPLOAD, CUT_DOWNLOAD)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
NAME_BYTES = 2000  # of an upload's body, where its metadata names the object


class Request(NamedTuple):
    """What was asked: the verb, and the address with all that names an object."""

    method: str
    target: str


class Answer(NamedTuple):
    """What a server answered, whole."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class FaultyProxy:
    """Passes requests on, or not.

    Args:
        upstream: ``http://host:port`` of the server.
        seed: of what happens.
        share: of the requests, to which something happens.
        gone_after: told of every request; from the first one on for which it is true, which is
            still served, there is no server.

    Attributes:
        address: ``http://host:port`` of the proxy.
        requests: how many there were.
        faults: how often each of `KINDS` happened.
        seen: every request, and what happened to it: one of `KINDS`, or "".
        gone: whether there is no server any more.
    """

    def __init__(
        self,
        upstream: str,
        *,
        seed: int,
        share: float = SHARE,
        gone_after: Callable[[Request], bool] = lambda _: False,
    ) -> None:
        self.upstream = urlsplit(upstream)
        self.faults: Counter[str] = Counter()
        self.seen: list[tuple[Request, str]] = []
        self.gone = False
        self._share = share
        self._gone_after = gone_after
        self._random = random.Random(seed)
        self._deck: list[str] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> int:
        return len(self.seen)

    def draw(self, request: Request, *, has_body: bool) -> tuple[str, bool]:
        """What happens to a request, and which of two ways that has; "": nothing."""
        with self._lock:
            kind, way = self._decide(request, has_body)
            if kind:
                self.faults[kind] += 1
            self.seen.append((request, kind))
            return kind, way

    def _decide(self, request: Request, has_body: bool) -> tuple[str, bool]:
        hit, way = self._random.random() < self._share, self._random.random() < 0.5
        return (self._next(request, has_body) if hit else ""), way

    def look(self, request: Request) -> None:
        """Looks whether this was the last request that is answered."""
        if self._gone_after(request):
            self.gone = True

    def _next(self, request: Request, has_body: bool) -> str:
        """The next kind that can happen to a request, of a deck that holds every kind once."""
        found = [kind for kind in self._deck if is_possible(kind, request, has_body)]
        if not found:
            self._deck += self._random.sample(KINDS, len(KINDS))
            return self._next(request, has_body)
        self._deck.remove(found[0])
        return found[0]


def is_possible(kind: str, request: Request, has_body: bool) -> bool:
    """Whether a fault can happen to a request."""
    if kind == CUT_UPLOAD:
        return has_body
    return kind != CUT_DOWNLOAD or request.method == "GET"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultyProxy

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no news; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        if self.server.proxy.gone:
            self._reset()
        else:
            self._serve_or_fail(self.server.proxy)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815 - names of the base

    def _serve_or_fail(self, proxy: FaultyProxy) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise ValueError("a body of unknown length is not passed on")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # Where names stand: in the address, or in what comes before the content of an upload.
        start = body[:NAME_BYTES].decode(errors="replace") if self.command == "POST" else ""
        request = Request(self.command, unquote(f"{self.path} {start}"))
        kind, way = proxy.draw(request, has_body=bool(body))
        if kind in (UNAVAILABLE, TOO_MANY, FORBIDDEN):
            self._refuse(int(kind))
        elif kind == RESET:
            self._reset()
        elif kind == CUT_UPLOAD:
            with self._passed_on(body[: len(body) // 2 if way else 0], len(body)):
                pass
            self._reset()
        else:
            answer = self._asked(body)
            if kind == LOST:
                self._reset()
            else:
                self._answer(answer, cut=kind == CUT_DOWNLOAD)
        proxy.look(request)

    def _asked(self, body: bytes) -> Answer:
        """Passes on the whole request."""
        with self._passed_on(body, len(body)) as connection:
            found = connection.getresponse()
            return Answer(found.status, found.reason, found.getheaders(), found.read())

    def _answer(self, answer: Answer, *, cut: bool) -> None:
        """Passes on an answer, or half of it."""
        self.send_response_only(answer.status, answer.reason)
        proxy = self.server.proxy
        for name, value in answer.headers:
            if name.lower() not in HOP_BY_HOP:
                # An upload in parts goes on where the server says: here, not there.
                self.send_header(name, value.replace(proxy.upstream.geturl(), proxy.address))
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[: len(answer.body) // 2 if cut else None])
        self.close_connection = cut or self.close_connection

    @contextlib.contextmanager
    def _passed_on(self, body: bytes, length: int) -> Iterator[http.client.HTTPConnection]:
        """Sends so much of a body of this length to the server; the connection then ends."""
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(str(upstream.hostname), upstream.port)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP:
                connection.putheader(name, value)
        connection.putheader("Connection", "close")
        if length or self.command != "GET":
            connection.putheader("Content-Length", str(length))
        with contextlib.suppress(ConnectionError):  # a server may answer before it has read all
            connection.endheaders(body)
        try:
            yield connection
        finally:
            connection.close()

    def _refuse(self, status: int) -> None:
        content = json.dumps({"error": {"code": status, "message": "by the proxy"}}).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        """Ends the connection as a crash does: with a reset, not with an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # which holds the socket open
        self.connection.close()
