"""The models of a root: the gate, versions, the champion pointer, rollback.

python -m pipeline.registry list --root out

    ROOT/models/<version>/        a promoted model, as TensorFlow Serving reads it; never changed
    ROOT/models/champion.json     the one pointer that readers follow, swapped last
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline import command, storage
from pipeline.command import InputError, show

PROG = "pipeline.registry"
MODELS = "models"
CHAMPION_FILE = "champion.json"
VERSION_FILE = "version.json"
NAMED_CHECKS = 3  # of those that failed; all stand in the decision


# The gate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What a challenger has to reach, whatever the champion does.

    Attributes:
        min_accuracy: over all rows.
        min_class_accuracy: over the rows of each class that has any.
    """

    min_accuracy: float = 0.8
    min_class_accuracy: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the gate: what it is, the challenger's value, the least that passes."""

    check: str
    value: float
    required: float

    @property
    def passed(self) -> bool:
        """Whether the challenger meets it."""
        return self.value >= self.required


def run_checks(report: dict[str, Any], gate: Gate) -> list[Check]:
    """Lists the conditions of the gate with a report's values.

    The report's baseline, where it has one, is the champion, scored on the same rows.
    """
    checks = [Check(check="accuracy", value=report["accuracy"], required=gate.min_accuracy)]
    checks += [
        Check(
            check=f"accuracy of class {row['name']}",
            value=row["accuracy"],
            required=gate.min_class_accuracy,
        )
        for row in report["per_class"]
        if row["support"]
    ]
    if report["baseline"] is not None:
        checks.append(
            Check(
                check="correct answers, against the champion's",
                value=report["correct"],
                required=report["baseline"]["correct"],
            )
        )
    return checks


def reason(checks: list[Check], has_champion: bool) -> str:
    """Says in a sentence why the gate promoted or did not."""
    failed = [check for check in checks if not check.passed]
    if failed:
        named = [f"{c.check}: {c.value:g}, required {c.required:g}" for c in failed[:NAMED_CHECKS]]
        more = [f"and {len(failed) - NAMED_CHECKS} more"] if len(failed) > NAMED_CHECKS else []
        return "; ".join(named + more)
    if has_champion:
        return (
            f"{checks[-1].value:g} correct, the champion {checks[-1].required:g} of the same rows"
        )
    return "above every floor, and there was no champion"


# Versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One promoted model; the content of ``champion.json`` and of ``version.json``.

    Attributes:
        version: its number.
        path: its folder, relative to the root.
        model_id: of the model.
        weights_sha256: of the model.
        dataset_id: what it was trained on.
        run_id: which run made it.
        accuracy: on the test split when it was promoted.
        sources: what the dataset was read from, as `pipeline.sources.open_sources` takes it.
        rolled_back_from: the version it is a copy of, if any.
    """

    version: int
    path: str
    model_id: str
    weights_sha256: str
    dataset_id: str
    run_id: str
    accuracy: float
    sources: list[str]
    rolled_back_from: int | None = None


def _load(path: Path) -> Version:
    try:
        return Version(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a version: {error}") from None


def versions(root: Path) -> list[Version]:
    """All promoted models, oldest first."""
    folders = [path for path in (root / MODELS).glob("*") if path.name.isdigit()]
    return [_load(path / VERSION_FILE) for path in sorted(folders, key=lambda path: int(path.name))]


def champion(root: Path) -> Version | None:
    """The model that is served, if there is one."""
    path = root / MODELS / CHAMPION_FILE
    return _load(path) if path.exists() else None


def publish(root: Path, model_dir: Path, version: Version) -> Version:
    """Copies a model in under the next number, then swaps the pointer.

    A crash in between leaves the old champion; publishing again then takes up the copy that
    is there.

    Returns:
        The version with its number and path.
    """
    known = versions(root)
    number = known[-1].version + 1 if known else 1
    numbered = dataclasses.replace(version, version=number, path=f"{MODELS}/{number}")
    pointer = champion(root)
    unfinished = known and (pointer is None or known[-1].version > pointer.version)
    if unfinished and _same_model(known[-1], version):
        numbered = known[-1]
    else:
        with storage.published_whole(root / numbered.path) as staging:
            shutil.copytree(model_dir, staging, dirs_exist_ok=True)
            storage.write_atomic(staging / VERSION_FILE, _json(numbered))
    storage.write_atomic(root / MODELS / CHAMPION_FILE, _json(numbered))
    return numbered


def _same_model(one: Version, other: Version) -> bool:
    return (one.run_id, one.model_id, one.rolled_back_from) == (
        other.run_id,
        other.model_id,
        other.rolled_back_from,
    )


def _json(version: Version) -> str:
    return json.dumps(dataclasses.asdict(version), indent=2) + "\n"


def rollback(root: Path, number: int | None) -> Version:
    """Publishes an old model again, as the highest version, so that servers follow.

    Args:
        root: the root.
        number: which version; None: the one before the champion's model.

    Raises:
        InputError: there is no such version, or none before.
    """
    current = champion(root)
    if current is None:
        raise InputError(f"{root}: no champion; nothing to roll back")
    origin = current.rolled_back_from or current.version
    known = {version.version: version for version in versions(root)}
    if number is None:
        number = max((other for other in known if other < origin), default=None)
        if number is None:
            raise InputError(f"{root}: no version before {origin}")
    if number not in known:
        raise InputError(f"--version {number}: expected one of {', '.join(map(str, known))}")
    if number in (current.version, origin):
        raise InputError(f"--version {number}: is the champion already")
    old = known[number]
    first = old.rolled_back_from or number
    return publish(root, root / old.path, dataclasses.replace(old, rolled_back_from=first))


# The command


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """The flags of this command."""

    action: str
    root: Path
    version: int | None = None


def parse(argv: list[str]) -> RegistryConfig:
    """Parses the command line."""
    parser = command.Parser(PROG, __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    for name, text in (
        ("list", "all versions, as a table"),
        ("current", "the champion, as JSON"),
        ("rollback", "publish an old version again"),
    ):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.error = parser.error
        action.add_argument("--root", required=True, metavar="DIR")
        if name == "rollback":
            action.add_argument("--version", type=int, metavar="V", help="default: the one before")
    flags = parser.parse_args(argv)
    return RegistryConfig(
        action=flags.action,
        root=storage.folder(flags.root),
        version=getattr(flags, "version", None),
    )


def execute(config: RegistryConfig) -> int:
    """Runs the command."""
    if not config.root.is_dir():
        raise InputError(f"{config.root}: no such folder")
    if config.action == "list":
        show(table(versions(config.root), champion(config.root)))
    elif config.action == "current":
        current = champion(config.root)
        if current is None:
            raise InputError(f"{config.root}: no champion yet")
        show(_json(current).rstrip())
    else:
        with storage.locked(config.root):
            published = rollback(config.root, config.version)
        show(f"version {published.version} is version {published.rolled_back_from} again")
    return command.DONE


def table(known: list[Version], current: Version | None) -> str:
    """The versions, one a line, the champion marked."""
    lines = ["  version  accuracy  model     run"]
    for version in known:
        mark = "*" if current is not None and version.version == current.version else " "
        again = f" (version {version.rolled_back_from} again)" if version.rolled_back_from else ""
        lines.append(
            f"{mark} {version.version:>7}  {version.accuracy:>8.4f}  {version.model_id[:8]}"
            f"  {version.run_id}{again}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    command.run(PROG, parse, execute)


if __name__ == "__main__":
    main()
