"""From a config to an exported model: reads the data, builds the run, trains, exports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import command, storage
from pipeline.command import InputError, log
from pipeline.dataset import Manifest, check_files, load_manifest
from trainer import run_folder, warm_start
from trainer.checkpoints import Checkpoints, Progress
from trainer.checks import check_divides
from trainer.config import TrainConfig
from trainer.data import first_images
from trainer.events import EventWriter
from trainer.export import describe, export
from trainer.loop import train
from trainer.progress import table
from trainer.run import Run
from trainer.run_folder import Places
from trainer.sources import open_source, resolve_input
from trainer.stop import StopSignal
from trainer.strategy import join, make_strategy, told_of_others
from trainer.trained import Splits, Trained, build, evaluation_batch
from trainer.workers import in_cluster

CHECKED_IMAGES = 64  # that a fresh process is asked about


def execute(
    config: TrainConfig,
    dataset_dir: Path,
    places: Places,
    stop: StopSignal,
    *,
    checkpoint_seconds: float,
    profile: bool,
    initial_weights: Path | None = None,
) -> int:
    """Trains, or goes on training, and exports; returns an exit code.

    Args:
        config: how to train.
        dataset_dir: on what.
        places: where to write.
        stop: whether to stop.
        checkpoint_seconds: how much work a kill may cost: a checkpoint is written when so much
            time has passed since the one before, at the end, and before a stop.
        profile: whether to trace a few calls.
        initial_weights: the exported model that `config.initial_weights` is the checksum of.

    Raises:
        InputError: the dataset, the model to start from or the run folder is not what it should be.
        LockedError: another process trains in this folder.
    """
    # Before any device is used; but one of several workers has to join the others first.
    manifest = None if in_cluster() else _open_dataset(dataset_dir, config)
    with contextlib.ExitStack() as held:
        held.enter_context(told_of_others(stop))
        strategy = make_strategy(config.replicas, tf32=config.tf32)
        stop.listen()
        workers = join(strategy)
        stop.with_others = not workers.alone
        with workers.together() as alike:
            manifest = manifest or _open_dataset(dataset_dir, config)
            if workers.is_chief:
                run_folder.require_writable(places)
            config = _resolve(config, strategy, manifest)
            devices = [device.split("device:")[-1] for device in strategy.extended.worker_devices]
            content = run_folder.describe(config, manifest.dataset_id, devices)
            alike.update(content)
        with workers.together():
            # Data is read before a run folder is made, so that a damaged set leaves nothing.
            there = places.run.is_dir()
            if there and workers.is_chief:
                _enter(held, places, content)
            splits = open_splits(config, dataset_dir, manifest)
            initial = None
            if initial_weights is not None and config.initial_weights is not None:
                warm_start.check_classes(initial_weights, manifest)
                initial = warm_start.load(initial_weights, config.initial_weights)
            if not there and workers.is_chief:
                _enter(held, places, content)
            finished = workers.is_chief and _is_done(places, content)
        if workers.agree(finished):
            if workers.is_chief:
                log.info("%s: already trained and exported", places.run)
            workers.part()
            return command.DONE
        trained = build(config, strategy, splits, manifest.num_classes, initial)
        run = Run(
            config=config,
            train=trained.train,
            evaluate=trained.evaluate,
            evaluated=trained.evaluated,
            evaluation_batch=evaluation_batch(strategy),
            order=splits.train.order,
            train_size=splits.train.size,
            validation_size=splits.validation.size if splits.validation else 0,
            checkpoints=Checkpoints(
                places.checkpoints,
                trained,
                run=run_folder.identity(content),
                seconds=checkpoint_seconds,
                writes=workers.is_chief,
            ),
            metrics=places.metrics,
            events=EventWriter(places.tensorboard) if workers.is_chief else None,
            stop=stop,
            workers=workers,
            profile=places.tensorboard if profile and workers.is_chief else None,
        )
        _announce(run, strategy)
        progress = train(run)
        if progress is None:
            log.info("stopped by SIGTERM after saving; the same command goes on from here")
            return command.TERMINATED
        stop.unsaved = stop.with_others = False  # from here on, a stop ends the process at once
        if not workers.is_chief:
            return command.DONE
        images = first_images(dataset_dir, manifest, CHECKED_IMAGES)
        _export(run, trained, manifest, places, progress, images)
    return command.DONE


def _enter(held: contextlib.ExitStack, places: Places, content: dict[str, Any]) -> None:
    """Takes the lock of the run folder, and makes sure that it holds no other run."""
    held.enter_context(storage.locked(places.run))
    run_folder.check_same_run(places, content)


def _is_done(places: Places, content: dict[str, Any]) -> bool:
    """Whether a process that was there before us has ended the run; else begins or goes on."""
    run_folder.tidy(places)
    if run_folder.is_finished(places, content):
        return True
    storage.write_atomic(places.config, json.dumps(content, indent=2) + "\n")
    return False


def _resolve(
    config: TrainConfig, strategy: tf.distribute.Strategy, manifest: Manifest
) -> TrainConfig:
    """Fills in what this machine decides.

    Raises:
        InputError: the batch cannot be divided among so many replicas.
    """
    replicas = strategy.num_replicas_in_sync
    check_divides(config.batch_size, replicas, reproducible=config.reproducible)
    own = len(strategy.extended.worker_devices)
    return dataclasses.replace(
        config, replicas=replicas, input=resolve_input(config.input, manifest, own)
    )


def _open_dataset(directory: Path, config: TrainConfig) -> Manifest:
    """Reads the manifest, and checks the splits and their files by size alone.

    Raises:
        InputError: there is no valid manifest, a file is missing or has another size than it says,
            or there is nothing to train on or to judge by.
    """
    manifest = load_manifest(directory)
    check_files(directory, manifest, "train", "validation")
    if not manifest.splits["train"].num_examples:
        raise InputError(f"{directory}: its train split has no examples")
    if config.patience and not manifest.splits["validation"].num_examples:
        raise InputError(
            f"--patience {config.patience}: expected 0, as {directory} has no validation split"
            " to judge by"
        )
    return manifest


def open_splits(config: TrainConfig, directory: Path, manifest: Manifest) -> Splits:
    """Opens the splits that a run needs.

    Raises:
        InputError: a file is not what the manifest says.
    """
    train = open_source(directory, manifest, config.train_on, config.seed, config.input)
    if "validation" in config.train_on or not manifest.splits["validation"].num_examples:
        return Splits(train, None)
    return Splits(train, open_source(directory, manifest, "validation", None, config.input))


def _announce(run: Run, strategy: tf.distribute.Strategy) -> None:
    log.info(
        "%s: %s examples, batch %d, %d epochs, on %d x %s",
        run.config.preset,
        f"{run.train_size:,}",
        run.config.batch_size,
        run.config.epochs,
        strategy.num_replicas_in_sync,
        strategy.extended.worker_devices[0].split(":")[-2],
    )


def _export(
    run: Run,
    trained: Trained,
    manifest: Manifest,
    places: Places,
    progress: Progress,
    images: np.ndarray,
) -> None:
    """Shows the final table and exports the best weights, where there are any, else the last."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for row in table(lines, progress.best_epoch or progress.epoch):
        log.info("%s", row)
    weights = list(progress.best_weights) or trained.evaluated()
    description = describe(weights, run.config, manifest, progress)
    export(trained.model.apply, weights, description, places, images)
    log.info("%s: exported, weights sha256 %s", places.model, description["weights_sha256"])
