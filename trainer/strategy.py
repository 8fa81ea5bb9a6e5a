"""Replicas: which devices a run uses."""

from __future__ import annotations

import tensorflow as tf

from pipeline.command import InputError


def make_strategy(replicas: int | None) -> tf.distribute.MirroredStrategy:
    """Mirrors the model over GPUs where there are any, else over logical CPUs.

    Must come before anything else runs on a device: logical CPUs are made at start-up.

    Args:
        replicas: how many; None: every visible GPU, else one CPU.

    Raises:
        InputError: more replicas than GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
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
