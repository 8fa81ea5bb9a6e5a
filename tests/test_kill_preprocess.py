"""Killed at any moment, or run twice at once: the next run leaves the dataset and nothing else."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import doomed
import helpers
import pytest

from pipeline import existing, preprocess
from pipeline.command import InputError
from pipeline.options import PreprocessConfig

NEW = ("--num_shards=3",)
OLD = ("--num_shards=2",)
COMMAND = "from pipeline import preprocess; preprocess.main()"


def spread(count):
    """The numbers below `count`; the first few of them, however many, are spread over all."""
    bits = (count - 1).bit_length()
    backwards = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(1 << bits))
    return [number for number in backwards if number < count]


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """Two runs that nothing disturbed: what they made, and how long the second one took.

    Attributes:
        source: what both read.
        new: the files of the one that the killed runs were to make.
        old_folder: the dataset that another one replaces, if one does.
        old: its files.
        until_staging: seconds until the folder appeared in which the new one is made.
        until_done: seconds until the end.
    """

    source: str
    new: dict[str, bytes]
    old_folder: Path | None = None
    old: dict[str, bytes] | None = None
    until_staging: float = 0
    until_done: float = 0


def files_of(folder):
    """The files of a dataset, without what no two runs have in common."""
    return {name: data for name, data in helpers.tree(folder).items() if name != "metrics.json"}


def start(*args):
    """Starts the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process):
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process, happened):
    """Waits for something to happen, or for the process to end."""
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def command(source, output, flags):
    return ("-m", "pipeline.preprocess", f"--source={source}", f"--output_dir={output}", *flags)


def staging_of(output):
    return output.parent / f".{output.name}.incomplete"


