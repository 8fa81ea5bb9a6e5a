"""Jobs on Dataflow: submitted, followed, stopped, taken up again.

A job's name comes from its output, so that the service itself refuses a second one beside it. Of a
job whose result is published later a note lies beside what it writes: a command that was killed,
that lost the service, or that was told to leave its job alone (``--on_sigterm detach``) finds it
when it is run again, and goes on with that job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions, TestOptions

from pipeline import gcs_publish, storage
from pipeline.command import FailedError, InputError, LockedError, StoppedError, log
from pipeline.dataflow_options import DETACH, JobOptions
from pipeline.gcs import GcsPath
from pipeline.interrupts import Interrupts
from pipeline.redaction import one_line, without_secrets
from pipeline.runners import Work, error_in

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.dataflow_client import Client

POLL_SECONDS = 5.0
EXPLAIN_SECONDS = 50.0  # a job's reason can follow some while after its failure
CANCEL_SECONDS = 120.0  # for a job to end that was cancelled

DONE = "JOB_STATE_DONE"
ENDED = {
    DONE: "is done",
    "JOB_STATE_FAILED": "failed",
    "JOB_STATE_CANCELLED": "was cancelled",
    "JOB_STATE_UPDATED": "was replaced by another job",
    "JOB_STATE_DRAINED": "was drained",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """Which job it is, and what for.

    Attributes:
        identity: see `Work`.
    """

    project: str
    region: str
    job_id: str
    identity: str

    def __str__(self) -> str:
        return f"job {self.job_id}"

    @property
    def console(self) -> str:
        """Its page."""
        place = f"https://console.cloud.google.com/dataflow/jobs/{self.region}/{self.job_id}"
        return f"{place}?project={self.project}"

    def command(self, verb: str) -> str:
        """What to type to ``show`` or ``cancel`` it."""
        where = f"--region {self.region} --project {self.project}"
        return f"gcloud dataflow jobs {verb} {self.job_id} {where}"


def job_name(work: Work) -> str:
    """A name that no other output has."""
    return f"digits-{work.stage}-{hashlib.sha256(str(work.output).encode()).hexdigest()[:12]}"


# Requests


def prepare(pipeline: beam.Pipeline, work: Work) -> Any:
    """Turns a graph into the description of a job (Beam's); builds the package to be staged."""
    cloud = pipeline.options.view_as(GoogleCloudOptions)
    cloud.job_name = cloud.job_name or job_name(work)
    test = pipeline.options.view_as(TestOptions)
    test.dry_run = True  # Beam's: it ends where anything would be staged
    try:
        job = pipeline.run().job
    except RuntimeError as error:
        raise InputError(f"the job cannot be prepared: {last_line(str(error))}") from None
    job.options.view_as(TestOptions).dry_run = False
    return job


def describe(pipeline: beam.Pipeline, work: Work) -> dict[str, Any]:
    """What `run` would send to be staged, and the request that would follow; sends nothing."""
    from pipeline.dataflow_client import Unsent

    job = prepare(pipeline, work)
    client = Unsent(job.options)
    client.create_job_description(job)
    cloud = job.google_cloud_options
    place = f"v1b3/projects/{cloud.project}/locations/{cloud.region}/jobs"
    return {
        "staged": client.staged,
        "request": {
            "method": "POST",
            "url": f"{cloud.dataflow_endpoint}/{place}",
            "body": json.loads(job.json()),
        },
    }


# Running


def run(pipeline: beam.Pipeline, work: Work) -> Any:
    """Runs a pipeline as a job, to its end, and returns its metrics (Beam's).

    Raises:
        InputError: a worker met wrong input, or the service refuses the request.
        LockedError: another job is at work for the same output.
        FailedError: the job failed, or was cancelled by others.
        UnreachableError: the service does not answer, or has no quota for another job.
        StoppedError: a SIGTERM came, and the job was cancelled or left, as the options say.
    """
    from pipeline.dataflow_client import Client

    client = Client(pipeline.options)
    how = pipeline.options.view_as(JobOptions).on_sigterm
    with Interrupts() as interrupts:
        note = take_up(client, work)
        try:
            if note is None:
                job = prepare(pipeline, work)
                log.info("staging in %s", job.google_cloud_options.staging_location)
                client.create_job_description(job)
                _write_job_file(job)
                with interrupts.held():  # a job that was begun is to be known
                    note = _submit(client, job, work)
            state, said = follow(client, note)
        except (StoppedError, KeyboardInterrupt) as stop:
            if note is None:
                said = "no job was submitted"
            elif how == DETACH:
                said = leave(note)
            else:
                said = cancel(client, note, work)
            log.info("%s", said)
            raise type(stop)(said) from None
    _let_go(work)
    if state != DONE:
        raise failure(note, state, said)
    return client.metrics(note)


def _submit(client: Client, job: Any, work: Work) -> Note:
    note = Note(
        project=job.google_cloud_options.project,
        region=job.google_cloud_options.region,
        job_id=client.create(job).id,
        identity=work.identity,
    )
    log.info("%s: %s", note, note.console)
    if isinstance(work.folder, GcsPath):
        gcs_publish.keep(work.folder, dataclasses.asdict(note))
    return note


def take_up(client: Client, work: Work) -> Note | None:
    """Looks for a job that was left running for the same output; None: one is to be submitted.

    Raises:
        LockedError: it is still at work, and makes something else of it.
    """
    if not isinstance(work.folder, GcsPath) or (found := gcs_publish.kept(work.folder)) is None:
        return None
    note = Note(**{field.name: str(found.get(field.name)) for field in dataclasses.fields(Note)})
    state = client.state(note, forgotten="JOB_STATE_FAILED")
    if note.identity == work.identity and (state == DONE or state not in ENDED):
        log.info("going on with %s, which was left running: %s", note, note.console)
        return note
    if state not in ENDED:
        raise LockedError(
            f"{work.output}: {note} was left running, and makes something else of it; wait for"
            f" its end, or: {note.command('cancel')}"
        )
    log.info("%s, which was left running, %s: starting again", note, ENDED[state])
    _let_go(work)
    storage.remove(work.folder)
    return None


def follow(client: Client, note: Note, seconds: float = float("inf")) -> tuple[str, str]:
    """Logs what becomes of a job until it has ended, or the time is up.

    Returns:
        Its state, and what the service says of its failure.
    """
    end = time.monotonic() + seconds
    state, said = "", ""
    failed_since = None
    while True:
        job = client.get(note)
        if job.state != state:
            state = job.state
            log.info("%s  %s %s", job.time, note, plain(state))
        for message in client.new_messages(note):
            text = without_secrets(message.text)
            line = last_line(text)
            if message.is_error:
                said = explaining(said, text)
                log.info("%s  error: %s", message.time, line)
            else:
                log.info("%s  %s", message.time, line)
        now = time.monotonic()
        if state == "JOB_STATE_FAILED" and not said:
            failed_since = now if failed_since is None else failed_since
            if now - failed_since < EXPLAIN_SECONDS:
                time.sleep(min(1.0, POLL_SECONDS))
                continue
        if state in ENDED or now >= end:
            return state, said
        time.sleep(POLL_SECONDS)


def leave(note: Note) -> str:
    """Says what one has to know of a job that goes on alone."""
    return (
        f"{note} goes on alone, and the same command takes it up again; see {note.command('show')}"
    )


def cancel(client: Client, note: Note, work: Work) -> str:
    """Cancels a job and waits for its end; says what became of it."""
    log.info("cancelling %s", note)
    try:
        client.cancel(note)
        state, _ = follow(client, note, CANCEL_SECONDS)
    except InputError as error:
        return f"{note} could not be cancelled ({error}); try: {note.command('cancel')}"
    if state == DONE:
        return f"{note} was done before it could be cancelled; the same command publishes it"
    if state not in ENDED:
        return f"{note} is being cancelled"
    _let_go(work)
    return f"{note} {ENDED[state]}"


def _let_go(work: Work) -> None:
    if isinstance(work.folder, GcsPath):
        gcs_publish.let_go(work.folder)


def _write_job_file(job: Any) -> None:
    if path := job.options.view_as(DebugOptions).dataflow_job_file:
        storage.write_atomic(storage.place(path), job.json())


# Words


def plain(state: str) -> str:
    """A state in words."""
    return ENDED.get(state) or f"is {state.removeprefix('JOB_STATE_').replace('_', ' ').lower()}"


def failure(note: Note, state: str, said: str) -> InputError:
    """What to raise of a job that ended in another way than well."""
    if (found := error_in(said)) is not None:
        return found
    reason = last_line(said) or f"see {note.console}"
    return FailedError(f"{note} {ENDED[state]}: {reason}")


def explaining(said: str, text: str) -> str:
    """Which of two messages says more of a failure: a traceback, or else the later one."""
    rank: Callable[[str], int] = lambda text: ("Traceback" in text) - ("work item was" in text)  # noqa: E731
    return text if not said or rank(text) >= rank(said) else said


def last_line(text: str) -> str:
    """A message in one line without secrets: of a traceback the error it ends in."""
    text = without_secrets(text)  # before a line is chosen: some have several
    if "Traceback (most recent call last)" in text:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
        text = next((x for x in reversed(lines) if ": " in x and "Traceback" not in x), text)
    return one_line(text)
