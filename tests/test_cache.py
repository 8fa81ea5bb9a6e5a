"""Folders of a bucket brought down whole, against a bucket in memory."""

import threading

import helpers
import memory_bucket
import pytest

from pipeline import cache, gcs, storage
from pipeline.command import InputError
from pipeline.gcs import GcsPath

FILES = {"in/graph": b"graph", "in/variables/data": b"1" * 20000, "in/variables/index": b""}
NAMES = {name.removeprefix("in/"): content for name, content in FILES.items()}
FOLDER = GcsPath("bucket", "in")


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    for name, content in {**FILES, "in/": b"", "in/variables/": b"", "inside/other": b""}.items():
        memory.store(memory.blob(name), content)
    return memory


@pytest.fixture
def kept(bucket, tmp_path, monkeypatch):
    """The folder that keeps what is brought down, and a list that counts downloads."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    downloads = []
    download = GcsPath.download
    monkeypatch.setattr(
        GcsPath, "download", lambda self, file: downloads.append(self) or download(self, file)
    )
    return tmp_path / "kept", downloads


def test_a_local_folder_is_itself(tmp_path):
    with cache.local(tmp_path) as found:
        assert found == tmp_path


def test_a_copy_goes_away_after_use(bucket):
    with cache.local(FOLDER) as found:
        assert helpers.tree(found) == NAMES
    assert not found.exists()
    with pytest.raises(RuntimeError), cache.local(FOLDER) as found:
        raise RuntimeError
    assert not found.exists()


def test_a_copy_is_kept_where_the_variable_says(kept):
    folder, downloads = kept
    for _ in range(2):
        with cache.local(FOLDER) as found:
            assert helpers.tree(found) == NAMES
        assert len(downloads) == 3
    assert list(folder.iterdir()) == [found] == [folder / cache.entry_name(cached())]


def cached(folder=FOLDER):
    return {name: stat for name, stat in folder.walk().items() if not name.endswith("/")}


def test_its_name_follows_from_the_content(kept, bucket):
    one = cache.entry_name(cached())
    assert len(one) == 32
    (FOLDER / "graph").write_bytes(b"graph")  # of another generation
    assert cache.entry_name(cached()) == one
    storage.write_atomic(GcsPath("bucket", "twin/graph"), b"graph")
    alone = cache.entry_name(cached(GcsPath("bucket", "twin")))
    for name, content in (("graph", b"Graph"), ("more", b"")):
        (FOLDER / name).write_bytes(content)
        assert cache.entry_name(cached()) not in (one, alone)
        with cache.local(FOLDER) as found:
            assert (found / name).read_bytes() == content


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "added"])
def test_a_copy_that_was_damaged_is_made_anew(kept, damage):
    _, downloads = kept
    with cache.local(FOLDER) as found:
        file = found / "variables/data"
        if damage == "changed":
            file.write_bytes(b"2" * 20000)
        elif damage == "cut":
            file.write_bytes(b"1" * 19999)
        elif damage == "gone":
            file.unlink()
        else:
            (found / "more").touch()
    with cache.local(FOLDER) as found:
        assert helpers.tree(found) == NAMES
    assert len(downloads) == 6


def test_a_killed_process_leaves_nothing_that_is_used(kept):
    folder, downloads = kept
    staging = folder / f".{cache.entry_name(cached())}.incomplete/half"
    staging.mkdir(parents=True)
    (staging / "graph").write_bytes(b"gra")
    with cache.local(FOLDER) as found:
        assert helpers.tree(found) == NAMES
    assert list(folder.iterdir()) == [found]
    assert len(downloads) == 3


def test_two_at_once_bring_it_down_once(kept, monkeypatch):
    folder, downloads = kept
    waited = threading.Event()
    monkeypatch.setattr(cache.time, "sleep", lambda _: waited.set())
    download, found = GcsPath.download, []

    def slow(self, file):
        waited.wait(60)  # until the other has met the lock
        download(self, file)

    monkeypatch.setattr(GcsPath, "download", slow)

    def use():
        with cache.local(FOLDER) as directory:
            found.append(helpers.tree(directory))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [NAMES, NAMES]
    assert len(downloads) == 3
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("change", ["other", "gone", "longer"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_changes_meanwhile(bucket, change, keep, tmp_path, monkeypatch):
    if keep:
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    walk = GcsPath.walk

    def changed_after(self):
        found = walk(self)
        if change == "gone":
            (FOLDER / "graph").unlink()
        else:
            (FOLDER / "graph").write_bytes(b"Graph" if change == "other" else b"graphs")
        return found

    monkeypatch.setattr(GcsPath, "walk", changed_after)
    with (
        pytest.raises(InputError, match=r"^gs://bucket/in/graph: changed while it was read$"),
        cache.local(FOLDER),
    ):
        pass
    assert helpers.tree(tmp_path) == {}


def test_a_name_that_leads_elsewhere(bucket, tmp_path):
    bucket.store(bucket.blob("in/../../../out"), b"bad")
    with (
        pytest.raises(
            InputError, match=r"gs://bucket/in/\.\./\.\./\.\./out: has an empty part, or"
        ),
        cache.local(FOLDER),
    ):
        pass


@pytest.mark.parametrize("named", ["file/x", "gs://bucket/cache"])
def test_a_cache_that_cannot_be_used_is_told_by_its_variable(bucket, tmp_path, monkeypatch, named):
    (tmp_path / "file").write_text("x")
    named = named if "://" in named else str(tmp_path / named)
    monkeypatch.setenv(cache.VARIABLE, named)
    with (
        pytest.raises(InputError, match=f"^{cache.VARIABLE}: {named}: "),
        cache.local(FOLDER),
    ):
        pass
