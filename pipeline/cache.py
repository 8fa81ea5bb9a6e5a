"""Folders of a bucket brought down whole, for libraries that read local files alone.

Where ``DIGITS_CACHE_DIR`` names a folder, what is brought down is kept there, under a name made of
the names, sizes and checksums of its files: a changed folder has another name, equal ones share
one, and what is found damaged is brought down anew. Nothing of it is removed here, as another
process may be reading it. Else it goes away after use.

Synopsis::

    with cache.local(folder) as directory:  # a local folder is itself
        tf.saved_model.load(str(directory))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline import reading, storage
from pipeline.command import InputError, LockedError
from pipeline.gcs import GcsPath, Stat, measure
from pipeline.storage import Place

VARIABLE = "DIGITS_CACHE_DIR"
WAIT_SECONDS = 0.1  # between two looks whether another process has brought a folder down


@contextlib.contextmanager
def local(folder: Place) -> Iterator[Path]:
    """Yields a local folder of the same files: a local one itself, else a copy, to be read only.

    Raises:
        InputError: the folder cannot be read, or changes meanwhile, or the cache cannot be used.
    """
    if not isinstance(folder, GcsPath):
        yield folder
        return
    # Not the empty objects that a console makes to show a folder.
    files = {name: stat for name, stat in folder.walk().items() if not name.endswith("/")}
    if (kept := kept_folder()) is not None:
        yield _kept(folder, files, kept / entry_name(files))
        return
    with tempfile.TemporaryDirectory(prefix="digits-") as temporary:
        _bring(folder, files, Path(temporary))
        yield Path(temporary)


def kept_folder() -> Path | None:
    """Where what is brought down is kept; None: it goes away after use.

    Raises:
        InputError: it cannot be.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    try:
        folder = storage.folder(named)
        storage.require_writable(folder)
    except InputError as error:
        raise InputError(f"{VARIABLE}: {error}") from None
    return folder


def entry_name(files: Mapping[str, Stat]) -> str:
    """Where a folder is kept: 32 hex digits over the names, sizes and checksums of its files."""
    content = sorted((name, stat.st_size, stat.crc32c) for name, stat in files.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def is_whole(directory: Path, files: Mapping[str, Stat]) -> bool:
    """Whether a folder holds these files and no others, by their sizes and checksums."""
    if not directory.is_dir():
        return False
    if storage.walk(directory) != {name: stat.st_size for name, stat in files.items()}:
        return False
    for name, stat in files.items():
        with (directory / name).open("rb") as file:
            if measure(file) != (stat.st_size, stat.crc32c):
                return False
    return True


class _ThereError(Exception):
    """Another process has brought it down."""


def _kept(folder: GcsPath, files: Mapping[str, Stat], entry: Path) -> Path:
    """Brings a folder down where that has not been done; waits where another process does it."""
    while not is_whole(entry, files):
        try:
            with storage.published_whole(entry, replace=True) as staging:
                if is_whole(entry, files):  # just before we took the lock; it may be in use
                    raise _ThereError
                _bring(folder, files, staging)
        except _ThereError:
            break
        except LockedError:
            time.sleep(WAIT_SECONDS)
    return entry


def _bring(folder: GcsPath, files: Mapping[str, Stat], directory: Path) -> None:
    """Downloads files and holds them to what the listing said of them.

    Raises:
        InputError: one has changed since, or has a name that leads elsewhere.
    """

    def bring(name: str) -> None:
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"{folder / name}: has an empty part, or . or .. as one")
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("wb") as file, storage.named(target):
                (folder / name).download(file)
        except FileNotFoundError:
            raise InputError(f"{folder / name}: changed while it was read") from None
        with target.open("rb") as file:
            if measure(file) != (files[name].st_size, files[name].crc32c):
                raise InputError(f"{folder / name}: changed while it was read")

    for _ in reading.each(folder, bring, files):
        pass
