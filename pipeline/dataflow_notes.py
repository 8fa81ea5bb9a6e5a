"""What is noted of a job beside what it writes, so that the same command finds it again.

The note comes before the request for the job: the answer may be lost, or the command be killed
before it has come. It goes once the result is published, or there is nothing to publish.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pipeline import gcs_publish, storage
from pipeline.command import LockedError, log
from pipeline.dataflow_follow import CANCELLING, DONE, ENDED, follow
from pipeline.gcs import GcsPath

if TYPE_CHECKING:
    from pipeline.dataflow_client import Client
    from pipeline.runners import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """Which job it is, and what for.

    Attributes:
        name: of the job; of those at work there is one of a name.
        request_id: by which the service knows the request for it.
        identity: see `Work`.
        job_id: "" until the service has told it.
    """

    project: str
    region: str
    name: str
    request_id: str
    identity: str
    job_id: str = ""

    def __str__(self) -> str:
        return f"job {self.job_id or self.name}"

    @property
    def console(self) -> str:
        """Its page; that of all jobs while its id is not known."""
        of_job = f"/{self.region}/{self.job_id}" if self.job_id else ""
        return f"https://console.cloud.google.com/dataflow/jobs{of_job}?project={self.project}"

    def command(self, verb: str) -> str:
        """What to type to ``show`` or ``cancel`` it."""
        where = f"--region {self.region} --project {self.project}"
        return f"gcloud dataflow jobs {verb} {self.job_id} {where}"


def write(note: Note, work: Work) -> None:
    """Writes the note on a job; where nothing is published later, there is no place for one."""
    if isinstance(work.folder, GcsPath):
        gcs_publish.keep(work.folder, dataclasses.asdict(note))


def read(work: Work) -> Note | None:
    """The note on the job that was left with the same output, if there is one."""
    if not isinstance(work.folder, GcsPath) or (found := gcs_publish.kept(work.folder)) is None:
        return None
    fields = dataclasses.fields(Note)
    return Note(**{field.name: str(found.get(field.name, "")) for field in fields})


def remove(work: Work) -> None:
    """Removes the note, with which the next command would go on."""
    if isinstance(work.folder, GcsPath):
        gcs_publish.let_go(work.folder)


def take_up(client: Client, work: Work) -> Note | None:
    """Looks for a job that was left running for the same output; None: one is to be submitted.

    Of one that is being cancelled the end is waited for.

    Raises:
        LockedError: it is still at work, and makes something else of it.
    """
    if (note := read(work)) is None:
        return None
    if not note.job_id and (job_id := client.find(note)):  # its answer was lost
        note = dataclasses.replace(note, job_id=job_id)
        write(note, work)
    state = client.state(note, forgotten="JOB_STATE_FAILED") if note.job_id else ""
    if state == CANCELLING:  # which was meant for an earlier command; its name is taken until then
        log.info("%s is being cancelled: waiting for its end", note)
        state, _ = follow(client, note)
    is_at_work = bool(state) and state not in ENDED
    if note.identity == work.identity and (state == DONE or is_at_work):
        log.info("going on with %s, which was left running: %s", note, note.console)
        return note
    if is_at_work:
        raise LockedError(
            f"{work.output}: {note} was left running, and makes something else of it; wait for"
            f" its end, or: {note.command('cancel')}"
        )
    said = ENDED.get(state, "was never made")
    log.info("%s, which was left running, %s: starting again", note, said)
    remove(work)
    assert work.folder is not None
    storage.remove(work.folder)
    return None
