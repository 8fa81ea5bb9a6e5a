"""The client of Dataflow: Beam's own, patient, and plain in what it says.

Loaded only where the cloud extra is installed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import requests
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners.dataflow import dataflow_metrics, dataflow_runner
from apache_beam.runners.dataflow.internal.apiclient import DataflowApplicationClient
from google.api_core import exceptions
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import dataflow as api

from pipeline import dataflow, storage
from pipeline.command import FailedError, InputError, LockedError, UnreachableError, log

PATIENCE_SECONDS = 600.0  # with a service that does not answer while a job runs
SUBMIT_SECONDS = 60.0
MESSAGES_SECONDS = 30.0  # without what is said of a job, it can be followed
LONGEST_PAUSE = 30.0
TIMEOUT_SECONDS = 60.0  # of one request
NOISE = ("JOB_MESSAGE_DEBUG", "JOB_MESSAGE_DETAILED", "JOB_MESSAGE_IMPORTANCE_UNKNOWN")

ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The state of a job, and since when it is in it."""

    state: str
    time: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """What the service has to say of a job."""

    time: str
    text: str
    is_error: bool


class Client(DataflowApplicationClient):
    """Stages what jobs need, submits them and asks for them."""

    def __init__(self, options: PipelineOptions) -> None:
        super().__init__(options)
        self._seen: set[str] = set()
        self._since: Any = None
        self._is_told_of_silence = False

    def stage_file_with_retry(
        self,
        gcs_or_local_path: str,
        file_name: str,
        stream_or_path: str | io.IOBase,
        mime_type: str = "",
        total_size: int | None = None,
    ) -> None:
        """Beam's place for it: uploads a file, checked by its checksum."""
        content = _content(stream_or_path)
        storage.write_atomic(storage.place(gcs_or_local_path) / file_name, content)

    def create(self, job: Any) -> Any:
        """Submits a job; trying again does no harm, as the request has an id.

        Raises:
            LockedError: a job of this name is at work.
            InputError: the service refuses the request.
            UnreachableError: it does not answer, or there is no quota for another job.
        """
        cloud = self.google_cloud_options
        request = api.CreateJobRequest(
            project_id=cloud.project, location=cloud.region, job=job.proto
        )
        taken = LockedError(
            f"a job named {job.proto.name} is at work in {cloud.project}, {cloud.region}; try"
            " again when it has ended"
        )
        try:
            made = patiently(
                lambda: self._jobs_client.create_job(request=request, timeout=TIMEOUT_SECONDS),
                SUBMIT_SECONDS,
            )
        except exceptions.Conflict:
            raise taken from None
        except exceptions.ClientError as error:
            raise InputError(f"Dataflow refuses the job: {told(error)}") from None
        if made.client_request_id not in ("", job.proto.client_request_id):
            raise taken
        return made

    def get(self, note: dataflow.Note) -> State:
        """The state of a job.

        Raises:
            FailedError: the service refuses.
            UnreachableError: it does not answer for long.
        """
        try:
            return self._get(note, exceptions.NotFound)  # it can be, of a job that was just made
        except exceptions.ClientError as error:
            raise FailedError(f"{note}: {told(error)}; see {note.console}") from None

    def state(self, note: dataflow.Note, *, forgotten: str) -> str:
        """The name of a job's state; `forgotten` where the service knows no such job."""
        try:
            return self._get(note).state
        except exceptions.NotFound:
            return forgotten
        except exceptions.ClientError as error:
            raise FailedError(f"{note}: {told(error)}; see {note.console}") from None

    def _get(self, note: dataflow.Note, *passing: type[Exception]) -> State:
        request = api.GetJobRequest(
            project_id=note.project, location=note.region, job_id=note.job_id
        )
        job = patiently(
            lambda: self._jobs_client.get_job(request=request, timeout=TIMEOUT_SECONDS),
            PATIENCE_SECONDS,
            *passing,
        )
        return State(state=api.JobState(job.current_state).name, time=clock(job.current_state_time))

    def new_messages(self, note: dataflow.Note) -> Iterator[Message]:
        """Yields what the service said since it was last asked, in order.

        Nothing where it refuses to say, or does not answer: the job's state tells its end.
        """
        request = api.ListJobMessagesRequest(
            project_id=note.project,
            location=note.region,
            job_id=note.job_id,
            start_time=self._since,
        )
        try:
            said = patiently(
                lambda: list(
                    self._messages_client.list_job_messages(
                        request=request, timeout=TIMEOUT_SECONDS
                    ).job_messages
                ),
                min(MESSAGES_SECONDS, PATIENCE_SECONDS),
            )
        except (exceptions.ClientError, UnreachableError) as error:
            if not self._is_told_of_silence:
                reason = error if isinstance(error, UnreachableError) else told(error)
                log.info("what Dataflow says of %s is not known: %s", note, reason)
            self._is_told_of_silence = True
            return
        for each in said:
            if each.id in self._seen:
                continue
            self._seen.add(each.id)
            self._since = max(self._since or each.time, each.time)
            importance = api.JobMessageImportance(each.message_importance).name
            if importance not in NOISE:
                yield Message(
                    time=clock(each.time),
                    text=each.message_text,
                    is_error=importance == "JOB_MESSAGE_ERROR",
                )

    def cancel(self, note: dataflow.Note) -> None:
        """Asks for the end of a job.

        Raises:
            FailedError: the service refuses.
            UnreachableError: it does not answer.
        """
        request = api.UpdateJobRequest(
            project_id=note.project,
            location=note.region,
            job_id=note.job_id,
            job=api.Job(requested_state=api.JobState.JOB_STATE_CANCELLED),
        )
        try:
            patiently(
                lambda: self._jobs_client.update_job(request=request, timeout=TIMEOUT_SECONDS),
                SUBMIT_SECONDS,
            )
        except exceptions.ClientError as error:
            raise FailedError(told(error)) from None

    def metrics(self, note: dataflow.Note) -> Any:
        """What a job that is done has counted; nothing where the service will not say."""
        job = api.Job(id=note.job_id, current_state=api.JobState.JOB_STATE_DONE)
        result = dataflow_runner.DataflowPipelineResult(job, None)
        found = dataflow_metrics.DataflowMetrics(self, result)
        try:
            found.query()
        except Exception as error:  # none is worth a result that is there
            log.warning("what %s counted is not known: %s", note, told(error))
            found._cached_metrics = api.JobMetrics()
        return found


