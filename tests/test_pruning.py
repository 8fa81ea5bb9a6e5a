import contextlib
import datetime
import itertools
import json
from types import SimpleNamespace

import helpers
import memory_bucket
import pytest

from pipeline import (
    gcs,
    gcs_publish,
    inventory,
    leases,
    ledger,
    promotion,
    pruning,
    registry,
    storage,
    versions,
)
from pipeline.command import InputError, LockedError, UnreachableError
from pipeline.dataset import load_manifest
from pipeline.gcs import GcsPath
from pipeline.registry import Version


@pytest.fixture(params=["local", "bucket"])
def root(request, tmp_path, monkeypatch):
    """An empty root, on the disk and in a bucket."""
    if request.param == "local":
        (tmp_path / "root").mkdir()
        return tmp_path / "root"
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)
    return GcsPath("bucket", "some/root")


def write(path, text=""):
    if not isinstance(path, GcsPath):
        path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, text)


def add_dataset(root, name):
    write(root / f"datasets/{name}/train-00000-of-00001.tfrecord")
    write(root / f"datasets/{name}/manifest.json", "{")  # known by its fingerprint alone


def add_run(root, name, dataset, *, promoted=False, line=True, **request):
    """A run as the chain leaves it; a promoted one has its version."""
    add_dataset(root, dataset)
    write(root / f"runs/{name}/request.json", json.dumps({"fingerprint": dataset} | request))
    write(root / f"runs/{name}/export/saved_model.pb", name)
    write(root / f"runs/{name}/decision.json", "{}")
    if promoted:
        registry.publish(
            root,
            root / f"runs/{name}/export",
            Version(
                model_id=f"id-{name}", weights_sha256=f"w-{name}", dataset_id=f"id-{dataset}",
                run_id=name, accuracy=0.9, class_names=["0", "1"], sources=["digits"],
            ),
        )  # fmt: skip
    if line:
        add_line(root, run_id=name, fingerprint=dataset, dataset_id=f"id-{dataset}")


def add_line(root, **entry):
    path = root / "runs.jsonl"
    old = path.read_text() if path.is_file() else ""
    write(path, old + json.dumps(entry) + "\n")


def standing(root):
    """What is there of models, runs and datasets; hidden names as well."""
    return {
        name: sorted(path.name for path in (root / name).iterdir() if path.name != "champion.json")
        for name in ("models", "runs", "datasets")
    }


def prune(root, keep):
    """Prunes, after a look at the plan, which has to say the same and change nothing."""
    before = storage.walk(root)
    planned = pruning.plan(root, keep)
    assert storage.walk(root) == before
    assert list(pruning.prune(root, keep)) == planned
    assert inventory.verify(root) == []
    assert registry.champion(root) is None or registry.champion(root).version
    return [str(removal.folder).removeprefix(f"{root}/") for removal in planned]


def test_the_newest_stay(root):
    for number in range(1, 6):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    assert prune(root, 2) == [
        "models/1", "models/2", "models/3", "runs/r1", "runs/r2", "runs/r3",
        "datasets/d1", "datasets/d2", "datasets/d3",
    ]  # fmt: skip
    assert standing(root) == {
        "models": ["4", "5"], "runs": ["r4", "r5"], "datasets": ["d4", "d5"],
    }  # fmt: skip
    assert prune(root, 2) == []
    assert len(ledger.read(root)) == 5
    add_run(root, "r6", "d6", promoted=True)
    assert registry.champion(root).version == 6


def test_the_model_before_the_champions_stays(root):
    """Whoever has read the pointer just before it moved reads that one."""
    for number in range(1, 5):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    assert [name for name in prune(root, 1) if name.startswith("models")] == [
        "models/1",
        "models/2",
    ]
    assert standing(root) == {"models": ["3", "4"], "runs": ["r4"], "datasets": ["d4"]}


def test_more_than_there_are(root):
    add_run(root, "r1", "d1", promoted=True)
    assert prune(root, 100) == []


