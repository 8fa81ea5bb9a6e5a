"""A disk that fills up at any stage: one line, nothing published, and on it goes with more room.

The roots lie on a small file system in memory, which only root may mount.
"""

import json
import re
import shutil
import subprocess

import helpers
import pytest

from pipeline import registry

FLAGS = (
    "--window=w", "--num_shards=2", "--hidden_units=32,16", "--epochs=2", "--batch_size=50",
    "--min_class_accuracy=0", "--checkpoint_seconds=0",
)  # fmt: skip
SIZE = 12 << 20
NO_ROOM = "no room left on the disk; once there is some, the same command goes on from here"
RUN = r"runs/w-core-\w{12}"
# What is taken away from a finished root so that this stage comes next, the bytes that are left
# free then, and the file that does not fit.
STAGES = {
    "preprocess": (["datasets", "runs", "models", "runs.jsonl"], 300_000, r"datasets/\S+"),
    "train": (
        ["runs/*/[!r]*", "runs/*/report", "models", "runs.jsonl"],
        200_000,
        rf"{RUN}/checkpoints/step-\d+\.ckpt",
    ),
    "export": (
        ["runs/*/export", "runs/*/report", "runs/*/decision.json", "models", "runs.jsonl"],
        150_000,
        rf"{RUN}/\S+",
    ),
    "evaluate": (
        ["runs/*/report", "runs/*/decision.json", "models", "runs.jsonl"],
        12_000,
        rf"{RUN}/\.report\.incomplete/\S+",
    ),
    "publish": (["models", "runs.jsonl"], 100_000, r"models/\S+"),
    "ledger": (["runs.jsonl"], 0, r"runs\.jsonl"),
    "request": (["datasets", "runs", "models", "runs.jsonl"], 0, r"runs\S*"),
}


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


@pytest.fixture
def disk(tmp_path):
    """A file system of `SIZE` bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs"]
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(path, room):
    """Fills a file system up with one file, but for some bytes."""
    with path.open("wb", buffering=0) as file:
        size = 0
        try:
            while True:
                size += file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, size - room))


def published(root):
    champion = registry.champion(root)
    return champion and (champion.version, champion.run_id, champion.weights_sha256)


@pytest.mark.campaign
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_each_stage(stage, finished, disk, small_idx):
    removed, room, named = STAGES[stage]
    root = shutil.copytree(finished, disk / "root")
    for pattern in removed:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = published(root)
    fill(disk / "ballast", room)
    done = run_chain(root, small_idx)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if NO_ROOM in line]
    assert len(said) == 1, done.stderr
    assert re.fullmatch(
        rf"python -m [a-z.]+: error: {re.escape(str(root))}/{named}: {NO_ROOM}", said[0]
    ), said
    assert published(root) == before
    assert not (root / "runs.jsonl").exists() or not (root / "runs.jsonl").read_bytes()
    (disk / "ballast").unlink()
    done = run_chain(root, small_idx)
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
