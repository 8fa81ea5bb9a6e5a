"""A run before its first step: what it is, as all workers understand it, and what it reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from pipeline import models, storage
from pipeline.command import InputError, log
from pipeline.dataset import Manifest, check_files, load_manifest
from pipeline.storage import Place
from trainer import run_folder, warm_start
from trainer.checks import check_divides
from trainer.config import TrainConfig
from trainer.data import shards_of
from trainer.mirror import Mirror
from trainer.run_folder import Places
from trainer.sources import open_source, resolve_input
from trainer.staging import bring_dataset
from trainer.trained import Splits
from trainer.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run as all of its workers understand it.

    Attributes:
        config: how to train, everything resolved.
        manifest: on what.
        content: of ``config.json``.
        places: where the run belongs.
        mirror: where it writes.
        strategy: the replicas.
        workers: the part of this process among others.
    """

    config: TrainConfig
    manifest: Manifest
    content: dict[str, Any]
    places: Places[Place]
    mirror: Mirror
    strategy: tf.distribute.Strategy
    workers: Workers


class Read(NamedTuple):
    """What was read before a run begins.

    Attributes:
        splits: the data.
        directory: where it lies.
        initial: the first weights, if given.
        learned_from: what those were trained on; see `warm_start.learned_from`.
    """

    splits: Splits
    directory: Path
    initial: list[np.ndarray] | None
    learned_from: list[dict[str, Any]]


def settle(
    config: TrainConfig,
    manifest: Manifest,
    places: Places[Place],
    mirror: Mirror,
    strategy: tf.distribute.Strategy,
    workers: Workers,
) -> Job:
    """Fills in what this machine decides, and makes sure that the run can write.

    Raises:
        InputError: it cannot, or its folders hold another run, or the batch cannot be divided
            among so many replicas.
    """
    if workers.is_chief:
        run_folder.require_writable(places)
    if config.input == "auto":  # a run goes on as it began, whatever memory there is here
        began = run_folder.earlier_input(places)
        config = dataclasses.replace(config, input=began or "auto")
    config = _resolve(config, strategy, manifest)
    devices = [device.split("device:")[-1] for device in strategy.extended.worker_devices]
    content = run_folder.describe(config, manifest.dataset_id, devices)
    if workers.is_chief:  # before the data is read and any folder is made
        run_folder.check_same_run(places, content)
    return Job(
        config=config,
        manifest=manifest,
        content=content,
        places=places,
        mirror=mirror,
        strategy=strategy,
        workers=workers,
    )


def begin(job: Job, dataset_dir: Place, initial_weights: Place | None) -> Read | None:
    """Reads the data, takes the run folder, and finds what to go on from.

    Returns:
        What was read; None where the run has ended already.

    Raises:
        InputError: the data, the first weights or the run folder is not what it should be.
        LockedError: another process trains in these folders.
    """
    with job.workers.together():
        # Data is read before a run folder is made, so that a damaged set leaves nothing.
        there = job.workers.is_chief and job.places.run.is_dir()
        if there:
            _enter(job)
        found = _read(job, dataset_dir, initial_weights)
        if job.workers.is_chief and not there:
            _enter(job)
        finished = job.workers.is_chief and _is_done(job)
    if job.workers.agree(finished):
        if job.workers.is_chief:
            log.info("%s: already trained and exported", job.places.run)
        job.workers.part()
        return None
    with job.workers.together():  # after the chief has the lock: nobody else writes there
        job.mirror.bring_down()
    return found


def _enter(job: Job) -> None:
    """Takes the locks, and makes sure again that nobody has begun another run meanwhile."""
    job.mirror.hold()
    run_folder.check_same_run(job.places, job.content)


def _is_done(job: Job) -> bool:
    """Whether a process that was there before us has ended the run; else begins or goes on."""
    run_folder.tidy(job.places)
    if run_folder.is_finished(job.places, job.content):
        return True
    if (problem := models.damage(job.places.model)) is not None:
        log.warning("the exported model is damaged and is made anew: %s", problem)
    run_folder.make(job.mirror.here)
    storage.write_atomic(job.places.config, json.dumps(job.content, indent=2) + "\n")
    return False


def _read(job: Job, dataset_dir: Place, initial_weights: Place | None) -> Read:
    """Reads the data, and the weights to start from, where there are any."""
    config, manifest = job.config, job.manifest
    shards = [*shards_of(manifest, "train"), *shards_of(manifest, "validation")]
    directory = bring_dataset(dataset_dir, manifest, shards, job.mirror.scratch)
    splits = open_splits(config, directory, manifest)
    if initial_weights is None or config.initial_weights is None:
        return Read(splits, directory, None, [])
    warm_start.check_classes(initial_weights, manifest)
    initial = warm_start.load(initial_weights, config.initial_weights)
    return Read(splits, directory, initial, warm_start.learned_from(initial_weights))


def _resolve(
    config: TrainConfig, strategy: tf.distribute.Strategy, manifest: Manifest
) -> TrainConfig:
    """Fills in what this machine decides.

    Raises:
        InputError: the batch cannot be divided among so many replicas.
    """
    replicas = strategy.num_replicas_in_sync
    check_divides(config.batch_size, replicas, reproducible=config.reproducible)
    devices = strategy.extended.worker_devices
    return dataclasses.replace(
        config, replicas=replicas, input=resolve_input(config.input, manifest, devices)
    )


def open_dataset(directory: Place, config: TrainConfig) -> Manifest:
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
