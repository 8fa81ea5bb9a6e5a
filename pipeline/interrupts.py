"""SIGTERM and Ctrl-C as exceptions, that wait while something must not be cut short."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from pipeline.command import StoppedError


class Interrupts:
    """Inside, the first SIGTERM raises `StoppedError`, and a Ctrl-C KeyboardInterrupt.

    What comes after the first ends the process as it otherwise would.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._held = False
        self._came: BaseException | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What comes inside is raised at its end, in the place of an error that ends it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._came is not None:
                raise self._came

    def _handle(self, number: int, _: object) -> None:
        self._restore()
        self._came = KeyboardInterrupt() if number == signal.SIGINT else StoppedError("a SIGTERM")
        if not self._held:
            raise self._came

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
