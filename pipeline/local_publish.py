"""A local folder, published whole: made beside its final name, and renamed.

Beside the folder NAME stands, while it is written, ``.NAME.incomplete/`` with the lock of who is
at work and what is written; and where NAME is replaced, the one before waits as
``.NAME.replaced`` until the new one is in its place.

Some file systems rename no folders: a bucket that Cloud Storage FUSE has mounted, or the lower
layer of a container. There the files are copied, as `gcs_publish` does it: the one without which
the folder is nothing to its readers goes first and comes last, and ``.NAME.incomplete/.moving``
names it, so that the next process removes what a killed one left half done.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import storage
from pipeline.command import InputError, LockedError
from pipeline.locks import LOCK_NAME

JOURNAL_NAME = ".moving"
# Where a folder cannot be renamed, before anything was changed. EMFILE is Cloud Storage FUSE's: too
# many objects in it, by default more than none. EIO is not among them: what a failing disk cannot
# rename, it is not to remove either.
REFUSALS = (errno.EMFILE, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)


@contextlib.contextmanager
def published_whole(
    final: Path, *, replace: bool, last: str, cleared: Sequence[str], left_out: Sequence[str]
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
            _settle(place, staging, aside)
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
            storage.flush(fresh)
            _put_in_place(fresh, place, aside, last, replace=replace)
            storage.remove(aside)
            storage.remove(staging)
        except BaseException:
            _settle(place, staging, aside)
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
            _settle(place, staging, aside)
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


def discard(folder: Path, first: str, last: str) -> None:
    """`storage.discard` of a local folder."""
    aside = folder.parent / f".{folder.name}{storage.REMOVED}"
    storage.remove(aside)
    if _is_renamed(folder, aside):
        storage.remove(aside)
    else:
        _remove_in_order(folder, first, last)


def _is_renamed(folder: Path, target: Path) -> bool:
    """Renames a folder, unless the file system renames none; whether it did."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return False
    return True


def _put_in_place(fresh: Path, place: Path, aside: Path, last: str, *, replace: bool) -> None:
    """Puts what was made in the place of what stands under the final name, which waits aside."""
    is_aside = not replace or not place.exists() or _is_renamed(place, aside)
    if is_aside and _is_renamed(fresh, place):  # POSIX lets it replace an empty folder
        return
    if not (fresh / last).is_file():
        raise InputError(f"{place}: folders cannot be renamed there; expected another file system")
    storage.write_atomic(fresh.parent / JOURNAL_NAME, last)
    if not is_aside:
        _remove_in_order(place, last)
    for path in sorted(fresh.rglob("*")):
        target = place / path.relative_to(fresh)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path != fresh / last:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    storage.flush(place)
    storage.write_atomic(place / last, (fresh / last).read_bytes())


def _remove_in_order(folder: Path, first: str, last: str = "") -> None:
    if first:
        storage.remove(folder / first)
    for path in list(folder.iterdir()):
        if path.name != last:
            storage.remove(path)
    storage.remove(folder)


def _settle(place: Path, staging: Path, aside: Path) -> None:
    """Ends what was begun: a folder half copied goes, and one that waits aside comes back."""
    journal = staging / JOURNAL_NAME
    if journal.is_file() and not (place / journal.read_text()).is_file():
        storage.remove(place)
    if aside.exists() and not place.exists():
        aside.rename(place)
    storage.remove(aside)


def _clear(staging: Path) -> None:
    """Removes everything but the lock."""
    for leftover in staging.iterdir():
        if leftover.name != LOCK_NAME:
            storage.remove(leftover)
