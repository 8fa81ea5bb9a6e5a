"""`memory_bucket` for processes one after the other: its objects are kept in a folder."""

import datetime
import pickle
import urllib.parse
from pathlib import Path

import memory_bucket

from pipeline import gcs


class Objects(dict):
    """{name: Blob}, each of which is a file as well."""

    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)

    def file(self, name):
        return self.folder / urllib.parse.quote(name, safe="")

    def __setitem__(self, name, blob):
        super().__setitem__(name, blob)
        temporary = self.folder / ".incomplete"
        temporary.write_bytes(pickle.dumps((blob.content, blob.generation, blob.updated)))
        temporary.rename(self.file(name))

    def __delitem__(self, name):
        super().__delitem__(name)
        self.file(name).unlink()


class Bucket(memory_bucket.Bucket):
    """A bucket whose clock is this machine's."""

    def __init__(self, folder):
        super().__init__()
        self.objects = Objects(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name != ".incomplete":
                self.load(urllib.parse.unquote(path.name), *pickle.loads(path.read_bytes()))

    def load(self, name, content, generation, updated):
        blob = memory_bucket.Blob(self, name)
        self.store(blob, content)
        blob.generation, blob.updated = generation, updated
        self.objects[name] = blob
        self._generation = max(self._generation, generation)

    @property
    def clock(self):
        return datetime.datetime.now(datetime.UTC)

    @clock.setter
    def clock(self, _):
        pass


def use(folder):
    """Has this process find one bucket, under whatever name; returns it."""
    bucket = Bucket(Path(folder))
    gcs.bucket = lambda name: bucket
    return bucket
