"""What every command does alike: flags, one-line errors and exit codes.

Synopsis::

    def parse(argv: list[str]) -> Config: ...      # pure; raises InputError
    def execute(config: Config) -> int: ...        # returns an exit code

    def main() -> None:
        run("trainer.task", parse, execute)
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags
from absl import logging as absl_logging
from absl.flags import argparse_flags

from pipeline import __version__

DONE = 0
FAILED = 1
BAD_INPUT = 2
KEPT_CHAMPION = 3
# What a stage tells the chain; to anybody else it is FAILED.
UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h
FULL_DISK = 74  # EX_IOERR
LOCKED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130
TERMINATED = 143

ADVICE = "no room left on the disk; once there is some, the same command goes on from here"

STAGE_VARIABLE = "DIGITS_STAGE"  # of the environment: set where the chain started this process

ConfigT = TypeVar("ConfigT")

# What Beam warns of wherever the parts of it that are not used here were not installed, and of
# each worker process or service that it starts.
REMARKS = (
    "apitools not found",
    "Resource module is not available",
    "No semi_persistent_directory",
    "Really starting service",
    "Really destroying service",
    "Authentication failed using Compute Engine",  # the command says it in its own words
)

# How Python, and behind a semicolon TensorFlow, says that there is no room, and where. Beam and
# TensorFlow wrap the errors of their steps in their own: what is left of them is this text.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM_TEXT = re.compile(
    r"(?P<tf>[^\s;]+); (?:{said})"
    r"|\[Errno (?:{codes})\] (?:{said})(?:: '(?P<os>[^'\n]+)'(?: -> '(?P<to>[^'\n]+)')?)?".format(
        said="|".join(map(os.strerror, NO_ROOM)), codes="|".join(map(str, NO_ROOM))
    )
)

# Our own lines, apart from absl's logger, on which TensorFlow writes as well.
log = logging.getLogger("digits_pipeline")


def show(text: str) -> None:
    """Prints a result; a reader that has gone away (``| head``) is no reason to fail."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the rest of the process


def aligned(
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    least: int = 0,
    gap: str = "  ",
) -> list[str]:
    """Lays out rows of cells as lines of text, in columns as wide as their longest cell.

    Args:
        rows: of as many cells each.
        left: the numbers of the columns that begin alike; the others end alike, as numbers do.
        least: how wide a column is at least.
        gap: what stands between two columns.
    """
    widths = [max(least, *map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class InputError(Exception):
    """The user's input is wrong; the message names it, its value and what was expected."""

    exit_code = BAD_INPUT


def full_disk(error: BaseException | None) -> str | None:
    """Names the file or folder for which there was no room, if an exception comes from that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return str(error.filename2 or error.filename or "the disk")
        if found := NO_ROOM_TEXT.search(str(error)):
            return found["tf"] or found["to"] or found["os"] or "the disk"
        error = error.__cause__ or error.__context__
    return None


class LockedError(InputError):
    """Another process holds the lock of this folder."""

    exit_code = LOCKED


class UnreachableError(InputError):
    """A server does not answer, or not as it should, or has no room: no fault of the input's."""

    exit_code = UNREACHABLE


class FailedError(InputError):
    """The job itself failed, for a reason that one line tells."""

    exit_code = FAILED


class StoppedError(BaseException):
    """A SIGTERM came; the message says what became of the work. No `except Exception` takes it."""


class Parser(argparse_flags.ArgumentParser):
    """An argument parser whose errors are one line and whose flags are never abbreviated.

    absl's own flags (``--verbosity`` and the like) are understood as well.
    """

    def __init__(self, prog: str, description: str, **kwargs: Any) -> None:
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line and exits with 2."""
        print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def positive_int(text: str) -> int:
    """Parses a flag that counts something: an integer of at least 1."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")


def natural(text: str) -> int:
    """Parses a flag that counts something which may be missing: an integer of at least 0."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text}")


def above_zero(unit: str) -> Callable[[str], float]:
    """Makes the parser of a flag that says how many of a unit, in a fraction perhaps: above 0."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (value := float(text)) < float("inf"):
                return value
        raise argparse.ArgumentTypeError(f"expected a number of {unit} above 0, got {text}")

    return parse


def fraction(text: str) -> float:
    """Parses a flag between 0 and 1, both included."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")


def open_fraction(text: str) -> float:
    """Parses a flag between 0 and 1, neither included."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, got {text}")


def run(
    prog: str, parse: Callable[[list[str]], ConfigT], execute: Callable[[ConfigT], int]
) -> NoReturn:
    """Parses the command line, runs the command and exits with its code.

    An `InputError` from either ends in one line on stderr and its exit code, and so does a wrong
    value of one of absl's flags; a silent server and a full disk end in one line and exit code 1.
    Any other exception is a failure of the job itself and keeps its traceback (exit code 1).
    """

    def guarded(step: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return step(argument)
        except (InputError, flags.Error) as error:
            print(f"python -m {prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(_told(getattr(error, "exit_code", BAD_INPUT)))
        except KeyboardInterrupt:
            print(f"python -m {prog}: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except StoppedError as error:
            print(f"python -m {prog}: stopped: {error}", file=sys.stderr)
            sys.exit(TERMINATED)
        except Exception as error:
            if (place := full_disk(error)) is None:
                raise
            print(f"python -m {prog}: error: {place}: {ADVICE}", file=sys.stderr)
            sys.exit(_told(FULL_DISK))

    def plain(argv: list[str]) -> ConfigT:
        handler = absl_logging.get_absl_handler()
        handler.setFormatter(_PlainFormatter())
        handler.addFilter(_worth_showing)
        log.setLevel(logging.INFO)
        return guarded(parse, argv[1:])

    app.run(lambda config: guarded(execute, config), flags_parser=plain)


def _told(code: int) -> int:
    """The exit code of a command: some tell the chain alone what it was that failed."""
    for_chain = code in (FULL_DISK, UNREACHABLE) and STAGE_VARIABLE not in os.environ
    return FAILED if for_chain else code


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def _worth_showing(record: logging.LogRecord) -> bool:
    """Keeps our own lines, and of the libraries only what warns of something.

    Beam logs an `InputError` of a worker, and that the disk is full, with its traceback; the
    command says it in one line.
    """
    asked = absl_logging.get_verbosity()
    if asked >= absl_logging.DEBUG:
        return True
    if record.levelno <= logging.INFO:
        return record.name == log.name and asked >= absl_logging.WARNING  # absl's default
    error = record.exc_info[1] if record.exc_info else None
    said = record.getMessage()
    return not (
        isinstance(error, InputError)
        or full_disk(error) is not None
        or f"{__name__}.InputError" in said
        or f"{__name__}.UnreachableError" in said
        or NO_ROOM_TEXT.search(said) is not None
        or any(remark in said for remark in REMARKS)
    )


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Holds back what a library's C++ part writes to stderr as it loads, unless loading fails.

    TensorFlow notes there, below any log level it can be given, that it found no GPU and which
    instructions the processor has. It also leaves Keras out; see `without_keras`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes, without_keras():
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def without_keras() -> Iterator[None]:
    """Lets TensorFlow load as it does where Keras is not installed: in about half the time.

    TensorFlow imports Keras, and that scikit-learn and matplotlib, only to register its classes,
    of which nothing here is made. Afterwards ``tf.keras`` is there for whoever asks for it.
    """
    if "keras" in sys.modules:
        yield
        return
    sys.modules["keras"] = None  # type: ignore[assignment]  # makes its import an ImportError
    try:
        yield
    finally:
        del sys.modules["keras"]
