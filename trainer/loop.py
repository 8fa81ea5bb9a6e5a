"""The outer loop: epochs, validation, metrics, checkpoints, and a stop in good order."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pipeline import command, storage
from pipeline.command import InputError, log
from pipeline.dataset import NUM_PIXELS, Manifest, load_manifest
from trainer import data
from trainer.checkpoints import Checkpoints, Progress
from trainer.config import TrainConfig, check_divides
from trainer.events import EventWriter
from trainer.export import METRICS_FILE, export
from trainer.model import MLP
from trainer.optimizers import Adam
from trainer.step import StepsFunction, make_evaluate, make_train_steps
from trainer.strategy import make_strategy

EVALUATION_BATCH = 1000
SECOND_SIGNAL_SECONDS = 2.0


class StopSignal:
    """Remembers a SIGTERM, so that the loop can stop between two calls.

    A second one kills, unless it comes at once: a signal to a whole group of processes arrives
    twice, from its sender and from the parent that hands it on.
    """

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self.received:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SECOND_SIGNAL_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self.received = True


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the loop works with.

    Attributes:
        config: how to train, `replicas` resolved.
        train: compiled steps over the train split.
        evaluate: compiled pass over the validation split; None where there is no validation.
        evaluation_batch: rows in each of its steps.
        train_size: examples of the train split.
        validation_size: examples of the validation split.
        checkpoints: of the run folder.
        events: TensorBoard's file.
        metrics: the path of ``metrics.jsonl``.
        stop: whether a stop was asked for.
    """

    config: TrainConfig
    train: StepsFunction
    evaluate: StepsFunction | None
    evaluation_batch: int
    train_size: int
    validation_size: int
    checkpoints: Checkpoints
    events: EventWriter
    metrics: Path
    stop: Callable[[], bool]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last may be a partial batch."""
        return -(-self.train_size // self.config.batch_size)


def execute(config: TrainConfig, dataset_dir: Path, run_dir: Path) -> int:
    """Trains, or goes on training, and exports; returns an exit code.

    Raises:
        InputError: the dataset or the run folder is not what it should be.
        LockedError: another process trains in this folder.
    """
    manifest = load_manifest(dataset_dir)
    for split in ("train", "validation"):
        check_present(dataset_dir, manifest, split)
    if not manifest.splits["train"].num_examples:
        raise InputError(f"{dataset_dir}: its train split has no examples")
    stop = StopSignal()
    strategy = make_strategy(config.replicas)
    config = dataclasses.replace(config, replicas=strategy.num_replicas_in_sync)
    check_divides(config.batch_size, strategy.num_replicas_in_sync)
    # Read before the run folder is made, so that a damaged dataset leaves nothing behind.
    train_split = data.load_split(dataset_dir, manifest, "train")
    validation = data.load_split(dataset_dir, manifest, "validation")
    with storage.locked(run_dir):
        open_run(run_dir, config, strategy, manifest)
        if (run_dir / "export" / "model.json").is_file():
            log.info("%s: already trained and exported", run_dir)
            return command.DONE
        run, model = _prepare(
            config, strategy, train_split, validation, manifest.num_classes, run_dir, stop
        )
        if not train(run):
            log.info("stopped by SIGTERM after saving; the same command goes on from here")
            return command.TERMINATED
        description = export(model, config, manifest.dataset_id, run.metrics, run_dir / "export")
    log.info("%s: exported, weights sha256 %s", run_dir / "export", description["weights_sha256"])
    return command.DONE


def check_present(directory: Path, manifest: Manifest, split: str) -> None:
    """Checks the files of a split by size alone, before the machinery starts.

    Raises:
        InputError: a file is missing or has another size than the manifest says.
    """
    for shard in manifest.splits[split].shards:
        path = directory / shard.file
        if not path.is_file():
            raise InputError(f"{path}: missing; the manifest names it")
        if path.stat().st_size != shard.bytes:
            raise InputError(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {shard.bytes}"
            )


def open_run(
    run_dir: Path, config: TrainConfig, strategy: tf.distribute.Strategy, manifest: Manifest
) -> None:
    """Writes ``config.json``, or makes sure that an earlier one asked for the same run.

    Raises:
        InputError: the folder holds another run.
    """
    path = run_dir / "config.json"
    devices = [device.split("device:")[-1] for device in strategy.extended.worker_devices]
    content: dict[str, Any] = dataclasses.asdict(config) | {
        "hidden_units": list(config.hidden_units),
        "dataset_id": manifest.dataset_id,
        "devices": devices,
    }
    if not path.exists():
        storage.write_atomic(path, json.dumps(content, indent=2) + "\n")
        return
    try:
        earlier = json.loads(path.read_text())
        different = sorted(k for k in earlier | content if earlier.get(k) != content.get(k))
    except (ValueError, TypeError):
        raise InputError(f"{path}: not the config of a run") from None
    if different:
        name = different[0]
        raise InputError(
            f"{run_dir}: holds a run with {name} {earlier.get(name)}, not {content.get(name)};"
            " expected a new folder, or the flags it was started with"
        )


def _prepare(
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    train: data.Examples,
    validation: data.Examples,
    num_classes: int,
    run_dir: Path,
    stop: StopSignal,
) -> tuple[Run, MLP]:
    """Builds the model on every replica, the compiled functions and what a run writes."""
    with strategy.scope():
        model = MLP(NUM_PIXELS, config.hidden_units, num_classes, seed=config.seed)
        optimizer = Adam(
            model.weights,
            learning_rate=config.learning_rate,
            beta_1=config.beta_1,
            beta_2=config.beta_2,
            epsilon=config.epsilon,
        )
    batch = evaluation_batch(strategy)
    run = Run(
        config=config,
        train=make_train_steps(strategy, model, optimizer, train, config.batch_size),
        evaluate=make_evaluate(strategy, model, validation, batch)
        if len(validation.labels)
        else None,
        evaluation_batch=batch,
        train_size=len(train.labels),
        validation_size=len(validation.labels),
        checkpoints=Checkpoints(run_dir / "checkpoints", model, optimizer),
        events=EventWriter(run_dir / "tensorboard"),
        metrics=run_dir / METRICS_FILE,
        stop=lambda: stop.received,
    )
    log.info(
        "%s: %s examples, batch %d, %d epochs, on %d x %s",
        config.preset,
        f"{run.train_size:,}",
        config.batch_size,
        config.epochs,
        config.replicas or 1,
        strategy.extended.worker_devices[0].split(":")[-2],
    )
    return run, model


def evaluation_batch(strategy: tf.distribute.Strategy) -> int:
    """A batch for validation that the replicas can share."""
    replicas = strategy.num_replicas_in_sync
    return -(-EVALUATION_BATCH // replicas) * replicas


def train(run: Run) -> bool:
    """Trains from where the run stands to its last epoch; False when stopped before."""
    progress = run.checkpoints.restore()
    _keep_lines(run.metrics, progress.epoch)
    while progress.epoch < run.config.epochs:
        for _ in _epoch(run, progress):
            # An epoch whose steps are done is finished first, because its checkpoint would
            # bear the number of one saved here, and a kill in between would damage both.
            if run.stop() and progress.step_in_epoch < run.steps_per_epoch:
                run.checkpoints.save(progress, _total_steps(run, progress))
                return False
        _finish_epoch(run, progress)
        if run.stop() and progress.epoch < run.config.epochs:
            return False
    return True


def _total_steps(run: Run, progress: Progress) -> int:
    return progress.epoch * run.steps_per_epoch + progress.step_in_epoch


def _epoch(run: Run, progress: Progress) -> Iterator[None]:
    """Takes the remaining steps of an epoch, and yields after each call.

    The calls of an epoch begin at multiples of `steps_per_call` whatever happened before, so
    that its sums are added in the same order, and come out equal, after a stop.
    """
    order = data.epoch_order(run.config.seed, progress.epoch, run.train_size)
    batches = data.cut(order, run.config.batch_size)
    label = f"epoch {progress.epoch + 1}/{run.config.epochs}"
    with tqdm(
        total=run.steps_per_epoch,
        initial=progress.step_in_epoch,
        desc=label,
        unit="step",
        leave=False,
        disable=None,
    ) as bar:
        while progress.step_in_epoch < run.steps_per_epoch:
            steps = slice(
                progress.step_in_epoch, progress.step_in_epoch + run.config.steps_per_call
            )
            started = time.monotonic()
            sums = run.train(batches.indices[steps], batches.mask[steps])
            progress.loss_sum += float(sums.loss)
            progress.correct += int(sums.correct)
            progress.seconds += time.monotonic() - started
            taken = len(batches.indices[steps])
            progress.step_in_epoch += taken
            _require_finite(
                progress.loss_sum,
                f"in epoch {progress.epoch + 1}, steps {steps.start} to {progress.step_in_epoch}",
            )
            bar.update(taken)
            yield


def _require_finite(loss: float, where: str) -> None:
    """Stops a run that has diverged, saying where, before it saves what is lost."""
    if not np.isfinite(loss):
        raise InputError(f"the loss is {loss} {where}; a smaller --learning_rate may help")


def _finish_epoch(run: Run, progress: Progress) -> None:
    """Validates, reports and saves; `progress` then stands at the start of the next epoch."""
    line = {
        "epoch": progress.epoch + 1,
        "step": _total_steps(run, progress),
        "loss": progress.loss_sum / run.train_size,
        "accuracy": progress.correct / run.train_size,
        **_validate(run, progress.epoch + 1),
        "seconds": round(progress.seconds, 4),
        "examples_per_second": round(run.train_size / progress.seconds, 1),
    }
    # The line comes before the checkpoint: one that has no checkpoint is written again.
    with run.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    run.events.write(line)
    log.info("%s", describe_epoch(line, run.config.epochs))
    step = _total_steps(run, progress)
    for field in dataclasses.fields(Progress):
        setattr(
            progress, field.name, field.default if field.name != "epoch" else progress.epoch + 1
        )
    run.checkpoints.save(progress, step)


def _validate(run: Run, epoch: int) -> dict[str, float | None]:
    if run.evaluate is None:
        return {"val_loss": None, "val_accuracy": None}
    rows = data.cut(np.arange(run.validation_size, dtype=np.int32), run.evaluation_batch)
    sums = run.evaluate(rows.indices, rows.mask)
    _require_finite(float(sums.loss), f"on the validation split after epoch {epoch}")
    return {
        "val_loss": float(sums.loss) / run.validation_size,
        "val_accuracy": int(sums.correct) / run.validation_size,
    }


def describe_epoch(line: dict[str, Any], epochs: int) -> str:
    """One line of ``metrics.jsonl`` as a person reads it."""
    text = (
        f"epoch {line['epoch']}/{epochs}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.4f}"
    )
    if line["val_accuracy"] is not None:
        text += f", validation loss {line['val_loss']:.4f}, accuracy {line['val_accuracy']:.4f}"
    return f"{text} ({line['seconds']:.1f} s, {line['examples_per_second']:,.0f} examples/s)"


def _keep_lines(path: Path, epochs: int) -> None:
    """Drops the lines of epochs that no checkpoint holds."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    storage.write_atomic(path, "".join(lines[:epochs]))
