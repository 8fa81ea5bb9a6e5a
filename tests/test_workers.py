"""Two worker processes on this machine: they stop, refuse and go on together."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import signalled_trainer
from signalled_trainer import CALLS

from pipeline import storage
from pipeline.command import FailedError, InputError, LockedError, UnreachableError
from trainer.workers import Said, Workers, difference

DEADLINE = 300  # seconds; for what takes about twenty


def run(dataset, run_dirs, *, signalled=None, flags=((), ())):
    """Runs one worker for each run folder, all at once: exit codes, and what each said.

    Args:
        dataset: its folder.
        run_dirs: a run folder for each; one is a process alone.
        signalled: which worker sends itself a signal, in which call, and which signal.
        flags: more of them, for each.
    """
    processes, logs = [], []
    addresses = [f"127.0.0.1:{port}" for port in helpers.free_ports(len(run_dirs))]
    try:
        for index, run_dir in enumerate(run_dirs):
            environ = os.environ | {"PYTHONPATH": str(helpers.ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
            if len(run_dirs) > 1:
                environ |= signalled_trainer.cluster(addresses, index)
            program = ["-m", "trainer.task"]
            if signalled and signalled[0] == index:
                program = [str(signalled_trainer.SCRIPT), *map(str, signalled[1:])]
            own = [*signalled_trainer.arguments(dataset, run_dir), *flags[index]]
            logs.append(Path(f"{run_dir}.{index}.log"))
            with logs[-1].open("w") as said:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *program, *own], env=environ, stdout=said, stderr=said
                    )
                )
        codes = [process.wait(DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return codes, [path.read_text() for path in logs]


def result(run_dir):
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["examples_per_second"]
    return json.loads((run_dir / "export" / "model.json").read_text())["weights_sha256"], lines


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def errors(said):
    """The last line of what each worker said, without the name of the program."""
    assert not any("Traceback" in text for text in said), said
    return [text.splitlines()[-1].split("error: ")[-1] for text in said]


@pytest.fixture(scope="module")
def alone(small_dataset, tmp_path_factory):
    """The folder of a run by one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    codes, said = run(small_dataset, [run_dir])
    assert codes == [0], said
    return run_dir


