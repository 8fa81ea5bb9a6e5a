"""The whole chain over the wire, on a root in a bucket: as on a local one, and alone there."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import test_gcs
from test_gcs import wait_until

from pipeline import leases, registry, storage
from pipeline.command import LockedError
from pipeline.gcs import GcsPath

pytestmark = pytest.mark.cloud

FLAGS = ("--source=digits", "--epochs=1", "--num_shards=2", "--min_class_accuracy=0", "--window=w")
WARM = (*FLAGS, "--seed=5", "--warm_start", "--force_promote", "--reason=it must")
ROOT = GcsPath(test_gcs.BUCKET, "of/root")
ENDLESS = ("--source=digits", "--epochs=9999", "--hidden_units=8", "--checkpoint_seconds=0")


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    with test_gcs.server(tmp_path_factory.mktemp("buckets") / "data") as process:
        yield process


def retrain(root, *flags):
    return helpers.run_cli("pipeline.retrain", "--root", root, *flags, timeout=900)


def start(root, *flags, **environ):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.retrain", f"--root={root}", *flags],
        cwd=helpers.ROOT,
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)} | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(root):
    """{name: content} of all that is under a root, but for locks, which differ."""
    names = [name for name in storage.walk(root) if not name.endswith(".lock")]
    return {name: (root / name).read_bytes() for name in names}


def lines(root):
    return [json.loads(line) for line in (root / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first():
    """Two on an empty root, one a moment later than the other: what became of them. Read only.

    The first stands still until the other has ended, so that it is not done before.
    """
    one = start(ROOT, *FLAGS, DIGITS_LEASE_SECONDS="600")
    wait_until((ROOT / ".lock").is_file, one)
    one.send_signal(signal.SIGSTOP)
    other = retrain(ROOT, *FLAGS)
    left = sorted(storage.walk(ROOT))
    one.send_signal(signal.SIGCONT)
    _, said = one.communicate(timeout=900)
    return one, said, other, left


@pytest.fixture(scope="module")
def roots(first, tmp_path_factory):
    """A root in the bucket and a local one, after the same two runs. Read only."""
    local = tmp_path_factory.mktemp("local") / "root"
    assert retrain(local, *FLAGS).returncode == 0
    for root in (ROOT, local):
        done = retrain(root, *WARM)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("champion: version 2, of run w-core-")
    return ROOT, local


def test_of_two_processes_one_works(first):
    one, said, other, left = first
    assert one.returncode == 0, said
    assert (other.returncode, other.stdout) == (75, "")
    assert other.stderr.count("\n") == 1, other.stderr
    assert f"{ROOT}: process {one.pid} on " in other.stderr
    assert "is at work here; if it is dead, its lock lapses in " in other.stderr
    assert ".lock" in left
    assert [name for name in left if "models" in name or "runs.jsonl" in name] == []


def test_the_same_files_and_bytes_as_on_a_local_root(roots):
    bucket, local = (contents(root) for root in roots)
    # TensorBoard's files are named by the second, the process and the machine.
    assert {n.partition("events.out")[0] for n in bucket} == {
        n.partition("events.out")[0] for n in local
    }
    # What has times in it, and what holds checksums of that; the model's graph is named by chance.
    timed = ("metrics.json", "metrics.jsonl", "request.json", "index.html", "runs.jsonl",
             "version.json", "champion.json", "report.html", ".ckpt", "saved_model.pb",
             "fingerprint.pb", "checksums.json", "decision.json")  # fmt: skip
    same = [name for name in bucket if not name.endswith(timed) and "events.out" not in name]
    assert [name for name in same if bucket[name] != local[name]] == []
    decisions = [name for name in bucket if name.endswith("/decision.json")]
    assert len(decisions) == 2
    for name in decisions:
        one, other = (json.loads(files[name]) for files in (bucket, local))
        assert one.pop("model_files").keys() == other.pop("model_files").keys()
        assert one == other
    kinds = {Path(name).name for name in same}
    assert kinds > {
        "manifest.json", "report.json", "model.json", "config.json",
        "variables.data-00000-of-00001", "train-00000-of-00002.tfrecord",
    }  # fmt: skip


def timeless(value):
    times = ("time", "promoted_at", "first_promoted_at")
    return {k: v for k, v in value.items() if k not in (*times, "request", "files")}


def test_the_same_champion_ledger_and_requests(roots):
    bucket, local = roots
    one, other = registry.champion(bucket), registry.champion(local)
    assert (one.version, one.weights_sha256) == (2, other.weights_sha256)
    assert one.files.keys() == other.files.keys()
    texts = [(root / "models/champion.json").read_text() for root in roots]
    assert timeless(json.loads(texts[0])) == timeless(json.loads(texts[1]))
    assert [timeless(line) for line in lines(bucket)] == [timeless(line) for line in lines(local)]
    assert [list(line) for line in lines(bucket)] == [list(line) for line in lines(local)]
    starts = []
    for run in (line["run_id"] for line in lines(local)):
        requests = [
            json.loads((root / "runs" / run / "request.json").read_text()) for root in roots
        ]
        assert timeless(requests[0]) == timeless(requests[1])
        starts.append(requests[0]["initial_weights"])
    assert starts == [None, "models/1"]


def test_nothing_new_changes_nothing(roots):
    root, _ = roots
    before = root.walk()
    done = retrain(root, *WARM[:-2])
    assert done.returncode == 0, done.stderr
    assert "nothing new" in done.stderr
    assert root.walk() == before
    assert not [name for name in before if Path(name).name.startswith(".")]


def test_a_dry_run_writes_nothing(roots):
    root, _ = roots
    before = root.walk()
    done = retrain(root, *FLAGS, "--seed=9", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"skip     preprocess: {root}/datasets/")
    assert "compare  with the champion, version 2 of run w-core-" in done.stdout
    assert root.walk() == before


def test_registry_and_pruning_of_such_a_root(roots, tmp_path):
    root, _ = roots
    done = helpers.run_cli("pipeline.registry", "verify", "--root", root)
    assert (done.returncode, done.stderr) == (0, "")
    done = helpers.run_cli("pipeline.registry", "prune", "--root", root, "--keep=1", "--dry_run")
    assert done.returncode == 0, done.stderr
    (first, *_) = lines(root)
    assert done.stdout == f"would remove {root}/runs/{first['run_id']}\n"


# Killed, and taken for dead


def processes_of(root):
    """The command lines of all processes that name a root."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if f"{root}/" in line]


