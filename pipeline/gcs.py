"""Objects in Cloud Storage buckets behind the few names of pathlib that the job uses.

An object appears whole, under its final name, or not at all. Every change states the generation
(the number of one content of an object) that it follows on, so that trying it again does no harm
and nobody replaces what he has not seen.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import io
import os
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import google_crc32c

from pipeline.command import InputError, LockedError
from pipeline.gcs_client import AbsentError, UnmetError, bucket, patience, told

SCHEME = "gs://"
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
MAX_KEY_BYTES = 1024
ATTEMPTS = 5  # to replace an object that others replace as well
SESSION_BYTES = 8 << 20  # above which the client uploads in several requests


class ChangedError(LockedError):
    """An object is not of the generation that was expected: somebody else is at work there."""

    def __init__(self, what: GcsPath | str) -> None:
        """`what`: the object; or the whole message, of which Beam makes an error anew."""
        said = (
            what if isinstance(what, str) else f"{what}: was changed by another process meanwhile"
        )
        super().__init__(said)


class Stat(NamedTuple):
    """What the server knows of an object; `st_size` in bytes, as `os.stat_result` has it."""

    st_size: int
    generation: int
    crc32c: str
    updated: datetime.datetime


@dataclasses.dataclass(frozen=True, order=True)
class GcsPath:
    """The name of an object, or of a folder: of all objects whose names begin so.

    Attributes:
        bucket: its bucket.
        key: its name there, parts joined by ``/``; empty for the whole bucket.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> GcsPath:
        return GcsPath(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part; empty for a bucket."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> GcsPath:
        """The folder it is in; a bucket is in itself."""
        return GcsPath(self.bucket, self.key.rpartition("/")[0])

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on: ``.gz``."""
        stem, dot, end = self.name.rpartition(".")
        return dot + end if stem and end else ""

    def absolute(self) -> GcsPath:
        """The same: a name in a bucket depends on no current folder."""
        return self

    def relative_to(self, folder: GcsPath) -> str:
        """The rest of the name, seen from a folder that it is in."""
        return self.key.removeprefix(folder._prefix)

    # Reading

    def find(self, *, seconds: float | None = None) -> Stat | None:
        """What the server knows of the object; None if there is none. `seconds`: see `put`."""
        if not self.key:
            return None
        with told(self):
            return _stat(bucket(self.bucket).get_blob(self.key, **patience(seconds)))

    def stat(self) -> Stat:
        """The same; FileNotFoundError if there is none."""
        if (found := self.find()) is None:
            raise self._missing()
        return found

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self.find() is not None

    def is_dir(self) -> bool:
        """Whether there are objects in this folder."""
        return next(self._list(max_results=1), None) is not None

    def exists(self) -> bool:
        """Whether there is either."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[GcsPath]:
        """Yields what is in a folder; nothing where there is none."""
        options = {"prefix": self._prefix, "delimiter": "/"}
        try:
            with told(self):
                listing = bucket(self.bucket).list_blobs(**options, **patience())
                keys = [blob.name for blob in listing]
                keys += [prefix.removesuffix("/") for prefix in listing.prefixes]
        except AbsentError:
            raise _no_bucket(self) from None
        for key in keys:
            if key != self._prefix:  # an empty object that a console made to show a folder
                yield GcsPath(self.bucket, key)

    def glob(self, pattern: str) -> Iterator[GcsPath]:
        """Yields what is in a folder and has a name of this form."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def walk(self) -> dict[str, Stat]:
        """{name, seen from here: what is known} of every object under a folder."""
        return {
            path.relative_to(self): stat for path, stat in self._list() if path.key != self._prefix
        }

    def read_bytes(self) -> bytes:
        """The content, checked against the server's checksum; FileNotFoundError if absent."""
        try:
            with told(self):
                return self._blob().download_as_bytes(
                    raw_download=True, checksum="crc32c", **patience()
                )
        except AbsentError:
            raise self._missing() from None

    def download(self, file: IO[bytes]) -> None:
        """Writes the content to a file as it arrives, checked as `read_bytes` checks it."""
        try:
            with told(self):
                self._blob().download_to_file(
                    file, raw_download=True, checksum="crc32c", **patience()
                )
        except AbsentError:
            raise self._missing() from None

    def read_range(self, first: int, size: int, generation: int) -> bytes:
        """Some bytes of the content that has this generation.

        Raises:
            InputError: it has another by now.
        """
        try:
            with told(self):
                data: bytes = self._blob().download_as_bytes(
                    start=first,
                    end=first + size - 1,
                    if_generation_match=generation,
                    raw_download=True,
                    checksum=None,  # there is none of a range
                    **patience(),
                )
        except (AbsentError, UnmetError):
            raise InputError(f"{self}: changed while it was read") from None
        if len(data) != size:
            raise InputError(f"{self}: changed while it was read")
        return data

    def read_text(self) -> str:
        """The content as UTF-8."""
        return self.read_bytes().decode()

    # Writing

    def write_bytes(self, data: bytes | IO[bytes]) -> Stat:
        """Writes or replaces the object; the last of several writers wins."""
        for _ in range(ATTEMPTS):
            found = self.find()
            with contextlib.suppress(ChangedError):
                return self.put(data, found.generation if found else 0)
        raise ChangedError(self)

    def put(
        self, data: bytes | IO[bytes], generation: int, *, seconds: float | None = None
    ) -> Stat:
        """Writes the object if it is of this generation; 0: if there is none.

        An object that has the very content already is taken for ours: a first attempt may have
        succeeded although its answer was lost.

        Args:
            data: the content.
            generation: the one that is replaced.
            seconds: that one request may take, and that it is tried again, if not the usual.

        Raises:
            ChangedError: it is of another generation.
        """
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        size, checksum = measure(file)
        for _ in range(ATTEMPTS):
            try:
                return self._upload(file, size, generation, seconds)
            except AbsentError:
                # Of several requests, the last may have been done although its answer was lost:
                # the server then knows nothing of them any more. Another attempt finds out.
                if size <= SESSION_BYTES:
                    break
            except UnmetError:
                return self._as_wanted(size, checksum, seconds)
        raise _no_bucket(self)

    def copy(self, source: GcsPath, stat: Stat) -> None:
        """Becomes a copy, made by the server, of another object where there is none yet.

        Raises:
            ChangedError: there is one with other content, or the source is not as stated.
        """
        try:
            with told(self):
                target, origin, token = self._blob(), source._blob(), None
                while True:
                    token, _, _ = target.rewrite(
                        origin,
                        token=token,
                        if_generation_match=0,
                        if_source_generation_match=stat.generation,
                        **patience(),
                    )
                    if token is None:
                        return
        except AbsentError:
            raise ChangedError(source) from None
        except UnmetError:
            self._as_wanted(stat.st_size, stat.crc32c)

    def unlink(self, missing_ok: bool = False, *, generation: int | None = None) -> None:
        """Removes the object, if it is of this generation.

        Raises:
            FileNotFoundError: there is none, and that is not all right.
            ChangedError: it is of another generation.
        """
        if not missing_ok:
            self.stat()  # later on, its absence may be our own doing, whose answer was lost
        try:
            with contextlib.suppress(AbsentError), told(self):
                self._blob().delete(if_generation_match=generation, **patience())
        except UnmetError:
            raise ChangedError(self) from None

    # How

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _blob(self) -> Any:
        return bucket(self.bucket).blob(self.key)

    def _list(self, **options: Any) -> Iterator[tuple[GcsPath, Stat]]:
        try:
            with told(self):
                for blob in bucket(self.bucket).list_blobs(
                    prefix=self._prefix, **options, **patience()
                ):
                    yield GcsPath(self.bucket, blob.name), _stat(blob)  # type: ignore[misc]
        except AbsentError:
            raise _no_bucket(self) from None

    def _upload(self, file: IO[bytes], size: int, generation: int, seconds: float | None) -> Stat:
        with told(self):
            blob = self._blob()
            blob.upload_from_file(
                file,
                rewind=True,
                size=size,
                content_type="application/octet-stream",
                if_generation_match=generation,
                checksum="crc32c",
                **patience(seconds),
            )
            return _stat(blob)  # type: ignore[return-value]

    def _as_wanted(self, size: int, checksum: str, seconds: float | None = None) -> Stat:
        found = self.find(seconds=seconds)
        if found is None or (found.st_size, found.crc32c) != (size, checksum):
            raise ChangedError(self)
        return found

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))


