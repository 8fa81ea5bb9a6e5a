"""A stand-in for Vertex AI's job service on loopback, which really runs what is submitted.

Speaks the REST form of `JobService`: every body is read into the API's own message types, in which
an unknown field is an error. A job's containers become local processes: ``python`` is this one,
and ``/gcs/bucket`` a folder in which no folder is renamed, as in a mounted bucket. They are told
what Vertex AI tells them, AIP_* and TF_CONFIG included.

    python tests/vertex_service.py --port 8080 --mounts out/gcs
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import helpers
from google.cloud.aiplatform_v1.types import CustomJob, JobState, Scheduling
from google.protobuf import json_format

JOBS = re.compile(r"/v1/(projects/[^/]+/locations/[^/]+)/customJobs")
JOB = re.compile(r"/v1/(projects/[^/]+/locations/[^/]+/customJobs/\d+)(:cancel)?")
LABEL = re.compile(r'labels\.([a-z][a-z0-9_-]*)="([^"]*)"')
PAGE = 2  # jobs on a page of a list: a client has to turn them
PERMANENT = 128  # exit codes below it are errors of the program, and end the job
# What Cloud Storage FUSE refuses below /gcs, as each process of a job begins: to rename a folder
# that holds anything, and to link a file.
REFUSING = """
import errno, os, pathlib

def refusing(function, is_refused, number):
    def refuses(source, target, **options):
        there = pathlib.Path({mounts!r}).resolve() in pathlib.Path(source).resolve().parents
        if there and is_refused(source):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        return function(source, target, **options)
    return refuses

