"""Replicas and workers: which devices a run uses, and what lies on each."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.command import InputError
from trainer.stop import StopSignal
from trainer.workers import EndedError, Workers, in_cluster

CONNECT_SECONDS = 300.0  # for what takes less than one, or where GPUs are slow to start, several
NEWS_SECONDS = 1.0  # that the word of a stop comes at most after the end of who was told to


def make_strategy(replicas: int | None, *, tf32: bool = False) -> tf.distribute.Strategy:
    """Mirrors the model over GPUs where there are any, else over logical CPUs.

    With TF_CONFIG set to a cluster of several workers, over all of their devices: every GPU,
    or the one CPU, of each; they should have met. Must come before anything else runs on a
    device, because logical CPUs, and the connections of a cluster, are made at start-up.

    Args:
        replicas: how many in all; None: every visible GPU, else one CPU.
        tf32: whether GPUs may round the factors of a matrix product to 10 bits.

    Raises:
        InputError: more replicas than GPUs, another number than the workers have, or a
            TF_CONFIG that describes no cluster.
    """
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:  # some of their kernels add up in any order otherwise
        tf.config.experimental.enable_op_determinism()
    if in_cluster():
        strategy = _connect()
        if replicas not in (None, strategy.num_replicas_in_sync):
            raise InputError(
                f"--replicas {replicas}: the workers of TF_CONFIG have"
                f" {strategy.num_replicas_in_sync} devices in all"
            )
        return strategy
    if gpus:
        if replicas is not None and replicas > len(gpus):
            raise InputError(
                f"--replicas {replicas}: this machine has {len(gpus)} GPUs; to train on logical"
                " CPUs instead, hide them with CUDA_VISIBLE_DEVICES=-1"
            )
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(replicas or len(gpus))])
    count = replicas or 1
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def _connect() -> tf.distribute.Strategy:
    """Makes the strategy of all workers.

    Where all have come, TensorFlow takes moments; but where one of them has ended in between, it
    may wait without end, and lets nothing of Python run: what ends the process then is a thread of
    C's.
    """
    faulthandler.dump_traceback_later(CONNECT_SECONDS, exit=True)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes; of several workers, the first one does."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type is None:
        return True
    if "chief" in resolver.cluster_spec().as_dict():
        return resolver.task_type == "chief"
    return resolver.task_id == 0


def join(strategy: tf.distribute.Strategy) -> Workers:
    """This process among the workers of a strategy."""
    if strategy.num_replicas_in_sync == len(strategy.extended.worker_devices):
        return Workers()
    total = make_total(strategy)

    def part() -> None:
        with contextlib.suppress(*PEER_ERRORS):  # the others have heard, and have ended
            total([0.0])

    return Workers(
        is_chief=is_chief(strategy),
        total=total,
        part=part,
        exchange=make_exchange(strategy),
    )


# What TensorFlow raises of a collective whose other end is gone: at once where its connection
# breaks, or when it has been silent for too long.
PEER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


@contextlib.contextmanager
def told_of_others(stop: StopSignal) -> Iterator[None]:
    """Says in one line that another worker has ended, where that is why this one fails.

    Raises:
        EndedError: another worker has ended.
    """
    try:
        yield
    except PEER_ERRORS as error:
        if not in_cluster():
            raise
        raise EndedError(stopped=stop.wait(NEWS_SECONDS)) from error


def make_total(strategy: tf.distribute.Strategy) -> Callable[[Sequence[float]], list[float]]:
    """Makes what adds up numbers over all workers, as float32; they must call it together."""
    own = len(strategy.extended.worker_devices)

    @tf.function
    def summed(values):  # type: ignore[no-untyped-def]
        def on_replica(value):  # type: ignore[no-untyped-def]
            value = tf.identity(value)  # on this replica's device, where the sum is wanted
            return tf.distribute.get_replica_context().all_reduce("SUM", value)

        return strategy.experimental_local_results(strategy.run(on_replica, (values,)))[0]

    def total(values: Sequence[float]) -> list[float]:
        given = np.array(values, np.float32)
        # A worker speaks once, however many replicas it has.
        said = per_replica(strategy, lambda replica: given * np.float32(replica % own == 0))
        return summed(said).numpy().tolist()

    return total


def make_exchange(strategy: tf.distribute.Strategy) -> Callable[[str], list[str]]:
    """Makes what brings a text of each worker to all of them; they must call it together."""
    own = len(strategy.extended.worker_devices)

    @tf.function
    def gathered(values):  # type: ignore[no-untyped-def]
        def on_replica(value):  # type: ignore[no-untyped-def]
            value = tf.identity(value)[tf.newaxis]
            return tf.distribute.get_replica_context().all_gather(value, axis=0)

        return strategy.experimental_local_results(strategy.run(on_replica, (values,)))[0]

    def rows(values: np.ndarray) -> np.ndarray:
        """[n] of each worker -> [workers, n]; bytes as floats, which every device sends."""
        return gathered(per_replica(strategy, lambda _: values.astype(np.float32))).numpy()[::own]

    def exchange(text: str) -> list[str]:
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = rows(np.array([len(data)])).astype(int)[:, 0]
        found = rows(np.pad(data, (0, max(1, sizes.max()) - len(data)))).astype(np.uint8)
        return [row[:n].tobytes().decode() for row, n in zip(found, sizes, strict=True)]

    return exchange


def shares_memory(strategy: tf.distribute.Strategy) -> bool:
    """Whether all replicas are CPUs of this process."""
    devices = strategy.extended.worker_devices
    alone = len(devices) == strategy.num_replicas_in_sync
    return alone and all("CPU:" in device for device in devices)


def own_replicas(strategy: tf.distribute.Strategy) -> range:
    """The numbers, among all replicas, of those of this process."""
    count = len(strategy.extended.worker_devices)
    resolver = strategy.cluster_resolver
    if strategy.num_replicas_in_sync == count or resolver is None:
        return range(count)
    workers_before = resolver.task_id
    if resolver.task_type == "worker":
        workers_before += len(resolver.cluster_spec().as_dict().get("chief", []))
    return range(workers_before * count, (workers_before + 1) * count)


def columns(strategy: tf.distribute.Strategy, replica: int, batch_size: int) -> slice:
    """The part of a global batch that is a replica's share."""
    size = batch_size // strategy.num_replicas_in_sync
    return slice(replica * size, (replica + 1) * size)


def per_replica(
    strategy: tf.distribute.Strategy, value_of: Callable[[int], Any]
) -> tf.distribute.DistributedValues:
    """Puts ``value_of(replica)`` on the device of each replica of this process."""
    devices = strategy.extended.worker_devices

    def on_device(context: tf.distribute.ValueContext) -> tf.Tensor:
        replica = context.replica_id_in_sync_group
        with tf.device(devices[replica % len(devices)]):  # else all would lie on the first
            return tf.identity(tf.convert_to_tensor(value_of(replica)))

    return strategy.experimental_distribute_values_from_function(on_device)


def shares(strategy: tf.distribute.Strategy, values: np.ndarray) -> tf.distribute.DistributedValues:
    """Gives each replica its columns of [steps, batch]."""
    return per_replica(
        strategy, lambda replica: values[:, columns(strategy, replica, values.shape[1])]
    )