class Unsent(Client):
    """Notes what would be staged, and asks nobody: not for credentials either.

    Attributes:
        staged: the files.
    """

    def __init__(self, options: PipelineOptions) -> None:
        anonymous = copy.deepcopy(options)
        anonymous.view_as(GoogleCloudOptions).no_auth = True
        super().__init__(anonymous)
        self._enable_caching = False
        self.staged: list[dict[str, Any]] = []

    def stage_file_with_retry(
        self,
        gcs_or_local_path: str,
        file_name: str,
        stream_or_path: str | io.IOBase,
        mime_type: str = "",
        total_size: int | None = None,
    ) -> None:
        """Notes a file."""
        content = _content(stream_or_path)
        self.staged.append(
            {
                "file": f"{gcs_or_local_path}/{file_name}",
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )


def _content(stream_or_path: str | io.IOBase) -> bytes:
    """What Beam gives to be staged: a file's content by its name, or a stream's."""
    if isinstance(stream_or_path, str):
        return Path(stream_or_path).read_bytes()
    content: bytes = stream_or_path.read()
    return content


def patiently(call: Callable[[], ResultT], seconds: float, *passing: type[Exception]) -> ResultT:
    """Asks again, with growing pauses, where an answer may still come.

    Args:
        call: asks.
        seconds: for how long.
        passing: errors of which it may, beside those of the server and the network.

    Raises:
        UnreachableError: none came in this time.
        GoogleAPICallError: the service refuses.
        InputError: the credentials cannot be used.
    """
    end, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return call()
        except Exception as error:
            if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
                raise InputError(
                    f"the Google credentials cannot be used ({type(error).__name__}); try:"
                    " gcloud auth application-default login"
                ) from None
            if not isinstance(error, passing) and not is_passing(error):
                raise
            if time.monotonic() + pause > end:
                raise UnreachableError(
                    f"Dataflow gives no answer for {seconds:g} seconds: {told(error)}; a job that"
                    " runs goes on, and the same command takes it up again"
                ) from None
            log.info("Dataflow does not answer (%s): asking again", told(error))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code is None or error.code in (408, 429) or error.code >= 500
    return isinstance(
        error, exceptions.RetryError | requests.RequestException | OSError | TransportError
    )


def told(error: Exception) -> str:
    """What an error is, without what it may hold of the request."""
    if isinstance(error, exceptions.GoogleAPICallError):
        said = dataflow.last_line(str(error.message or ""))
        return f"HTTP {int(error.code)}: {said}" if error.code else said
    return type(error).__name__


def clock(time: Any) -> str:
    """The service's time as text."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ") if time else "-"
