"""The whole chain, killed at any moment: the same command ends in the same champion."""

import json
import random
import re
import shutil
import signal
import time

import doomed
import helpers
import pytest

from pipeline import registry, storage
from pipeline.command import LockedError

FLAGS = (
    "--window=w",
    "--num_shards=2",
    "--hidden_units=32,16",
    "--epochs=3",
    "--batch_size=50",
    "--steps_per_call=2",
    "--min_class_accuracy=0",
    "--checkpoint_seconds=0",
)
MOMENTS = 20  # of each kind
COMMAND = "from pipeline import retrain; retrain.main()"


def run(root, source, **killed):
    """Runs the command to its end, its own or ours."""
    return doomed.run(COMMAND, root, "--root", root, "--source", f"idx:{source}", *FLAGS, **killed)


def wait_for_the_lock(root):
    """Waits until the stage has ended that was killed along with the chain."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with storage.locked(root):
                return
        except LockedError:
            assert time.monotonic() < deadline, "a stage goes on"
            time.sleep(0.01)


@pytest.fixture(scope="session")
def old_root(small_idx, tmp_path_factory):
    """A root that has a champion already, of another seed and another dataset."""
    root = tmp_path_factory.mktemp("old") / "root"
    data = helpers.write_idx(tmp_path_factory.mktemp("other"), helpers.make_images(seed=1))
    done = helpers.run_cli(
        "pipeline.retrain", "--root", root, f"--source=idx:{data}", *FLAGS, "--window=old"
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def undisturbed_root(old_root, small_idx, tmp_path_factory):
    """A root after a run that nothing disturbed, and how that ended. Read only."""
    root = shutil.copytree(old_root, tmp_path_factory.mktemp("undisturbed") / "root")
    ended = run(root, small_idx)
    assert ended.code == 0, ended.log
    return root, ended


@pytest.fixture(scope="session")
def undisturbed(undisturbed_root):
    """What a run comes to, the things it does to files itself, and how long it takes for them."""
    root, ended = undisturbed_root
    assert ended.steps > 20
    return result(root), ended.steps, ended.seconds


@pytest.fixture(scope="session")
def decided_root(old_root, undisturbed_root, tmp_path_factory):
    """The same root as it was when the decision was made. Read only."""
    root = shutil.copytree(undisturbed_root[0], tmp_path_factory.mktemp("decided") / "root")
    shutil.rmtree(root / "models")
    shutil.copytree(old_root / "models", root / "models")
    shutil.copy(old_root / "runs.jsonl", root / "runs.jsonl")
    return root


def result(root):
    """What does not depend on how often a run was killed."""
    champion = registry.champion(root)
    report = root / "runs" / champion.run_id / "report/report.json"
    # Each attempt writes an event file of its own, as TensorBoard expects, and chance names them.
    files = [name for name in helpers.tree(root) if "/tensorboard/" not in name]
    lines = [json.loads(line) for line in (root / "runs.jsonl").read_text().splitlines()]
    decision = json.loads((report.parent.parent / "decision.json").read_text())
    # A model's graph names its functions in the order of their making, which a kill changes.
    decision["model_files"] = sorted(decision["model_files"])
    return {
        "champion": (champion.version, champion.run_id, champion.weights_sha256),
        "report": report.read_bytes(),
        "decision": decision,
        "files": files,
        "ledger": [line | {"time": None, "request": None} for line in lines],
        "page": shown(root),
        "hidden": sorted({path.name for path in root.rglob(".*")}),
    }


def shown(root):
    """The page of all runs, but for the times in it and what is drawn over them."""
    page = (root / "index.html").read_text()
    return re.sub(r"<time.*?</time>|<svg.*?</svg>", "", page, flags=re.DOTALL)


def moments():
    """Shares of a run, one at random in each of so many equal parts; the first few far apart."""
    chance = random.Random(40)
    parts = [7 * i % MOMENTS for i in range(1, MOMENTS + 1)]
    return [round((part + chance.random()) / MOMENTS, 3) for part in parts]


@pytest.mark.campaign
@pytest.mark.parametrize("share", moments())
def test_killed_at_a_step_of_its_own(share, old_root, undisturbed, small_idx, tmp_path):
    expected, steps, _ = undisturbed
    root = shutil.copytree(old_root, tmp_path / "root")
    kill_and_go_on(root, small_idx, "step", int(share * steps), expected)


@pytest.mark.campaign
@pytest.mark.parametrize("share", moments())
def test_killed_in_the_middle_of_a_stage(share, old_root, undisturbed, small_idx, tmp_path):
    expected, _, seconds = undisturbed
    root = shutil.copytree(old_root, tmp_path / "root")
    kill_and_go_on(root, small_idx, "seconds", share * seconds, expected)


@pytest.mark.campaign
@pytest.mark.parametrize("share", moments())
def test_killed_as_it_publishes(share, decided_root, undisturbed, small_idx, tmp_path):
    whole = shutil.copytree(decided_root, tmp_path / "whole/root")
    ended = run(whole, small_idx)
    assert ended.code == 0, ended.log
    assert result(whole) == undisturbed[0]
    root = shutil.copytree(decided_root, tmp_path / "root")
    kill_and_go_on(root, small_idx, "step", int(share * ended.steps), undisturbed[0])


def kill_and_go_on(root, source, how, moment, expected):
    """Kills a run on a root at a moment, and shows that the same command ends the same."""
    assert expected["hidden"] == [".lock"]
    before = registry.champion(root)
    code, log, *_ = run(root, source, how=how, moment=moment)
    assert "Traceback" not in log
    if code == 0 and how == "seconds":  # it was faster than the one that nothing disturbed
        assert result(root) == expected
        return
    assert code == -signal.SIGKILL, log
    wait_for_the_lock(root)
    # At every moment there is a champion, and it is one that was promoted.
    champion = registry.champion(root)
    assert champion == before or champion.weights_sha256 == expected["champion"][2]
    assert (root / champion.path / "saved_model.pb").is_file()
    ended = run(root, source)
    assert ended.code == 0, ended.log
    assert result(root) == expected
