"""How a run ends: its line in the ledger, and what is said and counted where a stage failed."""

from __future__ import annotations

import contextlib
from typing import Any

from pipeline import command, ledger, plan, registry
from pipeline.command import log
from pipeline.ledger import Line
from pipeline.plan import Request
from pipeline.stages import StageError, Stages
from pipeline.storage import Place

FAILURES_FILE = "failures.jsonl"
MAX_FAILURES = 3  # of one run; then it must not stand in the way of others any longer
VERTEX = "pipeline.vertex"  # the stage whose 143 says that its job was cancelled, by whomever


def close(root: Place, request: Request, stages: Stages, **known: Any) -> None:
    """Enters the end of a run in the ledger."""
    stages.hold()
    line = Line(
        run_id=request.run_id,
        window=request.window,
        fingerprint=request.fingerprint,
        config_id=request.config_id,
        request=plan.checksum_of_request(root, request.run_id),
        **known,
    )
    ledger.append(root, line, attempt=request.attempt)


def failed(root: Place, request: Request, stages: Stages, error: StageError) -> int:
    """Says what failed and how to go on; closes a run that is not to be tried again.

    A stage that somebody else ended by a SIGTERM has failed; a job that was cancelled where it is
    kept has not. Wrong input stays wrong, so the run is closed at once, and the same command
    begins it anew.

    Raises:
        LockedError: another process has taken the root over.
    """
    was_cancelled = error.stage == VERTEX and error.code == command.TERMINATED
    if error.stopped or was_cancelled:
        return error.code
    if error.code == command.LOCKED:  # 75 of a chain says that another chain does the work
        stages.hold()
        hope = "another process or job is at work there; once it has ended, the same command goes"
        log.error("run %s: %s: %s on from here", request.run_id, error, hope)
        return command.FAILED
    if error.code == command.UNREACHABLE:  # no fault of the run's; there may be nobody to ask
        hope = "once the server answers or has room, the same command goes on from here"
        log.error("run %s: %s; %s", request.run_id, error, hope)
        return command.FAILED
    is_over = True
    if error.code == command.BAD_INPUT:
        hope = "once that is put right, the same command begins it anew"
    elif error.code == command.FULL_DISK:  # no fault of the run's: it does not count
        is_over, hope = False, "once there is room, the same command goes on from here"
    elif _count_failure(root, request, error) < MAX_FAILURES:
        is_over, hope = False, "the same command goes on from here"
    else:
        hope = f"given up after {MAX_FAILURES} attempts; the next command begins anew"
    champion = "the champion stays" if registry.champion(root) else "there is no champion yet"
    log.error("run %s: %s; %s; %s", request.run_id, error, champion, hope)
    if is_over:
        close(root, request, stages, outcome="failed", reason=str(error))
    return command.BAD_INPUT if error.code == command.BAD_INPUT else command.FAILED


def _count_failure(root: Place, request: Request, error: StageError) -> int:
    """Notes that a run failed; returns how often it has since it was begun."""
    path = plan.run_folder(root, request.run_id) / FAILURES_FILE
    entry = {"attempt": request.attempt, "stage": error.stage, "code": error.code}
    with contextlib.suppress(OSError):  # the disk may be full, and then that is what failed
        ledger.append_entry(path, entry)
    return sum(each.get("attempt") == request.attempt for each in ledger.read_entries(path))
