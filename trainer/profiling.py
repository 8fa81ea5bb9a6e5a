"""A trace of a few calls, as TensorBoard's profile plugin opens it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf

from pipeline.command import log

PROFILED_CALLS = range(1, 4)  # the first one compiles


@contextlib.contextmanager
def profiler(directory: Path | None) -> Iterator[Callable[[], None]]:
    """Yields what to call before each call; a few of them are traced.

    Args:
        directory: of TensorBoard's files; None traces nothing.
    """
    calls = 0
    tracing = False

    def before_call() -> None:
        nonlocal calls, tracing
        wanted = directory is not None and calls in PROFILED_CALLS
        calls += 1
        if wanted and not tracing:
            tf.profiler.experimental.start(str(directory))
        elif tracing and not wanted:
            tf.profiler.experimental.stop()
        tracing = wanted

    try:
        yield before_call
    finally:
        if tracing:
            tf.profiler.experimental.stop()
        if directory is not None and calls <= PROFILED_CALLS.start:
            log.warning("too few calls to profile; a smaller --steps_per_call makes more")
