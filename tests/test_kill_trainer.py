"""Killed at any moment, the same command ends in the weights of a run that nothing disturbed."""

import functools
import json
import random
import shutil
import signal

import doomed
import helpers
import pytest

FLAGS = (
    "--hidden_units=16,12",
    "--batch_size=8",
    "--epochs=4",
    "--steps_per_call=10",
    "--patience=9",  # so that there are best weights to keep
    "--ema_decay=0.9",
    "--checkpoint_seconds=0",  # as often as can be: a moment hits one more easily
)
KINDS = {
    "one replica": ("--replicas=1",),
    "reproducible": ("--replicas=2", "--reproducible"),
}
DELIBERATE = [("checkpoint", 5), ("export", "saved_model.pb")]
MOMENTS = 30  # in all
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


# What is drawn or read while a step is taken: all of it at once.
DRAWN = (
    "--input=stream",
    "--dropout=0.2",
    "--rotate=10",
    "--scale=0.1",
    "--shear=0.1",
    "--shift=2",
    "--elastic_alpha=8",
    "--elastic_sigma=4",
    "--calm_epochs=2",
    "--replicas=1",
)


def run(dataset, run_dir, flags=(), **killed):
    """Runs the command to its end, its own or ours."""
    arguments = ("--dataset_dir", dataset, "--run_dir", run_dir, *FLAGS, *flags)
    return doomed.run(COMMAND, run_dir, *arguments, **killed)


def kill(dataset, run_dir, flags, how, moment):
    """Runs the command until it is killed.

    One that ended before its time had come runs anew, to be killed in half that time.
    """
    code, log, *_ = run(dataset, run_dir, flags, how=how, moment=moment)
    if how == "seconds" and code == 0:
        shutil.rmtree(run_dir)
        kill(dataset, run_dir, flags, how, moment / 2)
        return
    assert code == -signal.SIGKILL, log


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
    """What a run of a kind comes to, what it does to files, and how long it takes for that."""

    @functools.cache
    def find(kind):
        run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
        ended = run(small_dataset, run_dir, KINDS[kind])
        assert ended.code == 0, ended.log
        assert ended.steps > 100
        return result(run_dir), ended.steps, ended.seconds

    return find


def chances():
    """How to kill each of the other runs, at random: one kind and the other in turn."""
    chance = random.Random(30)
    kinds = list(KINDS)
    return [
        (kinds[i % len(kinds)], chance.choice(("step", "seconds")), round(chance.random(), 3))
        for i in range(MOMENTS - len(DELIBERATE))
    ]


def assert_killed_it_ends_the_same(dataset, run_dir, kind, how, moment, expected):
    kill(dataset, run_dir, KINDS[kind], how, moment)
    ended = run(dataset, run_dir, KINDS[kind])
    assert ended.code == 0, ended.log
    assert result(run_dir) == expected
    left = [name for name in helpers.tree(run_dir) if "incomplete" in name or "/." in name]
    assert left == []
    assert len(list((run_dir / "checkpoints").iterdir())) == 2


@pytest.mark.campaign
@pytest.mark.parametrize(("how", "moment"), DELIBERATE)
def test_killed_as_it_writes_it_ends_the_same(how, moment, undisturbed, small_dataset, tmp_path):
    kind = "one replica"
    expected, *_ = undisturbed(kind)
    assert_killed_it_ends_the_same(small_dataset, tmp_path / "run", kind, how, moment, expected)


# A function of its own, so that a share of each has random moments in it.
@pytest.mark.campaign
@pytest.mark.parametrize(("kind", "how", "part"), chances())
def test_killed_at_any_moment_it_ends_the_same(
    kind, how, part, undisturbed, small_dataset, tmp_path
):
    expected, steps, seconds = undisturbed(kind)
    moment = int(part * steps) if how == "step" else part * seconds
    assert_killed_it_ends_the_same(small_dataset, tmp_path / "run", kind, how, moment, expected)


@pytest.mark.campaign
def test_killed_where_all_is_drawn_and_streamed_it_ends_the_same(small_dataset, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended = run(small_dataset, whole, DRAWN)
    assert ended.code == 0, ended.log
    for checkpoint in (3, 12):  # in the first epoch, and in the second
        ended = run(small_dataset, cut, DRAWN, how="checkpoint", moment=checkpoint)
        assert ended.code == -signal.SIGKILL, ended.log
    saved = [int(path.stem[5:]) for path in (cut / "checkpoints").glob("step-*")]
    assert 63 <= min(saved) < max(saved) < 126  # an epoch is 63 steps
    ended = run(small_dataset, cut, DRAWN)
    assert ended.code == 0, ended.log
    assert "epoch 1/4" not in ended.log
    assert result(cut) == result(whole)
