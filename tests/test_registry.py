import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import memory_bucket
import pytest

from pipeline import (
    checksums,
    gcs,
    gcs_publish,
    index,
    inventory,
    ledger,
    promotion,
    pruning,
    registry,
    storage,
    versions,
)
from pipeline.command import FailedError, InputError, LockedError
from pipeline.gcs import GcsPath
from pipeline.registry import Version

CONTRACT = {
    "version", "path", "model_id", "weights_sha256", "dataset_id", "run_id", "accuracy",
}  # fmt: skip


@pytest.fixture
def bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)  # so that the order of changes is one
    return memory


@pytest.fixture(params=["local", "bucket"])
def root(request, tmp_path):
    """An empty root, on the disk and in a bucket."""
    if request.param == "local":
        (tmp_path / "root").mkdir()
        return tmp_path / "root"
    request.getfixturevalue("bucket")
    return GcsPath("bucket", "some/root")


def make_model(tmp_path, name):
    folder = tmp_path / "exports" / name
    if not folder.exists():
        (folder / "variables").mkdir(parents=True)
        (folder / "saved_model.pb").write_text(name)
        (folder / "variables" / "variables.index").write_text(name * 2)
    version = Version(
        model_id=f"id-{name}",
        weights_sha256=f"sha-{name}",
        dataset_id=f"data-{name}",
        run_id=f"run-{name}",
        accuracy=0.9,
        class_names=["cat", "dog"],
        sources=["digits"],
    )
    described = {key: getattr(version, key) for key in inventory.DESCRIBED}
    (folder / "model.json").write_text(json.dumps(described))
    return folder, version


def publish(root, tmp_path, name):
    folder, version = make_model(tmp_path, name)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"of": name}))
    return registry.publish(root, folder, version, report=report)


def contents(folder):
    """{name: content} of all files under a folder, wherever it is."""
    return {name: (folder / name).read_bytes() for name in storage.walk(folder)}


def names(root):
    return sorted(path.name for path in (root / "models").iterdir())


# Publishing


def test_versions_count_up_and_the_pointer_follows(root, tmp_path):
    assert registry.champion(root) is None
    assert registry.versions(root) == []
    for number, name in enumerate("abc", start=1):
        published = publish(root, tmp_path, name)
        assert (published.version, published.path) == (number, f"models/{number}")
        assert registry.champion(root) == published
    assert [version.model_id for version in registry.versions(root)] == ["id-a", "id-b", "id-c"]
    assert (root / "models/2/variables/variables.index").read_text() == "bb"
    assert (root / "models/2/report.json").read_text() == '{"of": "b"}'
    assert names(root) == ["1", "2", "3", "champion.json"]


@pytest.mark.parametrize("harm", ["changed", "missing", "more"])
def test_what_is_not_as_it_was_judged_is_not_published(root, tmp_path, harm):
    first = publish(root, tmp_path, "a")
    before = contents(root)
    folder, version = make_model(tmp_path, "b")
    version = dataclasses.replace(version, files=checksums.sums(folder))
    path = folder / "variables/variables.index"
    if harm == "changed":
        path.write_text("b")
    elif harm == "missing":
        path.unlink()
    else:
        path = folder / "more"
        path.touch()
    with pytest.raises(FailedError) as failed:
        registry.publish(root, folder, version, report=tmp_path / "report.json")
    assert str(failed.value) == (
        f"{path}: is not as it was when the model was judged; nothing was published, and the same"
        " command looks at it anew"
    )
    assert contents(root) == before
    assert registry.champion(root) == first
    path.unlink(missing_ok=True)
    if harm != "more":
        path.write_text("bb")
    published = registry.publish(root, folder, version, report=tmp_path / "report.json")
    assert published.files.items() > version.files.items()
    assert published.files.keys() - version.files.keys() == {"report.json"}


def test_champion_file_is_the_contract_and_the_versions_own(root, tmp_path):
    published = publish(root, tmp_path, "a")
    text = (root / "models/champion.json").read_text()
    assert text == (root / "models/1/version.json").read_text()
    content = json.loads(text)
    assert content == dataclasses.asdict(published)
    assert content.keys() > CONTRACT
    assert content["class_names"] == ["cat", "dog"]
    when = datetime.datetime.fromisoformat(content["promoted_at"])
    assert when.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=5)


