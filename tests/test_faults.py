"""The whole chain on gs:// through a proxy that fails: the same in the end, or nothing by halves.

Faults happen to a tenth of all requests, those of the trainer's uploads and of the renewed locks
among them; see `engines/faulty_proxy.py`.
"""

import io
import itertools
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import helpers
import pytest
import test_gcs
from test_chain_gcs import contents, lines, timeless

sys.path.insert(0, str(Path(__file__).resolve().parent / "engines"))

import emulator
from faulty_proxy import CUT_UPLOAD, KINDS, FaultyProxy, is_possible

from pipeline import gcs, gcs_client, registry
from pipeline.command import InputError
from pipeline.gcs import ChangedError, GcsPath
from trainer import checkpoints

pytestmark = [pytest.mark.cloud, pytest.mark.campaign]

FLAGS = (
    "--source=digits", "--epochs=6", "--checkpoint_seconds=0", "--num_shards=2",
    "--min_class_accuracy=0", "--window=w",
)  # fmt: skip
# What has times in it, or checksums of that; and a model's graph is named by chance.
TIMED = ("metrics.json", "metrics.jsonl", "request.json", "index.html", "runs.jsonl",
         "version.json", "champion.json", "report.html", ".ckpt", "saved_model.pb",
         "fingerprint.pb", "checksums.json", "decision.json")  # fmt: skip