def parse(text: str) -> GcsPath:
    """Parses ``gs://bucket/some/folder``.

    Raises:
        InputError: it is not of that form.
    """
    name, _, key = text.removeprefix(SCHEME).partition("/")
    key = key.removesuffix("/")
    if not text.startswith(SCHEME) or not BUCKET_NAME.fullmatch(name):
        raise InputError(f"{text}: expected gs://bucket/path, with the name of a bucket")
    if key and not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise InputError(f"{text}: has an empty part, or . or .. as one; expected plain names")
    if len(key.encode(errors="replace")) > MAX_KEY_BYTES or not key.isprintable():
        raise InputError(f"{text}: expected at most {MAX_KEY_BYTES} bytes of printable text")
    return GcsPath(name, key)


def _stat(blob: Any) -> Stat | None:
    return blob and Stat(blob.size, blob.generation, blob.crc32c, blob.updated)


def measure(file: IO[bytes]) -> tuple[int, str]:
    """The size of a file's content and its CRC32C, written as the server writes it."""
    file.seek(0)
    checksum = google_crc32c.Checksum()
    while chunk := file.read(1 << 20):
        checksum.update(chunk)
    return file.tell(), base64.b64encode(checksum.digest()).decode()


def crc32c(data: bytes) -> str:
    """The CRC32C of a content, written as the server writes it."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _no_bucket(path: GcsPath) -> InputError:
    return InputError(f"{path}: there is no bucket {path.bucket}")
