"""The processes that train together: which they are, and what they settle before they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.command import (
    TERMINATED,
    FailedError,
    InputError,
    LockedError,
    UnreachableError,
)

# What another worker's exit code stands for; any other: wrong input.
KINDS = {kind.exit_code: kind for kind in (LockedError, UnreachableError, FailedError)}


class EndedError(InputError):
    """Another worker has ended, without which this one cannot go on."""

    def __init__(self, *, stopped: bool) -> None:
        super().__init__(
            "another worker ended; the same command on all goes on from the last checkpoint"
        )
        self.exit_code = TERMINATED if stopped else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among those that train together; by default, it is alone.

    Attributes:
        is_chief: whether this one writes; of several workers one does.
        total: the sum of each of a few numbers over all workers, the same to the last bit on all;
            all of them ask at the same steps.
        exchange: the texts of all workers, by rank; all of them exchange at the same steps.
        part: waits until all have heard what was settled last; for the last thing before an end.
    """

    is_chief: bool = True
    total: Callable[[Sequence[float]], list[float]] = list
    exchange: Callable[[str], list[str]] = lambda text: [text]
    part: Callable[[], object] = lambda: None

    def agree(self, said: bool) -> bool:
        """Whether any of the workers says yes; all of them ask at the same steps."""
        (yes,) = self.total([said])
        return yes > 0

    @contextlib.contextmanager
    def together(self) -> Iterator[dict[str, Any]]:
        """A block that all workers enter, and that none leaves where one of them refuses.

        Yields:
            An empty dict, for what has to be the same on all workers.

        Raises:
            InputError: this worker or another refuses, or they differ.
        """
        alike: dict[str, Any] = {}
        refusal = None
        try:
            yield alike
        except InputError as error:
            refusal = error
        own = Said(alike) if refusal is None else Said({}, str(refusal), refusal.exit_code)
        said = [Said(*json.loads(text)) for text in self.exchange(json.dumps(own))]
        found = refusal or difference(said)
        if found is not None:
            self.part()
            raise found


class Said(NamedTuple):
    """What one worker tells the others at the end of a block.

    Attributes:
        alike: what has to be the same on all workers.
        refusal: why it cannot go on, if so.
        exit_code: and with which exit code it ends; 0: it can go on.
    """

    alike: dict[str, Any]
    refusal: str = ""
    exit_code: int = 0


def difference(said: list[Said]) -> InputError | None:
    """Why workers cannot go on: what one of them refuses, else where they differ, if at all."""
    for rank, one in enumerate(said):
        if one.exit_code:
            return KINDS.get(one.exit_code, InputError)(f"worker {rank}: {one.refusal}")
    for rank, one in enumerate(said[1:], start=1):
        for name in sorted(said[0].alike | one.alike):
            if one.alike.get(name) != said[0].alike.get(name):
                return InputError(
                    f"worker {rank} has {name} {one.alike.get(name)}, worker 0"
                    f" {said[0].alike.get(name)}; expected the same flags on all workers, and"
                    " folders that they share"
                )
    return None


def is_address(value: object) -> bool:
    """Whether a value is host:port."""
    found = re.fullmatch(r".+:(\d{1,5})", value) if isinstance(value, str) else None
    return found is not None and int(found[1]) < 2**16


class Cluster(NamedTuple):
    """The workers of TF_CONFIG, and which of them this process is.

    Attributes:
        addresses: of all workers, host:port, the chief first; [] where it is not set.
        rank: of this one among them.
    """

    addresses: list[str]
    rank: int = 0


def in_cluster() -> bool:
    """Whether TF_CONFIG makes this process one of several workers; raises as `read_cluster`."""
    return len(read_cluster(os.environ.get("TF_CONFIG")).addresses) > 1


def read_cluster(text: str | None) -> Cluster:
    """Reads TF_CONFIG.

    Args:
        text: as Vertex AI sets it, ``{"cluster": {"worker": ["host:port", ...]},
            "task": {"type": "worker", "index": 0}}``; a ``chief`` may stand beside.

    Raises:
        InputError: it is something else, or this process is to be something else.
    """
    if not text:
        return Cluster([])

    def refuse(expected: str) -> InputError:
        return InputError(f"TF_CONFIG {text!r}: expected {expected}")

    try:
        content = json.loads(text)
        cluster, task = content.get("cluster", {}), content.get("task", {})
        others = sorted(set(cluster.keys()) - {"chief", "worker"})
        jobs = {kind: cluster.get(kind, []) for kind in ("chief", "worker")}
        rank, kind = task.get("index", 0), task.get("type", "worker")
    except (ValueError, AttributeError):
        raise refuse(
            '{"cluster": {"worker": [...]}, "task": {"type": "worker", "index": 0}}'
        ) from None
    if not all(isinstance(hosts, list) and all(map(is_address, hosts)) for hosts in jobs.values()):
        raise refuse("addresses like host:port in its cluster")
    if others:
        raise refuse(f"a cluster of chief and worker alone, not {others[0]}")
    if not cluster:
        return Cluster([])
    if kind not in list(jobs) or type(rank) is not int or not 0 <= rank < len(jobs[kind]):
        raise refuse(f"its task to be one of its cluster, not {kind} {rank}")
    before = len(jobs["chief"]) if kind == "worker" else 0
    return Cluster(jobs["chief"] + jobs["worker"], before + rank)