HASTY = "from pipeline import gcs_client\ngcs_client.RETRY_SECONDS = 2.0\n"
BIG = bytes(range(256)) * (gcs.SESSION_BYTES // 256 + 1)


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    with test_gcs.server(tmp_path_factory.mktemp("buckets") / "data") as process:
        yield process


def root_of(name):
    return GcsPath(test_gcs.BUCKET, f"{name}/root")


def retrain(root, **env):
    return helpers.run_cli("pipeline.retrain", "--root", root, *FLAGS, env=env, timeout=900)


@pytest.fixture(scope="module")
def undisturbed():
    """{name: content} of all there is after a chain that nothing happened to. Read only."""
    done = retrain(root_of("undisturbed"))
    assert done.returncode == 0, done.stderr
    return contents(root_of("undisturbed").parent)


def plain(name):
    """A name without what TensorBoard adds: the second, the process and the machine."""
    return name.partition("events.out")[0]


def names(found):
    """Of all there is; of the checkpoints the newest: those before it depend on how fast it was."""
    saved = sorted(name for name in found if name.endswith(".ckpt"))
    return {plain(name) for name in found if name not in saved[:-1]}


def assert_the_same(root, undisturbed):
    """All that is in the folder of a root, and beside it, is as it is undisturbed."""
    found = contents(root.parent)
    assert not [name for name in root.parent.walk() if name.endswith(".lock")]
    assert names(found) == names(undisturbed)
    same = [name for name in found if not name.endswith(TIMED) and "events.out" not in name]
    assert len(same) > 15
    assert [name for name in same if found[name] != undisturbed[name]] == []
    decisions = [
        [json.loads(files[name]) for name in sorted(files) if name.endswith("/decision.json")]
        for files in (found, undisturbed)
    ]
    judged = [[decision.pop("model_files").keys() for decision in each] for each in decisions]
    assert judged[0] == judged[1] != []
    assert decisions[0] == decisions[1]
    calm = root_of("undisturbed")
    one, other = registry.champion(root), registry.champion(calm)
    assert (one.version, one.weights_sha256) == (1, other.weights_sha256)
    champions = [json.loads((each / "models/champion.json").read_text()) for each in (root, calm)]
    assert timeless(champions[0]) == timeless(champions[1])
    assert champions[0]["files"].keys() == champions[1]["files"].keys()
    assert [timeless(line) for line in lines(root)] == [timeless(line) for line in lines(calm)]
    verified = helpers.run_cli("pipeline.registry", "verify", "--root", root)
    assert (verified.returncode, verified.stderr) == (0, "")


def show(name, proxy):
    """What a run had to stand, for whoever reads along (``pytest -s``)."""
    kinds = ", ".join(f"{kind}: {proxy.faults[kind]}" for kind in KINDS)
    on = Counter(
        part
        for request, kind in proxy.seen
        for part in (".lock", "checkpoints/", "tensorboard/")
        if kind and part in request.target
    )
    text = f"\n{name}: {proxy.requests} requests, {proxy.faults.total()} faults ({kinds}; {on})"
    print(text, flush=True)


# What others see meanwhile


def read_checkpoint(content):
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        checkpoints.read(Path(file.name))


def read_lines(content):
    assert content[-1:] in (b"", b"\n")
    for line in content.splitlines():
        json.loads(line)


def read_page(content):
    assert content[:15].lower() == b"<!doctype html>" and content.rstrip().endswith(b"</html>")


# By the ends of their names, of what differs from run to run: what fails where one is not whole.
READ = {".json": json.loads, ".jsonl": read_lines, ".html": read_page, ".ckpt": read_checkpoint}
# What names a folder; where it stands, all of the folder does.
NAMING = ("manifest.json", "export/model.json", "report/report.json", "models/1/version.json",
          "models/champion.json")  # fmt: skip


class Watch(threading.Thread):
    """Another one who looks into a root all the time, past the proxy.

    Attributes:
        seen: (name, generation) of all that was looked at.
        wrong: what was not whole.
    """

    def __init__(self, root, undisturbed):
        super().__init__(daemon=True)
        self.seen, self.wrong = set(), []
        self._root, self._undisturbed = root, undisturbed
        self._ending = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self.join()
        self.look()  # and once in the end

    def run(self):
        while not self._ending.wait(0.1):
            self.look()

    def look(self):
        listing = {
            f"root/{name}": stat
            for name, stat in self._root.walk().items()
            if not any(part.startswith(".") for part in name.split("/"))
        }
        for name in NAMING:
            self._look_at_folders(name, listing)
        for name, stat in listing.items():
            if (name, stat.generation) not in self.seen:
                self.seen.add((name, stat.generation))
                self._look_at(name)

    def _look_at_folders(self, naming, listing):
        """Whether in one and the same moment all is there that what names a folder speaks of."""
        for name in listing:
            if name.endswith(f"/{naming}"):
                folder = f"{name.rpartition('/')[0]}/"
                expected = {each for each in self._undisturbed if each.startswith(folder)}
                if missing := expected - listing.keys():
                    self.wrong.append((name, sorted(missing)))

    def _look_at(self, name):
        try:
            content = (self._root.parent / name).read_bytes()
        except FileNotFoundError:  # removed since
            return
        try:
            if not name.endswith(TIMED) and "events.out" not in name:
                assert content == self._undisturbed[name]
            for ending, read in READ.items():
                if name.endswith(ending):
                    read(content)
        except Exception as error:
            self.wrong.append((name, len(content), repr(error)))


def test_what_is_not_whole_is_seen(undisturbed):
    root = root_of("seen")
    for name in ("datasets/d/manifest.json", "models/champion.json", "runs.jsonl", "a/b.ckpt"):
        (root / name).write_bytes(b'{"half": ')
    (root / "datasets/d/.manifest.json.incomplete/x.json").write_bytes(b"no final name")
    named = "root/models/1/version.json"
    (root.parent / named).write_bytes(undisturbed[named])
    with Watch(root, undisturbed) as watch:
        pass
    wrong = {each[0] for each in watch.wrong}
    assert wrong == {
        "root/datasets/d/manifest.json", "root/models/champion.json", "root/runs.jsonl",
        "root/a/b.ckpt", named,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_same_in_the_end(seed, undisturbed):
    root = root_of(f"seed-{seed}")
    with (
        FaultyProxy(os.environ[emulator.VARIABLE], seed=seed) as proxy,
        Watch(root, undisturbed) as watch,
    ):
        done = retrain(root, STORAGE_EMULATOR_HOST=proxy.address, DIGITS_LEASE_SECONDS="12")
        show(f"seed {seed}", proxy)
        assert done.returncode == 0, done.stderr
        assert set(proxy.faults) == set(KINDS)
        assert 0.05 * proxy.requests < proxy.faults.total() < 0.2 * proxy.requests
        hit = [request.target for request, kind in proxy.seen if kind]
        assert [target for target in hit if ".lock" in target] != []
        uploads = [r.target for r, _ in proxy.seen if r.method != "GET" and "upload" in r.target]
        for part in ("checkpoints/step-", "tensorboard/events", "root/.lock", "models/1/"):
            assert [target for target in uploads if part in target] != [], part
    assert watch.wrong == [], watch.wrong
    assert len(watch.seen) > len(undisturbed) / 2
    assert any(name.endswith(".ckpt") for name, _ in watch.seen)
    assert_the_same(root, undisturbed)


# The server is gone for good


# Where a stage has begun, and what shows that it has ended.
STAGES = {
    "preprocess": (".tfrecord", "datasets/", "/manifest.json"),
    "train": ("checkpoints/step-", "runs/", "/export/model.json"),
    "evaluate": ("/.report.incomplete/", "runs/", "/report/report.json"),
    "promote": ("/rewriteTo/b/digits/o/promote/root/models/1/", "models/", "/version.json"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_gone_in_the_middle_and_back(stage, undisturbed, tmp_path):
    begun, folder, whole = STAGES[stage]
    root = root_of(stage)
    (tmp_path / "sitecustomize.py").write_text(HASTY)
    imported = os.pathsep.join((str(tmp_path), str(helpers.ROOT)))
    environ = {"DIGITS_LEASE_SECONDS": "6", "PYTHONPATH": imported}
    with FaultyProxy(
        os.environ[emulator.VARIABLE],
        seed=0,
        gone_after=lambda request: request.method == "POST" and begun in request.target,
    ) as proxy:
        lost = retrain(root, STORAGE_EMULATOR_HOST=proxy.address, **environ)
        show(f"gone as {stage} has begun", proxy)
        assert proxy.gone
    why = f": no answer from {proxy.address} within 2 seconds"
    hope = "; once the server answers or has room, the same command goes on from here"
    assert lost.returncode == 1, lost.stderr
    assert "Traceback" not in lost.stderr
    said = [line for line in lost.stderr.splitlines() if "error:" in line.lower()]
    print("\n".join(said))
    assert said[-1] == lost.stderr.splitlines()[-1]
    assert [line for line in said if not line.endswith((why, hope))] == []
    assert said[0].startswith("python -m ")
    assert said[0].endswith(why)
    shown = [name for name in contents(root.parent) if "/." not in name]
    published = [f"root/{name}" for name in ("runs.jsonl", "models/champion.json", "index.html")]
    assert [name for name in published if name in shown] == []
    assert [n for n in shown if n.startswith(f"root/{folder}") and n.endswith(whole)] == []
    shown = [name for name in shown if "/checkpoints/" not in name]  # an earlier one
    assert {plain(name) for name in shown} <= {plain(name) for name in undisturbed}
    done = retrain(root, **environ)
    for _ in range(30):  # until the locks have lapsed
        if done.returncode != 75:
            break
        assert "if it is dead, its lock lapses in " in done.stderr
        done = retrain(root, **environ)
    assert done.returncode == 0, done.stderr
    assert_the_same(root, undisturbed)


# One fault at each request of one operation


class OneFault(FaultyProxy):
    """Fails once, at one request, if the kind of fault can happen to it."""

    def __init__(self, upstream, number, kind, way):
        super().__init__(upstream, seed=0)
        self._number, self._kind, self._way = number, kind, way

    def _decide(self, request, has_body):
        is_it = self.requests + 1 == self._number and is_possible(self._kind, request, has_body)
        return self._kind if is_it else "", self._way


def replaced(path):
    stat = path.put(b"x" * 5000, 0)
    path.put(b"y" * 4000, stat.generation)
    return path.read_bytes() == b"y" * 4000


def big(path):
    path.put(BIG, 0)
    file = io.BytesIO()
    path.download(file)
    return file.getvalue() == BIG == path.read_bytes()


def in_part(path):
    stat = path.write_bytes(b"0123456789" * 1000)
    return path.read_range(5, 4000, stat.generation) == b"5678901234" * 400


def missing(path):
    for action in (path.read_bytes, path.unlink, path.stat):
        with pytest.raises(FileNotFoundError):
            action()
    with pytest.raises(InputError, match="changed while it was read"):
        path.read_range(0, 10, 1)
    return not path.exists()


def copied_and_removed(path):
    stat = path.write_bytes(b"z" * 3000)
    (path / "copy").copy(path, stat)
    path.unlink(generation=stat.generation)
    return path.find() is None and path.walk().keys() == {"copy"}


def of_another(path):
    stat = path.put(b"1", 0)
    for generation in (0, stat.generation + 1):
        with pytest.raises(ChangedError):
            path.put(b"2", generation)
    return path.read_bytes() == b"1"


OPERATIONS = (replaced, big, in_part, missing, copied_and_removed, of_another)


def test_any_one_fault_changes_no_outcome(monkeypatch):
    upstream = os.environ[emulator.VARIABLE]
    monkeypatch.setattr(gcs_client, "RETRY_SECONDS", 20.0)
    happened = Counter()
    for operation, kind, way in itertools.product(OPERATIONS, KINDS, (False, True)):
        if way and kind != CUT_UPLOAD:
            continue
        for number in itertools.count(1):
            path = GcsPath(test_gcs.BUCKET, f"one/{operation.__name__}/{kind}/{way}/{number}")
            with OneFault(upstream, number, kind, way) as proxy:
                monkeypatch.setenv(emulator.VARIABLE, proxy.address)
                at = f"{operation.__name__}: {kind} at request {number}"
                assert operation(path), at
                assert proxy.faults.total() <= 1
                happened[operation.__name__, kind] += proxy.faults[kind]
                if proxy.requests < number:
                    break
    monkeypatch.setenv(emulator.VARIABLE, upstream)
    print(f"\n{dict(happened)}")
    assert len(happened) == len(OPERATIONS) * len(KINDS)
    assert [each for each, count in happened.items() if count == 0] == [("missing", CUT_UPLOAD)]
