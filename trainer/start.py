"""From a config to an exported model: reads the data, builds the run, trains, exports."""

from __future__ import annotations

import json
import os

import tensorflow as tf

from pipeline import command
from pipeline.command import log
from pipeline.storage import Place
from trainer.checkpoints import Checkpoints, Progress
from trainer.config import TrainConfig
from trainer.data import first_images
from trainer.events import EventWriter
from trainer.export import describe, export
from trainer.job import Job, Read, begin, open_dataset, settle
from trainer.loop import train
from trainer.meeting import meet
from trainer.mirror import Mirror
from trainer.progress import table
from trainer.run import Run
from trainer.run_folder import Places
from trainer.stop import StopSignal
from trainer.strategy import join, make_strategy, told_of_others
from trainer.trained import Splits, Trained, build, evaluation_batch
from trainer.workers import Workers, in_cluster, read_cluster

CHECKED_IMAGES = 64  # that a fresh process is asked about


def execute(
    config: TrainConfig,
    dataset_dir: Place,
    places: Places[Place],
    stop: StopSignal,
    *,
    checkpoint_seconds: float,
    profile: bool,
    initial_weights: Place | None = None,
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
    manifest = None if in_cluster() else open_dataset(dataset_dir, config)
    with told_of_others(stop), Mirror(places) as mirror:
        stop.last = mirror.end
        strategy, workers = _join(config, stop)
        with workers.together() as alike:
            manifest = manifest or open_dataset(dataset_dir, config)
            job = settle(config, manifest, places, mirror, strategy, workers)
            alike.update(job.content)
        found = begin(job, dataset_dir, initial_weights)
        if found is None:
            return command.DONE
        trained = build(job.config, strategy, found.splits, manifest.num_classes, found.initial)
        run = _make_run(job, found.splits, trained, stop, checkpoint_seconds, profile)
        _announce(run, strategy)
        progress = train(run)
        if progress is None:
            log.info("stopped by SIGTERM after saving; the same command goes on from here")
            return command.TERMINATED
        stop.unsaved = False  # from here on, a stop ends the process at once
        if workers.is_chief:
            sha256 = _export(job, run, trained, progress, found)
            stop.with_others = True  # but for what is half published
            mirror.publish()
            log.info("%s: exported, weights sha256 %s", places.model, sha256)
    return command.DONE


def _join(config: TrainConfig, stop: StopSignal) -> tuple[tf.distribute.Strategy, Workers]:
    """Meets the workers that train with this one, makes the replicas, and joins them.

    As it connects workers, TensorFlow takes the signal for itself, for good.
    """
    with stop.held():
        if in_cluster():
            stop.line = meet(read_cluster(os.environ.get("TF_CONFIG")))
            stop.with_others = True  # who connects to one that has ended waits in vain, and long
        strategy = make_strategy(config.replicas, tf32=config.tf32)
    stop.with_others = False
    return strategy, join(strategy)


def _make_run(
    job: Job,
    splits: Splits,
    trained: Trained,
    stop: StopSignal,
    checkpoint_seconds: float,
    profile: bool,
) -> Run:
    here, is_chief = job.mirror.here, job.workers.is_chief
    return Run(
        config=job.config,
        train=trained.train,
        evaluate=trained.evaluate,
        evaluated=trained.evaluated,
        evaluation_batch=evaluation_batch(job.strategy),
        order=splits.train.order,
        train_size=splits.train.size,
        validation_size=splits.validation.size if splits.validation else 0,
        checkpoints=Checkpoints(
            here.checkpoints,
            trained,
            run=job.content,
            seconds=checkpoint_seconds,
            writes=is_chief,
            after=job.mirror.saved,
            shown=job.places.checkpoints,
        ),
        metrics=here.metrics,
        events=EventWriter(here.tensorboard) if is_chief else None,
        stop=stop,
        workers=job.workers,
        profile=here.tensorboard if profile and is_chief else None,
    )


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


def _export(job: Job, run: Run, trained: Trained, progress: Progress, read: Read) -> str:
    """Shows the final table and exports the best weights, where there are any, else the last.

    Args:
        job: the run.
        run: what the loop worked with.
        trained: as it left it.
        progress: where it ended.
        read: what it began with; the model is asked about images of its data.

    Returns:
        The checksum of the weights.
    """
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for row in table(lines, progress.best_epoch or progress.epoch):
        log.info("%s", row)
    weights = list(progress.best_weights) or trained.evaluated()
    description = describe(
        weights,
        run.config,
        job.manifest,
        progress,
        devices=job.content["devices"],
        learned_from=read.learned_from,
    )
    images = first_images(read.directory, job.manifest, CHECKED_IMAGES)
    export(trained.model.apply, weights, description, job.mirror.here, images)
    return description["weights_sha256"]
