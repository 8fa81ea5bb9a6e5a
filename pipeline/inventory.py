"""What a registry holds, for people: a table of it, and what is wrong with its files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline import checksums, command
from pipeline.command import InputError
from pipeline.models import MODEL_FILE
from pipeline.storage import Place
from pipeline.versions import (
    CHAMPION_FILE,
    MODELS,
    REPAIR,
    VERSION_FILE,
    Version,
    find_pointer,
    folders,
    load,
    numbers,
    path_of,
    pointer,
    unpromoted,
)

DESCRIBED = ("model_id", "weights_sha256", "dataset_id")  # there, and in a version
HEADINGS = ("", "version", "accuracy", "promoted (UTC)", "model", "dataset", "run", "")
TEXTS = (0, 3, 4, 5, 6, 7)  # of these columns; the others hold numbers


# The check


def damage(root: Place, version: Version) -> list[str]:
    """Compares every file of a version with what it was published with, a line for each problem."""
    return checksums.deep_damage(root / version.path, version.files, besides=[VERSION_FILE])


def verify(root: Place) -> list[str]:
    """Checks every file of every version, and the pointer; returns a line for each problem."""
    problems, known = [], {}
    for number in folders(root):
        try:
            known[number] = load(root, number)
        except InputError as error:
            if number in folders(root):
                problems.append(str(error))
            continue
        found = damage(root, known[number]) or _contradictions(root, known[number])
        if found and number not in folders(root):  # pruned meanwhile
            del known[number]
            continue
        problems += found
    models = root / MODELS
    parts = {CHAMPION_FILE, *map(str, folders(root))}
    problems += [
        f"{path}: belongs to no model"
        for path in (models.iterdir() if models.is_dir() else ())
        if path.name not in parts and not path.name.startswith(".")  # which may be at work
    ]
    extra = unpromoted(root)
    problems += [
        f"{root / path_of(number)}: not promoted; what is not being published just now, the next"
        " rollback, prune or retrain removes"
        for number in extra
    ]
    return problems + _pointer_problems(root, known, extra)


def _contradictions(root: Place, version: Version) -> list[str]:
    """Where a version says of its model what the model's own description does not."""
    if MODEL_FILE not in version.files:
        return []
    path = root / version.path / MODEL_FILE
    try:
        described = {key: json.loads(path.read_bytes())[key] for key in DESCRIBED}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"{path}: does not describe a model: {error}"]
    return [
        f"{path}: {key} is {value}, {VERSION_FILE} says {getattr(version, key)}"
        for key, value in described.items()
        if value != getattr(version, key)
    ]


def _pointer_problems(root: Place, known: dict[int, Version], extra: list[int]) -> list[str]:
    path = root / MODELS / CHAMPION_FILE
    try:
        current = pointer(root).version
    except InputError as error:
        return [str(error)]
    if current is None:
        return (
            [f"{path}: missing, although there are versions; {REPAIR}"]
            if known.keys() - set(extra)
            else []
        )
    if current.version not in folders(root):
        return [f"{path}: names version {current.version}, which is not there"]
    if current.version in known and known[current.version] != current:
        return [f"{path}: differs from {root / current.path / VERSION_FILE}"]
    return []


# The table


def table(root: Place) -> str:
    """All versions, one a line, the champion marked."""
    current, extra = find_pointer(root).version, unpromoted(root)
    rows: list[Sequence[str]] = [HEADINGS]
    for number in numbers(root):
        mark = "*" if current is not None and number == current.version else ""
        try:
            rows.append((mark, *_cells(load(root, number), promoted=number not in extra)))
        except InputError:
            if number not in folders(root):  # pruned meanwhile
                continue
            unknown = [""] * (len(HEADINGS) - 3)
            rows.append((mark, str(number), *unknown, f"{path_of(number)} cannot be read"))
    return "\n".join(command.aligned(rows, left=TEXTS))


def _cells(version: Version, *, promoted: bool) -> tuple[str, ...]:
    again = version.rolled_back_from
    notes = [f"version {again} again"] * bool(again) + ["not promoted"] * (not promoted)
    return (
        str(version.version),
        f"{version.accuracy:.4f}",
        version.promoted_at.replace("T", " ").removesuffix("+00:00"),
        version.model_id[:8],
        version.dataset_id[:8],
        version.run_id,
        ", ".join(notes),
    )
