"""A local folder, published whole: made beside its final name, and renamed.

Beside the folder NAME stands, while it is written, ``.NAME.incomplete/`` with the lock of who is
at work and what is written; and where NAME is replaced, the one before waits as
``.NAME.replaced`` until the new one is in its place.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import storage
from pipeline.command import InputError, LockedError
from pipeline.locks import LOCK_NAME


@contextlib.contextmanager
def published_whole(
    final: Path, *, replace: bool, cleared: Sequence[str], left_out: Sequence[str]
) -> Iterator[Path]:
    """`storage.published_whole` of a local folder."""
    if not replace:
        storage.require_absent(final)
    place, staging, aside = _places(final)
    if place.is_mount() or place == Path.cwd():
        raise InputError(
            f"{final}: a mount point or the current folder cannot be replaced as a whole;"
            " expected a folder inside it"
        )
    made = [folder for folder in staging.parents if not folder.exists()]
    with storage.locked(staging):
        try:
            _settle(place, aside)
            if not replace:
                storage.require_absent(final)  # again: it may have come as we took the lock
            _clear(staging)
            for name in cleared:
                storage.remove(final / name)
            # Of a name of its own, which a worker of a killed run that goes on writing lacks.
            fresh = staging / secrets.token_hex(8)
            fresh.mkdir()
            with storage.named(final):
                yield fresh
            for name in left_out:
                storage.remove(fresh / name)
            if replace and place.exists():
                place.rename(aside)
            fresh.rename(place)  # POSIX lets it replace an empty folder
            storage.remove(aside)
            storage.remove(staging)
        except BaseException:
            if aside.exists() and not place.exists():
                aside.rename(place)
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process may be using them by now
                for folder in made:
                    folder.rmdir()
            raise


def recover(final: Path) -> None:
    """`storage.recover` of a local folder."""
    place, staging, aside = _places(final)
    if staging.exists() or aside.exists():
        with contextlib.suppress(LockedError), storage.locked(staging):
            _settle(place, aside)
            _clear(staging)
            # What another process puts there, from the moment that the lock is gone, stays.
            shutil.rmtree(staging, ignore_errors=True)


def is_unsettled(final: Path) -> bool:
    """`storage.is_unsettled` of a local folder."""
    _, staging, aside = _places(final)
    return staging.exists() or aside.exists()


def _places(final: Path) -> tuple[Path, Path, Path]:
    """Where a folder is, where it is made, and where the one before it waits."""
    place = final.resolve()  # a link to an empty folder cannot be renamed over, its target can
    return (
        place,
        place.parent / f".{place.name}.incomplete",
        place.parent / f".{place.name}.replaced",
    )


def _settle(place: Path, aside: Path) -> None:
    if aside.exists() and not place.exists():
        aside.rename(place)
    storage.remove(aside)


def _clear(staging: Path) -> None:
    """Removes everything but the lock."""
    for leftover in staging.iterdir():
        if leftover.name != LOCK_NAME:
            storage.remove(leftover)
