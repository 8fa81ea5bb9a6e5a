"""One custom job from its submission, or from where it is found, to its end.

It is asked about with pauses that grow, and through silences of the service. Of a run there is
one job at a time: it carries the label of the run's folder, and whoever comes looks for it first.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections.abc import Mapping
from typing import Any, Protocol

from pipeline import command, gcs, leases, vertex_job
from pipeline.command import InputError, LockedError, StoppedError, log
from pipeline.interrupts import Interrupts
from pipeline.services import Asking, NoAnswerError, QuotaError, RefusedError
from pipeline.vertex_client import CANCELLED, CANCELLING, SERVICE, SUCCEEDED, Job, JobError
from pipeline.vertex_job import Task
from pipeline.vertex_options import VertexConfig

REPEAT_SECONDS = 600.0  # after which a state that stays is told again
CANCEL_SECONDS = 300.0  # for the trainer to save, and the service to notice
CANCEL_PATIENCE_SECONDS = 60.0
MAX_WAITS = 10  # for locks of killed trainers; then something else than bad luck kills them
RESOURCE_EXHAUSTED = 8  # of google.rpc.Code
EXIT_CODE = re.compile(r"exited with a non-zero status(?: code)?(?: of)? (\d+)")


class Jobs(Protocol):
    """What is asked of `vertex_client.Service`."""

    def create(self, request: Mapping[str, Any]) -> Job:
        """Makes a job."""

    def get(self, name: str) -> Job:
        """How it stands."""

    def unfinished(self, run_label: str) -> list[Job]:
        """Those of a run that have not ended."""

    def cancel(self, name: str) -> None:
        """Asks for the end of one."""


class Training:
    """The training of one run, as one custom job.

    Attributes:
        service: that runs it.
        config: where, and on what.
        task: what is to be trained.
    """

    def __init__(self, service: Jobs, config: VertexConfig, task: Task) -> None:
        self.service = service
        self.config = config
        self.task = task
        self._job: Job | None = None  # the last that was heard of it

    def finish(self) -> int:
        """Sees to it that a job trains the run, and follows it to its end; returns an exit code.

        Raises:
            JobError: it did not end well, or the service has no room.
            UnreachableError: the service does not answer.
            LockedError: a job of another attempt is at work in this folder.
            StoppedError: a SIGTERM came, and the job was cancelled.
        """
        with Interrupts() as interrupts:
            try:
                return self._finish(interrupts)
            except (StoppedError, KeyboardInterrupt) as stop:
                said = self._cancel()
                log.info("%s", said)
                raise type(stop)(said) from None

    def _finish(self, interrupts: Interrupts) -> int:
        waits = 0
        while True:
            job = self._find()
            was_dying = job is not None and job.state == CANCELLING
            ended = self._follow(job or self._submit(interrupts))
            if was_dying and ended.state != SUCCEEDED:
                continue  # what ended that one was meant for an earlier command
            is_locked = exit_code(ended.error) == command.LOCKED and waits < MAX_WAITS
            if not is_locked or not self._lock_lapses(ended):
                return outcome(ended, self.config)
            waits += 1

    def _asking(self, most: float = float("inf")) -> Asking:
        patience = min(most, self.config.patience_seconds)
        return Asking(SERVICE, patience=patience, longest=self.config.poll_seconds)

    def _find(self) -> Job | None:
        """The job that is at work for this attempt of the run, if there is one.

        Raises:
            LockedError: there is one of another attempt.
        """
        jobs = self._asking().until_answered(self.service.unfinished, self.task.run_label)
        for job in jobs:
            if job.attempt != str(self.task.attempt):
                raise LockedError(
                    f"{self.task.run_dir}: {job.name} ({job.display_name}) is at work here; wait"
                    " for its end, or cancel it"
                )
        if not jobs:
            return None
        log.info("found %s (%s)", jobs[0].name, jobs[0].display_name)
        return jobs[0]

    def _submit(self, interrupts: Interrupts) -> Job:
        """Makes a job: one, even where the answer is lost on its way here.

        Raises:
            JobError: the project may not have as much.
        """
        request = vertex_job.request(self.config, self.task)
        asking = self._asking()
        while True:
            try:
                with interrupts.held():  # a request that was heard is to be cancelled as well
                    self._job = job = self.service.create(request)
            except QuotaError as error:
                raise JobError(no_room(self.config, str(error)), command.UNREACHABLE) from None
            except NoAnswerError as error:
                asking.unanswered(error)
                if (made := self._find()) is not None:  # the request was heard all the same
                    return made
            else:
                log.info("submitted %s (%s)", job.name, job.display_name)
                return job

    def _follow(self, job: Job) -> Job:
        """Asks how a job stands until it has ended; tells every change of its state."""
        asking = self._asking()
        shown, shown_at = "", 0.0
        log.info("%s", console(job))
        while True:
            self._job = job
            now = time.monotonic()
            if job.state != shown or now - shown_at > REPEAT_SECONDS:
                log.info("%s after %s", job.state.lower(), age(job))
                if job.state != shown:
                    asking.begin()
                shown, shown_at = job.state, now
            if job.is_over:
                return job
            asking.wait()
            try:
                job = asking.until_answered(self.service.get, job.name)
            except RefusedError as error:
                raise JobError(f"{job.name}: its state is not told any more: {error}") from None

    def _lock_lapses(self, ended: Job) -> bool:
        """Waits as long as the trainer's lock takes to lapse; whether nobody renewed it meanwhile.

        It is then that of a trainer which was killed, and started again at once: as often as a
        machine is taken away so soon.
        """
        lock = gcs.parse(self.task.folder) / leases.LOCK_NAME
        found = lock.find()
        try:
            lapse = leases.parse_owner(lock.read_bytes()).lapse_seconds
        except FileNotFoundError:  # it has just been given up
            return True
        log.info("%s: %s; once more in %g seconds", ended.name, ended.error, lapse)
        time.sleep(lapse)
        return lock.find() in (found, None)

    def _cancel(self) -> str:
        """Cancels what is at work for this attempt, waits for its end, and says what came of it.

        It asks what that is: the answer to the request for a job may have been lost.
        """
        asking = self._asking(CANCEL_PATIENCE_SECONDS)
        deadline = time.monotonic() + CANCEL_SECONDS
        try:
            jobs = asking.until_answered(self.service.unfinished, self.task.run_label)
            names = {job.name for job in jobs if job.attempt == str(self.task.attempt)}
            if self._job is not None and not self._job.is_over:
                names.add(self._job.name)
            for name in sorted(names):
                log.info("cancelling %s", name)
                with contextlib.suppress(RefusedError):  # it has ended meanwhile
                    asking.until_answered(self.service.cancel, name)
            for name in sorted(names):
                while not asking.until_answered(self.service.get, name).is_over:
                    if time.monotonic() > deadline:
                        return f"{name} is still being cancelled"
                    asking.wait()
        except InputError as error:  # it refuses, or does not answer
            return f"the job may not be cancelled: {error}"
        if not names:
            return "no job was at work"
        return "cancelled; the same command goes on from the last checkpoint"


def outcome(job: Job, config: VertexConfig) -> int:
    """The exit code of a job that has ended.

    Raises:
        JobError: it did not end well.
    """
    reason = f": {job.error}" if job.error else ""
    if job.state == SUCCEEDED:
        return command.DONE
    if job.state == CANCELLED:
        log.info("%s was cancelled%s; the same command goes on from there", job.name, reason)
        return command.TERMINATED
    if job.error_code == RESOURCE_EXHAUSTED:
        raise JobError(no_room(config, job.error), command.UNREACHABLE)
    text = f"{job.name} ended as {job.state.lower()}{reason}; its log: {console(job)}"
    raise JobError(text, exit_code(job.error))


def exit_code(text: str) -> int:
    """The trainer's exit code, where what the service says of a failure tells it, else 1."""
    told = EXIT_CODE.search(text)
    code = int(told[1]) if told else command.FAILED
    return code if 0 < code < 256 else command.FAILED


def no_room(config: VertexConfig, reason: str) -> str:
    """What is said of a quota, and what may help against it."""
    spot = "" if config.spot else "--vertex_spot, "
    return (
        f"Vertex AI has no room in project {config.project}, region {config.region}: {reason};"
        f" try {spot}another --vertex_region or --vertex_machine_type, or ask for more:"
        f" https://console.cloud.google.com/iam-admin/quotas?project={config.project}"
    )


def console(job: Job) -> str:
    """The page of a job, where its log is as well."""
    _, project, _, region, _, number = job.name.split("/")
    return (
        f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{number}"
        f"?project={project}"
    )


def age(job: Job) -> str:
    """How long ago a job was made: ``0:01:30``."""
    elapsed = datetime.datetime.now(datetime.UTC) - job.created
    return str(datetime.timedelta(seconds=max(0, int(elapsed.total_seconds()))))
