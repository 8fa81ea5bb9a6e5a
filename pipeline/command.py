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
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from absl import app, flags
from absl import logging as absl_logging
from absl.flags import argparse_flags

from pipeline import __version__

DONE = 0
BAD_INPUT = 2
KEPT_CHAMPION = 3
LOCKED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130
TERMINATED = 143

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

# Our own lines, apart from absl's logger, on which TensorFlow writes as well.
log = logging.getLogger("digits_pipeline")


def show(text: str) -> None:
    """Prints a result; a reader that has gone away (``| head``) is no reason to fail."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the rest of the process


class InputError(Exception):
    """The user's input is wrong; the message names it, its value and what was expected."""

    exit_code = BAD_INPUT


class LockedError(InputError):
    """Another process holds the lock of this folder."""

    exit_code = LOCKED


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


def fraction(text: str) -> float:
    """Parses a flag between 0 and 1, both included."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")


def run(
    prog: str, parse: Callable[[list[str]], ConfigT], execute: Callable[[ConfigT], int]
) -> NoReturn:
    """Parses the command line, runs the command and exits with its code.

    An `InputError` from either ends in one line on stderr and its exit code, and so does a wrong
    value of one of absl's flags; any other exception is a failure of the job itself and keeps
    its traceback (exit code 1).
    """

    def guarded(step: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return step(argument)
        except (InputError, flags.Error) as error:
            print(f"python -m {prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", BAD_INPUT))
        except KeyboardInterrupt:
            print(f"python -m {prog}: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    def plain(argv: list[str]) -> ConfigT:
        handler = absl_logging.get_absl_handler()
        handler.setFormatter(_PlainFormatter())
        handler.addFilter(_worth_showing)
        log.setLevel(logging.INFO)
        return guarded(parse, argv[1:])

    app.run(lambda config: guarded(execute, config), flags_parser=plain)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def _worth_showing(record: logging.LogRecord) -> bool:
    """Keeps our own lines, and of the libraries only what warns of something.

    Beam logs an `InputError` of a worker with its traceback; the command says it in one line.
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
        or f"{__name__}.InputError" in said
        or any(remark in said for remark in REMARKS)
    )


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Holds back what a library's C++ part writes to stderr as it loads, unless loading fails.

    TensorFlow notes there, below any log level it can be given, that it found no GPU and which
    instructions the processor has.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes:
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
