"""The outer loop: epochs, validation, early stopping, checkpoints, and a stop in good order."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from pipeline.command import InputError, log
from trainer import data, run_folder
from trainer.checkpoints import Progress
from trainer.config import TrainConfig
from trainer.gradients import Totals
from trainer.profiling import profiler
from trainer.progress import Bar, describe_epoch
from trainer.run import Run
from trainer.step import NOTHING
from trainer.stride import Stride

VALIDATION_STEPS_PER_CALL = 100
ADVICE = "a smaller --learning_rate may help"


class _StopError(Exception):
    """A stop was asked for, and the run is saved."""


def train(run: Run) -> Progress | None:
    """Trains from where the run stands to its end; None when stopped before.

    Every line, checkpoint and sum comes out the same however often the run was stopped or
    killed in between, and however its steps were cut into calls: a call adds step after step to
    the sums of the one before, so that numbers are added in the same order.
    """
    with run.workers.together() as alike:
        progress = run.checkpoints.restore()
        alike.update(step=run.step(progress), checkpoint=run.checkpoints.digest())
    if run.workers.is_chief:
        run_folder.write_lines(run.metrics, progress.lines)
    bar = Bar(run.config.epochs, run.steps_per_epoch, shown=run.workers.is_chief)
    training, validating = Stride(run.config.steps_per_call), Stride(VALIDATION_STEPS_PER_CALL)
    with contextlib.closing(bar), profiler(run.profile) as before_call:
        try:
            if not is_over(run.config, progress):
                _compile_validation(run, progress)
            while not is_over(run.config, progress):
                _train_epoch(run, progress, bar, before_call, training)
                validation = _validate(run, progress, validating)
                bar.close()
                _finish_epoch(run, progress, validation, validating)
        except _StopError:
            run.workers.part()
            return None
    run.workers.part()
    return progress


def is_over(config: TrainConfig, progress: Progress) -> bool:
    """Whether there is nothing left to train, or no hope of better."""
    patience_lost = progress.epoch - progress.best_epoch >= config.patience > 0
    return progress.epoch >= config.epochs or patience_lost


def _pause(run: Run, progress: Progress, stride: Stride) -> None:
    """Between two calls: saves if it is time, and saves and stops if that was asked for.

    Args:
        run: what the loop works with.
        progress: where it stands.
        stride: of the call before; the chief's becomes that of all.
    """
    run.stop.unsaved = True
    own = stride.steps if run.workers.is_chief else 0
    asked, due, steps = run.workers.total([run.stop.received, run.checkpoints.due(), own])
    stride.steps = int(steps)
    if asked or due or is_over(run.config, progress):
        run.checkpoints.save(progress, run.step(progress))
        if asked:
            raise _StopError
        run.stop.unsaved = False  # where a stop has come meanwhile, the process ends here


def _train_epoch(
    run: Run, progress: Progress, bar: Bar, before_call: Callable[[], None], stride: Stride
) -> None:
    """Takes the remaining steps of an epoch."""
    batches = data.cut(run.order(progress.epoch), run.config.batch_size)
    while progress.step_in_epoch < run.steps_per_epoch:
        first = progress.step_in_epoch
        last = min(first + stride.steps, run.steps_per_epoch)
        so_far = Totals(progress.loss_sum, progress.correct)
        before_call()
        started = time.monotonic()
        sums = run.train(
            batches.indices[first:last], batches.mask[first:last], progress.epoch, so_far
        )
        loss, correct = float(sums.loss), int(sums.correct)
        seconds = time.monotonic() - started
        if not np.isfinite(loss):
            _tell_bad_step(run, progress, loss, last - first)
        stride.took(last - first, seconds)
        progress.seconds += seconds
        progress.loss_sum, progress.correct = loss, correct
        progress.step_in_epoch = last
        seen = int(batches.mask[:last].sum())
        bar.update(progress, seen, taken=last - first)
        _pause(run, progress, stride)


def _tell_bad_step(run: Run, stands: Progress, loss: float, taken: int) -> NoReturn:
    """Names the step whose loss is not finite, by taking again the steps since the last save.

    Args:
        run: what the loop works with.
        stands: the progress before the call in which it came out.
        loss: what came out.
        taken: steps of that call.

    Raises:
        InputError: always.
    """
    where = f"in the {taken} steps from step {run.step(stands) + 1}"
    progress = run.checkpoints.rewind()
    while progress.epoch <= stands.epoch:
        batches = data.cut(run.order(progress.epoch), run.config.batch_size)
        for i in range(progress.step_in_epoch, run.steps_per_epoch):
            one = slice(i, i + 1)
            sums = run.train(batches.indices[one], batches.mask[one], progress.epoch)
            if not np.isfinite(float(sums.loss)):
                step = progress.epoch * run.steps_per_epoch + i + 1
                _refuse_loss(
                    run, float(sums.loss), f"at step {step}, in epoch {progress.epoch + 1}"
                )
        progress = Progress(epoch=progress.epoch + 1)
    _refuse_loss(run, loss, where)  # on devices that never compute the same twice


def _refuse_loss(run: Run, loss: float, where: str) -> NoReturn:
    run.workers.part()  # the loss is that of all workers, so all of them come here
    raise InputError(f"the loss is {loss} {where}; {ADVICE}")


def _validation_rows(run: Run) -> data.Batches:
    return data.cut(np.arange(run.validation_size, dtype=np.int32), run.evaluation_batch)


def _compile_validation(run: Run, progress: Progress) -> None:
    """Validates on a single batch, while a stop would lose nothing: its first call compiles."""
    if run.evaluate is not None:
        rows = _validation_rows(run)
        run.evaluate(rows.indices[:1], rows.mask[:1], progress.epoch)


def _validate(run: Run, progress: Progress, stride: Stride) -> Totals | None:
    """Loss and right answers, as means over the validation split."""
    if run.evaluate is None:
        return None
    rows = _validation_rows(run)
    sums, first = NOTHING, 0
    while first < len(rows.indices):
        if first:
            # Not after the last: what follows is quick, and worth saving.
            _pause(run, progress, stride)
        last = min(first + stride.steps, len(rows.indices))
        started = time.monotonic()
        sums = run.evaluate(rows.indices[first:last], rows.mask[first:last], progress.epoch, sums)
        loss = float(sums.loss)
        if not np.isfinite(loss):
            step, epoch = run.step(progress), progress.epoch + 1
            _refuse_loss(run, loss, f"on the validation split after step {step}, epoch {epoch}")
        stride.took(last - first, time.monotonic() - started)
        first = last
    return Totals(*(float(each) / run.validation_size for each in sums))


def _finish_epoch(run: Run, progress: Progress, validation: Totals | None, stride: Stride) -> None:
    """Reports an epoch; `progress` then stands at the start of the next one."""
    epoch, step = progress.epoch + 1, run.step(progress)
    line = {
        "epoch": epoch,
        "step": step,
        "loss": progress.loss_sum / run.train_size,
        "accuracy": progress.correct / run.train_size,
        "val_loss": validation and validation.loss,
        "val_accuracy": validation and validation.correct,
        "seconds": round(progress.seconds, 4),
        "examples_per_second": round(run.train_size / progress.seconds, 1),
    }
    with run.workers.together():
        weights = None
        if run.events is not None and run.events.wants_histograms(epoch, run.config.epochs):
            weights = run.evaluated()
            if not all(np.isfinite(weight).all() for weight in weights):
                raise InputError(f"the weights are not finite after step {step}; {ADVICE}")
        if run.workers.is_chief:
            # For people to read at once; it counts once a checkpoint holds it.
            run_folder.append_line(run.metrics, line)
            log.info("%s", describe_epoch(line, run.config.epochs))
        if run.events is not None:
            run.events.write(line, weights)
    progress.lines = (*progress.lines, line)
    following = next_epoch(run, progress, validation)
    for field in dataclasses.fields(Progress):
        setattr(progress, field.name, getattr(following, field.name))
    _pause(run, progress, stride)


def next_epoch(run: Run, progress: Progress, validation: Totals | None) -> Progress:
    """The start of the next epoch; where patience has an end, with the best weights so far.

    An epoch is better with a higher validation accuracy, or with the same and a lower loss.
    """
    following = Progress(
        epoch=progress.epoch + 1,
        best_epoch=progress.best_epoch,
        best_accuracy=progress.best_accuracy,
        best_loss=progress.best_loss,
        best_weights=progress.best_weights,
        lines=progress.lines,
    )
    if run.config.patience and validation is not None:
        best = (progress.best_accuracy, -progress.best_loss)
        if not progress.best_epoch or (validation.correct, -validation.loss) > best:
            following.best_epoch = following.epoch
            following.best_accuracy, following.best_loss = validation.correct, validation.loss
            following.best_weights = tuple(run.evaluated())
    return following
