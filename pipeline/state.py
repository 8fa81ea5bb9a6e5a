"""What stands under a root, looked at once: its ledger, its champion and the folders of its runs.

In a bucket that takes two listings and three small files, however many runs there are.

Synopsis::

    state = look(root)
    state.champion, state.lines, state.has("2026-01-01-core-0123", "decision.json")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import ledger, registry, storage
from pipeline.gcs import GcsPath
from pipeline.plan import RUNS
from pipeline.storage import Place

Files = Mapping[str, str]  # {name: its CRC32C, where a listing says it, or nothing}


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What stood there a moment ago; whoever holds the lock of the root can rely on it.

    Attributes:
        root: the root.
        lines: of its ledger.
        champion: if there is one.
        runs: the folders of runs by name, and the files in each.
    """

    root: Place
    lines: Sequence[Mapping[str, Any]]
    champion: registry.Version | None
    runs: Mapping[str, Files]

    def has(self, run_id: str, name: str) -> bool:
        """Whether there is a file of this name in the folder of a run."""
        return name in self.runs.get(run_id, ())


def look(root: Place) -> State:
    """Looks at a root.

    Raises:
        InputError: the champion is damaged.
    """
    return State(
        root=root,
        lines=ledger.read(root),
        champion=registry.champion(root),
        runs=list_folders(root / RUNS),
    )


def list_folders(parent: Place) -> dict[str, Files]:
    """The folders in another, and the files under each; one listing of a bucket."""
    if not isinstance(parent, GcsPath):
        paths = [path for path in parent.glob("*") if path.is_dir()]
        return {path.name: dict.fromkeys(storage.walk(path), "") for path in paths}
    found: dict[str, dict[str, str]] = {}
    for name, stat in parent.walk().items():
        folder, slash, file = name.partition("/")
        if slash:
            found.setdefault(folder, {})[file] = stat.crc32c
    return dict(found)
