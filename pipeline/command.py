"""What every command does alike: flags, one-line errors and exit codes.

Synopsis::

    def parse(argv: list[str]) -> Config: ...      # pure; raises InputError
    def execute(config: Config) -> int: ...        # returns an exit code

    def main() -> None:
        run("trainer.task", parse, execute)
"""

from __future__ import annotations

import argparse
import logging as std_logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from absl import app, logging
from absl.flags import argparse_flags

from pipeline import __version__

DONE = 0
BAD_INPUT = 2
KEPT_CHAMPION = 3
LOCKED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130
TERMINATED = 143

ConfigT = TypeVar("ConfigT")


class InputError(Exception):
    """The user's input is wrong. The message is one line: the name, the value, what was expected."""

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
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help lists the flags)\n")


def positive_int(text: str) -> int:
    """Parses a flag that counts something: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def fraction(text: str) -> float:
    """Parses a flag between 0 and 1, both included."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def run(
    prog: str, parse: Callable[[list[str]], ConfigT], execute: Callable[[ConfigT], int]
) -> NoReturn:
    """Parses the command line, runs the command and exits with its code.

    An `InputError` from either ends in one line on stderr and its exit code; any other
    exception is a failure of the job itself and keeps its traceback (exit code 1).
    """

    def guarded(step: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return step(argument)
        except InputError as error:
            print(f"python -m {prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print(f"python -m {prog}: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    def start(config: ConfigT) -> int:
        _plain_logging()
        return guarded(execute, config)

    app.run(start, flags_parser=lambda argv: guarded(parse, argv[1:]))


def _plain_logging() -> None:
    """Shows our own progress as plain lines, and of the libraries only what warns."""
    if logging.get_verbosity() == logging.WARNING:  # absl's default; a flag given is kept
        logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(_PlainFormatter())
    for library in ("apache_beam", "tensorflow", "tensorflow_datasets", "matplotlib", "fontTools"):
        std_logging.getLogger(library).setLevel(std_logging.WARNING)


class _PlainFormatter(std_logging.Formatter):
    def format(self, record: std_logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= std_logging.INFO else f"{record.levelname}: {text}"
