"""The models of a root: the champion, promotion, rollback.

python -m pipeline.registry list --root out

    ROOT/models/<version>/        a promoted model, as TensorFlow Serving reads it; never changed
    ROOT/models/champion.json     the one pointer that readers follow, swapped last

Here is the command; `__all__` is what the rest of the job does with a registry.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator

from pipeline import command, inventory, ledger, storage
from pipeline.command import InputError, LockedError, show
from pipeline.promotion import champion, discard_unpromoted, publish, require_pointer
from pipeline.rollback import rollback
from pipeline.storage import Lock, Place
from pipeline.versions import MODELS, Version, version_json, versions

__all__ = [
    "Version",
    "champion",
    "discard_unpromoted",
    "publish",
    "require_pointer",
    "rollback",
    "versions",
]

PROG = "pipeline.registry"
ACTIONS = {
    "list": "all versions, as a table",
    "current": "the champion, as JSON",
    "rollback": "publish an old version again",
    "verify": "check every file of every version",
    "prune": "remove old models, runs and datasets",
}
# What to do where a retrain is at work, which may take hours.
IF_LOCKED = {
    "rollback": "a retrain is stopped by SIGTERM; roll back then, and give it again: it goes on",
    "prune": "prune once it has ended",
}


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
        with _locked(config) as lock:
            published = rollback(config.root, config.version, reason=config.reason, lock=lock)
            storage.hold(lock)
            _refresh_index(config.root)
        show(f"version {published.version} is version {published.rolled_back_from} again")
    elif config.action == "verify":
        return _verify(config.root)
    else:
        _prune(config)
    return command.DONE


@contextlib.contextmanager
def _locked(config: RegistryConfig) -> Iterator[Lock]:
    """Holds the lock of the root; where another process does, that line says how to go on."""
    with contextlib.ExitStack() as stack:
        held: contextlib.AbstractContextManager[Lock] = storage.locked(config.root)
        try:
            lock = stack.enter_context(held)
        except LockedError as error:
            raise LockedError(f"{error}; {IF_LOCKED[config.action]}") from None
        yield lock


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
        with _locked(config) as lock:
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
