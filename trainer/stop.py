"""A request to stop (SIGTERM): what is worth saving is saved, then the process ends, at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pipeline.command import TERMINATED, log
from trainer.meeting import Line

GRACE_SECONDS = 5.0
GRACE_WITH_OTHERS_SECONDS = 20.0
SECOND_SIGNAL_SECONDS = 2.0
LOOK_SECONDS = 0.05


class StopSignal:
    """Remembers a SIGTERM for the loop to see, and ends the process where the loop cannot look.

    Python runs a handler only between two of its own instructions, and not while TensorFlow
    compiles, reads or multiplies. A thread therefore waits on the file descriptor on which the
    interpreter's C handler reports signals. It leaves the loop `GRACE_SECONDS` to save and
    return where something is `unsaved`, and more where other workers have to come as far; else,
    or later, it ends the process itself, which is safe at any moment: every file is written
    beside its name and renamed. The other workers are told at once, and do the same.

    A second signal ends the wait, unless it comes at once: a signal to a whole group of
    processes arrives twice, from its sender and from the parent that hands it on.

    Attributes:
        received: whether a stop was asked for, here or of another worker.
        unsaved: whether steps were taken that no checkpoint holds, or the loop that has saved them
            for the sake of a stop is about to return.
        with_others: whether something is under way with others, other workers or a server, that
            only the process itself can bring to an end.
        line: to the other workers, if there are any.
        last: called in the thread before it ends the process, but for a second signal.
    """

    def __init__(self) -> None:
        self.received = False
        self.unsaved = False
        self.with_others = False
        self.line: Line | None = None
        self.last: Callable[[], None] = lambda: None
        self._closed = False
        self._reports, self._reporter = socket.socketpair()
        self._reports.settimeout(LOOK_SECONDS)
        self._reporter.setblocking(False)
        self._handler_before = signal.getsignal(signal.SIGTERM)
        self._listen()
        self._reporter_before = signal.set_wakeup_fd(
            self._reporter.fileno(), warn_on_full_buffer=False
        )
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        with self.held():
            self._thread.start()  # the signal is never its own to take

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
        if self.line is not None:
            self.line.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block in which something else may take the signal for itself, and gets none.

        One that comes waits for the end of the block, where this takes it again; only the
        watching thread sees it before. Threads that start in the block never get one.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            self._listen()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self, seconds: float) -> bool:
        """Whether a stop was asked for, now or within some seconds."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return self.received

    def _listen(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _: int, __: FrameType | None) -> None:
        self.received = True

    def _grace(self) -> float:
        """How long the loop is left to end by itself, in seconds."""
        if self.with_others or (self.unsaved and self.line is not None):
            return GRACE_WITH_OTHERS_SECONDS
        return GRACE_SECONDS if self.unsaved else -1.0

    def _watch(self) -> None:
        since = signalled = None  # when a stop was asked for, and when by a signal to this process
        while not self._closed:
            signals = b""
            with contextlib.suppress(TimeoutError):
                signals = self._reports.recv(64)
            now = time.monotonic()
            came = signal.SIGTERM in signals
            if came and signalled is not None and now - signalled > SECOND_SIGNAL_SECONDS:
                break
            if signalled is None and (came or signal.SIGTERM in signal.sigpending()):
                signalled = now
            told = self.line is not None and self.line.heard()
            if since is None and (told or signalled is not None):
                self.received = True
                since = now
                if self.line is not None:
                    self.line.tell()
            if since is not None and now - since > self._grace():
                self.last()
                break
        if not self._closed:
            log.info("stopped by SIGTERM; the same command goes on from the last checkpoint")
            os._exit(TERMINATED)