@pytest.mark.campaign
@pytest.mark.parametrize(("asked", "call"), [(1, CALLS + 1), (0, 2), (1, 1)])
def test_a_stop_of_one_worker_stops_both_and_they_end_as_one_would(
    asked, call, alone, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    codes, said = run(small_dataset, [run_dir] * 2, signalled=(asked, call, "SIGTERM"))
    assert codes == [143, 143], said
    assert not (run_dir / "export").exists()
    steps = 10 * call if call <= CALLS else 25 + 10 * (call - CALLS)
    assert checkpoints(run_dir)[-1] == f"step-{steps:08d}.ckpt"
    stopped = "stopped by SIGTERM after saving; the same command goes on from here"
    assert not any("Traceback" in text for text in said), said
    # Not the last line always: TensorFlow may note that the other worker has ended.
    assert [text.splitlines().count(stopped) for text in said] == [1, 1], said

    codes, said = run(small_dataset, [run_dir] * 2)
    assert codes == [0, 0], said
    assert ("epoch 1/3" in said[0]) == (call <= CALLS)
    assert "epoch " not in said[1]  # the chief alone speaks
    assert result(run_dir) == result(alone)
    assert len(list((run_dir / "tensorboard").iterdir())) == 2  # one of each start, the chief's


@pytest.mark.campaign
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_of_a_killed_worker_says_so_in_one_line(killed, small_dataset, tmp_path):
    run_dir = tmp_path / "run"
    codes, said = run(small_dataset, [run_dir] * 2, signalled=(killed, CALLS + 2, "SIGKILL"))
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, said
    expected = "another worker ended; the same command on all goes on from the last checkpoint"
    assert errors(said)[1 - killed] == expected
    # A chief that is left alone may have been about to save when it learned of it.
    steps = (35,) if killed == 0 else (25, 35)
    assert checkpoints(run_dir)[-1] in [f"step-{step:08d}.ckpt" for step in steps]


@pytest.mark.campaign
def test_workers_with_other_checkpoints_are_refused(small_dataset, tmp_path):
    first, chief, other = tmp_path / "first", tmp_path / "chief", tmp_path / "other"
    codes, said = run(small_dataset, [first] * 2, signalled=(0, 2, "SIGTERM"))
    assert codes == [143, 143], said
    shutil.copytree(first, chief)
    before = helpers.tree(chief / "checkpoints")
    codes, said = run(small_dataset, [chief, other])
    assert codes == [2, 2], said
    for line in errors(said):
        assert line.startswith("worker 1 has checkpoint ")
        assert line.endswith(
            "; expected the same flags on all workers, and folders that they share"
        )
    assert helpers.tree(chief / "checkpoints") == before
    assert not other.exists()


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("flags", "said_of"),
    [
        (((), ("--input=stream",)), "worker 1 has input stream, worker 0 resident; "),
        (((), ("--seed=23",)), "worker 1 has seed 23, worker 0 22; "),
        (((), ("--hidden_units=16",)), "worker 1 has hidden_units [16], worker 0 [16, 12]; "),
    ],
)
def test_workers_that_were_asked_for_different_runs_are_refused(
    flags, said_of, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    codes, said = run(small_dataset, [run_dir] * 2, flags=flags)
    assert codes == [2, 2], said
    assert [line.startswith(said_of) for line in errors(said)] == [True, True], said
    assert not run_dir.exists()


@pytest.mark.campaign
def test_what_one_worker_refuses_all_refuse(small_dataset, tmp_path):
    run_dir = tmp_path / "locked"
    with storage.locked(run_dir):
        codes, said = run(small_dataset, [run_dir] * 2)
    assert codes == [75, 75], said
    line = f"{run_dir}: another process is at work here"
    assert errors(said) == [line, f"worker 0: {line}"]

    damaged = shutil.copytree(small_dataset, tmp_path / "damaged")
    next(damaged.glob("train*")).unlink()
    flags = ((), (f"--dataset_dir={damaged}",))
    codes, said = run(small_dataset, [tmp_path / "run"] * 2, flags=flags)
    assert codes == [2, 2], said
    own = errors(said)[1]
    assert own.startswith(f"{damaged}")
    assert errors(said)[0] == f"worker 1: {own}"
    assert not (tmp_path / "run").exists()


@pytest.mark.campaign
def test_workers_of_a_finished_run_have_nothing_to_do(alone, small_dataset):
    before = helpers.tree(alone)
    codes, said = run(small_dataset, [alone] * 2)
    assert codes == [0, 0], said
    assert said == [f"{alone}: already trained and exported\n", ""]
    assert helpers.tree(alone) == before


SHARE = "; expected the same flags on all workers, and folders that they share"


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ([Said({"a": 1})], type(None), "None"),
        ([Said({"a": 1}), Said({"a": 1})], type(None), "None"),
        ([Said({}), Said({}), Said({}, "x: bad", 2)], InputError, "worker 2: x: bad"),
        ([Said({}, "x: held", 75), Said({"a": 1})], LockedError, "worker 0: x: held"),
        ([Said({}), Said({}, "x: no answer", 69)], UnreachableError, "worker 1: x: no answer"),
        ([Said({}), Said({}, "x: denied", 1)], FailedError, "worker 1: x: denied"),
        (
            [Said({"b": 1, "a": 1}), Said({"b": 2, "a": 2})],
            InputError,
            f"worker 1 has a 2, worker 0 1{SHARE}",
        ),
        ([Said({"a": 1}), Said({})], InputError, f"worker 1 has a None, worker 0 1{SHARE}"),
        ([Said({}), Said({"a": 1})], InputError, f"worker 1 has a 1, worker 0 None{SHARE}"),
    ],
)
def test_the_first_refusal_or_difference_counts(said, kind, message):
    found = difference(said)
    assert type(found) is kind
    assert str(found) == message


def test_a_block_ends_alike_for_whoever_refused_and_whoever_heard_of_it():
    parted = []
    heard = ['[{}, "", 0]', '[{}, "x: held", 75]']
    workers = Workers(alone=False, exchange=lambda _: heard, part=lambda: parted.append(1))
    with pytest.raises(LockedError, match=r"^worker 1: x: held$"), workers.together():
        pass
    with pytest.raises(InputError, match=r"^own$") as own, workers.together():
        raise InputError("own")
    assert own.value.exit_code == 2
    assert parted == [1, 1]


def test_alone_a_block_ends_as_it_would_without_others():
    with Workers().together() as alike:
        alike["a"] = float("nan")
    with pytest.raises(LockedError, match=r"^own$"), Workers().together():
        raise LockedError("own")