def test_nothing_at_all(root):
    assert pruning.plan(root, 1) == []


def test_what_the_champion_needs_stays(root):
    """It is the oldest of all: later challengers were kept out."""
    add_run(root, "champion", "d0", promoted=True)
    for number in range(1, 5):
        add_run(root, f"r{number}", f"d{number}")
    prune(root, 1)
    assert standing(root) == {
        "models": ["1"], "runs": ["champion", "r4"], "datasets": ["d0", "d4"],
    }  # fmt: skip


def test_what_a_rolled_back_champion_needs_stays(root):
    for number in range(1, 6):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    registry.rollback(root, 2)
    prune(root, 1)
    assert standing(root) == {
        "models": ["2", "5", "6"], "runs": ["r2", "r5"], "datasets": ["d2", "d5"],
    }  # fmt: skip
    with pytest.raises(InputError, match="expected one of 2, 5, 6"):
        registry.rollback(root, 1)


def test_a_version_that_was_never_promoted_goes(root):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    second = registry.versions(root)[1]
    promotion._swap(root, second, versions.pointer(root).generation)  # as a crash leaves it
    assert [name for name in prune(root, 2) if name.startswith("models")] == ["models/3"]


def test_without_a_champion_no_version_goes(root):
    add_run(root, "r1", "d1", promoted=True)
    add_run(root, "r2", "d2", promoted=True)
    storage.remove(root / "models/champion.json")
    removed = [str(removal.folder) for removal in pruning.plan(root, 1)]
    assert removed == [f"{root}/runs/r1", f"{root}/datasets/d1"]


def test_an_unfinished_run_and_its_dataset_stay(root):
    add_run(root, "oldest", "d0", line=False)
    for number in range(1, 5):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    add_run(root, "r5", "d0")  # its dataset was judged elsewhere, long ago
    for number in range(6, 9):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    prune(root, 1)
    assert standing(root)["runs"] == ["oldest", "r8"]
    assert standing(root)["datasets"] == ["d0", "d8"]


def test_a_run_that_was_begun_anew_is_unfinished(root):
    add_run(root, "failed", "d0", attempt=0)
    add_run(root, "again", "d1", attempt=1)
    for number in range(2, 5):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    prune(root, 1)
    assert standing(root)["runs"] == ["again", "r4"]
    assert standing(root)["datasets"] == ["d1", "d4"]


@pytest.mark.parametrize("flag", ["initial_weights", "trainer_arguments"])
def test_the_model_that_a_warm_start_needs_stays(root, flag):
    for number in range(1, 14):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    start = "models/2" if flag == "initial_weights" else [f"--initial_weights={root}/models/3"]
    add_run(root, "judged", "d1", initial_weights="models/4")
    add_run(root, "warm", "d1", line=False, **{flag: start})
    storage.remove(root / "runs/warm/decision.json")
    prune(root, 1)
    kept = {"initial_weights": ["12", "13", "2"], "trainer_arguments": ["12", "13", "3"]}[flag]
    assert standing(root)["models"] == kept
    write(root / "runs/warm/decision.json", "{}")
    assert prune(root, 1) == []
    add_line(root, run_id="warm", fingerprint="d1")
    prune(root, 1)
    assert standing(root)["models"] == ["12", "13"]


def test_the_model_that_a_failed_warm_start_began_from_stays_as_long_as_the_run(root):
    add_run(root, "r1", "d1", promoted=True)
    add_run(root, "failed", "d1", attempt=0, initial_weights="models/1")
    storage.remove(root / "runs/failed/decision.json")
    for number in range(2, 6):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    prune(root, 5)
    assert standing(root)["models"] == ["1", "2", "3", "4", "5"]
    prune(root, 4)
    assert standing(root)["runs"] == ["r2", "r3", "r4", "r5"]
    assert standing(root)["models"] == ["2", "3", "4", "5"]


