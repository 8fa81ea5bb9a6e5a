"""The models of a root: the champion, promotion, rollback.

python -m pipeline.registry list --root out

    ROOT/models/<version>/        a promoted model, as TensorFlow Serving reads it; never changed
    ROOT/models/champion.json     the one pointer that readers follow, swapped last

A version above the pointer's was never promoted: a process was killed as it published it, and
whoever next holds the lock of the root removes it; see `settle`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import sys

from pipeline import checksums, command, inventory, ledger, storage
from pipeline.command import InputError, show
from pipeline.gcs import GcsPath
from pipeline.storage import Lock, Place
from pipeline.versions import (
    CHAMPION_FILE,
    MODELS,
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
    versions,
)

__all__ = ["Version", "champion", "publish", "rollback", "settle", "versions"]

PROG = "pipeline.registry"
ACTIONS = {
    "list": "all versions, as a table",
    "current": "the champion, as JSON",
    "rollback": "publish an old version again",
    "verify": "check every file of every version",
    "prune": "remove old models, runs and datasets",
}


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
        version: what is known of it.
        report: a file that goes along, what the model was promoted for.
        lock: of the root, which is looked at before every change of it.

    Returns:
        The version with its number, path, time and files.

    Raises:
        InputError: the model's folder holds no files.
        LockedError: the pointer was changed by another process meanwhile, or the lock is lost.
    """
    return _publish(root, model_dir, version, report, pointer(root), lock)


def _publish(
    root: Place,
    model_dir: Place,
    version: Version,
    report: Place | None,
    before: Pointer,
    lock: Lock | None,
) -> Version:
    last = before.version.version if before.version else 0
    taken = numbers(root)
    if before.version is None:  # and any folder may be what a pointer once named
        taken += set(folders(root)) - set(unpromoted(root))
    newest = max([*taken, last])
    published = _unfinished(root, newest, version) if newest > last else None
    if published is None:
        settle(root, lock=lock)
        storage.hold(lock)
        published = _copy_in(root, model_dir, newest + 1, version, report)
    storage.hold(lock)
    _swap(root, published, before.generation)
    return published


def settle(root: Place, *, lock: Lock | None = None) -> list[int]:
    """Removes versions that were never promoted; the root is locked meanwhile.

    Returns:
        Their numbers; see `versions.unpromoted` on which these are.

    Raises:
        LockedError: the lock of the root, if given, is lost.
    """
    storage.discard_leftovers(root / MODELS)
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
        published = dataclasses.replace(
            version,
            version=number,
            path=path_of(number),
            promoted_at=now,
            first_promoted_at=version.first_promoted_at or now,
            files={
                name: checksums.copy_file(source, staging / name)
                for name, source in sorted(sources.items())
            },
        )
        storage.write_atomic(staging / VERSION_FILE, version_json(published))
    return published


def _swap(root: Place, version: Version, generation: int) -> None:
    """Lets the pointer name another version; LockedError if it is not of this generation."""
    path, text = root / MODELS / CHAMPION_FILE, version_json(version)
    if isinstance(path, GcsPath):
        path.put(text.encode(), generation)
        return
    for leftover in path.parent.glob(f".{path.name}.*"):  # of one that was killed as it wrote
        storage.remove(leftover)
    storage.write_atomic(path, text)


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
    published = _publish(root, root / old.path, again, None, before, lock)
    storage.hold(lock)
    _note(root, published, reason)
    return published


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


# The command


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """The flags of this command."""

    action: str
    root: Place
    version: int | None = None
    reason: str | None = None
    keep: int = 1
    dry_run: bool = False


def parse(argv: list[str]) -> RegistryConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.error = parser.error
        action.add_argument("--root", required=True, metavar="DIR")
        if name == "rollback":
            action.add_argument(
                "--version",
                type=int,
                metavar="V",
                help="default: the one before that has other weights",
            )
            action.add_argument("--reason", metavar="TEXT", help="why, for the ledger")
        if name == "prune":
            action.add_argument(
                "--keep",
                required=True,
                type=command.positive_int,
                metavar="N",
                help="the newest N of each, whatever the champion needs, and the model before it",
            )
            action.add_argument("--dry_run", action="store_true", help="only say what would go")
    flags = vars(parser.parse_args(argv))
    given = {
        name: flags[name]
        for name in ("action", "version", "reason", "keep", "dry_run")
        if name in flags
    }
    return RegistryConfig(root=storage.folder(flags["root"], buckets=True), **given)


def execute(config: RegistryConfig) -> int:
    """Runs the command."""
    _require_root(config.root)
    if config.action == "list":
        show(inventory.table(config.root))
    elif config.action == "current":
        current = champion(config.root)
        if current is None:
            raise InputError(f"{config.root}: no champion yet")
        show(version_json(current).rstrip())
    elif config.action == "rollback":
        with storage.locked(config.root) as lock:
            published = rollback(config.root, config.version, reason=config.reason, lock=lock)
            storage.hold(lock)
            _refresh_index(config.root)
        show(f"version {published.version} is version {published.rolled_back_from} again")
    elif config.action == "verify":
        return _verify(config.root)
    else:
        _prune(config)
    return command.DONE


def _require_root(root: Place) -> None:
    """Refuses, before anything is written, a folder where the chain has kept nothing."""
    from pipeline.plan import DATASETS, RUNS

    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    parts = (MODELS, RUNS, DATASETS)
    if not (root / ledger.LEDGER_FILE).is_file() and not any((root / x).is_dir() for x in parts):
        raise InputError(
            f"{root}: not the root of a chain; expected {', '.join(parts)} or"
            f" {ledger.LEDGER_FILE} in it"
        )


def _verify(root: Place) -> int:
    problems = inventory.verify(root)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return command.BAD_INPUT
    known = versions(root)
    files = sum(len(version.files) for version in known)
    show(f"{root}: {len(known)} versions, {files} files, all as they were published")
    return command.DONE


def _prune(config: RegistryConfig) -> None:
    from pipeline import pruning

    if config.dry_run:
        lines = [f"would remove {each.folder}" for each in pruning.plan(config.root, config.keep)]
    else:
        with storage.locked(config.root) as lock:
            removed = pruning.prune(config.root, config.keep, lock=lock)
            lines = [f"removed {removal.folder}" for removal in removed]
            storage.hold(lock)
            _refresh_index(config.root)
    show("\n".join(lines or ["nothing to remove"]))


def _refresh_index(root: Place) -> None:
    """Lets the root's page tell it too; where what draws it is missing, the next retrain does."""
    if importlib.util.find_spec("jinja2"):
        from pipeline import index

        index.write_index(root)


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
