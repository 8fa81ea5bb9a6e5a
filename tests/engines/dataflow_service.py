"""A local stand-in for the Dataflow service: its REST interface, jobs in memory, and a script.

It takes a request only if the service's own message type has every field of it, and refuses a
second active job of a name. A list tells of a job what the service's tells: no request. What
becomes of a job is for a test to say: the states that it goes through, what is said of it, when
nothing answers, and what is run in its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from google.protobuf import json_format

if TYPE_CHECKING:
    from google.cloud import dataflow as api

JOBS = re.compile(r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs")
JOB = re.compile(JOBS.pattern + r"/(?P<id>[^/]+)")
ENDED = ("DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED")
PAGE = 2  # jobs on a page of a list: a client has to turn them
TOKEN = "ya29.b2YtYS1kYXRhZmxvdy10aGF0LWlzLW5vbmU"
START = datetime.datetime(2026, 11, 20, 3, 0, tzinfo=datetime.UTC)


@dataclasses.dataclass(kw_only=True)
class Script:
    """What becomes of the next job.

    Attributes:
        states: one after another, each as often as it is asked for `asked` times; the last stays.
        asked: how often.
        messages: (importance, text), all there from the start of the last state on.
        execute: does the job's work, beside, before its last state; returns its metrics.
        stays: the state that a request to cancel does not end.
    """

    states: tuple[str, ...] = ("QUEUED", "RUNNING", "DONE")
    asked: int = 1
    messages: tuple[tuple[str, str], ...] = ()
    execute: Callable[[api.Job], list[dict]] | None = None
    stays: str = ""


@dataclasses.dataclass(kw_only=True)
class Running:
    """A job: the request as it came, and where its script is."""

    job: api.Job
    script: Script
    project: str
    region: str
    asked: int = 0
    cancelled: bool = False
    working: bool = False
    metrics: list[dict] = dataclasses.field(default_factory=list)

    @property
    def at(self) -> int:
        last = len(self.script.states) - 1 - self.working
        return min(max(0, self.asked - 1) // self.script.asked, last)

    @property
    def state(self) -> str:
        state = self.script.states[self.at]
        if self.cancelled and state not in ENDED and state != self.script.stays:
            return "CANCELLED"
        return state


class Service:
    """The service, at `endpoint`.

    Attributes:
        jobs: by their id.
        requests: (method, path) of all that came.
        script: of the next job.
        failing: HTTP codes that the next requests are answered with, first to last.
        refused: what the next submission is refused with: (HTTP code, text).
        losing: whether the answers to submissions get lost, which are heard all the same.
        forgets_requests: whether no answer tells which request a job was made for.
        tokens: the credentials of every request; at `/token` it hands some out.
        echoing: whether it refuses all requests, and repeats their credentials.
    """

    def __init__(self) -> None:
        from google.cloud import dataflow  # of the cloud extra

        self._api = dataflow
        self.jobs: dict[str, Running] = {}
        self.requests: list[tuple[str, str]] = []
        self.script = Script()
        self.failing: list[int] = []
        self.refused: tuple[int, str] | None = None
        self.losing = False
        self.forgets_requests = False
        self.tokens: list[str | None] = []
        self.echoing = False
        self._lock = threading.Lock()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service._answer(self)

            def do_POST(self) -> None:
                service._answer(self)

            def do_PUT(self) -> None:
                service._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://localhost:{self._server.server_address[1]}"

    @property
    def only(self) -> Running:
        """The one job there is."""
        (running,) = self.jobs.values()
        return running

    @contextlib.contextmanager
    def running(self) -> Iterator[Service]:
        """Serves inside; afterwards nothing listens."""
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """Goes away for good."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path, query = urlsplit(handler.path).path, urlsplit(handler.path).query
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests.append((handler.command, path))
            if path == "/token":
                code, content = 200, {"access_token": TOKEN, "expires_in": 3600}
            else:
                self.tokens.append(handler.headers.get("Authorization"))
                code, content = self._handle(handler.command, path, body, parse_qs(query))
                if self.echoing:
                    code, content = _error(403, f"not with Authorization: {self.tokens[-1]}")
        if self.losing and handler.command == "POST":
            handler.close_connection = True
            return
        data = json.dumps(content).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _handle(
        self, method: str, path: str, body: bytes, query: dict[str, list[str]]
    ) -> tuple[int, dict]:
        if self.failing:
            return _error(self.failing.pop(0), "made to fail")
        if method == "POST" and (found := JOBS.fullmatch(path)):
            return self._create(found["project"], found["region"], body)
        if found := JOBS.fullmatch(path):
            return self._list(found["project"], found["region"], query)
        found = re.fullmatch(JOB.pattern + r"(?P<of>/messages|/metrics)?", path)
        if not found or found["id"] not in self.jobs:
            return _error(404, f"no such job: {path}")
        running = self.jobs[found["id"]]
        if (found["project"], found["region"]) != (running.project, running.region):
            return _error(404, "the job is of another project or region")
        if method == "PUT":
            wanted = self._parse(body)
            assert wanted == self._api.Job(requested_state="JOB_STATE_CANCELLED"), wanted
            running.cancelled = running.state not in ENDED
            return 200, self._job(found["id"])
        if found["of"] == "/messages":
            return 200, {"jobMessages": self._messages(running)}
        if found["of"] == "/metrics":
            return 200, {"metrics": running.metrics}
        running.asked += 1
        return 200, self._job(found["id"])

    def _create(self, project: str, region: str, body: bytes) -> tuple[int, dict]:
        if self.refused:
            return _error(*self.refused)
        try:
            job = self._parse(body)
        except json_format.ParseError as error:
            return _error(400, f"not a job: {error}")
        for name, other in self.jobs.items():
            if other.job.client_request_id == job.client_request_id:
                return 200, self._job(name)
            if other.job.name == job.name and other.state not in ENDED:
                return _error(409, f"There is already an active job named {job.name}.")
        name = f"2026-11-20_03_00_00-{len(self.jobs) + 1}"
        running = Running(job=job, script=self.script, project=project, region=region)
        if running.script.execute is not None:
            running.working = True
            threading.Thread(target=self._execute, args=(running,), daemon=True).start()
        self.jobs[name] = running
        return 200, self._job(name)

    def _list(self, project: str, region: str, query: dict[str, list[str]]) -> tuple[int, dict]:
        summaries = [
            {field: value for field, value in self._job(name).items() if field != "clientRequestId"}
            for name, running in self.jobs.items()
            if (running.project, running.region) == (project, region)
            and running.job.name in query.get("name", [running.job.name])
        ]
        first = int(query.get("pageToken", ["0"])[0])
        more = {"nextPageToken": str(first + PAGE)} if len(summaries) > first + PAGE else {}
        return 200, {"jobs": summaries[first : first + PAGE]} | more

    def _parse(self, body: bytes) -> api.Job:
        message = self._api.Job.pb(self._api.Job())
        return self._api.Job.wrap(json_format.Parse(body, message))

    def _job(self, name: str) -> dict:
        running, number = self.jobs[name], list(self.jobs).index(name)
        since = START + datetime.timedelta(minutes=running.at)
        return {
            "id": name,
            "name": running.job.name,
            "clientRequestId": "" if self.forgets_requests else running.job.client_request_id,
            "createTime": (START + datetime.timedelta(hours=number)).isoformat(),
            "currentState": f"JOB_STATE_{running.state}",
            "currentStateTime": since.isoformat().replace("+00:00", "Z"),
        }

    def _messages(self, running: Running) -> list[dict]:
        said = [("DEBUG", "not to be shown"), ("BASIC", "Worker configuration: n1-standard-1.")]
        if running.state in ENDED:
            said += running.script.messages
        return [
            {
                "id": str(index),
                "time": (START + datetime.timedelta(seconds=index)).isoformat(),
                "messageText": text,
                "messageImportance": f"JOB_MESSAGE_{importance}",
            }
            for index, (importance, text) in enumerate(said)
        ]

    def _execute(self, running: Running) -> None:
        try:
            running.metrics = running.script.execute(running.job)
        except Exception as error:
            running.script = Script(states=("FAILED",), messages=(("ERROR", str(error)),))
        running.working = False


def _error(code: int, text: str) -> tuple[int, dict]:
    return code, {"error": {"code": code, "message": text, "status": "-"}}