def test_every_file_is_noted_with_size_and_checksum(root, tmp_path):
    published = publish(root, tmp_path, "a")
    files = contents(root / "models/1")
    del files["version.json"]
    assert files.keys() == {
        "saved_model.pb", "variables/variables.index", "model.json", "report.json",
    }  # fmt: skip
    assert dataclasses.asdict(published)["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }


def test_versions_sort_as_numbers(root, tmp_path):
    for number in range(11):
        publish(root, tmp_path, f"m{number}")
    assert [version.version for version in registry.versions(root)] == list(range(1, 12))


def test_numbers_are_not_given_twice(root, tmp_path):
    for name in "ab":
        publish(root, tmp_path, name)
    storage.remove(root / "models/2")  # the champion itself, by hand
    assert publish(root, tmp_path, "c").version == 3


def test_publish_takes_up_a_copy_whose_pointer_was_not_swapped(root, tmp_path):
    first = publish(root, tmp_path, "a")
    published = publish(root, tmp_path, "b")
    promotion._swap(root, first, versions.pointer(root).generation)  # as a crash leaves it
    assert publish(root, tmp_path, "b") == published == registry.champion(root)
    assert names(root) == ["1", "2", "champion.json"]


def publish_half(root, tmp_path, name):
    """As a process leaves it that was killed before the pointer was swapped."""
    before = versions.pointer(root)
    published = publish(root, tmp_path, name)
    if before.version is None:
        storage.remove(root / "models/champion.json")
    else:
        promotion._swap(root, before.version, versions.pointer(root).generation)
    return published


def test_what_was_never_promoted_is_told_and_removed(root, tmp_path):
    publish(root, tmp_path, "a")
    publish(root, tmp_path, "b")
    publish_half(root, tmp_path, "c")
    *_, second, third = inventory.table(root).splitlines()
    assert second.endswith("run-b") and third.endswith("run-c  not promoted")
    (problem,) = inventory.verify(root)
    assert problem.startswith(f"{root}/models/3: not promoted")
    assert registry.discard_unpromoted(root) == [3]
    assert inventory.verify(root) == registry.discard_unpromoted(root) == []
    assert names(root) == ["1", "2", "champion.json"]


@pytest.mark.parametrize(
    ("names", "removing"),
    [("", "discard"), ("", "prune"), ("ab", "discard"), ("ab", "prune"), ("ab", "rollback")],
)
def test_who_was_about_to_promote_what_is_removed_is_refused(bucket, tmp_path, names, removing):
    root = GcsPath("bucket", "root")
    for name in names:
        publish(root, tmp_path, name)
    published = publish_half(root, tmp_path, "c")
    seen = versions.find_pointer(root)
    if removing == "discard":
        assert registry.discard_unpromoted(root) == [published.version]
    elif removing == "prune":
        assert [str(each.folder) for each in pruning.prune(root, 1)] == [f"{root}/{published.path}"]
    else:
        assert registry.rollback(root, None).model_id == "id-a"
    with pytest.raises(LockedError, match=r"champion\.json: was changed by another process"):
        promotion._swap(root, published, seen.generation)
    if removing != "rollback":
        assert versions.find_pointer(root).version == seen.version
        assert inventory.verify(root) == []
    assert publish(root, tmp_path, "d") == registry.champion(root)


def test_rollback_neither_takes_nor_leaves_what_was_never_promoted(root, tmp_path):
    for name in "ab":
        publish(root, tmp_path, name)
    publish_half(root, tmp_path, "c")
    with pytest.raises(InputError, match=r"expected one of 1, 2$"):
        registry.rollback(root, 3)
    back = registry.rollback(root, None)
    # Not 3: a server that has read the other model under this number would not read it again.
    assert (back.version, back.model_id) == (4, "id-a")
    assert names(root) == ["1", "2", "4", "champion.json"]


def test_the_first_version_when_it_was_never_promoted(root, tmp_path):
    publish_half(root, tmp_path, "a")
    assert registry.discard_unpromoted(root) == [1]
    publish_half(root, tmp_path, "a")
    storage.write_atomic(root / "runs.jsonl", '{"run_id": "run-a", "version": 1}\n')
    assert registry.discard_unpromoted(root) == []  # it was promoted, and the pointer is lost


def test_nothing_is_removed_without_a_pointer_that_tells(root, tmp_path):
    for name in "abc":
        publish(root, tmp_path, name)
    storage.write_atomic(root / "models/champion.json", "{")
    assert registry.discard_unpromoted(root) == []
    storage.remove(root / "models/champion.json")
    assert registry.discard_unpromoted(root) == []
    assert names(root) == ["1", "2", "3"]


@pytest.mark.parametrize("harm", ["another model", "a file gone", "a byte changed"])
def test_publish_takes_up_nothing_else(root, tmp_path, harm):
    first = publish(root, tmp_path, "a")
    publish(root, tmp_path, "b")
    promotion._swap(root, first, versions.pointer(root).generation)
    if harm == "a file gone":
        storage.remove(root / "models/2/saved_model.pb")
    if harm == "a byte changed":
        storage.write_atomic(root / "models/2/saved_model.pb", b"c")
    published = publish(root, tmp_path, "c" if harm == "another model" else "b")
    assert published.version == 3
    assert registry.champion(root) == published
    assert names(root) == ["1", "3", "champion.json"]


def test_publish_leaves_nothing_when_there_is_no_model(root, tmp_path):
    first = publish(root, tmp_path, "a")
    _, version = make_model(tmp_path, "b")
    with pytest.raises(InputError, match="missing: no files; expected an exported model"):
        registry.publish(root, tmp_path / "missing", version)
    assert registry.champion(root) == first
    assert names(root) == ["1", "champion.json"]


def test_publish_leaves_nothing_when_a_copy_fails(root, tmp_path, monkeypatch):
    first = publish(root, tmp_path, "a")
    write_atomic = storage.write_atomic

    def fail(path, data):
        if path.name == "variables.index":
            raise OSError(28, "No space left on device")
        write_atomic(path, data)

    monkeypatch.setattr(storage, "write_atomic", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(root, tmp_path, "b")
    assert registry.champion(root) == first
    assert names(root) == ["1", "champion.json"]


# Killed at any moment


def test_killed_before_any_change_of_a_bucket(bucket, tmp_path):
    """The pointer names a whole model throughout, and the same call ends in the same place."""
    root = GcsPath("bucket", "root")

    def start():
        bucket.objects.clear()
        bucket.before = lambda number: None
        publish(root, tmp_path, "a")
        publish(root, tmp_path, "b")

    start()
    before, changes = registry.champion(root), bucket.changes
    registry.rollback(root, None)
    total = bucket.changes - changes
    assert total > 10
    for moment in range(total):
        start()
        begun = bucket.changes

        def kill(number, begun=begun, moment=moment):
            if number - begun >= moment:
                raise memory_bucket.KilledError

        bucket.before = kill
        with pytest.raises(memory_bucket.KilledError):
            registry.rollback(root, None)
        bucket.before = lambda number: None
        current = registry.champion(root)
        assert inventory.damage(root, current) == []
        assert current.model_id in (before.model_id, "id-a")
        bucket.clock += datetime.timedelta(minutes=5)  # the lock of the dead one lapses
        if current.model_id != "id-a":
            assert registry.rollback(root, None).version == 3
        assert inventory.verify(root) == []
        assert names(root) == ["1", "2", "3", "champion.json"]


def test_two_publish_in_one_bucket_and_one_wins(bucket, tmp_path):
    """The slower one finds that the pointer is not as it was, and leaves it alone."""
    root = GcsPath("bucket", "root")
    publish(root, tmp_path, "a")
    slow = make_model(tmp_path, "slow")

    def overtake(number):
        if "root/models/2/version.json" in bucket.objects:
            bucket.before = lambda number: None
            publish(root, tmp_path, "quick")

    bucket.before = overtake
    with pytest.raises(LockedError, match=r"champion\.json: was changed by another process"):
        registry.publish(root, *slow)
    assert registry.champion(root).model_id == "id-quick"
    assert inventory.verify(root) == []


def rolled_back_by_a_child(root, moment):
    """Rolls back in a process that is killed before its change of this number, if it has one."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    changes = itertools.count()

    def counted(function):
        def run(*args, **kwargs):
            if next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return run

    Path.replace, Path.rename, Path.mkdir = map(counted, (Path.replace, Path.rename, Path.mkdir))
    shutil.rmtree = counted(shutil.rmtree)
    try:
        registry.rollback(root, None)
    finally:
        os._exit(0)


def test_killed_before_any_change_of_a_folder(tmp_path):
    for moment in range(100):
        root = tmp_path / f"root{moment}"
        for name in "ab":
            publish(root, tmp_path, name)
        killed = rolled_back_by_a_child(root, moment) == signal.SIGKILL
        if not killed:
            break
        assert registry.champion(root).model_id == "id-b"
        assert registry.rollback(root, None).version == 3
        assert inventory.verify(root) == []
        assert names(root) == ["1", "2", "3", "champion.json"]
    assert moment > 15
    assert registry.champion(root).model_id == "id-a"


# Readers


LOOP = """
import hashlib, json, sys
from pathlib import Path
from pipeline import registry
root = Path(sys.argv[1])
seen, rounds = [], 0

def read_pointer():
    return json.loads((root / "models/champion.json").read_text())

{read}
print("reading", flush=True)
while not (root / "stop").exists():
    rounds += 1
    champion = read_pointer()
    try:
        read(champion)
    except FileNotFoundError:  # held up for so long that two more were promoted, then pruned
        assert read_pointer()["version"] >= champion["version"] + 2
        continue
    assert registry.champion(root).version >= champion["version"]
    seen.append(champion["version"])
assert seen == sorted(seen), seen
print(rounds, len(set(seen)))
"""
READ = """
def read(champion):
    folder = root / champion["path"]
    assert json.loads((folder / "version.json").read_text()) == champion
    for name, noted in champion["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == noted["bytes"], name
        assert hashlib.sha256(content).hexdigest() == noted["sha256"], name
"""


def read_while(change, root, read):
    """Reads what the pointer names, in a loop and a process of its own, while a function works.

    Returns:
        How often it was read, and how many versions were seen.
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", LOOP.replace("{read}", read), root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout.readline() == "reading\n"
        change()
        (root / "stop").touch()
        out, error = reader.communicate(timeout=120)
    finally:
        reader.kill()
    assert reader.returncode == 0, error
    return map(int, out.split())


def test_a_reader_in_a_loop_always_finds_a_whole_model(tmp_path):
    root = tmp_path / "root"
    for name in "ab":
        publish(root, tmp_path, name)

    def change():
        for number in range(40):
            publish(root, tmp_path, f"c{number}")
            current = registry.rollback(root, None)
            assert [removal.folder.name for removal in pruning.prune(root, 1)]
            assert registry.versions(root)[-1] == current

    rounds, seen = read_while(change, root, READ)
    assert rounds >= seen > 5


def test_a_champion_that_is_pruned_as_it_is_read(root, tmp_path, monkeypatch):
    """Whoever was held up looks again at the pointer, which has moved."""
    publish(root, tmp_path, "a")
    pointer = promotion.pointer

    def held_up(root):
        monkeypatch.setattr(promotion, "pointer", pointer)
        read = pointer(root)
        for name in "bc":
            publish(root, tmp_path, name)
        assert [removal.folder.name for removal in pruning.prune(root, 1)] == ["1"]
        return read

    monkeypatch.setattr(promotion, "pointer", held_up)
    assert registry.champion(root).version == 3


SAVE = """
import sys
import tensorflow as tf
class Model(tf.Module):
    @tf.function(input_signature=[])
    def serve(self):
        return self.table
for name in sys.argv[2:]:
    model = Model()
    model.table = tf.Variable(tf.fill([1000, 100], float(name)))
    tf.saved_model.save(model, f"{sys.argv[1]}/exports/{name}", signatures=model.serve)
"""
LOAD = """
import tensorflow as tf
def read(champion):
    serve = tf.saved_model.load(root / champion["path"]).signatures["serving_default"]
    (table,) = serve().values()
    assert table.shape == [1000, 100]
    assert (table.numpy() == float(champion["model_id"].removeprefix("id-"))).all()
"""


@pytest.mark.campaign
def test_tensorflow_in_a_loop_always_loads_a_whole_model(tmp_path):
    root = tmp_path / "root"
    done = helpers.run_python("-c", SAVE, tmp_path, 1, 2, 3)
    assert done.returncode == 0, done.stderr
    publish(root, tmp_path, "1")

    def change():
        for number in range(20):
            publish(root, tmp_path, str(2 + number % 2))
            registry.rollback(root, 1)

    loads, seen = read_while(change, root, LOAD)
    assert loads >= seen > 2


# Rolling back


def test_rollback_publishes_the_old_model_as_the_highest_version(root, tmp_path):
    for name in "abc":
        publish(root, tmp_path, name)
    back = registry.rollback(root, None)
    assert (back.version, back.model_id, back.rolled_back_from) == (4, "id-b", 2)
    assert registry.champion(root) == back
    old, new = contents(root / "models/2"), contents(root / "models/4")
    assert old.pop("version.json") != new.pop("version.json")
    assert old == new
    further = registry.rollback(root, None)
    assert (further.version, further.model_id) == (5, "id-a")
    with pytest.raises(InputError, match="no version before 1"):
        registry.rollback(root, None)
    forward = registry.rollback(root, 3)
    assert (forward.version, forward.model_id) == (6, "id-c")
    again = registry.rollback(root, 4)  # itself a copy
    assert (again.version, again.model_id, again.rolled_back_from) == (7, "id-b", 2)


@pytest.mark.parametrize(
    ("number", "message"), [(7, "expected one of 1, 2"), (2, "is the champion already")]
)
def test_rollback_refuses(root, tmp_path, number, message):
    publish(root, tmp_path, "a")
    publish(root, tmp_path, "b")
    with pytest.raises(InputError, match=message):
        registry.rollback(root, number)
    assert len(registry.versions(root)) == 2


def test_rollback_is_noted_in_the_ledger(root, tmp_path, capsys):
    for name in "ab":
        publish(root, tmp_path, name)
    run(capsys, "rollback", "--root", str(root), "--reason", "it took 7 for 1")
    run(capsys, "rollback", "--root", str(root), "--version", "2")
    entries = [{k: v for k, v in e.items() if v is not None} for e in ledger.read(root)]
    assert [entry.pop("time")[:2] for entry in entries] == ["20", "20"]
    common = {"outcome": "rolled_back", "accuracy": 0.9, "promoted": False, "forced": False}
    assert entries == [
        common | {"run_id": "run-a", "model_id": "id-a", "dataset_id": "data-a", "version": 3,
                  "reason": "version 1 again: it took 7 for 1"},
        common | {"run_id": "run-b", "model_id": "id-b", "dataset_id": "data-b", "version": 4,
                  "reason": "version 2 again"},
    ]  # fmt: skip
    assert [ledger.times_closed(entries, name) for name in ("run-a", "run-b")] == [0, 0]


@pytest.mark.parametrize("version", [None, 2, 4, 1])
def test_a_rollback_that_was_killed_before_its_line_is_not_done_twice(
    root, tmp_path, monkeypatch, version
):
    for name in "abc":
        publish(root, tmp_path, name)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ledger, "append", killed)
        registry.rollback(root, None)
    back = registry.champion(root)
    assert (back.version, back.rolled_back_from, ledger.read(root)) == (4, 2, [])
    again = registry.rollback(root, version, reason="it took 7 for 1")
    lines = [(line["version"], line["reason"]) for line in ledger.read(root)]
    noted = (4, "version 2 again: it took 7 for 1")
    if version == 1:  # another one is asked for
        noted = (4, "version 2 again")
        assert (again.version, again.rolled_back_from) == (5, 1)
        assert lines == [noted, (5, "version 1 again: it took 7 for 1")]
    else:
        assert again == back == registry.champion(root)
        assert lines == [noted]
    assert [each.version for each in registry.versions(root)] == list(range(1, again.version + 1))


def test_rollback_passes_over_copies_of_the_same_weights(root, tmp_path):
    publish(root, tmp_path, "a")
    folder, version = make_model(tmp_path, "b")
    for run_id in ("first", "renewed"):
        registry.publish(root, folder, dataclasses.replace(version, run_id=run_id))
    assert [each.weights_sha256 for each in registry.versions(root)] == ["sha-a", "sha-b", "sha-b"]
    assert registry.rollback(root, None).rolled_back_from == 1
    assert registry.rollback(root, 2).rolled_back_from == 2
    storage.remove(root / "models/1")
    with pytest.raises(InputError, match=r"no version before 2$"):
        registry.rollback(root, None)
    registry.rollback(root, 3)
    with pytest.raises(InputError, match="no version before 3 with other weights"):
        registry.rollback(root, None)


def test_rollback_without_champion(root):
    with pytest.raises(InputError, match="no champion"):
        registry.rollback(root, None)


def test_rollback_from_a_damaged_champion(root, tmp_path):
    for name in "ab":
        publish(root, tmp_path, name)
    storage.remove(root / "models/2/saved_model.pb")
    assert registry.rollback(root, None).model_id == "id-a"
    assert registry.champion(root).version == 3


def test_rollback_never_publishes_a_damaged_model(root, tmp_path):
    for name in "ab":
        publish(root, tmp_path, name)
    storage.write_atomic(root / "models/1/saved_model.pb", b"x")  # of the same size
    with pytest.raises(InputError, match=r"--version 1: is damaged: .*/models/1/saved_model\.pb"):
        registry.rollback(root, None)
    assert registry.champion(root).version == 2
    assert names(root) == ["1", "2", "champion.json"]


# Damage


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"files": 1}', '{"files": {"a": 1}}', "\\xff"]
)
def test_a_broken_pointer_is_one_clear_line(root, text):
    storage.write_atomic(root / "models/champion.json", text) if isinstance(root, GcsPath) else None
    if not isinstance(root, GcsPath):
        (root / "models").mkdir()
        (root / "models/champion.json").write_text(text)
    with pytest.raises(InputError, match=r"champion\.json: cannot be read.*rollback --version V"):
        registry.champion(root)
    assert len(inventory.table(root).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", None])
def test_a_lost_pointer_is_put_back_by_a_rollback(root, tmp_path, text):
    for name in "abc":
        publish(root, tmp_path, name)
    storage.remove(root / "models/3/version.json")  # so that its folder alone tells of it
    storage.remove(root / "models/champion.json")
    if text is not None:
        storage.write_atomic(root / "models/champion.json", text)
    with pytest.raises(InputError, match=r"rollback --version V puts a version in its place"):
        registry.rollback(root, None)
    with pytest.raises(InputError, match=r"--version 3: expected one of 1, 2$"):
        registry.rollback(root, 3)
    back = registry.rollback(root, 2)
    assert (back.version, back.model_id, back.rolled_back_from) == (4, "id-b", 2)
    assert registry.champion(root) == back
    assert names(root) == ["1", "2", "3", "4", "champion.json"]


def test_a_root_of_another_release(root, tmp_path):
    """Fields that are not known are left out, and what may be missing has its default."""
    published = publish(root, tmp_path, "a")
    for name in ("models/1/version.json", "models/champion.json"):
        raw = json.loads((root / name).read_text()) | {"signed_by": "somebody"}
        del raw["rolled_back_from"]
        raw["files"]["model.json"]["crc32c"] = "00000000"
        storage.write_atomic(root / name, json.dumps(raw))
    assert registry.champion(root) == published
    assert inventory.verify(root) == []
    publish(root, tmp_path, "b")
    assert registry.rollback(root, 1).version == 3
    assert inventory.verify(root) == []


def test_a_pointer_to_a_place_elsewhere(root, tmp_path):
    published = publish(root, tmp_path, "a")
    pointer = root / "models/champion.json"
    storage.write_atomic(pointer, json.dumps(dataclasses.asdict(published) | {"path": "../x"}))
    with pytest.raises(InputError, match=r"version 1 at path '\.\./x'"):
        registry.champion(root)


def harm_missing(folder):
    storage.remove(folder / "saved_model.pb")
    return r"saved_model\.pb: missing"


def harm_size(folder):
    storage.write_atomic(folder / "saved_model.pb", b"longer")
    return r"saved_model\.pb: has 6 bytes, expected 1"


def harm_gone(folder):
    storage.remove(folder)
    return r"version\.json: missing"


def harm_extra(folder):
    storage.write_atomic(folder / "more", b"")
    return "more: belongs to no model"


def harm_byte(folder):
    storage.write_atomic(folder / "saved_model.pb", b"x")
    return r"saved_model\.pb: has another checksum than it was published with"


HARM = [harm_missing, harm_size, harm_gone, harm_extra, harm_byte]


@pytest.mark.parametrize("harm", HARM[:-1], ids=lambda harm: harm.__name__)
def test_a_damaged_champion_is_one_clear_line(root, tmp_path, harm):
    publish(root, tmp_path, "a")
    message = harm(root / "models/1")
    with pytest.raises(InputError, match=f"the champion is damaged: .*{message}; .*verify"):
        registry.champion(root)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_verify_finds_every_harm(root, tmp_path, harm, number):
    for name in "abc":
        publish(root, tmp_path, name)
    assert inventory.verify(root) == []
    message = harm(root / f"models/{number}")
    problems = inventory.verify(root)
    if harm is harm_gone:
        gone = [f"{root}/models/champion.json: names version 3, which is not there"]
        assert problems == (gone if number == 3 else [])  # an old version may be pruned
    else:
        (problem,) = problems
        assert problem.startswith(f"{root}/models/{number}/")
        assert problem.endswith(message.replace("\\", ""))


def rewrite(file, **changes):
    storage.write_atomic(file, json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: rewrite(root / "models/1/version.json", version=2, path="models/2"),
         "/models/1/version.json: says that it is version 2"),
        (lambda root: rewrite(root / "models/1/version.json", model_id="id-x"),
         "/models/1/model.json: model_id is id-a, version.json says id-x"),
        (lambda root: rewrite(root / "models/2/version.json", accuracy=1.0),
         "/models/champion.json: differs from {root}/models/2/version.json"),
        (lambda root: storage.remove(root / "models/1/version.json"),
         "/models/1/version.json: missing"),
        (lambda root: storage.write_atomic(root / "models/1/version.json", "{"),
         "/models/1/version.json: cannot be read as a version: Expecting property name"
         " enclosed in double quotes: line 1 column 2 (char 1)"),
        (lambda root: storage.write_atomic(root / "models/notes", "x"),
         "/models/notes: belongs to no model"),
        (lambda root: storage.remove(root / "models/champion.json"),
         "/models/champion.json: missing, although there are versions; pipeline.registry rollback"
         " --version V puts a version in its place"),
    ],
)  # fmt: skip
def test_verify_finds_every_contradiction(root, tmp_path, harm, message):
    for name in "ab":
        publish(root, tmp_path, name)
    harm(root)
    assert inventory.verify(root) == [f"{root}{message.format(root=root)}"]


