"""A disk that fills up at any stage: one line, nothing published, and on it goes with more room.

The roots lie on a small file system in memory, which only root may mount; and, wherever the tests
run, in a folder with a quota that every Python process of the job keeps.
"""

import json
import os
import re
import shutil
import subprocess

import helpers
import pytest

from pipeline import registry, storage

FLAGS = (
    "--window=w", "--num_shards=2", "--hidden_units=32,16", "--epochs=2", "--batch_size=50",
    "--min_class_accuracy=0", "--checkpoint_seconds=0",
)  # fmt: skip
SIZE = 12 << 20
NO_ROOM = "no room left on the disk; once there is some, the same command goes on from here"
RUN = r"runs/w-core-\w{12}"
# What is taken away from a finished root so that this stage comes next, the bytes that are left
# free then, and who names which file that does not fit. Those that publish come first: of a
# bounded share they are the ones to run.
STAGES = {
    "publish": (["models", "runs.jsonl"], 100_000, "pipeline.retrain", r"models/\S+"),
    "ledger": (["runs.jsonl"], 0, "pipeline.retrain", r"runs\.jsonl"),
    "evaluate": (
        ["runs/*/report", "runs/*/decision.json", "models", "runs.jsonl"],
        12_000,
        "pipeline.evaluate",
        rf"{RUN}/\.report\.incomplete/\S+",
    ),
    "export": (
        ["runs/*/export", "runs/*/report", "runs/*/decision.json", "models", "runs.jsonl"],
        100_000,
        "trainer.task",
        rf"{RUN}/\.export\.incomplete/\S+",
    ),
    "train": (
        ["runs/*/[!r]*", "runs/*/report", "models", "runs.jsonl"],
        200_000,
        "trainer.task",
        rf"{RUN}/(checkpoints/\.?step-\d+\.ckpt\S*|metrics\.jsonl)",
    ),
    "preprocess": (
        ["datasets", "runs", "models", "runs.jsonl"],
        300_000,
        "pipeline.preprocess",
        r"datasets/\S+",
    ),
    "request": (
        ["datasets", "runs", "models", "runs.jsonl"],
        0,
        "pipeline.retrain",
        r"runs\S*",
    ),
}
# What every Python process begins with that finds it on its path: where a folder holds so many
# bytes already, nothing in it is opened to be written any more. Locks stay empty.
QUOTA = """
import errno, os, sys

def used(folder):
    files = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    return sum(os.lstat(path).st_size for path in files if os.path.lexists(path))

def watch(event, arguments):
    if event != "open" or not isinstance(arguments[0], str):
        return
    path, _, flags = arguments
    folder, limit = os.environ["QUOTA_FOLDER"], int(os.environ["QUOTA_BYTES"])
    if not path.startswith(folder + os.sep) or os.path.basename(path) == ".lock":
        return
    if flags & (os.O_WRONLY | os.O_RDWR) and used(folder) >= limit:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)

sys.addaudithook(watch)
"""


def run_chain(root, source, **options):
    return helpers.run_cli(
        "pipeline.retrain", "--root", root, "--source", f"idx:{source}", *FLAGS, **options
    )


@pytest.fixture(scope="module")
def finished(small_idx, tmp_path_factory):
    """A root that nothing disturbed. Read only."""
    root = tmp_path_factory.mktemp("finished") / "root"
    done = run_chain(root, small_idx)
    assert done.returncode == 0, done.stderr
    return root


class Disk:
    """A file system of `SIZE` bytes.

    Attributes:
        place: where it is.
        env: variables of the processes that work on it.
    """

    def __init__(self, place):
        self.place = place
        self.env = {}

    def fill(self, room):
        """Fills it up with one file, but for some bytes."""
        with (self.place / "ballast").open("wb", buffering=0) as file:
            size = 0
            try:
                while True:
                    size += file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, size - room))

    def clear(self):
        """Makes room again."""
        (self.place / "ballast").unlink()


class Quota(Disk):
    """A folder in which no more than so many bytes may lie."""

    def fill(self, room):
        """Lets it hold what it holds now, and some bytes more."""
        hooks = self.place.parent / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(QUOTA)
        self.env = {
            "PYTHONPATH": os.pathsep.join(map(str, (hooks, helpers.ROOT))),
            "QUOTA_FOLDER": self.place,
            "QUOTA_BYTES": sum(storage.walk(self.place).values()) + room,
        }

    def clear(self):
        """Lets it hold anything."""
        self.env = {}


@pytest.fixture
def place(tmp_path):
    """An empty folder."""
    place = tmp_path / "disk"
    place.mkdir()
    return place


@pytest.fixture
def mounted(place):
    """A small file system."""
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs"]
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here, and the quota has to do: {done.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", place], check=True)


def published(root):
    champion = registry.champion(root)
    return champion and (champion.version, champion.run_id, champion.weights_sha256)


@pytest.mark.campaign
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_each_stage(stage, finished, mounted, small_idx):
    fill_up(stage, finished, mounted, small_idx)


@pytest.mark.campaign
@pytest.mark.parametrize("stage", STAGES)
def test_a_quota_that_is_used_up_at_each_stage(stage, finished, place, small_idx):
    fill_up(stage, finished, Quota(place), small_idx)


def fill_up(stage, finished, disk, small_idx):
    """Leaves too little room for a stage, then enough, and shows what comes of both."""
    removed, room, module, named = STAGES[stage]
    root = shutil.copytree(finished, disk.place / "root")
    for pattern in removed:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = published(root)
    disk.fill(room)
    done = run_chain(root, small_idx, env=disk.env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if NO_ROOM in line]
    # A quota that is used up has no room for the root's page either.
    said = [line for line in said if "index.html" not in line]
    assert len(said) == 1, done.stderr
    assert re.fullmatch(
        rf"python -m {re.escape(module)}: error: {re.escape(str(root))}/{named}: {NO_ROOM}", said[0]
    ), said
    assert published(root) == before
    assert not (root / "runs.jsonl").exists() or not (root / "runs.jsonl").read_bytes()
    disk.clear()
    done = run_chain(root, small_idx, env=disk.env)
    assert done.returncode == 0, done.stderr
    assert published(root) == published(finished)
    found, expected = (helpers.tree(each) for each in (root, finished))
    assert sorted(without_events(found)) == sorted(without_events(expected))
    report = f"runs/{published(root)[1]}/report/report.json"
    assert found[report] == expected[report]
    assert len((root / "runs.jsonl").read_text().splitlines()) == 1
    assert json.loads((root / "runs.jsonl").read_text())["version"] == 1


def without_events(names):
    return [name for name in names if "/tensorboard/" not in name and "failures" not in name]
