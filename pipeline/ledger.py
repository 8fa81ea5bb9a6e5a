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
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline import storage
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
    time: str = ""


def append(root: Place, line: Line) -> None:
    """Adds a line, with the time, and flushes it to the disk."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    append_json(root / LEDGER_FILE, dataclasses.asdict(dataclasses.replace(line, time=now)))


def append_json(path: Place, entry: Mapping[str, Any]) -> None:
    """Adds a line to a file; after one that was cut short, on a line of its own.

    Raises:
        LockedError: an object, which is written anew, was changed by another process meanwhile.
    """
    if isinstance(path, GcsPath):
        stat = path.find()
        old = path.read_bytes() if stat else b""
        torn = old[-1:] not in (b"", b"\n")
        new = old + b"\n" * torn + json.dumps(entry).encode() + b"\n"
        path.put(new, stat.generation if stat else 0)
        return
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
    lines = read_json(root / LEDGER_FILE)
    return [line for line in lines if isinstance(line.get("run_id"), str)]


def read_json(path: Place) -> list[dict[str, Any]]:
    """The objects in a file of one a line; see `append_json`."""
    found = []
    try:
        texts = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
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


def challengers_before(lines: Sequence[Mapping[str, Any]], test_id: str) -> int:
    """How many models these rows have judged so far."""
    return sum(line.get("outcome") in JUDGED and line.get("test_id") == test_id for line in lines)


def is_end(line: Mapping[str, Any]) -> bool:
    """Whether a line tells of the end of a run, and not of a rollback to its model."""
    return line.get("outcome") != ROLLED_BACK


def times_closed(lines: Sequence[Mapping[str, Any]], run_id: str) -> int:
    """How often a run came to an end: once, or again where it failed and was begun anew."""
    return sum(line.get("run_id") == run_id and is_end(line) for line in lines)
