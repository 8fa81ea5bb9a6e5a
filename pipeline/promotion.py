"""The champion of a root, and how a model becomes it.

A version above the pointer's was never promoted: a process was killed as it published it, and
whoever next holds the lock of the root removes it; see `discard_unpromoted`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping

from pipeline import checksums, inventory, storage
from pipeline.checksums import FileSum
from pipeline.command import FailedError, InputError
from pipeline.gcs import GcsPath
from pipeline.storage import Lock, Place
from pipeline.versions import (
    CHAMPION_FILE,
    MODELS,
    NOBODY,
    REPAIR,
    VERSION_FILE,
    Pointer,
    Version,
    find_pointer,
    folders,
    load,
    numbers,
    path_of,
    pointer,
    unpromoted,
    version_json,
)


def champion(root: Place) -> Version | None:
    """The model that is served, if there is one.

    Should another process promote and prune as this one looks, it looks again.

    Raises:
        InputError: the pointer cannot be read, or a file of the model is missing or has another
            size than it was published with.
    """
    current = pointer(root).version
    while current is not None:
        problems = checksums.damage(root / current.path, current.files, besides=[VERSION_FILE])
        if not problems:
            break
        seen, current = current, pointer(root).version
        if current == seen:
            raise InputError(
                f"the champion is damaged: {problems[0]}; pipeline.registry verify tells all,"
                " and rollback --version V puts another in its place"
            )
    return current


def require_pointer(root: Place) -> None:
    """Refuses a root that has lost its pointer: any model would do there, as for a first one.

    Raises:
        InputError: versions were promoted, and nothing says which of them is the champion.
    """
    if pointer(root).version is None and set(numbers(root)) - set(unpromoted(root)):
        path = root / MODELS / CHAMPION_FILE
        raise InputError(f"{path}: missing, although there are versions; {REPAIR}")


def publish(
    root: Place,
    model_dir: Place,
    version: Version,
    *,
    report: Place | None = None,
    lock: Lock | None = None,
) -> Version:
    """Copies a model in under the next number, then swaps the pointer.

    A crash in between leaves the old champion; publishing the same again then takes up the copy
    that is there, and publishing another model removes it, without using its number again: a
    server may be reading what it has. Whoever publishes holds the lock of the root; in a bucket,
    should it be lost, the pointer is left to whoever has changed it.

    Args:
        root: the root.
        model_dir: the model's files.
        version: what is known of it; where it names files, they have to be those.
        report: a file that goes along, what the model was promoted for.
        lock: of the root, which is looked at before every change of it.

    Returns:
        The version with its number, path, time and files.

    Raises:
        InputError: the model's folder holds no files.
        FailedError: they are not those that `version` names.
        LockedError: the pointer was changed by another process meanwhile, or the lock is lost.
    """
    return publish_after(pointer(root), root, model_dir, version, report=report, lock=lock)


def publish_after(
    before: Pointer,
    root: Place,
    model_dir: Place,
    version: Version,
    *,
    report: Place | None = None,
    lock: Lock | None = None,
) -> Version:
    """Does `publish`, if the pointer is what it was: `before`, which may be one that is damaged."""
    last = before.version.version if before.version else 0
    taken = numbers(root)
    if before.version is None:  # and any folder may be what a pointer once named
        taken += set(folders(root)) - set(unpromoted(root))
    newest = max([*taken, last])
    published = _unfinished(root, newest, version) if newest > last else None
    if published is None:
        storage.discard_leftovers(root / MODELS)
        before = fence(root, before, lock=lock)
        _discard_unpromoted(root, lock)
        storage.hold(lock)
        published = _copy_in(root, model_dir, newest + 1, version, report)
    storage.hold(lock)
    _swap(root, published, before.generation)
    return published


def discard_unpromoted(root: Place, *, lock: Lock | None = None) -> list[int]:
    """Removes versions that were never promoted; the root is locked meanwhile.

    Returns:
        Their numbers; see `versions.unpromoted` on which these are.

    Raises:
        LockedError: the lock of the root, if given, is lost, or another process has just changed
            the pointer.
    """
    storage.discard_leftovers(root / MODELS)
    if not unpromoted(root):
        return []
    fence(root, find_pointer(root), lock=lock)
    return _discard_unpromoted(root, lock)


def fence(root: Place, before: Pointer, *, lock: Lock | None = None) -> Pointer:
    """Comes before the removal of what was never promoted, so that nobody promotes it any more.

    Who was taken for dead as he promoted it may be about to swap the pointer, and has looked at his
    lock for the last time. In a bucket the pointer is therefore written again as it is, which gives
    it another generation than he expects; where there is none yet, one that names no version.

    Args:
        root: the root.
        before: the pointer, as it was seen.
        lock: of the root, which is looked at before.

    Returns:
        The pointer as it is now.

    Raises:
        LockedError: the pointer is another one by now, or the lock is lost.
    """
    path = root / MODELS / CHAMPION_FILE
    if not isinstance(path, GcsPath) or not unpromoted(root):
        return before
    storage.hold(lock)
    stat = path.put((before.text or NOBODY).encode(), before.generation)
    return before._replace(generation=stat.generation)


def _discard_unpromoted(root: Place, lock: Lock | None) -> list[int]:
    removed = unpromoted(root)
    for number in removed:
        storage.discard(root / path_of(number), VERSION_FILE, lock=lock)
    return removed


def _unfinished(root: Place, number: int, version: Version) -> Version | None:
    """A copy of the same model, if it is one, that the pointer never came to name."""
    storage.recover(root / path_of(number))  # it may have been killed as it tidied up
    with contextlib.suppress(InputError):
        found = load(root, number)
        same = all(
            getattr(found, name) == getattr(version, name)
            for name in ("run_id", "model_id", "weights_sha256", "rolled_back_from")
        )
        if same and not inventory.damage(root, found):
            return found
    return None


def _copy_in(
    root: Place, model_dir: Place, number: int, version: Version, report: Place | None
) -> Version:
    sources = {name: model_dir / name for name in storage.walk(model_dir) if name != VERSION_FILE}
    if not sources:
        raise InputError(f"{model_dir}: no files; expected an exported model")
    if report is not None:
        sources[report.name] = report
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with storage.published_whole(root / path_of(number), last=VERSION_FILE) as staging:
        copies = {
            name: checksums.copy_file(source, staging / name)
            for name, source in sorted(sources.items())
        }
        _require_noted(model_dir, copies, version.files, report)
        published = dataclasses.replace(
            version,
            version=number,
            path=path_of(number),
            promoted_at=now,
            first_promoted_at=version.first_promoted_at or now,
            files=copies,
        )
        storage.write_atomic(staging / VERSION_FILE, version_json(published))
    return published


def _require_noted(
    model_dir: Place,
    copies: Mapping[str, FileSum],
    noted: Mapping[str, FileSum],
    report: Place | None,
) -> None:
    """Makes sure that what was copied is what was noted of a model, if anything was.

    Raises:
        FailedError: a file is another one, is missing, or has come.
    """
    for name in sorted(copies.keys() | noted.keys()) if noted else ():
        is_report = report is not None and name == report.name
        if not is_report and copies.get(name) != noted.get(name):
            raise FailedError(
                f"{model_dir / name}: is not as it was when the model was judged; nothing was"
                " published, and the same command looks at it anew"
            )


def _swap(root: Place, version: Version, generation: int) -> None:
    """Lets the pointer name another version; LockedError if it is not of this generation."""
    path, text = root / MODELS / CHAMPION_FILE, version_json(version)
    if isinstance(path, GcsPath):
        path.put(text.encode(), generation)
        return
    for leftover in path.parent.glob(f".{path.name}.*"):  # of one that was killed as it wrote
        storage.remove(leftover)
    storage.write_atomic(path, text)
