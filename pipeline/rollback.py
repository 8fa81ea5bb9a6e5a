"""An old model made the champion again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import inventory, ledger, promotion, storage
from pipeline.command import InputError
from pipeline.storage import Lock, Place
from pipeline.versions import (
    REPAIR,
    Pointer,
    Version,
    find_pointer,
    load,
    numbers,
    unpromoted,
)


def rollback(
    root: Place, number: int | None, *, reason: str | None = None, lock: Lock | None = None
) -> Version:
    """Publishes an old model again, as the highest version, so that servers follow.

    Killed before its line in the ledger and called again, it adds that line alone.

    Args:
        root: the root.
        number: which version; None: the one before the champion's model that has other
            weights. Where there is no pointer that can be read, it has to be given, and gets one.
        reason: why, for the ledger, where it is noted.
        lock: of the root, which is looked at before every change of it.

    Raises:
        InputError: there is no such version, or none before, or its files are damaged.
        LockedError: the lock is lost, or the pointer was changed by another process meanwhile.
    """
    before = find_pointer(root)
    if (owed := _unnoted(root, before.version)) is not None:  # killed before the ledger's line
        was_asked_for = number in (None, owed.version, owed.rolled_back_from)
        storage.hold(lock)
        _note(root, owed, reason if was_asked_for else None)
        if was_asked_for:
            return owed
    if number is None:
        number = _previous(root, before)
    current, extra = before.version, unpromoted(root)
    known = [other for other in numbers(root) if other not in extra]
    if number not in known:
        expected = f"one of {', '.join(map(str, known))}" if known else "one, but there is none"
        raise InputError(f"--version {number}: expected {expected}")
    own = (current.version, current.rolled_back_from) if current else ()
    if current and number in own and not inventory.damage(root, current):
        raise InputError(f"--version {number}: is the champion already")
    old = load(root, number)
    if problems := inventory.damage(root, old):
        raise InputError(f"--version {number}: is damaged: {problems[0]}")
    again = dataclasses.replace(
        old,
        rolled_back_from=old.rolled_back_from or number,
        first_promoted_at=old.first_promoted_at or old.promoted_at,
    )
    published = promotion.publish_after(before, root, root / old.path, again, lock=lock)
    storage.hold(lock)
    _note(root, published, reason)
    return published


def was_left(
    lines: Sequence[Mapping[str, Any]], champion: Version | None, model_id: str | None
) -> bool:
    """Whether a rollback has led away from a model, and nothing back to it since.

    Args:
        lines: of the ledger. Their versions tell what came when: the line of a run that was killed
            may come after that of a rollback from its model.
        champion: if there is one; its rollback may have been killed before its line.
        model_id: of the model.
    """
    swaps = [line for line in lines if isinstance(line.get("version"), int)]
    if champion is not None and champion.rolled_back_from is not None:
        known = {line["version"] for line in swaps}
        if champion.version not in known:
            swaps.append(dataclasses.asdict(champion) | {"outcome": ledger.ROLLED_BACK})
    came, left = False, False
    later: set[str] = set()  # the runs that were promoted since it came
    for line in sorted(swaps, key=lambda line: line["version"]):
        if line.get("model_id") == model_id:
            came, left, later = True, False, set()
        elif line.get("outcome") != ledger.ROLLED_BACK:
            later.add(line["run_id"])
        elif came and line["run_id"] not in later:
            left = True
    return left


def _unnoted(root: Place, current: Version | None) -> Version | None:
    """The champion, where a rollback made it that and the ledger says nothing of it."""
    if current is None or current.rolled_back_from is None or inventory.damage(root, current):
        return None
    known = [line.get("version") for line in ledger.read(root)]
    return None if current.version in known else current


def _note(root: Place, version: Version, reason: str | None) -> None:
    """Enters a rollback in the ledger."""
    ledger.append(
        root,
        ledger.Line(
            run_id=version.run_id,
            outcome="rolled_back",
            reason=f"version {version.rolled_back_from} again" + (f": {reason}" if reason else ""),
            accuracy=version.accuracy,
            model_id=version.model_id,
            dataset_id=version.dataset_id,
            version=version.version,
        ),
    )


def _previous(root: Place, before: Pointer) -> int:
    """The newest version that is older than the champion's model and has other weights.

    A renewal of an old champion comes to the same weights, which nobody rolls back to.
    """
    if before.problem:
        raise InputError(f"{before.problem}; {REPAIR}")
    if before.version is None:
        hint = f"; {REPAIR}" if numbers(root) else ""
        raise InputError(f"{root}: no champion; nothing to roll back{hint}")
    origin = before.version.rolled_back_from or before.version.version
    older = [number for number in numbers(root) if number < origin]
    for number in reversed(older):
        if load(root, number).weights_sha256 != before.version.weights_sha256:
            return number
    others = " with other weights" if older else ""
    raise InputError(f"{root}: no version before {origin}{others}")
