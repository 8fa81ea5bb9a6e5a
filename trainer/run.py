"""What the outer loop works with: the compiled functions, the files and the other workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.checkpoints import Progress
from trainer.config import TrainConfig
from trainer.events import EventWriter
from trainer.step import StepsFunction
from trainer.workers import Workers


class Stop(Protocol):
    """What the loop needs of `stop.StopSignal`."""

    received: bool
    unsaved: bool


class SavedProgress(Protocol):
    """What the loop needs of `checkpoints.Checkpoints`."""

    def due(self) -> bool:
        """Whether it is time to save again."""

    def save(self, progress: Progress, step: int) -> None:
        """Saves the run as it stands after `step` steps."""

    def restore(self) -> Progress:
        """Restores what was saved last, by whatever process."""

    def rewind(self) -> Progress:
        """Goes back to what this process saved or restored last."""

    def digest(self) -> str:
        """Names what this process saved or restored last, to the last bit."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the loop works with.

    Attributes:
        config: how to train, everything resolved.
        train: compiled steps over the train split.
        evaluate: compiled pass over the validation split; None where there is no validation.
        evaluated: the weights that `evaluate` uses, as arrays.
        evaluation_batch: rows in each of its steps.
        order: the rows of the train split in the order of an epoch.
        train_size: examples of the train split.
        validation_size: examples of the validation split.
        checkpoints: of the run folder.
        metrics: the path of ``metrics.jsonl``.
        events: TensorBoard's file; None for a worker that is not the chief.
        stop: whether a stop was asked for.
        workers: the part of this process among others.
        profile: where to write a trace of a few calls, if anywhere.
    """

    config: TrainConfig
    train: StepsFunction
    evaluate: StepsFunction | None
    evaluated: Callable[[], list[np.ndarray]]
    evaluation_batch: int
    order: Callable[[int], np.ndarray]
    train_size: int
    validation_size: int
    checkpoints: SavedProgress
    metrics: Path
    events: EventWriter | None
    stop: Stop
    workers: Workers = dataclasses.field(default_factory=Workers)
    profile: Path | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last may be a partial batch."""
        return -(-self.train_size // self.config.batch_size)

    def step(self, progress: Progress) -> int:
        """Steps taken in all."""
        return progress.epoch * self.steps_per_epoch + progress.step_in_epoch
