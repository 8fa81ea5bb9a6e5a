"""The stages of the chain as processes of their own: the one place where they are started.

A stage dies with the process that started it, however that ends: on Linux the kernel kills it,
and anywhere `pipeline.watchdog` kills its whole process group, the workers of Beam among it, and
keeps the lock of the root until nothing of it is left. The lock of a root in a bucket lapses with
the process that holds it; a stage ends as well once another process has taken that lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import command, storage, watchdog
from pipeline.command import InputError, UnreachableError
from pipeline.leases import Lease
from pipeline.storage import Place

LOOK_SECONDS = 1.0  # how often it is looked whether the lock was lost
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StageError(Exception):
    """A stage did not end well.

    Attributes:
        stage: its module.
        code: its exit code; below 0, the number of the signal that killed it.
        stopped: whether the command itself was told to stop, which is no failure of the stage's.
    """

    def __init__(self, stage: str, code: int, *, stopped: bool = False) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"{stage} {how}")
        self.stage = stage
        self.code = code
        self.stopped = stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What the trainer made of its flags.

    Attributes:
        arguments: that are its own.
        rest: that are not.
        config: what they come to.
    """

    arguments: tuple[str, ...]
    rest: tuple[str, ...]
    config: dict[str, Any]


class Stages:
    """Runs stages one after another, each as its own process, and hands a SIGTERM on to them.

    Is a context: at its end no process of a stage is left.

    Attributes:
        lock: of the root, as `storage.locked` yields it.
    """

    def __init__(self, lock: storage.Lock) -> None:
        self.lock = lock
        self._passed = [lock] if isinstance(lock, int) else []  # to processes, by its descriptor
        self._process: subprocess.Popen | None = None
        self._stopping = False
        self._watchdog: subprocess.Popen | None = None
        signal.signal(signal.SIGTERM, self._stop)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.communicate()  # closes its pipe, which ends it

    def hold(self) -> None:
        """Does `storage.hold` for the lock of the root."""
        storage.hold(self.lock)

    def run(self, module: str, *arguments: str | Place) -> None:
        """Runs ``python -m module`` to its end, and that of all processes that it started.

        Raises:
            StageError: it did not exit with 0, or a SIGTERM came.
            LockedError: the lock of the root was lost; the stage was killed.
        """
        if self._stopping:
            raise StageError(module, command.TERMINATED, stopped=True)
        self.hold()
        pipe = self._pipe_to_watchdog()
        self._process = process = subprocess.Popen(
            _command(module, arguments),
            pass_fds=self._passed,
            env=os.environ | {command.STAGE_VARIABLE: module},
            start_new_session=True,  # its group is then its own, for the watchdog
            preexec_fn=_begins(os.getpid(), pipe),
        )
        try:
            if self._stopping:  # the signal came as the process was being made
                process.terminate()
            with self._killed_without_the_lock(process), contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays its
        except KeyboardInterrupt:  # the terminal tells us alone: it is in another session
            process.terminate()
            process.wait()
            raise
        finally:
            watchdog.kill_group(process.pid)
            os.write(pipe, b"0\n")
        code = process.wait()
        self.hold()
        if self._stopping:
            raise StageError(module, command.TERMINATED, stopped=True)
        if code:
            raise StageError(module, code)

    @contextlib.contextmanager
    def _killed_without_the_lock(self, process: subprocess.Popen) -> Iterator[None]:
        """Kills the group of a process, should the lock of the root be lost meanwhile."""
        if not isinstance(self.lock, Lease):
            yield
            return
        lease, ended = self.lock, threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_SECONDS):
                if lease.lost:
                    watchdog.kill_group(process.pid)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # while the number is the process's own

    def _pipe_to_watchdog(self) -> int:
        """The write end of its pipe, which no other process has."""
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                _command("pipeline.watchdog", ()),
                stdin=subprocess.PIPE,
                pass_fds=self._passed,
                start_new_session=True,
            )
        assert self._watchdog.stdin is not None
        return self._watchdog.stdin.fileno()

    def _stop(self, *_: object) -> None:
        self._stopping = True
        if self._process is not None:
            self._process.terminate()


def trainer_folders(run_dir: Place) -> list[str]:
    """Where the trainer writes: in the run folder, whatever a cloud's environment says."""
    places = {"model": "export", "checkpoint": "checkpoints", "tensorboard": "tensorboard"}
    inside = [f"--{name}_dir={run_dir / folder}" for name, folder in places.items()]
    return [f"--run_dir={run_dir}", *inside]


def ask_trainer(arguments: Sequence[str], *, initial_weights: Place | None = None) -> Training:
    """Asks the trainer which arguments are its own and what they come to.

    Args:
        arguments: of the command line.
        initial_weights: the model to start from, if it is not for them to say.

    Raises:
        InputError: it refuses the value of one, or one is for the chain to give.
        UnreachableError: the model to start from is on a server that does not answer.
        StageError: it ended in another way than with an answer; what it said went to stderr.
    """
    given = ["--dry_run=known", "--dataset_dir=-", *trainer_folders(Path("-"))]
    if initial_weights is not None:
        given.append(f"--initial_weights={initial_weights}")
    taken = {flag.split("=")[0] for flag in given}
    if named := [flag for flag in arguments if flag.split("=")[0] in taken]:
        raise InputError(f"{named[0]}: is for trainer.task alone; here it follows from --root")
    answer = subprocess.run(
        _command("trainer.task", (*given, *arguments)),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {command.STAGE_VARIABLE: "trainer.task"},
        preexec_fn=_dies_with(os.getpid()),
    )
    # A library of this process may speak first, in the child: gRPC does, of a fork.
    said = answer.stderr.rpartition("python -m trainer.task: error: ")[2].strip()
    if answer.returncode in (command.BAD_INPUT, command.UNREACHABLE):
        if answer.returncode == command.UNREACHABLE:
            raise UnreachableError(said)
        raise InputError(said or f"trainer.task refuses its flags: {' '.join(arguments)}")
    if answer.returncode:
        print(said, file=sys.stderr)
        raise StageError("trainer.task --dry_run", answer.returncode)
    config, unknown = map(json.loads, answer.stdout.splitlines())
    return Training(arguments=without(arguments, unknown), rest=tuple(unknown), config=config)


def without(arguments: Sequence[str], unknown: Sequence[str]) -> tuple[str, ...]:
    """The arguments that are left when those of another command, in the same order, are not."""
    left = list(unknown)
    kept = []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return tuple(kept)


def _command(module: str, arguments: Sequence[str | Place]) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What a child does first so that it ends with its parent; None where there is no way to."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec little is allowed

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it was asked for
            os._exit(command.TERMINATED)

    return ask_the_kernel


def _begins(parent: int, pipe: int) -> Callable[[], None]:
    """What a stage does first: it dies with its parent, and its group is known to the watchdog."""
    die_with = _dies_with(parent)

    def begin() -> None:
        os.write(pipe, b"%d\n" % os.getpid())  # here: the parent may not live to do it
        if die_with is not None:
            die_with()

    return begin
