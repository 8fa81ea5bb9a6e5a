"""Exact resume: everything that decides the future of a run, saved and restored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tensorflow as tf

from trainer.model import MLP
from trainer.optimizers import Adam

KEEP = 2  # the newest, and the one before it while the newest is being written


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step_in_epoch: steps taken in the epoch after them.
        loss_sum: sum of losses over the examples of that epoch so far.
        correct: right answers in that epoch so far.
        seconds: time spent training in that epoch so far, over all attempts.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run folder: weights, slots, step count and `Progress`."""

    def __init__(self, directory: Path, model: MLP, optimizer: Adam) -> None:
        self._progress = {
            field.name: tf.Variable(
                field.default, dtype=tf.int64 if field.type == "int" else tf.float64
            )
            for field in dataclasses.fields(Progress)
        }
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, progress=self._progress)
        self._manager = tf.train.CheckpointManager(checkpoint, str(directory), max_to_keep=KEEP)

    def restore(self) -> Progress:
        """Restores the newest checkpoint, if there is one, and says where the run stands."""
        if self._manager.latest_checkpoint:
            status = self._manager.checkpoint.restore(self._manager.latest_checkpoint)
            status.assert_existing_objects_matched()
        return Progress(**{name: value.numpy().item() for name, value in self._progress.items()})

    def save(self, progress: Progress, step: int) -> None:
        """Saves the run as it stands after `step` steps."""
        for name, variable in self._progress.items():
            variable.assign(getattr(progress, name))
        self._manager.save(checkpoint_number=step)
