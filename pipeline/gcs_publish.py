"""A folder in a bucket, published whole: there is no renaming one, so one object comes last.

Beside the folder NAME stands, while it is written, ``.NAME.incomplete/`` with

    .lock       who is at work; see `leases`
    TOKEN/      what is written, each process under a name of its own: one that was taken for
                dead, and is not, cannot write into another's files
    .moving     from when NAME itself is changed: the names of what goes and what comes

The server copies the files to their final names. The file without which the folder is nothing,
its manifest, is the first that goes and the last that comes. The next process finds in
``.moving`` what to remove where that file is missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import leases, storage
from pipeline.command import InputError, LockedError
from pipeline.gcs import ChangedError, GcsPath, Stat

JOURNAL_NAME = ".moving"
AT_ONCE = 8  # requests; the client keeps ten connections


@contextlib.contextmanager
def published_whole(final: GcsPath, *, replace: bool, last: str) -> Iterator[GcsPath]:
    """`storage.published_whole` of a folder in a bucket."""
    if not final.key:
        raise InputError(f"{final}: a bucket is not replaced as a whole; expected a folder in it")
    staging = _staging(final)
    with leases.held(staging) as lease:
        _settle(final, staging, lease)
        if not replace:
            storage.require_absent(final)
        try:
            yield staging / lease.owner.token
            _move(staging / lease.owner.token, final, lease, last)
        except BaseException as error:
            try:
                lease.renew()
                _settle(final, staging, lease)
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
            _settle(final, staging, lease)


def remove(path: GcsPath) -> None:
    """Removes an object, or every object in a folder."""
    path.unlink(missing_ok=True)
    _all(lambda name: (path / name).unlink(missing_ok=True), path.walk())


def _staging(final: GcsPath) -> GcsPath:
    return final.parent / f".{final.name}.incomplete"


def _settle(final: GcsPath, staging: GcsPath, lease: leases.Lease) -> None:
    """Ends what was begun: a folder half changed goes, and all of staging but the lock."""
    last, names = _read_journal(staging / JOURNAL_NAME)
    found = final.walk() if names else {}
    if last not in found:
        _unlink_all(final, {name: found[name] for name in names & found.keys()}, lease)
    rest = staging.walk()
    rest.pop(storage.LOCK_NAME, None)
    _unlink_all(staging, rest, lease)


def _read_journal(path: GcsPath) -> tuple[str, set[str]]:
    """What comes last, and the names of all that goes and comes; none where nothing was begun."""
    try:
        moving = json.loads(path.read_bytes())
        return str(moving["last"]), set(moving["names"])
    except FileNotFoundError:
        return "", set()
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: not a list of names; remove it by hand") from None


def _move(source: GcsPath, final: GcsPath, lease: leases.Lease, last: str) -> None:
    """Puts what was written in the place of what stands under the final name.

    Raises:
        LockedError: another process has taken over.
    """
    lease.renew()
    new, old = source.walk(), final.walk()
    if last not in new:
        raise ValueError(f"{source}: no {last} was written")
    journal = {"last": last, "names": sorted(new.keys() | old.keys())}
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


def _unlink_all(folder: GcsPath, found: dict[str, Stat], lease: leases.Lease) -> None:
    """Removes objects as they were found; what another has put in their place since stays."""

    def unlink(name: str) -> None:
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
