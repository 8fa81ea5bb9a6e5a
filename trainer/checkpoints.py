"""Exact resume: everything that decides the future of a run, saved and restored.

A checkpoint is one file, ``step-00001260.ckpt``: the length of a JSON header in eight bytes and
its SHA-256, the header, the arrays as raw little-endian bytes, and the SHA-256 of all that. It is
written beside its name, flushed to the disk and renamed, so that a kill leaves the old ones or the
new one; the checksums are for disks and for what copies them, that of the header for whoever asks
which run it is of without reading the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from pipeline import reading, storage
from pipeline.command import UnreachableError, log
from pipeline.storage import Place, PlaceT
from trainer import same_run

KEEP = 2  # the newest, and the one before it in case the newest gets damaged
PREFIX = struct.Struct("<Q32s")
PATTERN = "step-*.ckpt"


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step_in_epoch: steps taken in the epoch after them.
        loss_sum: sum of losses over the examples of that epoch so far.
        correct: right answers in that epoch so far.
        seconds: time spent training in that epoch so far, over all attempts.
        best_epoch: the epoch with the best validation so far; 0: none yet.
        best_accuracy: its validation accuracy.
        best_loss: its validation loss.
        best_weights: its weights as evaluated, float32, where the run may stop early.
        lines: of ``metrics.jsonl``, one for each epoch completed.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = 0.0
    best_loss: float = 0.0
    best_weights: tuple[np.ndarray, ...] = ()
    lines: tuple[dict[str, Any], ...] = ()


class Restorable(Protocol):
    """What a run trains, as arrays and back."""

    def values(self) -> list[np.ndarray]:
        """The arrays as they stand."""

    def assign(self, values: list[np.ndarray]) -> None:
        """Takes over arrays that `values` gave."""


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def write(file: IO[bytes], header: dict[str, Any], arrays: list[np.ndarray]) -> None:
    """Writes one checkpoint."""
    arrays = [np.asarray(a, a.dtype.newbyteorder("<"), order="C") for a in arrays]
    text = json.dumps(header | {"arrays": [[a.dtype.str, list(a.shape)] for a in arrays]}).encode()
    digest = hashlib.sha256()
    prefix = PREFIX.pack(len(text), hashlib.sha256(text).digest())
    for part in (prefix, text, *(a.tobytes() for a in arrays)):
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def read(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads back what `write` wrote.

    Raises:
        DamagedError: the file is not whole.
        ValueError, KeyError, TypeError: it is whole, but `write` did not write it.
        OSError: it cannot be read, which says nothing of what it holds.
    """
    data = path.read_bytes()
    content = memoryview(data)[:-32]
    if len(data) < PREFIX.size + 32 or hashlib.sha256(content).digest() != data[-32:]:
        raise DamagedError("its checksum is wrong")
    length, _ = PREFIX.unpack_from(content)
    at = PREFIX.size + length
    header = json.loads(bytes(content[PREFIX.size : at]))
    arrays = []
    for kind, shape in header.pop("arrays"):
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(content, np.dtype(kind), count, at).reshape(shape)
        arrays.append(array.copy())
        at += array.nbytes
    return header, arrays


def newest(directory: PlaceT) -> tuple[PlaceT, Any] | None:
    """The newest checkpoint of a folder that tells its run, and the content of that one's config.

    Reads the header alone, however large the rest is; None where there is none to read.
    """
    for path in newest_first(directory):
        try:
            with reading.opened(path) as file:
                length, digest = PREFIX.unpack(file.read(PREFIX.size))
                text = file.read(length)
            if hashlib.sha256(text).digest() == digest:
                return path, json.loads(text).get("run")
        except (OSError, struct.error, OverflowError):  # `Checkpoints.restore` tells of it
            continue
    return None