holds = lambda path: os.path.isdir(path) and bool(os.listdir(path))
os.rename = refusing(os.rename, holds, errno.EMFILE)
os.replace = refusing(os.replace, holds, errno.EMFILE)
os.link = refusing(os.link, lambda _: True, errno.ENOSYS)
"""


class RefusalError(Exception):
    """An error answer: HTTP status, google.rpc status, message."""


class Job:
    """A custom job, and the processes that are its containers.

    Attributes:
        message: the `CustomJob`.
        starts: how often its processes were started.
        codes: their exit codes, start by start.
    """

    def __init__(self, message, service):
        self.message = message
        self.service = service
        self.starts = 0
        self.codes = []
        self.processes = []
        self.is_preempted = False
        self.is_cancelled = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True)

    @property
    def state(self):
        return self.message.state.name.removeprefix("JOB_STATE_")

    def move(self, state):
        now = datetime.datetime.now(datetime.UTC)
        with self.changed:
            self.message.state = JobState[f"JOB_STATE_{state}"]
            self.message.update_time = now
            if state == "RUNNING" and self.starts == 1:
                self.message.start_time = now
            if state in ("SUCCEEDED", "FAILED", "CANCELLED"):
                self.message.end_time = now
            self.changed.notify_all()

    def wait_for(self, *states, seconds=120):
        with self.changed:
            assert self.changed.wait_for(lambda: self.state in states, seconds), self.state

    def send(self, number):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def preempt(self, number=signal.SIGTERM):
        """Takes the machines away, as Compute Engine does of spot ones."""
        self.is_preempted = True
        self.send(number)

    def cancel(self):
        with self.changed:
            if self.message.state in (JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED):
                return
        self.is_cancelled = True
        self.move("CANCELLING")
        self.send(signal.SIGTERM)

    def _work(self):
        self.service.may_start.wait()
        while True:
            if self.is_cancelled:
                return self.move("CANCELLED")
            self.starts += 1
            self.processes = list(self.service.start(self))
            self.move("RUNNING")
            if self.is_cancelled:
                self.send(signal.SIGTERM)
            codes = self._wait()
            self.codes.append(codes)
            if self.is_cancelled:
                return self.move("CANCELLED")
            if self.is_preempted:
                self.is_preempted = False
                self.move("PENDING")
                continue
            failed = [(index, code) for index, code in enumerate(codes) if code]
            if not failed:
                return self.move("SUCCEEDED")
            return self.fail(*failed[0])

    def _wait(self):
        """The exit codes; as one of the workers fails, or is taken away, the others are ended."""
        left = list(self.processes)
        while left:
            for process in list(left):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.02)
                    left.remove(process)
                    if code and (self.is_preempted or len(self.processes) > 1):
                        for other in left:
                            other.kill()
        return [process.returncode for process in self.processes]

    def fail(self, index, code):
        pool = 0 if index == 0 else 1
        status = code if code > 0 else PERMANENT - code
        self.message.error = {
            "code": 3,
            "message": f"The replica workerpool{pool}-{index - pool} exited with a non-zero status"
            f" of {status}. To find out more about why your job exited please check the logs:\n"
            "https://console.cloud.google.com/logs/viewer?project=1",
        }
        self.move("FAILED")


class Service(ThreadingHTTPServer):
    """The service. Is a context: at its end no process of a job is left.

    Attributes:
        jobs: by name.
        received: the `CustomJob` of every request for one, as it came.
        heard: the verb of every request.
        faults: what goes wrong with the next requests: (verb, how), where how is an HTTP status
            with what it says, or "drop": the connection is closed before anything is done, "lose":
            once it is done, "cut": in the middle of the answer; or "echo": it refuses, and repeats
            the caller's credentials.
        tokens: the credentials of every request.
        is_silent: whether every connection is closed at once.
        may_start: whether jobs leave the state PENDING.
        program: what is run in place of every container's command, if anything.
        said: the folder of what the processes say.
    """

    daemon_threads = True

    def __init__(self, mounts, port=0, *, tls=None):
        """Serves in plain http, or with the key and the certificate in a file."""
        super().__init__(("127.0.0.1", port), Handler)
        self.scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"
        self.mounts = Path(mounts)
        self.jobs = {}
        self.received = []
        self.heard = []
        self.faults = []
        self.tokens = []
        self.is_silent = False
        self.may_start = threading.Event()
        self.may_start.set()
        self.program = None
        self.said = Path(tempfile.mkdtemp())
        self.modules = Path(tempfile.mkdtemp())
        (self.modules / "sitecustomize.py").write_text(REFUSING.format(mounts=str(self.mounts)))
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    @property
    def job(self):
        """The only job."""
        (job,) = self.jobs.values()
        return job

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.may_start.set()
        for job in self.jobs.values():
            job.is_cancelled = True
            job.send(signal.SIGKILL)
            job.thread.join(60)

    def handle_error(self, request, client_address):
        """A client that went away is no reason for a traceback."""

    def outputs(self):
        """What the processes said, start by start."""
        return [path.read_text() for path in sorted(self.said.iterdir())]

    # The verbs

    def create(self, parent, body):
        message = CustomJob()
        try:
            json_format.Parse(body, CustomJob.pb(message))
        except json_format.ParseError as error:
            raise RefusalError(400, "INVALID_ARGUMENT", str(error)) from None
        check(message)
        with self.lock:
            self.received.append(CustomJob(message))
            message.name = f"{parent}/customJobs/{len(self.jobs) + 1}"
            message.create_time = message.update_time = datetime.datetime.now(datetime.UTC)
            job = self.jobs[message.name] = Job(message, self)
        job.move("PENDING")
        job.thread.start()
        return job.message

    def find(self, name):
        if name not in self.jobs:
            raise RefusalError(404, "NOT_FOUND", f"The CustomJob {name} does not exist.")
        return self.jobs[name]

    def list(self, parent, query):
        asked = LABEL.fullmatch(query.get("filter", ""))
        if asked is None:
            raise RefusalError(400, "INVALID_ARGUMENT", f"filter {query.get('filter')!r}")
        found = [
            job.message
            for name, job in self.jobs.items()
            if name.startswith(f"{parent}/") and job.message.labels.get(asked[1]) == asked[2]
        ]
        first = int(query.get("pageToken") or 0)
        more = {"nextPageToken": str(first + PAGE)} if len(found) > first + PAGE else {}
        return {"customJobs": list(map(as_json, found[first : first + PAGE]))} | more

    # The containers

    def start(self, job):
        """Starts the processes of a job."""
        spec = job.message.job_spec
        count = sum(pool.replica_count for pool in spec.worker_pool_specs)
        addresses = [f"127.0.0.1:{port}" for port in helpers.free_ports(count)]
        rank = 0
        for pool_index, pool in enumerate(spec.worker_pool_specs):
            for index in range(pool.replica_count):
                name = f"{job.message.name.rpartition('/')[2]}-{job.starts}-{pool_index}-{index}"
                environ = self.environ(spec)
                if count > 1:
                    task = {"type": ("chief", "worker")[pool_index], "index": index}
                    cluster = {"chief": addresses[:1], "worker": addresses[1:]}
                    environ["TF_CONFIG"] = json.dumps(
                        {"cluster": cluster, "task": task, "environment": "cloud"}
                    )
                with (self.said / f"{name}.log").open("w") as said:
                    yield subprocess.Popen(
                        self.command(pool.container_spec), env=environ, stdout=said, stderr=said,
                        cwd=self.said,
                    )  # fmt: skip
                rank += 1

    def command(self, container):
        if self.program is not None:
            return [sys.executable, "-c", self.program]
        command = [*container.command, *container.args]
        assert command[0] == "python", command
        mounted = [re.sub(r"(^|=)/gcs/", rf"\1{self.mounts}/", word) for word in command[1:]]
        return [sys.executable, *mounted]

    def environ(self, spec):
        """Of ours as little as there is in an image, and what Vertex AI sets."""
        kept = ("PATH", "HOME", "STORAGE_EMULATOR_HOST", "DIGITS_LEASE_SECONDS")
        environ = {name: os.environ[name] for name in kept if name in os.environ}
        base = spec.base_output_directory.output_uri_prefix.rstrip("/")
        environ |= {
            "PYTHONPATH": f"{self.modules}{os.pathsep}{helpers.ROOT}",
            "CUDA_VISIBLE_DEVICES": "-1",
            "AIP_MODEL_DIR": f"{base}/model/",
            "AIP_CHECKPOINT_DIR": f"{base}/checkpoints/",
            "AIP_TENSORBOARD_LOG_DIR": f"{base}/logs/",
        }
        return environ


def check(job):
    """Refuses a job for what the service would refuse it for."""
    spec = job.job_spec
    pools = spec.worker_pool_specs
    facts = {
        "display_name": 0 < len(job.display_name) <= 128,
        "labels": all(
            re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) and re.fullmatch(r"[a-z0-9_-]{0,63}", value)
            for key, value in job.labels.items()
        ),
        "worker_pool_specs": 1 <= len(pools) <= 4 and pools[0].replica_count == 1,
        "replica_count": all(pool.replica_count >= 1 for pool in pools),
        "image_uri": all(pool.container_spec.image_uri for pool in pools),
        "machine_type": all(pool.machine_spec.machine_type for pool in pools),
        "accelerator_count": all(
            (pool.machine_spec.accelerator_count > 0) == bool(pool.machine_spec.accelerator_type)
            for pool in pools
        ),
        "timeout": spec.scheduling.timeout.total_seconds() > 0,
        "strategy": spec.scheduling.strategy in (Scheduling.Strategy.STANDARD,
                                                 Scheduling.Strategy.SPOT),
        "output_uri_prefix": spec.base_output_directory.output_uri_prefix.startswith("gs://"),
    }  # fmt: skip
    wrong = [name for name, holds in facts.items() if not holds]
    if wrong:
        raise RefusalError(400, "INVALID_ARGUMENT", f"List of found errors: {', '.join(wrong)}")


def as_json(message):
    return json_format.MessageToDict(type(message).pb(message), use_integers_for_enums=True)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(path.query))
        if found := JOBS.fullmatch(path.path):
            self.answer("list", lambda: self.server.list(found[1], query))
        elif found := JOB.fullmatch(path.path):
            self.answer("get", lambda: as_json(self.server.find(found[1]).message))

    def do_POST(self):
        path = urllib.parse.urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if found := JOBS.fullmatch(path):
            self.answer("create", lambda: as_json(self.server.create(found[1], body)))
        elif (found := JOB.fullmatch(path)) and found[2]:
            self.answer("cancel", lambda: self.server.find(found[1]).cancel() or {})

    def answer(self, verb, work):
        """Does what is asked for, and says so, unless something goes wrong."""
        server = self.server
        server.heard.append(verb)
        server.tokens.append(self.headers.get("Authorization"))
        fault = None
        if server.faults and server.faults[0][0] == verb:
            fault = server.faults.pop(0)[1]
        if server.is_silent or fault == "drop":
            return self.hang_up()
        try:
            if isinstance(fault, tuple):
                raise RefusalError(*fault)
            if fault == "echo":
                raise RefusalError(403, "PERMISSION_DENIED", f"Authorization: {server.tokens[-1]}")
            status, content = 200, work()
        except RefusalError as error:
            status, name, text = error.args
            content = {"error": {"code": status, "status": name, "message": text}}
        if fault == "lose":
            return self.hang_up()
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        return self.hang_up() if fault == "cut" else None

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--mounts", required=True, help="the folder that stands for /gcs")
    flags = parser.parse_args()
    with Service(flags.mounts, flags.port) as service:
        print(service.url, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
