"""One job on Dataflow to its end: its states, and what the service says of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.command import FailedError, InputError, log
from pipeline.redaction import one_line, without_secrets
from pipeline.runners import error_in

if TYPE_CHECKING:
    from pipeline.dataflow_client import Client
    from pipeline.dataflow_notes import Note

POLL_SECONDS = 5.0
EXPLAIN_SECONDS = 50.0  # a job's reason can follow some while after its failure

DONE = "JOB_STATE_DONE"
CANCELLING = "JOB_STATE_CANCELLING"
ENDED = {
    DONE: "is done",
    "JOB_STATE_FAILED": "failed",
    "JOB_STATE_CANCELLED": "was cancelled",
    "JOB_STATE_UPDATED": "was replaced by another job",
    "JOB_STATE_DRAINED": "was drained",
}


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
