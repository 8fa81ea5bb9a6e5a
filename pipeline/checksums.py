"""The files of a folder, by size and checksum: copied, and held to what was noted of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.storage import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSum:
    """A file's size in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str


def file_sum(content: bytes) -> FileSum:
    """What is noted of a file."""
    return FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def sums(folder: Place) -> dict[str, FileSum]:
    """What is noted of every file under a folder, by its name seen from there."""
    return {name: file_sum((folder / name).read_bytes()) for name in sorted(storage.walk(folder))}


def plain(files: Mapping[str, FileSum]) -> dict[str, dict[str, Any]]:
    """What is noted of files as JSON has it."""
    return {name: dataclasses.asdict(noted) for name, noted in files.items()}


def parse(raw: Any) -> dict[str, FileSum]:
    """Reads `plain` back; another version may have noted more of a file.

    Raises:
        TypeError, ValueError, KeyError: it is something else.
    """
    return {
        name: FileSum(bytes=noted["bytes"], sha256=noted["sha256"])
        for name, noted in dict(raw).items()
    }


def copy_file(source: Place, target: Place) -> FileSum:
    """Copies a file, folders to it included, and notes what was written."""
    content = source.read_bytes()
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(target, content)
    return file_sum(content)


def damage(
    folder: Place, files: Mapping[str, FileSum], *, besides: Collection[str] = ()
) -> list[str]:
    """Compares a folder with what was noted of it, by names and sizes: without reading a file.

    Args:
        folder: the folder.
        files: what was noted.
        besides: files that have to be there as well, of any content.

    Returns:
        A line for each file that is missing, of another size, or not noted.
    """
    found = storage.walk(folder)
    problems = [f"{folder / name}: missing" for name in (*besides, *files) if name not in found]
    problems += [
        f"{folder / name}: has {found[name]} bytes, expected {noted.bytes}"
        for name, noted in files.items()
        if name in found and found[name] != noted.bytes
    ]
    extra = found.keys() - files.keys() - set(besides)
    return problems + [f"{folder / name}: belongs to no model" for name in sorted(extra)]


def deep_damage(
    folder: Place, files: Mapping[str, FileSum], *, besides: Collection[str] = ()
) -> list[str]:
    """The same, and reads every file: its checksum has to be as noted."""
    sizes = storage.walk(folder)
    whole = [name for name, noted in files.items() if sizes.get(name) == noted.bytes]
    problems = damage(folder, files, besides=besides)
    for name in whole:
        try:
            if file_sum((folder / name).read_bytes()) != files[name]:
                problems.append(f"{folder / name}: has another checksum than it was published with")
        except FileNotFoundError:  # removed since it was listed
            problems.append(f"{folder / name}: missing")
    return problems
