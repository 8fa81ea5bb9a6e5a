"""Killed at any moment, the same command ends in the weights of a run that nothing disturbed."""

import json
import random
import signal

import doomed
import helpers
import pytest

FLAGS = (
    "--hidden_units=16,12",
    "--batch_size=8",
    "--epochs=4",
    "--replicas=1",
    "--steps_per_call=10",
    "--patience=9",  # so that there are best weights to keep
    "--ema_decay=0.9",
    "--checkpoint_seconds=0",  # as often as can be: a moment hits one more easily
)
MOMENTS = 30
# The command, that also ends itself in the middle of writing the nth checkpoint, or as the
# exported model's files appear.
COMMAND = """
import pathlib
from trainer import checkpoints, task
write = checkpoints.write

def write_half(file, header, arrays):
    global moment
    write(file, header, arrays)
    moment = int(moment) - 1
    if moment < 0:
        file.seek(file.tell() // 2)
        file.truncate()
        file.flush()
        die()

if how == "checkpoint":
    checkpoints.write = write_half

def lie_in_wait():
    while not any(pathlib.Path(folder).glob(".export.incomplete/*/" + moment)):
        time.sleep(0.0005)
    die()

if how == "export":
    threading.Thread(target=lie_in_wait, daemon=True).start()
task.main()
"""


def run(dataset, run_dir, **killed):
    """Runs the command to its end, its own or ours."""
    arguments = ("--dataset_dir", dataset, "--run_dir", run_dir, *FLAGS)
    return doomed.run(COMMAND, run_dir, *arguments, **killed)


def result(run_dir):
    """What does not depend on how often a run was killed."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["examples_per_second"]
    assert (run_dir / "export" / "metrics.jsonl").read_text() == (
        run_dir / "metrics.jsonl"
    ).read_text()
    return json.loads((run_dir / "export" / "model.json").read_text()), lines


@pytest.fixture(scope="session")
def undisturbed(small_dataset, tmp_path_factory):
    """What a run comes to, the things it does to files, and how long it takes for them."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run(small_dataset, run_dir)
    assert ended.code == 0, ended.log
    assert ended.steps > 100
    return result(run_dir), ended.steps, ended.seconds


def moments():
    """How to kill each run: first those that must be among them, then at random."""
    found = [("checkpoint", 5), ("export", "saved_model.pb")]
    chance = random.Random(30)
    while len(found) < MOMENTS:
        found.append((chance.choice(("step", "seconds")), round(chance.random(), 3)))
    return found


@pytest.mark.campaign
@pytest.mark.parametrize(("how", "moment"), moments())
def test_killed_at_a_moment_it_ends_the_same(how, moment, undisturbed, small_dataset, tmp_path):
    expected, steps, seconds = undisturbed
    if how in ("step", "seconds"):
        moment = int(moment * steps) if how == "step" else moment * seconds
    run_dir = tmp_path / "run"
    code, log, *_ = run(small_dataset, run_dir, how=how, moment=moment)
    if how == "seconds" and code == 0:  # it was faster than the one that nothing disturbed
        assert result(run_dir) == expected
        return
    assert code == -signal.SIGKILL, log
    ended = run(small_dataset, run_dir)
    assert ended.code == 0, ended.log
    assert result(run_dir) == expected
    left = [name for name in helpers.tree(run_dir) if "incomplete" in name or "/." in name]
    assert left == []
    assert len(list((run_dir / "checkpoints").iterdir())) == 2
