"""``ROOT/index.html``: every run of a root, what it reached, and who was promoted and why.

Links are relative, so the root may be moved or served; a run that was pruned has none.

Synopsis::

    write_index(root)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import storage, templates
from pipeline.history import OUTCOMES, Run, read_object, read_runs, share
from pipeline.ledger import ROLLED_BACK
from pipeline.storage import Place
from pipeline.versions import CHAMPION_FILE, MODELS

INDEX_FILE = "index.html"
MAX_CLASSES = 40  # drawn over time: the least accurate ones, where there are more


def write_index(root: Place) -> None:
    """Brings ``index.html`` up to date; one that says the same already is left alone.

    Args:
        root: of the chain, see `pipeline.retrain`; it must be there, and may hold nothing yet. It
            is locked meanwhile.
    """
    if isinstance(root, Path):
        for leftover in root.glob(f".{INDEX_FILE}.*"):  # of one that was killed as it wrote
            leftover.unlink(missing_ok=True)
    champion = read_object(root / MODELS / CHAMPION_FILE)
    name = root.resolve().name if isinstance(root, Path) else root.name
    page = render(read_runs(root), champion, name or "this root").encode()
    path = root / INDEX_FILE
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == page:
            return
    storage.write_atomic(path, page)


# The page


def render(runs: Sequence[Run], champion: dict[str, Any], name: str) -> str:
    """The page.

    Args:
        runs: the newest first.
        champion: the content of ``champion.json``, or empty.
        name: of the root.
    """
    champion_run = next((run for run in runs if run.run_id == champion.get("run_id")), None)
    events = [run for run in reversed(runs) if run.judged or _came_back(run)]
    timed = [run for run in events if run.time is not None]
    return templates.render(
        "index.html.jinja",
        name=name,
        entries=runs,
        runs=sum(run.outcome != ROLLED_BACK for run in runs),
        newest=next((run for run in runs if run.outcome != ROLLED_BACK), None),
        champion=champion,
        champion_run=champion_run,
        champion_accuracy=share(champion.get("accuracy")),
        tally={outcome: sum(run.outcome == outcome for run in runs) for outcome in OUTCOMES},
        timeline_svg=_timeline(timed),
        timeline_words=_timeline_words(timed, share(champion.get("accuracy"))),
        classes=class_histories(events, champion_run.per_class if champion_run else {}),
        max_classes=MAX_CLASSES,
    )


def _came_back(run: Run) -> bool:
    return run.outcome == ROLLED_BACK and run.accuracy is not None


def _timeline(runs: Sequence[Run]) -> str:
    from pipeline import plots

    if not runs:
        return ""
    # Runs without a time are not among them; mypy cannot know.
    times = [run.time for run in runs if run.time is not None]
    judged = [run for run in runs if run.judged]  # a rollback is to figures of its day
    changed = [b.time for a, b in itertools.pairwise(judged) if b.time and a.test_id != b.test_id]
    return plots.timeline(
        times,
        [100 * (run.accuracy or 0) for run in runs],
        [run.won for run in runs],
        changed,
    )


def _timeline_words(runs: Sequence[Run], serving: float | None) -> str:
    winners = [run for run in runs if run.won]
    judged = sum(run.judged for run in runs)
    if not winners:
        return f"Accuracy over time of {judged} runs, none promoted."
    promoted = sum(run.judged for run in winners)
    back = len(winners) - promoted
    again = f" and {back} rolled back to" if back else ""
    first = templates.percent(winners[0].accuracy)
    last = templates.percent(winners[-1].accuracy if serving is None else serving)
    return (
        f"Accuracy over time of {judged} runs, {promoted} promoted{again}: "
        f"the first champion has {first}, the last {last}."
    )


def class_histories(
    events: Sequence[Run], serving: dict[str, float | None] | None = None
) -> dict[str, Any]:
    """The accuracy of each class over the runs, as points of small plots that share their scale.

    Args:
        events: judged runs and rollbacks, the oldest first.
        serving: of the champion by class, where it is known; else it is the last that won.

    Returns:
        ``rows``, one for each class of the newest judged run, and ``low``, where the scale starts.
    """
    judged = [i for i, run in enumerate(events) if run.judged]
    names = list(events[judged[-1]].per_class) if judged else []
    values = {name: [run.per_class.get(name) for run in events] for name in names}
    known = [value for row in values.values() for value in row if value is not None]
    low = min(0.995, math.floor(200 * min(known, default=0.0)) / 200)  # half a percent at a time
    wins = [run.won for run in events]
    rows = []
    for name, row in values.items():
        held = _held(row, wins)
        if serving:  # whatever the ledger misses
            held[-1] = serving.get(name)
        rows.append(
            {
                "name": name,
                "every": _lines(row, low, judged),
                "champions": _lines(held, low, range(len(held))),
                "latest": row[judged[-1]],
                "serving": held[-1],
            }
        )
    if len(rows) > MAX_CLASSES:
        rows.sort(key=lambda row: math.inf if row["latest"] is None else row["latest"])
    return {"rows": rows[:MAX_CLASSES], "low": low, "left_out": max(0, len(rows) - MAX_CLASSES)}


def _held(values: Sequence[float | None], wins: Sequence[bool]) -> list[float | None]:
    """The values of the champions, each held until the next one."""
    held: list[float | None] = []
    for value, won in zip(values, wins, strict=True):
        held.append(value if won else held[-1] if held else None)
    return held


def _lines(values: Sequence[float | None], low: float, drawn: Sequence[int]) -> list[str]:
    """The ``points`` of SVG polylines in a box of 100 by 30; None parts one from the next.

    Args:
        values: one for each step from the left to the right.
        low: which value is at the bottom; 1 is at the top.
        drawn: the numbers of those that count.
    """
    step = 100 / max(1, len(values) - 1)
    lines: list[list[str]] = [[]]
    for i in drawn:
        if (value := values[i]) is None:
            lines.append([])
        else:
            lines[-1].append(f"{i * step:.4g},{30 * (1 - value) / (1 - low):.4g}")
    # A lone point is no line: it is drawn as the shortest one.
    return [" ".join(line if len(line) > 1 else line * 2) for line in lines if line]