def test_what_the_champion_has_learned_from_stays(root, monkeypatch):
    """The newest folder of each content, once: a source that is only touched makes it again."""
    manifest = SimpleNamespace
    known = {"d1": "one", "d2": "two", "d3": "one", "d4": "four"}
    monkeypatch.setattr(
        pruning, "load_manifest", lambda at: manifest(dataset_id=known.get(at.name, at.name))
    )
    for number in range(1, 5):
        add_run(root, f"r{number}", f"d{number}")
    learned = [{"dataset_id": name, "splits": ["train"]} for name in ("one", "two", "gone", "d5")]
    add_run(root, "r5", "d5", line=False)
    model = {"model_id": "id-r5", "weights_sha256": "w-r5", "dataset_id": "id-d5"}
    write(root / "runs/r5/export/model.json", json.dumps(model | {"learned_from": learned}))
    add_run(root, "r5", "d5", promoted=True)
    add_run(root, "r6", "d6")
    prune(root, 1)
    assert standing(root)["datasets"] == ["d2", "d3", "d5", "d6"]
    add_run(root, "r7", "d7", promoted=True)  # which does not say what it has learned from
    prune(root, 1)
    assert standing(root)["datasets"] == ["d7"]


def test_a_server_that_does_not_answer_lets_no_dataset_go(root, monkeypatch):
    def unreachable(folder):
        raise UnreachableError("no answer")

    for number in (1, 2):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    monkeypatch.setattr(pruning, "load_manifest", unreachable)
    with pytest.raises(UnreachableError):
        list(pruning.prune(root, 1))
    assert standing(root)["datasets"] == ["d1", "d2"]


def test_an_unfinished_run_that_does_not_tell_its_dataset_keeps_all(root):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    write(root / "runs/silent/request.json", "{}")
    assert [name for name in prune(root, 1) if name.startswith("datasets")] == []


def test_a_dataset_that_the_ledger_does_not_name_stays(root):
    for number in (1, 2):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    add_dataset(root, "fresh")
    prune(root, 1)
    assert standing(root)["datasets"] == ["d2", "fresh"]


def test_the_last_line_of_a_run_counts(root):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=number == 3)
    add_line(root, run_id="r1", fingerprint="d1")
    prune(root, 2)
    assert standing(root)["runs"] == ["r1", "r3"]


def test_a_torn_ledger(root):
    for number in (1, 2):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    path = root / "runs.jsonl"
    write(path, path.read_text() + '[]\n{"no": 1}\n\n{"run_id": "r1", "finger')
    assert [line["run_id"] for line in ledger.read(root)] == ["r1", "r2"]
    prune(root, 1)
    assert standing(root)["runs"] == ["r2"]


def test_a_damaged_champion_stops_it(root):
    for number in (1, 2):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    storage.remove(root / "models/2/saved_model.pb")
    before = storage.walk(root)
    with pytest.raises(InputError, match="the champion is damaged"):
        list(pruning.prune(root, 1))
    assert storage.walk(root) == before


def test_rests_of_versions_go(root):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    storage.remove(root / "models/2/version.json")  # as a killed removal may leave it
    assert [v.version for v in registry.versions(root)] == [1, 3]
    assert prune(root, 5) == ["models/2"]


def test_same_images_under_another_fingerprint(tmp_path, small_dataset):
    """A source that is only touched makes the same dataset again: one of them is enough."""
    root = tmp_path
    identity = load_manifest(small_dataset).dataset_id
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}")
        for name, content in helpers.tree(small_dataset).items():
            path = root / f"datasets/d{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    version = Version(
        model_id="m", weights_sha256="w", dataset_id=identity, run_id="r2", accuracy=0.9,
        class_names=["0"], sources=["digits"],
    )  # fmt: skip
    registry.publish(root, root / "runs/r2/export", version)
    prune(root, 1)
    assert standing(root)["datasets"] == ["d2", "d3"]
    storage.write_atomic(root / "runs.jsonl", json.dumps({"run_id": "r3", "dataset_id": identity}))
    assert prune(root, 1) == []  # which of them it needs cannot be told


# Killed in the middle