@pytest.fixture
def at_work(request):
    """(process, root): a chain that is training, whose lock lapses after 8 seconds."""
    root = GcsPath(test_gcs.BUCKET, request.node.name)
    process = start(root, *ENDLESS, DIGITS_LEASE_SECONDS="6")
    wait_until(lambda: any(".ckpt" in name for name in root.walk()), process, seconds=600)
    assert process.poll() is None, process.communicate()
    yield process, root
    process.kill()
    process.communicate()


def test_a_dead_ones_lock_is_taken_over_when_it_has_lapsed(at_work):
    process, root = at_work
    assert len(processes_of(root)) > 0
    process.kill()
    process.wait()
    wait_until(lambda: processes_of(root) == [])  # its stage dies with it
    renewed = (root / ".lock").stat()
    owner = leases.parse_owner((root / ".lock").read_bytes())
    assert (owner.pid, owner.lapse_seconds) == (process.pid, 8.0)
    refused = 0
    while True:
        try:
            lease = leases.acquire(root)
            break
        except LockedError as error:
            assert f"process {process.pid} on" in str(error)
            refused += 1
            time.sleep(0.05)
    assert refused > 0
    taken = (root / ".lock").stat().updated
    assert taken - renewed.updated >= datetime.timedelta(seconds=8)
    lease.end()
    done = retrain(root, *ENDLESS, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "make     go on with run " in done.stdout


def test_one_that_was_paused_stops_its_stage_and_publishes_nothing(at_work):
    process, root = at_work
    process.send_signal(signal.SIGSTOP)
    while True:
        try:
            lease = leases.acquire(root)
            break
        except LockedError:
            time.sleep(0.05)
    assert len(processes_of(root)) > 0  # its stage goes on
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the lock of this process has lapsed" in said.splitlines()[-1]
    wait_until(lambda: processes_of(root) == [])
    assert not (root / "runs.jsonl").exists()
    assert not (root / "models").exists()
    assert not (root / "index.html").exists()
    lease.renew()  # nobody has touched it
    lease.end()
