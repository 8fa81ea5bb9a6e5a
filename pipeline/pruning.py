"""Which models, runs and datasets of a root can go, and their removal.

Versions above the champion's go: nobody is publishing while the root is locked, and they were
never promoted.
The newest of each stay, and whatever is needed:

- the version before the champion's: a reader may have followed the pointer just before it moved
- the champion's version, run and dataset, and the version it is a copy of after a rollback
- a dataset of each content that the champion has learned from: before a warm start from it they
  are asked whether an image of test stands in one of them
- every run that the ledger does not name, or that was begun anew after its last line there: it is
  not finished; and its dataset
- every dataset that the ledger does not name
- every version that the request of a run names that stays and is not finished, or failed: a warm
  start goes on, or is begun anew, from there
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline import ledger, promotion, storage
from pipeline.command import InputError, UnreachableError
from pipeline.dataset import MANIFEST_NAME, load_manifest
from pipeline.models import MODEL_FILE, learned_from
from pipeline.plan import DATASETS, DECISION_FILE, REQUEST_FILE, RUNS, has_ended
from pipeline.state import State, list_folders, look
from pipeline.storage import Lock, Place
from pipeline.versions import (
    MODELS,
    VERSION_FILE,
    Version,
    find_pointer,
    folders,
    numbers,
    path_of,
    unpromoted,
)

START = re.compile(rf"{MODELS}/([0-9]+)(?![0-9])")  # in a request
TELLING = (REQUEST_FILE, "config.json", DECISION_FILE)  # of a run: which dataset it is of


class Removal(NamedTuple):
    """A folder that can go, and the file without which its readers take it for nothing."""

    folder: Place
    first: str


def prune(root: Place, keep: int, *, lock: Lock | None = None) -> Iterator[Removal]:
    """Removes what `plan` names, and yields it once it is gone; the root is locked meanwhile.

    Raises:
        InputError: see `plan`.
        LockedError: the lock of the root, if given, is lost; what is left stays. Or another process
            has just changed the pointer.
    """
    for name in (MODELS, RUNS, DATASETS):
        storage.discard_leftovers(root / name)
    promotion.fence(root, find_pointer(root), lock=lock)
    for removal in plan(root, keep):
        storage.discard(removal.folder, removal.first, lock=lock)
        yield removal


def plan(root: Place, keep: int) -> list[Removal]:
    """Lists what can go.

    Args:
        root: the root.
        keep: how many of the newest models, runs and datasets stay; of models, at least 2.

    Raises:
        InputError: the champion is damaged; an older version may be needed.
    """
    state = look(root)
    current, lines = state.champion, state.lines
    found = _visible(state.runs)
    unfinished = [name for name in found if not _is_finished(state, name)]
    made = _visible(list_folders(root / DATASETS))
    datasets = {name: _names(root / DATASETS / name) for name in made}
    runs = _old(found, {name: [name] for name in found}, lines, keep)
    old_datasets = _old(datasets, datasets, lines, keep)
    needed_runs = {*unfinished, current.run_id if current else ""}
    needed = _datasets_of(state, unfinished, datasets)
    if current is not None:
        needed |= _of_champion(current, lines, datasets)
        stay = needed | (datasets.keys() - set(old_datasets))
        learned = learned_from(root / current.path / MODEL_FILE)
        needed |= _newest_of(learned.keys() - _ids(stay, datasets), old_datasets, datasets)
    gone = [name for name in runs if name not in needed_runs]
    failed = [name for name in found if name not in gone and not state.has(name, DECISION_FILE)]
    starts = _starts_of(state, {*unfinished, *failed})
    return [
        *(
            Removal(root / path_of(number), VERSION_FILE)
            for number in _old_versions(root, current, keep)
            if number not in starts
        ),
        *(Removal(root / RUNS / name, DECISION_FILE) for name in gone),
        *(
            Removal(root / DATASETS / name, MANIFEST_NAME)
            for name in old_datasets
            if name not in needed
        ),
    ]


def _visible(folders: Iterable[str]) -> list[str]:
    return sorted(name for name in folders if name[0] != ".")


def _is_finished(state: State, run_id: str) -> bool:
    return has_ended(state.root / RUNS / run_id, state.lines, state.runs[run_id])


def _old_versions(root: Place, current: Version | None, keep: int) -> list[int]:
    """Versions that can go, and what is left of those that a killed process was removing."""
    extra = unpromoted(root)
    if current is None:
        return extra
    newest = [number for number in numbers(root) if number <= current.version]
    newest = newest[-max(keep, 2) :]  # a reader may still be at the one before
    needed = {*newest, current.version, current.rolled_back_from}
    old = [n for n in folders(root) if n < current.version and n not in needed]
    return old + extra


def _starts_of(state: State, runs: Iterable[str]) -> set[int]:
    """The versions that the requests of runs name."""
    texts = [_read(state, run_id, REQUEST_FILE) for run_id in runs]
    return {int(number) for text in texts for number in START.findall(text)}


def _read(state: State, run_id: str, name: str) -> str:
    """A file of a run; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if state.has(run_id, name):
            return (state.root / RUNS / run_id / name).read_text()
    return ""


def _old(
    found: Iterable[str],
    known_as: dict[str, list[str]],
    lines: Sequence[Mapping[str, Any]],
    keep: int,
) -> list[str]:
    """Of what the ledger names, all but the newest, by the last line that names it."""
    last = {
        line[key]: number
        for number, line in enumerate(filter(ledger.is_end, lines))
        for key in ("run_id", "fingerprint", "dataset_id")
        if isinstance(line.get(key), str)
    }
    # A fingerprint tells more than an id: when a source is only touched, both make the same.
    named = {
        name: next(last[alias] for alias in known_as[name] if alias in last)
        for name in found
        if any(alias in last for alias in known_as[name])
    }
    return sorted(named, key=lambda name: named[name])[:-keep]


def _names(folder: Place) -> list[str]:
    """What a dataset is known as: its fingerprint, which is its folder's name, and its id."""
    try:
        return [folder.name, load_manifest(folder).dataset_id]
    except UnreachableError:  # which says nothing of its id, and it may be needed
        raise
    except InputError:
        return [folder.name]


def _of_champion(
    current: Version, lines: Sequence[Mapping[str, Any]], datasets: dict[str, list[str]]
) -> set[str]:
    """The dataset of the champion, by its fingerprint, or all of the same content."""
    stated = {str(line.get("fingerprint")) for line in lines if line["run_id"] == current.run_id}
    same = {name for name, aliases in datasets.items() if current.dataset_id in aliases}
    return stated & datasets.keys() or same


def _ids(names: Iterable[str], datasets: Mapping[str, list[str]]) -> set[str]:
    """All that some datasets are known as."""
    return {alias for name in names for alias in datasets[name]}


def _newest_of(
    wanted: Iterable[str], old: Sequence[str], datasets: Mapping[str, list[str]]
) -> set[str]:
    """Of old datasets, the oldest first, the newest of each id that is wanted."""
    newest = {alias: name for name in old for alias in datasets[name]}
    return {newest[dataset_id] for dataset_id in wanted if dataset_id in newest}


def _datasets_of(state: State, runs: Iterable[str], datasets: dict[str, list[str]]) -> set[str]:
    """The datasets of some runs; all there are, if a run does not tell which is its own."""
    needed: set[str] = set()
    for run_id in runs:
        text = "".join(_read(state, run_id, name) for name in TELLING)
        own = {name for name, aliases in datasets.items() if any(a in text for a in aliases)}
        needed |= own or set(datasets)
    return needed