class StopError(BaseException):
    pass


def test_killed_at_any_removal(tmp_path, monkeypatch):
    """What is left is whole or gone, and the next prune removes the rest."""
    remove = storage.remove
    for moment in range(100):
        root = tmp_path / f"root{moment}"
        root.mkdir()
        for number in (1, 2, 3):
            add_run(root, f"r{number}", f"d{number}", promoted=True)
        calls = 0

        def stop(path, moment=moment):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise StopError
            remove(path)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "remove", stop)
            try:
                list(pruning.prune(root, 1))
                break
            except StopError:
                pass
        assert inventory.verify(root) == []
        list(pruning.prune(root, 1))
        assert standing(root) == {"models": ["2", "3"], "runs": ["r3"], "datasets": ["d3"]}
    assert moment == 10  # five folders, each looked at before and after it is moved aside


# The command


def run(capsys, *argv):
    code = registry.execute(registry.parse(list(argv)))
    return code, capsys.readouterr().out.splitlines()


def test_command(root, capsys):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=number != 2)
    add_run(root, "r4", "d3", promoted=True)
    gone = [
        f"{root}/{name}"
        for name in ("models/1", "runs/r1", "runs/r2", "runs/r3", "datasets/d1", "datasets/d2")
    ]
    before = storage.walk(root)
    argv = ("prune", "--root", str(root), "--keep", "1")
    assert run(capsys, *argv, "--dry_run") == (0, [f"would remove {name}" for name in gone])
    assert storage.walk(root) == before
    assert run(capsys, *argv) == (0, [f"removed {name}" for name in gone])
    assert run(capsys, *argv) == (0, ["nothing to remove"])


def test_command_waits_for_nobody(root, capsys):
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    argv = ("prune", "--root", str(root), "--keep", "1")
    with storage.locked(root):
        with pytest.raises(LockedError, match=r"at work here.*; prune once it has ended$"):
            run(capsys, *argv)
        assert len(run(capsys, *argv, "--dry_run")[1]) == 5
    assert standing(root)["models"] == ["1", "2", "3"]


# Taken for dead, and is not


@pytest.fixture
def overtaken(tmp_path, monkeypatch):
    """Runs the command, and lets another process take its lock over before one of its changes."""
    memory, late = memory_bucket.Bucket(), [0.0]
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    monkeypatch.setattr(gcs_publish, "AT_ONCE", 1)
    monkeypatch.setattr(leases, "_now", lambda: late[0])
    root = GcsPath("bucket", "some/root")
    for number in (1, 2, 3):
        add_run(root, f"r{number}", f"d{number}", promoted=True)
    before = dict(memory.objects)

    def run(step, *argv):
        """What stood when the lock was taken over, what stands in the end; None: was not."""
        memory.objects, memory.changes, found = dict(before), 0, []

        def take_over(number):
            if number == step:
                late[0] += 1000
                memory.clock += datetime.timedelta(seconds=1000)
                leases.acquire(root)
                found.append(set(memory.contents().items()))

        memory.before = take_over
        with contextlib.suppress(LockedError):
            registry.execute(registry.parse([argv[0], "--root", str(root), *argv[1:]]))
        memory.before = lambda number: None
        return (found.pop(), set(memory.contents().items())) if found else None

    return run


def test_pruning_ends_with_the_lock(overtaken):
    """No more than the change that was under way."""
    for step in itertools.count(1):
        if (found := overtaken(step, "prune", "--keep=1")) is None:
            break
        before, after = found
        assert len(before ^ after) <= 1, step
    assert step > 10


def test_a_rollback_ends_with_the_lock(overtaken):
    """No more than the change that was under way, of what readers see."""
    for step in itertools.count(1):
        if (found := overtaken(step, "rollback")) is None:
            break
        before, after = (
            {
                (name, content)
                for name, content in contents
                if name.endswith(("champion.json", "runs.jsonl", "index.html"))
            }
            for contents in found
        )
        assert len(after - before) <= 1, step
    assert step > 10
