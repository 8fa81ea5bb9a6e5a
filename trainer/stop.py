"""A request to stop (SIGTERM): what is worth saving is saved, then the process ends, at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from pipeline.command import TERMINATED, log

GRACE_SECONDS = 5.0
GRACE_WITH_OTHERS_SECONDS = 20.0
SECOND_SIGNAL_SECONDS = 2.0
LOOK_SECONDS = 0.05


class StopSignal:
    """Remembers a SIGTERM for the loop to see, and ends the process where the loop cannot look.

    Python runs a handler only between two of its own instructions, and not while TensorFlow
    compiles, reads or multiplies. A thread therefore waits on the file descriptor on which the
    interpreter's C handler reports signals. It leaves the loop `GRACE_SECONDS` to save and
    return where something is `unsaved`, and more where others train `with_others`; else, or
    later, it ends the process itself, which is safe at any moment: every file is written beside
    its name and renamed.

    A second signal ends the wait, unless it comes at once: a signal to a whole group of
    processes arrives twice, from its sender and from the parent that hands it on.

    Attributes:
        received: whether a stop was asked for.
        unsaved: whether steps were taken that no checkpoint holds.
        with_others: whether something is under way with others, other workers or a server, that
            only the process itself can bring to an end.
        last: called in the thread before it ends the process, but for a second signal.
    """

    def __init__(self) -> None:
        self.received = False
        self.unsaved = False
        self.with_others = False
        self.last: Callable[[], None] = lambda: None
        self._closed = False
        self._reports, self._reporter = socket.socketpair()
        self._reports.settimeout(LOOK_SECONDS)
        self._reporter.setblocking(False)
        self._handler_before = signal.getsignal(signal.SIGTERM)
        self.listen()
        self._reporter_before = signal.set_wakeup_fd(
            self._reporter.fileno(), warn_on_full_buffer=False
        )
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: Any) -> None:
        """Leaves signals as they were; from here on the process ends by itself."""
        self._closed = True
        self._thread.join()
        signal.set_wakeup_fd(self._reporter_before)
        signal.signal(signal.SIGTERM, self._handler_before)
        self._reports.close()
        self._reporter.close()

    def listen(self) -> None:
        """Takes the signal, again where something else has: a cluster of TensorFlow's does."""
        signal.signal(signal.SIGTERM, self._handle)

    def saved(self) -> None:
        """Tells that a checkpoint holds every step.

        Once a stop was asked for, the loop that saved for its sake is about to return, and is
        still left the time for it.
        """
        if not self.received:
            self.unsaved = False

    def _handle(self, _: int, __: FrameType | None) -> None:
        self.received = True

    def _grace(self) -> float:
        """How long the loop is left to end by itself, in seconds."""
        if self.with_others:
            return GRACE_WITH_OTHERS_SECONDS
        return GRACE_SECONDS if self.unsaved else -1.0

    def _watch(self) -> None:
        since = None
        while not self._closed:
            signals = b""
            with contextlib.suppress(TimeoutError):
                signals = self._reports.recv(64)
            now = time.monotonic()
            if signal.SIGTERM in signals:
                self.received = True
                if since is not None and now - since > SECOND_SIGNAL_SECONDS:
                    break
                since = now if since is None else since
            if since is not None and now - since > self._grace():
                self.last()
                break
        if not self._closed:
            log.info("stopped by SIGTERM; the same command goes on from the last checkpoint")
            os._exit(TERMINATED)
