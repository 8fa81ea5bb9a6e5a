"""Files that others keep, in a local folder and in a bucket: read alike."""

import io
import os
import threading

import memory_bucket
import pytest

from pipeline import gcs, reading
from pipeline.command import InputError
from pipeline.gcs import GcsPath
from pipeline.reading import NO_FILE, NotAFileError, Stamp


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    return memory


FILES = {"a": b"12345", "b": b"", "sub/c": b"3", "x.png/y": b"4"}


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path, bucket):
    """A folder of `FILES`."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    put = memory_bucket.put_tree(bucket, tmp_path, "data/in")
    return tmp_path if request.param == "local" else put


def test_stamps(folder):
    found = reading.stamps(folder)
    assert {name: stamp.size for name, stamp in found.items()} == {
        "a": 5,
        "b": 0,
        "sub": -1,
        "x.png": -1,
    }
    assert found["sub"] == found["x.png"] == NO_FILE
    assert all(found[name].version > 0 for name in "ab")


def test_stamp_tells_a_change(folder, bucket):
    before = reading.stamps(folder)
    if isinstance(folder, GcsPath):
        (folder / "a").write_bytes(b"54321")
    else:
        os.utime(folder / "a", ns=(1, before["a"].version + 1))
    after = reading.stamps(folder)
    assert [name for name in before if before[name] != after[name]] == ["a"]


def test_stamps_of_what_is_no_file(tmp_path):
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"1")
    os.mkfifo(tmp_path / "pipe")
    found = reading.stamps(tmp_path)
    assert found["gone"] == found["pipe"] == NO_FILE
    assert found["link"] == found["file"] == Stamp(1, (tmp_path / "file").stat().st_mtime_ns)


def test_no_such_folder(tmp_path, bucket):
    assert reading.stamps(GcsPath("bucket", "none")) == {}
    with pytest.raises(FileNotFoundError):
        reading.stamps(tmp_path / "none")


def test_a_file_and_a_folder_of_one_name(bucket):
    for name in ("in/a/b", "in/a", "in/c", "in/c/d", "in/", "in/e/"):
        bucket.store(bucket.blob(name), b"1")
    found = reading.stamps(GcsPath("bucket", "in"))
    assert {name: stamp.size for name, stamp in found.items()} == {"a": 1, "c": 1, "e": -1}


@pytest.mark.parametrize("range_bytes", [1, 7, 100, 4096])
def test_opened_reads_as_a_file_does(tmp_path, bucket, monkeypatch, range_bytes):
    monkeypatch.setattr(reading, "RANGE_BYTES", range_bytes)
    content = os.urandom(1000)
    (tmp_path / "a").write_bytes(content)
    place = memory_bucket.put_tree(bucket, tmp_path, "in") / "a"
    with reading.opened(place) as file:
        oracle = io.BytesIO(content)
        for offset, whence, size in (
            (0, 0, 4), (10, 1, 100), (0, 1, 300), (-20, 2, 30), (500, 0, 0), (5000, 0, 3),
            (-1000, 2, 1000), (0, 1, 1), (3, 0, -1),
        ):  # fmt: skip
            assert file.seek(offset, whence) == oracle.seek(offset, whence)
            assert file.read(size) == oracle.read(size)
            assert file.tell() == oracle.tell()


def test_opened_asks_for_ranges_alone(bucket, monkeypatch):
    monkeypatch.setattr(reading, "RANGE_BYTES", 10)
    bucket.store(bucket.blob("a"), bytes(1000))
    asked = []
    read_range = GcsPath.read_range
    monkeypatch.setattr(
        GcsPath, "read_range", lambda self, *args: asked.append(args[:2]) or read_range(self, *args)
    )
    with reading.opened(GcsPath("bucket", "a")) as file:
        file.seek(990)
        assert file.read(3) == bytes(3)
        assert file.read(100) == bytes(7)
    assert asked == [(990, 10)]


def test_an_object_that_changes_while_it_is_open(bucket, monkeypatch):
    monkeypatch.setattr(reading, "RANGE_BYTES", 10)
    path = GcsPath("bucket", "a")
    for change in (lambda: path.write_bytes(bytes(100)), path.unlink):
        path.write_bytes(bytes(100))
        with reading.opened(path) as file:
            file.read(5)
            change()
            with pytest.raises(InputError, match=r"^gs://bucket/a: changed while it was read$"):
                file.read(50)


def test_opened_where_there_is_none(folder):
    with pytest.raises(FileNotFoundError), reading.opened(folder / "none"):
        pass


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 100])
def test_read_start(folder, size):
    assert reading.read_start(folder / "a", size) == b"12345"[:size]
    assert reading.read_start(folder / "b", size) == b""


def test_read_start_of_much(bucket):
    content = os.urandom(3 * memory_bucket.PIECE + 1)
    bucket.store(bucket.blob("a"), content)
    for size in (memory_bucket.PIECE - 1, memory_bucket.PIECE, memory_bucket.PIECE + 1, 10**6):
        assert reading.read_start(GcsPath("bucket", "a"), size) == content[:size]


def test_read_start_of_what_is_no_file(folder, tmp_path):
    with pytest.raises(NotAFileError):
        reading.read_start(folder / "sub", 5)
    with pytest.raises(FileNotFoundError) as caught:
        reading.read_start(folder / "none", 5)
    assert caught.value.strerror == "No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError):
        reading.read_start(tmp_path / "pipe", 5)


def test_each_in_order(folder):
    met = threading.Barrier(reading.AT_ONCE)  # passed only where so many are at it at once
    several = isinstance(folder, GcsPath)

    def action(number):
        if several:
            met.wait(60)
        return number * number

    items = range(2 * reading.AT_ONCE)
    assert list(reading.each(folder, action, items)) == [number**2 for number in items]


def test_each_ends_with_the_first_error(folder):
    def action(number):
        if number:
            raise ValueError(number)
        return number

    found = reading.each(folder, action, range(3))
    assert next(found) == 0
    with pytest.raises(ValueError, match="1"):
        next(found)
