"""A bucket in the memory of the tests, as strict as Cloud Storage is.

It keeps generation preconditions on every change (fake-gcs-server does on uploads only), has a
clock that tests can move, and can run something before any one change of an object: another
process, or this one's end.
"""

import base64
import datetime
import threading

import google_crc32c
from google.api_core import exceptions

from pipeline.gcs import GcsPath

PIECE = 8192  # a download arrives in such pieces


class KilledError(BaseException):
    """The process has ended here; nothing it does from then on happens."""


def put_tree(bucket, folder, prefix):
    """Puts every file under a local folder in a bucket; returns its gs:// folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            bucket.store(bucket.blob(name), path.read_bytes())
    return GcsPath("bucket", prefix)


class Bucket:
    """What `pipeline.gcs` asks of a google.cloud.storage.Bucket.

    Attributes:
        objects: {name: Blob}.
        clock: what the server's clock shows.
        changes: how many changes were asked for.
        looks: how many times it was asked for what it holds.
        before: called with the number of a change before it is made.
    """

    def __init__(self):
        self.objects = {}
        self.clock = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        self.changes = self.looks = 0
        self.before = lambda number: None
        self._generation = 0
        self.lock = threading.RLock()

    def contents(self):
        return {name: blob.content for name, blob in sorted(self.objects.items())}

    def blob(self, name):
        return Blob(self, name)

    def get_blob(self, name, **_):
        self.looks += 1
        return self.objects.get(name)

    def list_blobs(self, prefix, delimiter=None, max_results=None, **_):
        self.looks += 1
        with self.lock:
            found = [self.objects[n] for n in sorted(self.objects) if n.startswith(prefix)]
        rest = [blob.name[len(prefix) :] for blob in found]
        listing = Listing(found[:max_results])
        if delimiter:
            listing = Listing(b for b, name in zip(found, rest, strict=True) if "/" not in name)
            listing.prefixes = {prefix + n.split("/")[0] + "/" for n in rest if "/" in n}
        return listing

    def announce(self):
        """Counts a change that is about to be made."""
        with self.lock:
            number, self.changes = self.changes, self.changes + 1
        self.before(number)

    def require(self, name, expected):
        """Refuses a change where the object is not of the expected generation."""
        found = self.objects[name].generation if name in self.objects else 0
        if expected is not None and expected != found:
            raise exceptions.PreconditionFailed(f"{name} is of {found}, not {expected}")

    def store(self, blob, content):
        self._generation += 1
        blob.content, blob.size, blob.generation = content, len(content), self._generation
        digest = google_crc32c.Checksum(content).digest()
        blob.crc32c, blob.updated = base64.b64encode(digest).decode(), self.clock
        self.objects[blob.name] = blob


class Listing(list):
    prefixes = ()


class Blob:
    """What is asked of a google.cloud.storage.Blob."""

    def __init__(self, bucket, name):
        self.bucket, self.name = bucket, name

    def upload_from_file(self, file, *, if_generation_match, **_):
        file.seek(0)
        content = file.read()
        self.bucket.announce()
        with self.bucket.lock:
            self.bucket.require(self.name, if_generation_match)
            self.bucket.store(self, content)

    def rewrite(self, source, *, if_generation_match, if_source_generation_match, **_):
        self.bucket.announce()
        with self.bucket.lock:
            self.bucket.require(self.name, if_generation_match)
            if (found := self.bucket.objects.get(source.name)) is None:
                raise exceptions.NotFound(source.name)
            if found.generation != if_source_generation_match:
                raise exceptions.PreconditionFailed(source.name)
            self.bucket.store(self, found.content)
        return None, len(found.content), len(found.content)

    def delete(self, *, if_generation_match, **_):
        self.bucket.announce()
        with self.bucket.lock:
            if self.name not in self.bucket.objects:
                raise exceptions.NotFound(self.name)
            self.bucket.require(self.name, if_generation_match)
            del self.bucket.objects[self.name]

    def download_as_bytes(self, *, start=0, end=None, if_generation_match=None, **_):
        with self.bucket.lock:
            content = self._found().content
            self.bucket.require(self.name, if_generation_match)
        if start and start >= len(content):
            raise exceptions.RequestRangeNotSatisfiable(self.name)
        return content[start : None if end is None else end + 1]

    def download_to_file(self, file, **_):
        content = self._found().content
        for first in range(0, len(content), PIECE):
            file.write(content[first : first + PIECE])

    def _found(self):
        self.bucket.looks += 1
        if self.name not in self.bucket.objects:
            raise exceptions.NotFound(self.name)
        return self.bucket.objects[self.name]
