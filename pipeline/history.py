"""What is known of the runs of a root: its ledger, and what still stands of the runs' folders.

A rollback is an entry of its own: of the run whose model came back, when it did.

Nothing there is relied on: a line that cannot be read is passed over, of a run that was pruned
what the ledger says is left.

Synopsis::

    newest, *older = read_runs(root)
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import Any
from urllib.parse import quote

from pipeline import ledger
from pipeline.ledger import JUDGED, ROLLED_BACK
from pipeline.plan import DECISION_FILE, REPORT, RUNS
from pipeline.state import Files, list_folders
from pipeline.storage import Place

OUTCOMES = (*JUDGED, "failed", "abandoned", ROLLED_BACK, "unfinished")
LINKED = {"report": "report/report.html", "decision": DECISION_FILE}  # in a run's folder
_RUN_ID = re.compile(r"[\w+=-][\w.+=-]{0,199}", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run; None and empty where nothing is.

    Attributes:
        run_id: its name.
        outcome: one of promoted, kept, failed, abandoned, rolled_back, unfinished.
        forced: whether it was promoted against the gate.
        reason: why, in words.
        time: when it came to its end.
        accuracy: on the rows that judged it.
        per_class: accuracy by name of class.
        test_id: which rows judged it.
        version: under which it was published.
        attempts: how often it came to an end.
        links: {what: address relative to the root} of the files that are there.
    """

    run_id: str
    outcome: str
    forced: bool
    reason: str
    time: datetime.datetime | None
    accuracy: float | None
    per_class: dict[str, float | None]
    test_id: str
    version: int | None
    attempts: int
    links: dict[str, str]

    @property
    def judged(self) -> bool:
        """Whether the gate said yes or no to it."""
        return self.outcome in JUDGED and self.accuracy is not None

    @property
    def won(self) -> bool:
        """Whether its model became the champion then."""
        return self.outcome in ("promoted", ROLLED_BACK)


def read_runs(root: Place) -> list[Run]:
    """All runs and rollbacks, the newest first; those runs come first that the ledger lacks."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}  # by run, and by number of the rollback
    ends: dict[str, dict[str, Any]] = {}
    attempts: dict[str, int] = {}
    for number, line in enumerate(ledger.read(root), start=1):
        run_id = line["run_id"]
        if not ledger.is_end(line):
            known = {"per_class_accuracy": ends.get(run_id, {}).get("per_class_accuracy")}
            lines[run_id, number] = known | {k: v for k, v in line.items() if v is not None}
            continue
        attempts[run_id] = attempts.get(run_id, 0) + 1
        lines.pop((run_id, 0), None)  # the last line of a run tells what became of it, and when
        lines[run_id, 0] = ends[run_id] = line
    folders = list_folders(root / RUNS)
    runs = {name: files for name, files in folders.items() if _RUN_ID.fullmatch(name)}
    for run_id in sorted(runs.keys() - ends.keys()):
        has_decision = DECISION_FILE in runs[run_id]
        decision = read_object(root / RUNS / run_id / DECISION_FILE) if has_decision else {}
        lines[run_id, 0] = decision | {"outcome": "unfinished"}
    return [
        _run(root, run_id, line, 0 if number else attempts.get(run_id, 0), runs.get(run_id, {}))
        for (run_id, number), line in reversed(lines.items())
    ]


def _run(root: Place, run_id: str, line: dict[str, Any], attempts: int, files: Files) -> Run:
    outcome = line.get("outcome")
    if outcome not in OUTCOMES:
        outcome = "promoted" if line.get("promoted") is True else "kept"
    version = line.get("version")
    return Run(
        run_id=run_id,
        outcome=outcome,
        forced=line.get("forced") is True,
        reason=str(line.get("reason") or ""),
        time=_time(line.get("time")),
        accuracy=share(line.get("accuracy")),
        per_class=_per_class(root, run_id, line, files),
        test_id=str(line.get("test_id") or ""),
        version=version if isinstance(version, int) else None,
        attempts=attempts,
        links={
            what: quote(f"{RUNS}/{run_id}/{name}") for what, name in LINKED.items() if name in files
        },
    )


def _per_class(
    root: Place, run_id: str, line: dict[str, Any], files: Files
) -> dict[str, float | None]:
    """The accuracy of each class by its name, from the ledger or else from the run's report."""
    known = line.get("per_class_accuracy")
    if isinstance(known, dict):
        return {str(name): share(value) for name, value in known.items()}
    if REPORT not in files:
        return {}
    rows = read_object(root / RUNS / run_id / REPORT).get("per_class")
    if isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows):
        return {str(row["name"]): share(row.get("accuracy")) for row in rows}
    return {}


def share(value: Any) -> float | None:
    """A number from 0 to 1, or None where it is anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= 1 else None


def _time(text: Any) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time.replace(tzinfo=time.tzinfo or datetime.UTC)


def read_object(path: Place) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
