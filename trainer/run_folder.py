"""A run's folders: where its files go, which run they belong to, and whether it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from pipeline import models, storage
from pipeline.command import InputError, LockedError
from pipeline.storage import Place
from trainer import same_run
from trainer.config import TrainConfig

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FILE = "model.json"

# The folders that Vertex AI names in the environment of a custom job.
VERTEX = {
    "model_dir": "AIP_MODEL_DIR",
    "checkpoint_dir": "AIP_CHECKPOINT_DIR",
    "tensorboard_dir": "AIP_TENSORBOARD_LOG_DIR",
}
MOUNTS = Path("/gcs")  # where it mounts Cloud Storage: bucket by bucket

PlaceT_co = TypeVar("PlaceT_co", bound=Place, covariant=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places(Generic[PlaceT_co]):
    """Where a run writes.

    Attributes:
        run: the run folder: its config, its metrics, its lock.
        model: the exported model.
        checkpoints: what a run goes on from.
        tensorboard: event files and profiles.
    """

    run: PlaceT_co
    model: PlaceT_co
    checkpoints: PlaceT_co
    tensorboard: PlaceT_co

    @property
    def config(self) -> PlaceT_co:
        """How the run was started."""
        return cast(PlaceT_co, self.run / CONFIG_FILE)

    @property
    def metrics(self) -> PlaceT_co:
        """One line an epoch."""
        return cast(PlaceT_co, self.run / METRICS_FILE)


def places(
    run_dir: Place,
    given: Mapping[str, str | None],
    environ: Mapping[str, str],
    *,
    mounts: Path = MOUNTS,
) -> Places[Place]:
    """The folders of a run: those given, else those of the environment, else in the run folder.

    Args:
        run_dir: the run folder.
        given: the flags ``model_dir``, ``checkpoint_dir`` and ``tensorboard_dir``, None where
            not given.
        environ: the process's environment.
        mounts: where buckets may be mounted, which it then names.

    Raises:
        InputError: one cannot be used.
    """
    found: dict[str, Place] = {}
    for (flag, variable), inside in zip(
        VERTEX.items(), ("export", "checkpoints", "tensorboard"), strict=True
    ):
        text, of_vertex = given.get(flag), environ.get(variable)
        try:
            if text is not None:
                found[flag] = storage.folder(text, buckets=True)
            else:
                found[flag] = mounted(of_vertex, mounts) if of_vertex else run_dir / inside
        except InputError as error:
            name = variable if text is None else f"--{flag}"
            raise InputError(f"{name}: {error}") from None
    return Places(
        run=run_dir,
        model=found["model_dir"],
        checkpoints=found["checkpoint_dir"],
        tensorboard=found["tensorboard_dir"],
    )


def mounted(text: str, mounts: Path) -> Place:
    """The folder that a path or ``gs://bucket/path`` means, on this machine if it can be.

    Raises:
        InputError: it cannot be used.
    """
    place = storage.folder(text, buckets=True)
    if isinstance(place, Path) or not (mounts / place.bucket).is_dir():
        return place
    return storage.folder(str(mounts / place.bucket / place.key))


def require_writable(places: Places) -> None:
    """Makes sure that a run can write where it will have to, and leaves no trace.

    Raises:
        InputError: it cannot.
    """
    if places.model == places.model.parent:
        raise InputError(f"{places.model}: is not replaced as a whole; expected a folder in it")
    for folder in (places.run, places.model.parent, places.checkpoints, places.tensorboard):
        storage.require_writable(folder)


def locked(places: Places) -> list[Place]:
    """The folders whose locks a run holds: its own, and that of checkpoints kept elsewhere."""
    own, apart = _full_name(places.run), _full_name(places.checkpoints)
    return [places.run] if apart.startswith(own) else [places.checkpoints, places.run]


def _full_name(folder: Place) -> str:
    return f"{folder.resolve() if isinstance(folder, Path) else folder}/"


def make(places: Places[Path]) -> None:
    """Makes the folders that a run writes single files in, and those they are in."""
    for folder in (places.checkpoints, places.tensorboard):
        folder.mkdir(parents=True, exist_ok=True)


def describe(config: TrainConfig, dataset_id: str, devices: list[str] | None) -> dict[str, Any]:
    """The content of ``config.json``."""
    content = {**dataclasses.asdict(config), "dataset_id": dataset_id, "devices": devices}
    return json.loads(json.dumps(content))  # as it is read back: lists for tuples


def begun(places: Places) -> Iterator[tuple[Place, Any]]:
    """What tells of a run that was begun, if one was, with ``config.json`` as it has it.

    Yields:
        A file, and that content; None where the file is not whole.
    """
    from trainer import checkpoints

    if places.config.is_file():
        yield places.config, _read(places.config)
    path = places.model / MODEL_FILE
    if path.is_file() and not _lost_its_description(places):
        yield path, _content_of_model(_read(path))
    if (found := checkpoints.newest(places.checkpoints)) is not None:
        yield found


def _read(path: Place) -> Any:
    """A JSON file; None where it is not one."""
    with contextlib.suppress(ValueError, OSError):
        return json.loads(path.read_text())
    return None


def _lost_its_description(places: Places) -> bool:
    """Whether an exported model does not say any more whose it is, and once did."""
    content = _content_of_model(_read(places.model / MODEL_FILE))
    return content is None and models.damage(places.model) is not None


def _content_of_model(description: Any) -> Any:
    try:
        own = {name: description.get(name) for name in ("dataset_id", "devices")}
        return description["config"] | own
    except (AttributeError, TypeError, KeyError):
        return None


def check_same_run(places: Places, asked: dict[str, Any]) -> None:
    """Makes sure that none of a run's folders holds another run than the one asked for.

    Raises:
        InputError: one does; the message names the first difference.
    """
    for path, content in begun(places):
        same_run.require_same(path, content, asked)


def earlier_input(places: Places) -> Literal["resident", "stream"] | None:
    """How a run that was begun reads its examples; None where none was, or it does not say."""
    for _, content in begun(places):
        found = content.get("input") if isinstance(content, dict) else None
        if found in ("resident", "stream"):
            return found
    return None


def is_finished(places: Places, asked: dict[str, Any]) -> bool:
    """Whether the model of this very run is exported, whole, with as many epochs as are asked for.

    Raises:
        InputError: the place of the model is taken by something else.
    """
    path = places.model / MODEL_FILE
    if not path.is_file():
        if not storage.is_unsettled(places.model) and models.damage(places.model) is None:
            storage.require_absent(places.model)
        return False
    if _lost_its_description(places):
        return False
    found = _content_of_model(_read(path))
    same_run.require_same(path, found, asked)
    return found["epochs"] >= asked["epochs"] and models.damage(places.model) is None


def holds_model(folder: Place) -> bool:
    """Whether what is there was exported once, be it damaged: it may be replaced."""
    return any((folder / name).is_file() for name in (MODEL_FILE, models.SUMS_FILE))


def tidy(places: Places) -> None:
    """Removes what a process left that was killed as it wrote a file or replaced a model.

    Raises:
        LockedError: one is at work on the model, or is not known to be dead.
    """
    storage.recover(places.model)
    if storage.is_unsettled(places.model):
        raise LockedError(f"{places.model}: another process is at work here")
    for folder, names in (
        (places.run, f".{CONFIG_FILE}.* .{METRICS_FILE}.*"),
        (places.checkpoints, ".step-*.ckpt.*"),
    ):
        for name in names.split():
            for leftover in folder.glob(name):
                leftover.unlink(missing_ok=True)


# metrics.jsonl


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes the lines that a checkpoint holds, whatever became of the file."""
    storage.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds an epoch's line, and has it on the disk before any checkpoint that follows."""
    with storage.named(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