@pytest.fixture(scope="session")
def undisturbed(small_idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    source = f"idx:{small_idx}"
    done = helpers.run_python(*command(source, folder / "old", OLD))
    assert done.returncode == 0, done.stderr
    began = time.monotonic()
    process = start(*command(source, folder / "new", NEW))
    wait_for(process, staging_of(folder / "new").exists)
    until_staging = time.monotonic() - began
    assert process.wait() == 0
    until_done = time.monotonic() - began
    return Undisturbed(
        source=source,
        old_folder=folder / "old",
        old=helpers.tree(folder / "old"),
        new=files_of(folder / "new"),
        until_staging=until_staging,
        until_done=until_done,
    )


@pytest.fixture
def output(tmp_path):
    return tmp_path / "place" / "out"


def completes(undisturbed, output, flags):
    """The next run of the same command makes the dataset, and leaves nothing else."""
    done = helpers.run_python(*command(undisturbed.source, output, flags))
    assert done.returncode == 0, done.stderr
    found = files_of(output)
    assert sorted(found) == sorted(undisturbed.new)
    assert [name for name in found if found[name] != undisturbed.new[name]] == []
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def put_old(undisturbed, output):
    shutil.copytree(undisturbed.old_folder, output)


def old_new_or_none(undisturbed, output):
    """What a reader finds after a kill is one dataset whole, or none."""
    if not output.exists():
        return
    found = helpers.tree(output)
    if found != undisturbed.old:
        found = {n: d for n, d in found.items() if n != "metrics.json"}
        assert sorted(found) == sorted(undisturbed.new)
        assert [name for name in found if found[name] != undisturbed.new[name]] == []


def new_or_none(undisturbed, output):
    if output.exists():
        assert helpers.tree(output) != undisturbed.old
        old_new_or_none(undisturbed, output)


# By the clock: before anything is written, and while it is


def killed_after(undisturbed, output, flags, share):
    """Kills a run: below 1, this share of the way to its first file; from 1 on, of the rest."""
    process = start(*command(undisturbed.source, output, flags))
    if share < 1:
        time.sleep(share * undisturbed.until_staging)
    else:
        wait_for(process, staging_of(output).exists)
        time.sleep((share - 1) * (undisturbed.until_done - undisturbed.until_staging))
    kill(process)


# Of 20: four before anything is written, the others while it is.
SHARES = [number / 4 if number < 4 else 1 + (number - 4) / 16 for number in range(20)]


@pytest.mark.campaign
@pytest.mark.parametrize("share", [SHARES[number] for number in spread(20)][1:])
def test_killed_at_a_time(share, undisturbed, output):
    killed_after(undisturbed, output, NEW, share)
    new_or_none(undisturbed, output)
    completes(undisturbed, output, NEW)


# At an event that shows from outside


def appears(pattern):
    return lambda output: any(output.parent.glob(pattern))


EVENTS = {
    "a shard": appears(".out.incomplete/*/*.tfrecord"),
    "the manifest": appears(".out.incomplete/*/manifest.json"),
    "the staging folder": appears(".out.incomplete"),
    "the quarantine": appears(".out.incomplete/*/quarantine/*"),
    "a temporary file": appears(".out.incomplete/*/.*.tfrecord.*"),
    "the last shard": appears(".out.incomplete/*/test-00002-of-00003.tfrecord"),
    "the metrics": appears(".out.incomplete/*/metrics.json"),
    "the dataset": appears("out/manifest.json"),
}


@pytest.mark.campaign
@pytest.mark.parametrize("event", EVENTS)
def test_killed_as_something_appears(event, undisturbed, output):
    output.parent.mkdir()
    process = start(*command(undisturbed.source, output, NEW))
    wait_for(process, lambda: EVENTS[event](output))
    kill(process)
    new_or_none(undisturbed, output)
    completes(undisturbed, output, NEW)


# At a step: every one of them, as if the machine had stopped there


def killed_at_step(undisturbed, output, flags, step=doomed.MANY):
    """Kills a run before a step; returns the steps it took where it ended well, or 0."""
    output.parent.mkdir(exist_ok=True)
    args = command(undisturbed.source, output, flags)[2:]
    ended = doomed.run(COMMAND, output.parent, *args, moment=step)
    assert ended.code in (0, -signal.SIGKILL), ended.log
    return ended.steps


@pytest.fixture(scope="session")
def steps(undisturbed, tmp_path_factory):
    """How many steps a run takes that makes a dataset, and one that replaces another."""
    fresh = tmp_path_factory.mktemp("steps") / "fresh" / "out"
    fresh.parent.mkdir()
    over = fresh.parent.parent / "over" / "out"
    over.parent.mkdir()
    put_old(undisturbed, over)
    return (
        killed_at_step(undisturbed, fresh, NEW),
        killed_at_step(undisturbed, over, (*NEW, "--overwrite")),
    )


COUNT = 36
EACH = 12  # the last steps publish the dataset: every one of them is a case


def nth_step(total, number):
    """Of `COUNT` steps, the first is the run's first, the last its last."""
    if number >= COUNT - EACH:
        return total - COUNT + number
    return number * (total - EACH) // (COUNT - EACH)


@pytest.mark.campaign
@pytest.mark.parametrize("number", spread(COUNT))
def test_killed_at_a_step(number, undisturbed, steps, output):
    assert killed_at_step(undisturbed, output, NEW, nth_step(steps[0], number)) == 0
    new_or_none(undisturbed, output)
    completes(undisturbed, output, NEW)


@pytest.mark.campaign
@pytest.mark.parametrize("number", spread(COUNT))
def test_killed_at_a_step_of_overwriting(number, undisturbed, steps, output):
    flags = (*NEW, "--overwrite")
    output.parent.mkdir()
    put_old(undisturbed, output)
    assert killed_at_step(undisturbed, output, flags, nth_step(steps[1], number)) == 0
    old_new_or_none(undisturbed, output)
    completes(undisturbed, output, flags)


def test_killed_while_it_writes(small_idx, small_dataset, output):
    undisturbed = Undisturbed(source=f"idx:{small_idx}", new=files_of(small_dataset))
    output.parent.mkdir()
    process = start(*command(undisturbed.source, output, NEW))
    wait_for(process, lambda: EVENTS["a shard"](output))
    kill(process)
    new_or_none(undisturbed, output)
    completes(undisturbed, output, NEW)


# Two at once


@pytest.mark.campaign
@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("apart", (0.0, 0.5, 0.25, 0.75, 0.95))
def test_two_at_once(apart, overwrite, undisturbed, output):
    flags = NEW
    output.parent.mkdir()
    if overwrite:
        put_old(undisturbed, output)
        flags = (*NEW, "--overwrite")
    both = []
    for _ in range(2):
        both.append(start(*command(undisturbed.source, output, flags)))
        time.sleep(apart * undisturbed.until_done)
    codes = sorted(process.wait() for process in both)
    assert codes in ([0, 0], [0, 75])
    completes(undisturbed, output, flags)


@pytest.mark.parametrize("same", (True, False))
def test_another_run_publishes_meanwhile(same, small_idx, small_dataset, monkeypatch):
    config = PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=small_dataset, num_shards=3 if same else 4
    )
    answers = [lambda *_: False, existing.is_there]  # as it was when this run began, and later
    monkeypatch.setattr(existing, "is_there", lambda *args: answers.pop(0)(*args))
    before = helpers.tree(small_dataset)
    if same:
        assert preprocess.execute(config) == 0
    else:
        with pytest.raises(InputError, match="another dataset"):
            preprocess.execute(config)
    assert helpers.tree(small_dataset) == before