def newest_first(directory: PlaceT) -> list[PlaceT]:
    """The checkpoints of a folder; where a step has more digits, its name is longer."""
    found = cast(Iterable[PlaceT], directory.glob(PATTERN))
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: their folder.
        trained: what they hold besides a `Progress`.
        run: the content of its ``config.json``; see `same_run`.
        seconds: how much work a kill may cost; see `due`.
        writes: False for a worker that is not the chief: it keeps step, but writes nothing.
        after: called when one was saved.
        shown: the folder as messages name it, where that is not `directory`.
        clock: for tests.
    """

    def __init__(
        self,
        directory: Path,
        trained: Restorable,
        *,
        run: dict[str, Any],
        seconds: float,
        writes: bool = True,
        after: Callable[[], None] = lambda: None,
        shown: Place | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._trained = trained
        self._run = run
        self._seconds = seconds
        self._writes = writes
        self._after = after
        self._shown = shown or directory
        self._clock = clock
        self._saved_at = clock()
        self._latest: tuple[Progress, list[np.ndarray]] | None = None

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self._clock() - self._saved_at >= self._seconds

    def save(self, progress: Progress, step: int) -> None:
        """Saves the run as it stands after `step` steps."""
        self._latest = dataclasses.replace(progress), self._trained.values()
        if self._writes:
            scalars = {k: v for k, v in vars(progress).items() if k != "best_weights"}
            header = {"run": self._run, "progress": scalars}
            with storage.open_atomic(self._directory / f"step-{step:08d}.ckpt") as file:
                write(file, header, [*progress.best_weights, *self._latest[1]])
            for old in newest_first(self._directory)[KEEP:]:
                old.unlink()
            self._after()
        self._saved_at = self._clock()

    def restore(self) -> Progress:
        """Restores the newest checkpoint that is whole, if any, and says where the run stands.

        Raises:
            InputError: the folder holds checkpoints of another run, or of another program.
            UnreachableError: a checkpoint cannot be read; it stays.
        """
        self._latest = Progress(), self._trained.values()
        files = newest_first(self._directory)
        for path in files:
            try:
                self._latest = self._read(path)
            except DamagedError as error:
                rest = files[files.index(path) + 1 :]
                instead = f"from {rest[0].name}, the one before it" if rest else "from the start"
                shown = self._shown / path.name
                log.warning("%s: damaged (%s); going on %s", shown, error, instead)
                if self._writes:
                    path.unlink(missing_ok=True)
                continue
            break
        return self.rewind()

    def rewind(self) -> Progress:
        """Goes back to the state that was saved or restored last."""
        assert self._latest is not None
        progress, values = self._latest
        self._trained.assign(values)
        return dataclasses.replace(progress)

    def digest(self) -> str:
        """Names the state that was saved or restored last, to the last bit: 32 hex digits."""
        assert self._latest is not None
        progress, values = self._latest
        apart = ("best_weights", "lines", "seconds")  # the first follow; the others decide nothing
        scalars = {k: v for k, v in vars(progress).items() if k not in apart}
        found = hashlib.sha256(json.dumps(scalars).encode())
        for value in (*progress.best_weights, *values):
            found.update(value.tobytes())
        return found.hexdigest()[:32]

    def _read(self, path: Path) -> tuple[Progress, list[np.ndarray]]:
        shown = self._shown / path.name
        try:
            header, arrays = read(path)
            run, scalars = header["run"], header["progress"]
        except FileNotFoundError:  # found damaged by the chief, which has removed it meanwhile
            raise DamagedError("it is gone") from None
        except OSError as error:
            raise UnreachableError(f"{shown}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise same_run.unknown(shown) from None
        same_run.require_same(shown, run, self._run)
        own = self._trained.values()
        best, values = arrays[: -len(own)], arrays[-len(own) :]
        if list(map(_kind, values)) != list(map(_kind, own)):
            raise same_run.unknown(shown)
        try:
            progress = Progress(**scalars, best_weights=tuple(best))
        except TypeError:
            raise same_run.unknown(shown) from None
        progress.lines = tuple(progress.lines)  # JSON knows lists alone
        return progress, values


def _kind(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...]]:
    return array.dtype, array.shape
