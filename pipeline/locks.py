"""The lock of a local folder: a file that the kernel locks for as long as its owner lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline import command
from pipeline.command import InputError, LockedError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def held(directory: Path) -> Iterator[int]:
    """`storage.locked` of a local folder."""
    path = directory / LOCK_NAME
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if os.path.lexists(directory) and not directory.is_dir():
                raise
            # It was there, and another has removed it before it could be looked at.
            raise LockedError(f"{directory}: another process is at work here") from None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another has removed the folder that we just found or made
            raise LockedError(f"{directory}: another process is at work here") from None
    except OSError as error:
        if error.errno in command.NO_ROOM:
            raise
        raise InputError(f"{directory}: cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            ours = False
        except OSError as error:
            raise InputError(f"{directory}: cannot be locked: {error.strerror}") from None
        if not ours:  # held by another, or removed with its folder as we opened it
            raise LockedError(f"{directory}: another process is at work here")
        yield descriptor
    finally:
        os.close(descriptor)
