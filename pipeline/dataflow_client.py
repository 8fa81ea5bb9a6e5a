"""The client of Dataflow: Beam's own, patient, and plain in what it says.

Loaded only where the cloud extra is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow import dataflow_metrics, dataflow_runner
from google.api_core import exceptions
from google.cloud import dataflow as api

from pipeline import services
from pipeline.command import FailedError, LockedError, UnreachableError, log
from pipeline.dataflow_follow import ENDED
from pipeline.dataflow_notes import Note
from pipeline.dataflow_staging import Staging
from pipeline.services import Asking, NoAnswerError, RefusedError

SERVICE, ROLE = "Dataflow", "Dataflow Developer"
PATIENCE_SECONDS = 600.0  # with a service that does not answer while a job runs
SUBMIT_SECONDS = 60.0
MESSAGES_SECONDS = 30.0  # without what is said of a job, it can be followed
TIMEOUT_SECONDS = 60.0  # of one request
NOISE = ("JOB_MESSAGE_DEBUG", "JOB_MESSAGE_DETAILED", "JOB_MESSAGE_IMPORTANCE_UNKNOWN")
NEWEST = 20  # jobs of a name, among which is looked for the one whose answer was lost

T = TypeVar("T")


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


class Client(Staging):
    """Stages what jobs need, submits them and asks for them."""

    def __init__(self, options: PipelineOptions) -> None:
        super().__init__(options)
        self._seen: set[str] = set()
        self._since: Any = None
        self._is_told_of_silence = False

    def create(self, job: Any, note: Note) -> str:
        """Submits a job and returns its id: of one, even where the answer is lost on its way here.

        Raises:
            LockedError: another job of this name is at work.
            RefusedError: the service refuses the request.
            UnreachableError: it does not answer, or there is no quota for another job.
            FailedError: it does not say whether it heard the request.
        """
        request = api.CreateJobRequest(project_id=note.project, location=note.region, job=job.proto)
        taken = LockedError(
            f"a job named {note.name} is at work in {note.project}, {note.region}; try again when"
            " it has ended"
        )
        asking = Asking(SERVICE, patience=SUBMIT_SECONDS)
        unanswered = False
        while True:
            try:
                with told():
                    made = self._jobs_client.create_job(request=request, timeout=TIMEOUT_SECONDS)
            except NoAnswerError as error:
                asking.unanswered(error)
                unanswered = True
                if found := self.find(note):  # the request was heard all the same
                    return found
            except RefusedError as error:
                if error.code != 409:
                    raise
                if unanswered and (found := self.find(note)):  # by ours, heard meanwhile
                    return found
                raise taken from None
            else:
                if made.client_request_id not in ("", note.request_id):
                    raise taken
                return str(made.id)

    def find(self, note: Note) -> str:
        """The id of the job that a note announces; "" where there is none.

        A list tells no more of a job than its name. Where the service does not tell its request
        either, it is the one that is at work: there can be no other of its name.

        Raises:
            FailedError: the service refuses.
            UnreachableError: it does not answer.
        """
        listed = api.ListJobsRequest(project_id=note.project, location=note.region, name=note.name)

        def list_jobs() -> list[Any]:
            pages = self._jobs_client.list_jobs(request=listed, timeout=TIMEOUT_SECONDS)
            return [job for job in pages if job.name == note.name]

        jobs = self._patiently(note, SUBMIT_SECONDS, list_jobs)
        jobs.sort(key=lambda job: job.create_time.timestamp() if job.create_time else 0.0)
        for job in reversed(jobs[-NEWEST:]):
            get = functools.partial(self._get, note, job.id, whole=True)
            found = self._patiently(note, SUBMIT_SECONDS, get)
            is_at_work = state_name(found.current_state) not in ENDED
            told_of = found.client_request_id
            if told_of == note.request_id or (is_at_work and not told_of):
                return str(job.id)
        return ""

    def get(self, note: Note) -> State:
        """The state of a job.

        Raises:
            FailedError: the service refuses.
            UnreachableError: it does not answer for long.
        """

        def get() -> Any:
            try:
                return self._get(note, note.job_id)
            except exceptions.NotFound:  # it can be, of a job that was just made
                raise NoAnswerError(f"no {note}") from None

        job = self._patiently(note, PATIENCE_SECONDS, get)
        return State(state=state_name(job.current_state), time=clock(job.current_state_time))

    def state(self, note: Note, *, forgotten: str) -> str:
        """The name of a job's state; `forgotten` where the service knows no such job."""

        def get() -> str:
            try:
                return state_name(self._get(note, note.job_id).current_state)
            except exceptions.NotFound:
                return forgotten

        return self._patiently(note, PATIENCE_SECONDS, get)

    def _get(self, note: Note, job_id: str, *, whole: bool = False) -> Any:
        view = api.JobView.JOB_VIEW_ALL if whole else api.JobView.JOB_VIEW_SUMMARY
        request = api.GetJobRequest(
            project_id=note.project, location=note.region, job_id=job_id, view=view
        )
        return self._jobs_client.get_job(request=request, timeout=TIMEOUT_SECONDS)

    def _patiently(self, note: Note, seconds: float, call: Callable[[], T]) -> T:
        """What the service answers in the end, when it is asked about a job.

        Raises:
            FailedError: it refuses.
            UnreachableError: it does not answer.
        """

        def ask() -> T:
            with told():
                return call()

        try:
            return Asking(SERVICE, patience=seconds).until_answered(ask)
        except RefusedError as error:
            raise FailedError(f"{note}: {error}; see {note.console}") from None

    def new_messages(self, note: Note) -> Iterator[Message]:
        """Yields what the service said since it was last asked, in order.

        Nothing where it refuses to say, or does not answer: the job's state tells its end.
        """
        request = api.ListJobMessagesRequest(
            project_id=note.project,
            location=note.region,
            job_id=note.job_id,
            start_time=self._since,
        )

        def list_messages() -> list[Any]:
            answer = self._messages_client.list_job_messages(
                request=request, timeout=TIMEOUT_SECONDS
            )
            return list(answer.job_messages)

        try:
            said = self._patiently(note, min(MESSAGES_SECONDS, PATIENCE_SECONDS), list_messages)
        except (FailedError, UnreachableError) as error:
            if not self._is_told_of_silence:
                log.info("what Dataflow says of %s is not known: %s", note, error)
            self._is_told_of_silence = True
            return
        for each in said:
            if each.id in self._seen:
                continue
            self._seen.add(each.id)
            self._since = max(self._since or each.time, each.time)
            importance = getattr(each.message_importance, "name", NOISE[-1])  # one it knows
            if importance not in NOISE:
                yield Message(
                    time=clock(each.time),
                    text=each.message_text,
                    is_error=importance == "JOB_MESSAGE_ERROR",
                )

    def cancel(self, note: Note) -> None:
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
        self._patiently(
            note,
            SUBMIT_SECONDS,
            lambda: self._jobs_client.update_job(request=request, timeout=TIMEOUT_SECONDS),
        )

    def metrics(self, note: Note) -> Any:
        """What a job that is done has counted; nothing where the service will not say."""
        job = api.Job(id=note.job_id, current_state=api.JobState.JOB_STATE_DONE)
        result = dataflow_runner.DataflowPipelineResult(job, None)
        found = dataflow_metrics.DataflowMetrics(self, result)
        try:
            with told():
                found.query()
        except Exception as error:  # none is worth a result that is there
            is_told = isinstance(error, NoAnswerError | RefusedError)
            reason = error if is_told else type(error).__name__
            log.warning("what %s counted is not known: %s", note, reason)
            found._cached_metrics = api.JobMetrics()
        return found


def state_name(state: int) -> str:
    """The name of a state; one that this client does not know yet is no end."""
    with contextlib.suppress(ValueError):
        return str(api.JobState(state).name)
    return str(api.JobState.JOB_STATE_UNKNOWN.name)


def clock(time: Any) -> str:
    """The service's time as text."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ") if time else "-"


def told() -> AbstractContextManager[None]:
    """`services.told` of this service."""
    return services.told(SERVICE, ROLE)
