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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions, TestOptions

from pipeline import dataflow_notes, dataflow_packages, storage
from pipeline.command import FailedError, InputError, StoppedError, UnreachableError, log
from pipeline.dataflow_follow import DONE, ENDED, failure, follow, last_line
from pipeline.dataflow_notes import Note, take_up
from pipeline.dataflow_options import DETACH, JobOptions
from pipeline.interrupts import Interrupts
from pipeline.runners import Work

if TYPE_CHECKING:
    import apache_beam as beam

    from pipeline.dataflow_client import Client

CANCEL_SECONDS = 120.0  # for a job to end that was cancelled


def job_name(work: Work) -> str:
    """A name that no other output has."""
    return f"digits-{work.stage}-{hashlib.sha256(str(work.output).encode()).hexdigest()[:12]}"


# Requests


def prepare(pipeline: beam.Pipeline, work: Work, scratch: Path) -> Any:
    """Turns a graph into the description of a job (Beam's); builds the package to be staged.

    Args:
        pipeline: the graph.
        work: what it is for.
        scratch: a folder for what is to be staged.
    """
    cloud = pipeline.options.view_as(GoogleCloudOptions)
    cloud.job_name = cloud.job_name or job_name(work)
    test = pipeline.options.view_as(TestOptions)
    test.dry_run = True  # Beam's: it ends where anything would be staged
    dataflow_packages.ask_for(pipeline.options, scratch)
    try:
        job = pipeline.run().job
    except RuntimeError as error:
        raise InputError(f"the job cannot be prepared: {last_line(str(error))}") from None
    job.options.view_as(TestOptions).dry_run = False
    dataflow_packages.forget(job.options, scratch)
    return job


def describe(pipeline: beam.Pipeline, work: Work) -> dict[str, Any]:
    """What `run` would send to be staged, and the request that would follow; sends nothing."""
    from pipeline.dataflow_staging import Unsent

    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(pipeline, work, Path(scratch))
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

    The note on a job that is done stays until its result is published: a command that is killed
    before that pays for no second one.

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
                with tempfile.TemporaryDirectory() as scratch:
                    job = prepare(pipeline, work, Path(scratch))
                    log.info("staging in %s", job.google_cloud_options.staging_location)
                    client.create_job_description(job)
                _write_job_file(job)
                with interrupts.held():  # a job that was begun is to be known
                    note = announce(job, work)
                    note = submit(client, job, note, work)
            state, said = follow(client, note)
        except (StoppedError, KeyboardInterrupt) as stop:
            said = stopped(client, note, work, how)
            log.info("%s", said)
            raise type(stop)(said) from None
    if state != DONE:
        dataflow_notes.remove(work)
        raise failure(note, state, said)
    return client.metrics(note)


def announce(job: Any, work: Work) -> Note:
    """Notes a job that is about to be asked for."""
    note = Note(
        project=job.google_cloud_options.project,
        region=job.google_cloud_options.region,
        name=job.proto.name,
        request_id=job.proto.client_request_id,
        identity=work.identity,
    )
    dataflow_notes.write(note, work)
    return note


def submit(client: Client, job: Any, note: Note, work: Work) -> Note:
    """Asks for a job, and notes its id."""
    try:
        note = dataclasses.replace(note, job_id=client.create(job, note))
    except (UnreachableError, FailedError):  # it may have been heard all the same
        raise
    except InputError:
        dataflow_notes.remove(work)
        raise
    log.info("%s: %s", note, note.console)
    dataflow_notes.write(note, work)
    return note


def stopped(client: Client, note: Note | None, work: Work, how: str) -> str:
    """Cancels or leaves a job, as `how` says; tells what became of it."""
    if note is None:
        return "no job was submitted"
    if not note.job_id:  # nor does anybody know whether it will have one
        try:
            note = dataclasses.replace(note, job_id=client.find(note))
        except InputError as error:
            log.info("%s", error)
        if not note.job_id:
            return f"{note} may have been submitted; the same command takes it up if it was"
        dataflow_notes.write(note, work)
    return leave(note) if how == DETACH else cancel(client, note, work)


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
    dataflow_notes.remove(work)
    return f"{note} {ENDED[state]}"


def _write_job_file(job: Any) -> None:
    if path := job.options.view_as(DebugOptions).dataflow_job_file:
        storage.write_atomic(storage.place(path), job.json())
