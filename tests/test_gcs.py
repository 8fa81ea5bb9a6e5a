"""gs:// folders over the wire, against fake-gcs-server; `make cloud-check` installs it.

`test_gcs_publish.py` covers what is decided; here real clients, real workers and real kills meet a
server, which keeps generation preconditions on uploads, but not on copies and removals.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import helpers
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "engines"))

import emulator
import install

from pipeline import gcs, leases, storage
from pipeline.gcs import ChangedError, GcsPath

pytestmark = pytest.mark.cloud

BUCKET = "digits"
NEW = ("--num_shards=3",)
OLD = ("--num_shards=2",)
PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
# The command, with a lock that soon lapses, and little patience with the server.
HASTY = """
from pipeline import gcs_client, leases, preprocess
leases.HEARTBEAT_SECONDS, leases.LAPSE_SECONDS, gcs_client.RETRY_SECONDS = 0.3, 3.0, 1.0
preprocess.main()
"""
LAPSE_SECONDS = 3.0


@contextlib.contextmanager
def server(folder):
    """Runs a server that has one empty bucket; yields its process, and points clients at it."""
    if not install.EMULATOR.exists():
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing("fake-gcs-server is not installed; `make cloud-check` does")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (folder / BUCKET).mkdir(parents=True)
    command = emulator.command(address, folder)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(emulator.VARIABLE, address)
            wait_until(lambda: answers(address))
            yield process
    finally:
        process.kill()
        process.wait()


def answers(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{address}/storage/v1/b").status == 200
    return False


def wait_until(happened, process=None, seconds=120):
    """Waits for something to happen; with a process, for its end as well."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        if process and process.poll() is not None:
            return
        time.sleep(0.002)


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    with server(tmp_path_factory.mktemp("buckets") / "data") as process:
        yield process


@pytest.fixture
def output(request):
    """A folder in the bucket for one test, in a folder of its own."""
    return GcsPath(BUCKET, f"{request.node.name.replace('[', '/').strip(']')}/out")


def arguments(source, output, flags):
    return [f"--source=idx:{source}", f"--output_dir={output}", *flags]


def preprocess(source, output, *flags, script=None):
    entry = ("-c", script) if script else ("-m", "pipeline.preprocess")
    return helpers.run_python(*entry, *arguments(source, output, flags))


def start(source, output, flags, script=HASTY):
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments(source, output, flags)],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process):
    process.kill()
    process.communicate()


def files_of(folder):
    """{relative name: content} of a dataset, without what no two runs have in common."""
    if isinstance(folder, Path):
        files = helpers.tree(folder)
    else:
        files = {name: (folder / name).read_bytes() for name in folder.walk()}
    return {name: data for name, data in files.items() if name != "metrics.json"}


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def assert_alone(output, expected):
    """The dataset stands there, and nothing beside it."""
    assert_equal(files_of(output), expected)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.fixture(scope="module")
def local(small_idx, tmp_path_factory):
    """{flags: files} of the datasets that local runs make."""
    folder = tmp_path_factory.mktemp("local")
    made = {}
    for flags in (NEW, OLD):
        done = preprocess(small_idx, folder / flags[0], *flags)
        assert done.returncode == 0, done.stderr
        made[flags] = files_of(folder / flags[0])
    return made


@pytest.fixture
def put_old(small_idx, local, output):
    done = preprocess(small_idx, output, *OLD)
    assert done.returncode == 0, done.stderr
    assert_alone(output, local[OLD])


# The server


@pytest.mark.parametrize("size", (5, 9 << 20), ids=["at_once", "resumable"])
def test_content_and_preconditions(size, output):
    content = os.urandom(size)
    first = output.put(content, 0)
    assert first.st_size == size
    assert output.read_bytes() == content
    assert output.put(content, 0) == first
    with pytest.raises(ChangedError):
        output.put(content + b"1", 0)
    second = output.put(content + b"1", first.generation)
    (output.parent / "copy").copy(output, second)
    assert (output.parent / "copy").stat().crc32c == second.crc32c
    with storage.open_atomic(output) as file:
        file.write(content)
        file.write(b"2")
    assert output.read_bytes() == content + b"2"
    assert output.parent.walk().keys() == {"out", "copy"}


def test_what_the_server_does_not_keep(output):
    """Copies and removals pass whatever they state; a version that is stricter is welcome."""
    one, other = output / "one", output / "other"
    stat = one.put(b"1", 0)
    other.put(b"2", 0)
    other.copy(one, stat)
    assert other.read_bytes() == b"1"
    other.unlink(generation=1)
    assert not other.exists()


