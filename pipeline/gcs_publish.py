"""A folder in a bucket, published whole: there is no renaming one, so one object comes last.

Beside the folder NAME stands, while it is written, ``.NAME.incomplete/`` with

    .lock       who is at work; see `leases`
    TOKEN/      what is written, each process under a name of its own: one that was taken for
                dead, and is not, cannot write into another's files
    .moving     from when NAME itself is changed: the names of what goes and what comes
    .kept       a TOKEN, where a job writes that goes on without the process which began it, and
                a note on that job: the next process may take it up, until it is published

The server copies the files to their final names. The file without which the folder is nothing,
its manifest, is the first that goes and the last that comes. The next process finds in
``.moving`` what to remove where that file is missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import leases, storage
from pipeline.command import InputError, LockedError
from pipeline.gcs import ChangedError, GcsPath, Stat

JOURNAL_NAME = ".moving"
KEPT_NAME = ".kept"
AT_ONCE = 8  # requests; the client keeps ten connections


@contextlib.contextmanager
def published_whole(
    final: GcsPath,
    *,
    replace: bool,
    last: str,
    resume: bool,
    cleared: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Iterator[GcsPath]:
    """`storage.published_whole` of a folder in a bucket."""
    if not final.key:
        raise InputError(f"{final}: a bucket is not replaced as a whole; expected a folder in it")
    staging = _staging(final)
    with leases.held(staging) as lease:
        kept = _settle(final, staging, lease, _read_kept(staging)[0] if resume else "")
        if not replace:
            storage.require_absent(final)
        if cleared:
            found = final.walk()
            names = {name for name in found if name.split("/")[0] in cleared}
            _unlink_in_order(final, {name: found[name] for name in names}, last, "", lease)
        fresh = staging / (kept or lease.owner.token)
        try:
            yield fresh
            _move(fresh, final, lease, last, left_out)
        except BaseException as error:
            try:
                lease.renew()
                _settle(final, staging, lease, _read_kept(staging)[0])
            except InputError:  # the next process settles what it finds
                if lease.lost and isinstance(error, Exception):
                    raise  # nothing here is ours any more, which may be why it failed
            raise
        lease.renew()
        _settle(final, staging, lease)


def recover(final: GcsPath) -> None:
    """`storage.recover` of a folder in a bucket."""
    staging = _staging(final)
    if final.key and staging.is_dir():
        with contextlib.suppress(LockedError), leases.held(staging) as lease:
            _settle(final, staging, lease, _read_kept(staging)[0])


def keep(folder: GcsPath, note: dict[str, Any]) -> None:
    """Lets what `published_whole` yielded outlive this process, whose work a job goes on with."""
    content = json.dumps({"folder": folder.name, "note": note})
    storage.write_atomic(folder.parent / KEPT_NAME, content)


def kept(folder: GcsPath) -> dict[str, Any] | None:
    """The note on the job that writes in such a folder; None where none does."""
    name, note = _read_kept(folder.parent)
    return note if name == folder.name else None


def let_go(folder: GcsPath) -> None:
    """Ends what `keep` began."""
    (folder.parent / KEPT_NAME).unlink(missing_ok=True)


def _read_kept(staging: GcsPath) -> tuple[str, dict[str, Any]]:
    try:
        found = json.loads((staging / KEPT_NAME).read_bytes())
        return str(found["folder"]), dict(found["note"])
    except FileNotFoundError:
        return "", {}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{staging / KEPT_NAME}: not a note; remove it by hand") from None


def is_unsettled(final: GcsPath) -> bool:
    """`storage.is_unsettled` of a folder in a bucket."""
    return _staging(final).is_dir()


def remove(path: GcsPath) -> None:
    """Removes an object, or every object in a folder; where no lock tells whose it is."""
    path.unlink(missing_ok=True)
    _all(lambda name: (path / name).unlink(missing_ok=True), path.walk())


def discard(folder: GcsPath, first: str, last: str, lease: leases.Lease | None = None) -> None:
    """`storage.discard` of a folder in a bucket."""
    _unlink_in_order(folder, folder.walk(), first, last, lease)


def _staging(final: GcsPath) -> GcsPath:
    return final.parent / f".{final.name}.incomplete"


def _settle(final: GcsPath, staging: GcsPath, lease: leases.Lease, kept: str = "") -> str:
    """Ends what was begun: a folder half changed goes, and all of staging but the lock.

    What is kept stays as well, with the note on it, unless it is published by now.

    Returns:
        What is kept still.
    """
    last, names, before = _read_journal(staging / JOURNAL_NAME)
    found = final.walk() if names else {}
    if last not in found:
        _unlink_all(final, {name: found[name] for name in names & found.keys()}, lease)
    elif found[last].generation != before:
        kept = ""
    rest = staging.walk()
    rest.pop(leases.LOCK_NAME, None)
    if kept:
        rest.pop(KEPT_NAME, None)
        rest = {name: stat for name, stat in rest.items() if not name.startswith(f"{kept}/")}
    # A note on what is published goes while it can still be told that it is.
    _unlink_in_order(staging, rest, KEPT_NAME, JOURNAL_NAME, lease)
    return kept


def _read_journal(path: GcsPath) -> tuple[str, set[str], int]:
    """What comes last, the names of all that goes and comes, and which last one stood there before.

    No names where nothing was begun.
    """
    try:
        moving = json.loads(path.read_bytes())
        return str(moving["last"]), set(moving["names"]), int(moving.get("before", 0))
    except FileNotFoundError:
        return "", set(), 0
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: not a list of names; remove it by hand") from None


def _move(
    source: GcsPath, final: GcsPath, lease: leases.Lease, last: str, left_out: Sequence[str]
) -> None:
    """Puts what was written in the place of what stands under the final name.

    Raises:
        LockedError: another process has taken over.
    """
    lease.renew()
    new, old = source.walk(), final.walk()
    for name in left_out:
        new.pop(name, None)
    if last not in new:
        raise ValueError(f"{source}: no {last} was written")
    journal = {
        "last": last,
        "names": sorted(new.keys() | old.keys()),
        "before": old[last].generation if last in old else 0,
    }
    lease.check()
    (source.parent / JOURNAL_NAME).put(json.dumps(journal).encode(), 0)
    if last in old:
        _unlink_all(final, {last: old.pop(last)}, lease)
    _unlink_all(final, old, lease)
    new.pop(last)
    _all(lambda name: _copy(source / name, final / name, new[name], lease), new)
    _require_equal(final, new)
    content = (source / last).read_bytes()
    lease.renew()
    _put_last(final / last, content, lease)


def _put_last(path: GcsPath, content: bytes, lease: leases.Lease) -> None:
    try:
        path.put(content, 0)
    except ChangedError:
        # By one that was taken for dead, and had been told to go on just before: what it says
        # is of files that are no longer there.
        lease.renew()
        path.unlink(missing_ok=True)
        raise


def _unlink_in_order(
    folder: GcsPath, found: dict[str, Stat], first: str, last: str, lease: leases.Lease | None
) -> None:
    for names in ({first}, found.keys() - {first, last}, {last}):
        _unlink_all(folder, {name: found[name] for name in names & found.keys()}, lease)


def _unlink_all(folder: GcsPath, found: dict[str, Stat], lease: leases.Lease | None) -> None:
    """Removes objects as they were found; what another has put in their place since stays."""

    def unlink(name: str) -> None:
        if lease is not None:
            lease.check()
        (folder / name).unlink(missing_ok=True, generation=found[name].generation)

    _all(unlink, found)


def _copy(source: GcsPath, target: GcsPath, stat: Stat, lease: leases.Lease) -> None:
    lease.check()
    target.copy(source, stat)


def _require_equal(folder: GcsPath, expected: dict[str, Stat]) -> None:
    def contents(stats: dict[str, Stat]) -> dict[str, tuple[int, str]]:
        return {name: (stat.st_size, stat.crc32c) for name, stat in stats.items()}

    if contents(folder.walk()) != contents(expected):
        raise ChangedError(folder)


def _all(action: Callable[[str], Any], names: Iterable[str]) -> None:
    """Does something for each name, several at once; ends with the first error."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(action, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
