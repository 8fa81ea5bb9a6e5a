"""``ROOT/runs.jsonl``: a line for each end of a run and for each rollback, the oldest first.

Synopsis::

    ledger.append(root, Line(run_id=..., outcome="kept", ...))
    lines = ledger.read(root)
    ledger.find_judged(lines, config_id=..., fingerprint=..., dataset_id=None)
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pipeline import storage
from pipeline.command import LockedError
from pipeline.gcs import GcsPath
from pipeline.storage import Place

LEDGER_FILE = "runs.jsonl"
JUDGED = ("promoted", "kept")
ROLLED_BACK = "rolled_back"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What became of a run, None where it did not come so far; or that its model came back.

    Attributes:
        run_id: names the run.
        window: when it was scheduled for.
        outcome: promoted, or the gate kept the champion; failed, where the stages refused what
            they were given or failed again and again; abandoned, where its source has changed;
            rolled_back, where an operator made its model the champion again, which is no end.
        promoted: whether the run's model became the champion.
        forced: whether that was against the gate.
        reason: why, in a sentence.
        accuracy: on the rows that judged it.
        per_class_accuracy: the same for each class, as in ``decision.json``.
        model_id: of its model.
        dataset_id: of its dataset.
        fingerprint: of its source and the dataset's options.
        config_id: of how it was trained; see `plan.make_config_id`.
        test_id: which rows judged it; see `tally.make_test_id`.
        version: under which it was published.
        request: the CRC32C of the ``request.json`` that this is the end of, as a bucket's
            listings have it: where it is the same there, the run was not begun anew.
        time: when the line was written, UTC.
    """

    run_id: str
    window: str | None = None
    outcome: Literal["promoted", "kept", "failed", "abandoned", "rolled_back"]
    promoted: bool = False
    forced: bool = False
    reason: str
    accuracy: float | None = None
    per_class_accuracy: Any = None
    model_id: str | None = None
    dataset_id: str | None = None
    fingerprint: str | None = None
    config_id: str | None = None
    test_id: str | None = None
    version: int | None = None
    request: str | None = None
    time: str = ""


def append(root: Place, line: Line, *, attempt: int | None = None) -> None:
    """Adds a line, with the time, and flushes it to the disk.

    Args:
        root: the root.
        line: what it says, but for the time.
        attempt: of the end of a run: how often it had come to an end before.

    Raises:
        LockedError: another process has entered the same end, or is writing as well.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = root / LEDGER_FILE

    def require_open(before: list[dict[str, Any]]) -> None:
        if attempt is not None and times_closed(before, line.run_id) > attempt:
            raise LockedError(f"{path}: another process has entered the end of run {line.run_id}")

    entry = dataclasses.asdict(dataclasses.replace(line, time=now))
    append_entry(path, entry, require=require_open)


def append_entry(
    path: Place,
    entry: Mapping[str, Any],
    *,
    require: Callable[[list[dict[str, Any]]], None] = lambda before: None,
) -> None:
    """Adds a line to a file; after one that was cut short, on a line of its own.

    An object is written anew, if it is still of the generation that was read; so a line whose
    answer was lost is not written twice when it is tried again.

    Args:
        path: the file.
        entry: what the line holds.
        require: is given what the file holds before, and raises where nothing is to be added.

    Raises:
        LockedError: an object was changed by another process meanwhile.
    """
    if isinstance(path, GcsPath):
        stat = path.find()
        old = path.read_bytes() if stat else b""
        require(_parsed(old))
        torn = old[-1:] not in (b"", b"\n")
        new = old + b"\n" * torn + json.dumps(entry).encode() + b"\n"
        path.put(new, stat.generation if stat else 0)
        return
    require(read_entries(path))
    with storage.named(path), path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"
        data = b"\n" * torn + json.dumps(entry).encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # what fitted on a full disk is no line
            raise


def read(root: Place) -> list[dict[str, Any]]:
    """The lines of a root's ledger that name a run; one that a crash cut short does not."""
    lines = read_entries(root / LEDGER_FILE)
    return [line for line in lines if isinstance(line.get("run_id"), str)]


def read_entries(path: Place) -> list[dict[str, Any]]:
    """The objects in a file of one a line; see `append_entry`."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return []


def _parsed(data: bytes) -> list[dict[str, Any]]:
    found = []
    for text in data.splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def find_judged(
    lines: Sequence[Mapping[str, Any]],
    *,
    config_id: str,
    fingerprint: str,
    dataset_id: str | None,
) -> Mapping[str, Any] | None:
    """The last time that a model trained like this on this dataset was put before the gate.

    Args:
        lines: of the ledger.
        config_id: how it is trained.
        fingerprint: of the source and the dataset's options.
        dataset_id: the dataset's, where it is known: another source may have the same images.
    """
    for line in reversed(lines):
        same_data = line.get("fingerprint") == fingerprint or (
            dataset_id is not None and line.get("dataset_id") == dataset_id
        )
        if line.get("outcome") in JUDGED and line.get("config_id") == config_id and same_data:
            return line
    return None


def count_judged(lines: Sequence[Mapping[str, Any]], test_id: str | None = None) -> int:
    """How many models were judged, each counted once however often it was put before the gate.

    Args:
        lines: of the ledger; one that does not name its model stands for one of its own.
        test_id: by which rows; None: by any.
    """
    judged = [
        line
        for line in lines
        if line.get("outcome") in JUDGED and test_id in (None, line.get("test_id"))
    ]
    named = {line["model_id"] for line in judged if line.get("model_id") is not None}
    return len(named) + sum(line.get("model_id") is None for line in judged)


def is_end(line: Mapping[str, Any]) -> bool:
    """Whether a line tells of the end of a run, and not of a rollback to its model."""
    return line.get("outcome") != ROLLED_BACK


def times_closed(lines: Sequence[Mapping[str, Any]], run_id: str) -> int:
    """How often a run came to an end: once, or again where it failed and was begun anew."""
    return sum(line.get("run_id") == run_id and is_end(line) for line in lines)