def test_names_of_all_kinds(output):
    names = ["a b", "ü", "a?b", "a#b", "100%", "a+b", "[x]", "sub/deep/er"]
    for name in names:
        storage.write_atomic(output / name, name)
    assert output.walk().keys() == set(names)
    assert [(output / name).read_text() for name in names] == names
    assert {path.name for path in output.iterdir()} == {*names[:-1], "sub"}
    storage.remove(output)
    assert not output.exists()


# Datasets


@pytest.mark.parametrize("engine", ((), PROCESSES), ids=["in_process", "processes"])
def test_same_bytes_as_a_local_folder(engine, small_idx, local, output):
    done = preprocess(small_idx, output, *NEW, *engine)
    assert done.returncode == 0, done.stderr
    assert_alone(output, local[NEW])
    generations = output.walk()
    again = preprocess(small_idx, output, *NEW)
    assert (again.returncode, again.stderr) == (0, f"{output}: already there\n")
    assert output.walk() == generations


def test_gzip(small_idx, tmp_path, output):
    flags = ("--num_shards=2", "--compression=gzip")
    for folder in (output, tmp_path / "out"):
        assert preprocess(small_idx, folder, *flags).returncode == 0
    assert_alone(output, files_of(tmp_path / "out"))
    assert helpers.run_cli("pipeline.dataset", "verify", output).returncode == 0