def test_verify_takes_what_is_being_published_for_no_harm(tmp_path):
    root = tmp_path / "root"
    publish(root, tmp_path, "a")
    with storage.published_whole(root / "models/2"):
        assert inventory.verify(root) == []


# The command


def run(capsys, *argv):
    code = registry.execute(registry.parse(list(argv)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(root, tmp_path, capsys):
    for name in ("first", "b"):
        publish(root, tmp_path, name)
    registry.rollback(root, None)
    times = [v.promoted_at[:19].replace("T", " ") for v in registry.versions(root)]
    assert run(capsys, "list", "--root", str(root))[1].splitlines() == [
        "   version  accuracy  promoted (UTC)       model     dataset   run",
        f"         1    0.9000  {times[0]}  id-first  data-fir  run-first",
        f"         2    0.9000  {times[1]}  id-b      data-b    run-b",
        f"*        3    0.9000  {times[2]}  id-first  data-fir  run-first  version 1 again",
    ]


def test_table_of_nothing_and_of_what_cannot_be_read(root, tmp_path):
    assert len(inventory.table(root).splitlines()) == 1
    publish(root, tmp_path, "a")
    publish(root, tmp_path, "b")
    storage.write_atomic(root / "models/1/version.json", "{")
    lines = inventory.table(root).splitlines()
    assert lines[1].split() == ["1", "models/1", "cannot", "be", "read"]
    assert lines[2].split()[:2] == ["*", "2"]


def test_commands(root, tmp_path, capsys):
    (root / "models").mkdir() if isinstance(root, Path) else None
    with pytest.raises(InputError, match="no champion yet" if root.is_dir() else "no such folder"):
        run(capsys, "current", "--root", str(root))
    for name in "ab":
        publish(root, tmp_path, name)
    code, out, _ = run(capsys, "current", "--root", str(root))
    assert (code, json.loads(out)) == (0, dataclasses.asdict(registry.champion(root)))
    code, out, _ = run(capsys, "rollback", "--root", str(root), "--version", "1")
    assert (code, out) == (0, "version 3 is version 1 again\n")
    code, out, _ = run(capsys, "verify", "--root", str(root))
    assert (code, out) == (0, f"{root}: 3 versions, 12 files, all as they were published\n")
    harm_byte(root / "models/1")
    harm_missing(root / "models/2")
    code, out, error = run(capsys, "verify", "--root", str(root))
    assert (code, out) == (2, "")
    assert error.count("\n") == 2


def test_rollback_waits_for_nobody(tmp_path, capsys):
    root = tmp_path / "root"
    for name in "ab":
        publish(root, tmp_path, name)
    with storage.locked(root), pytest.raises(LockedError) as caught:
        run(capsys, "rollback", "--root", str(root))
    assert caught.value.exit_code == 75
    assert str(caught.value) == (
        f"{root}: another process is at work here; a retrain is stopped by SIGTERM; roll back then,"
        " and give it again: it goes on"
    )
    assert registry.champion(root).version == 2


@pytest.mark.parametrize("argv", [["rollback"], ["prune", "--keep", "1"]])
def test_the_page_is_written_while_the_root_is_locked(tmp_path, capsys, monkeypatch, argv):
    root = tmp_path / "root"
    for name in "ab":
        publish(root, tmp_path, name)
    write_index, written = index.write_index, []

    def write(root):
        with pytest.raises(LockedError), storage.locked(root):
            pass
        written.append(write_index(root))

    monkeypatch.setattr(index, "write_index", write)
    run(capsys, *argv, "--root", str(root))
    assert len(written) == 1


@pytest.mark.parametrize(
    "argv",
    [
        [], ["list"], ["promote"], ["list", "--root", "x", "--version", "1"],
        ["prune", "--root", "x"], ["prune", "--root", "x", "--keep", "0"],
        ["verify", "--root", "x", "--dry_run"],
    ],
)  # fmt: skip
def test_bad_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        registry.parse(argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_root(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        registry.execute(registry.parse(["list", "--root", str(tmp_path / "none")]))


@pytest.mark.parametrize("action", registry.ACTIONS)
def test_a_folder_that_is_no_root(root, capsys, action):
    storage.write_atomic(root / "notes", "")
    argv = [action, "--root", str(root), *(["--keep", "1"] if action == "prune" else [])]
    with pytest.raises(InputError, match=r": not the root of a chain; expected models, runs"):
        run(capsys, *argv)
    assert list(storage.walk(root)) == ["notes"]


def test_the_command_as_a_process(tmp_path):
    root = tmp_path / "root"
    publish(root, tmp_path, "a")
    harm_byte(root / "models/1")
    done = helpers.run_cli("pipeline.registry", "verify", "--root", root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{root}/models/1/saved_model.pb: has another checksum than it was published with\n"
    )
    storage.remove(root / "models/1/saved_model.pb")
    done = helpers.run_cli("pipeline.registry", "current", "--root", root)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the champion is damaged" in done.stderr