def test_another_dataset_needs_overwrite(small_idx, local, put_old, output):
    refused = preprocess(small_idx, output, *NEW)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"python -m pipeline.preprocess: error: {output}: holds another dataset; expected a new"
        " or empty folder, or --overwrite\n"
    )
    assert_alone(output, local[OLD])
    done = preprocess(small_idx, output, *NEW, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert_alone(output, local[NEW])


def test_files_of_others_are_not_replaced(small_idx, put_old, output):
    storage.write_atomic(output / "notes.txt", b"mine")
    before = output.walk()
    refused = preprocess(small_idx, output, *NEW, "--overwrite")
    assert refused.returncode == 2
    assert "holds notes.txt, which is no part of a dataset" in refused.stderr
    assert output.walk() == before


def test_looking_into_datasets(small_idx, tmp_path, put_old, output):
    assert preprocess(small_idx, tmp_path / "out", *OLD).returncode == 0
    verified = helpers.run_cli("pipeline.dataset", "verify", output)
    assert (verified.returncode, verified.stdout, verified.stderr) == (
        0,
        f"{output}: 720 records, all as the manifest states\n",
        "",
    )
    here = helpers.run_cli("pipeline.dataset", "describe", output)
    assert here.returncode == 0, here.stderr
    there = helpers.run_cli("pipeline.dataset", "describe", tmp_path / "out")
    assert here.stdout.splitlines()[1:] == there.stdout.splitlines()[1:]
    differ = helpers.run_cli("pipeline.dataset", "diff", output, tmp_path / "out")
    assert [line.split() for line in differ.stdout.splitlines()[3:7]] == [
        [kind, "0"] for kind in ("added", "removed", "relabelled", "moved")
    ]
    shard = output / "test-00001-of-00002.tfrecord"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    storage.write_atomic(shard, bytes(content))
    (output / "test-00000-of-00002.tfrecord").unlink()
    damaged = helpers.run_cli("pipeline.dataset", "verify", output)
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert damaged.stderr.splitlines() == [
        f"{output}/test-00000-of-00002.tfrecord: cannot be read: No such file or directory",
        f"{shard}: its checksum differs from the manifest's",
    ]


# Killed, and two at once


def staging_of(output):
    return output.parent / f".{output.name}.incomplete"


def appears(output, suffix):
    return lambda: any(name.endswith(suffix) for name in output.walk())


def journal_stands(output):
    return (staging_of(output) / ".moving").is_file


def goes(output, name):
    return lambda: journal_stands(output)() and not (output / name).is_file()


EVENTS = {
    "a shard is written": lambda output: appears(staging_of(output), ".tfrecord"),
    "files begin to move": journal_stands,
    "a file has moved": lambda output: appears(output, "of-00003.tfrecord"),
    "the lock is taken": lambda output: appears(staging_of(output), ".lock"),
    "the manifest is written": lambda output: appears(staging_of(output), "manifest.json"),
    "the last file has moved": lambda output: appears(output, "validation-00002-of-00003.tfrecord"),
    "the metrics are written": lambda output: appears(staging_of(output), "metrics.json"),
}


def killed(source, output, flags, happened):
    process = start(source, output, flags)
    wait_until(happened, process)
    kill(process)
    found = files_of(output)
    return found if "manifest.json" in found else {}


@pytest.mark.parametrize("event", EVENTS)
def test_killed(event, small_idx, local, output):
    left = killed(small_idx, output, NEW, EVENTS[event](output))
    assert left in ({}, local[NEW])
    time.sleep(LAPSE_SECONDS)
    done = preprocess(small_idx, output, *NEW)
    assert done.returncode == 0, done.stderr
    assert_alone(output, local[NEW])


@pytest.mark.parametrize("event", [*EVENTS, "the old manifest goes"])
def test_killed_as_it_overwrites(event, small_idx, local, put_old, output):
    happened = EVENTS.get(event, lambda folder: goes(folder, "manifest.json"))(output)
    left = killed(small_idx, output, (*NEW, "--overwrite"), happened)
    assert left in (local[OLD], {}, local[NEW])
    time.sleep(LAPSE_SECONDS)
    done = preprocess(small_idx, output, *NEW, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert_alone(output, local[NEW])


def test_lock_of_the_dead_holds_until_it_lapses(small_idx, local, output):
    lock = staging_of(output) / ".lock"
    process = start(small_idx, output, NEW, script="from pipeline import preprocess as p; p.main()")
    wait_until(lock.is_file, process)
    kill(process)
    before = lock.stat()
    refused = preprocess(small_idx, output, *NEW)
    assert refused.returncode == 75
    said = refused.stderr.splitlines()[-1]
    assert f"{staging_of(output)}: process {process.pid} on {socket.gethostname()} is" in said
    assert "if it is dead, its lock lapses in" in said
    assert lock.stat() == before
    owner = leases.parse_owner(lock.read_bytes())
    assert (owner.pid, owner.lapse_seconds) == (process.pid, 60.0)
    lapsed = leases.owner_json(dataclasses.replace(owner, lapse_seconds=0.0))
    lock.put(lapsed, before.generation)
    assert preprocess(small_idx, output, *NEW).returncode == 0
    assert_alone(output, local[NEW])


def test_two_at_once(small_idx, local, output):
    first = start(small_idx, output, NEW)
    wait_until((staging_of(output) / ".lock").is_file, first)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the other has begun
    refused = preprocess(small_idx, output, *NEW, script=HASTY.replace("3.0", "60.0"))
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate()
    if refused.returncode == 75:
        assert f"process {first.pid} on" in refused.stderr
        assert first.returncode == 0, said
    else:  # this machine is so slow that the lock of the first had lapsed
        assert (refused.returncode, first.returncode) == (0, 75)
    assert preprocess(small_idx, output, *NEW).returncode == 0
    assert_alone(output, local[NEW])


def test_taken_for_dead_and_is_not(small_idx, local, output):
    first = start(small_idx, output, (*NEW, "--overwrite"))
    wait_until(appears(staging_of(output), ".tfrecord"), first)
    first.send_signal(signal.SIGSTOP)
    time.sleep(LAPSE_SECONDS)
    done = preprocess(small_idx, output, *OLD)
    assert done.returncode == 0, done.stderr
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate()
    assert first.returncode == 75, said
    assert "Traceback" not in said
    assert_equal(files_of(output), local[OLD])
    assert preprocess(small_idx, output, *OLD).returncode == 0
    assert_alone(output, local[OLD])


# What cannot be reached


def test_no_such_bucket(small_idx):
    path = gcs.parse("gs://no-such-bucket/out")
    for done in (
        preprocess(small_idx, path, *NEW),
        helpers.run_cli("pipeline.dataset", "verify", path),
    ):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "there is no bucket no-such-bucket" in done.stderr


def test_no_such_dataset(output):
    done = helpers.run_cli("pipeline.dataset", "verify", output)
    assert (done.returncode, done.stderr) == (
        2,
        f"python -m pipeline.dataset: error: {output}: no such folder; expected a dataset\n",
    )
    storage.write_atomic(output / "manifest.json", json.dumps({"format_version": 0}))
    done = helpers.run_cli("pipeline.dataset", "verify", output)
    assert done.returncode == 2
    assert f"{output}/manifest.json: format_version is 0, expected 1" in done.stderr


def test_server_goes_away(small_idx, output, tmp_path):
    with server(tmp_path / "data") as other:
        process = start(small_idx, output, NEW)
        wait_until(appears(staging_of(output), ".tfrecord"), process)
        other.kill()
        _, said = process.communicate()
    assert process.returncode == 1, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("python -m pipeline.preprocess: error: gs://digits/")
    assert "no answer from http://127.0.0.1:" in last
