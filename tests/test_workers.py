"""Two worker processes on this machine: they stop, refuse and go on together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import signalled_trainer
from signalled_trainer import CALLS, STANDS

from pipeline import storage
from pipeline.command import FailedError, InputError, LockedError, UnreachableError
from trainer.meeting import meet
from trainer.workers import Cluster, Said, Workers, difference

DEADLINE = 300  # seconds; for what takes about twenty


def local_addresses(count):
    return [f"127.0.0.1:{port}" for port in helpers.free_ports(count)]


def begin(dataset, run_dir, index, addresses, *flags, program=("-m", "trainer.task")):
    """Starts a worker, one process alone where there is one address: it, and where it speaks."""
    environ = os.environ | {"PYTHONPATH": str(helpers.ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    if len(addresses) > 1:
        environ |= signalled_trainer.cluster(addresses, index)
    own = [*signalled_trainer.arguments(dataset, run_dir), *flags]
    log = Path(f"{run_dir}.{index}.log")
    with log.open("w") as said:
        command = [sys.executable, *program, *own]
        return subprocess.Popen(command, env=environ, stdout=said, stderr=said), log


def run(dataset, run_dirs, *, signalled=None, flags=((), ())):
    """Runs one worker for each run folder, all at once: exit codes, and what each said.

    Args:
        dataset: its folder.
        run_dirs: a run folder for each; one is a process alone.
        signalled: which worker sends itself a signal, in which call, and which signal.
        flags: more of them, for each.
    """
    begun = []
    addresses = local_addresses(len(run_dirs))
    try:
        for index, run_dir in enumerate(run_dirs):
            options = {}
            if signalled:  # the chief says for all how many steps a call takes
                call = signalled[1] if signalled[0] == index else signalled_trainer.NEVER
                options["program"] = (signalled_trainer.SCRIPT, str(call), signalled[2])
            begun.append(begin(dataset, run_dir, index, addresses, *flags[index], **options))
        codes = [process.wait(DEADLINE) for process, _ in begun]
    finally:
        for process, _ in begun:
            process.kill()
            process.wait()
    return codes, [log.read_text() for _, log in begun]


def waiting(index, addresses):
    """What the first line of one of two workers is."""
    other = 1 - index
    return (
        f"worker {index}: waiting for the other 1 of 2 workers: worker {other} ({addresses[other]})"
    )


def wait_for_line(process, log, line):
    deadline = time.monotonic() + DEADLINE
    while line not in log.read_text().splitlines():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


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


@pytest.mark.parametrize("index", [0, 1])
def test_a_stop_of_a_worker_that_waits_for_the_other_ends_it(index, small_dataset, tmp_path):
    addresses = local_addresses(2)
    process, log = begin(small_dataset, tmp_path / "run", index, addresses)
    try:
        wait_for_line(process, log, waiting(index, addresses))
        process.terminate()
        assert process.wait(DEADLINE) == 143
    finally:
        process.kill()
        process.wait()
    stopped = "stopped by SIGTERM; the same command goes on from the last checkpoint"
    assert log.read_text().splitlines() == [waiting(index, addresses), stopped]
    assert [path.name for path in tmp_path.iterdir()] == [log.name]


@pytest.mark.campaign
@pytest.mark.parametrize("first", [0, 1])
def test_a_worker_may_come_late(first, alone, small_dataset, tmp_path):
    addresses, run_dir = local_addresses(2), tmp_path / "run"
    begun = [begin(small_dataset, run_dir, first, addresses)]
    try:
        wait_for_line(*begun[0], waiting(first, addresses))
        begun.append(begin(small_dataset, run_dir, 1 - first, addresses))
        codes = [process.wait(DEADLINE) for process, _ in begun]
    finally:
        for process, _ in begun:
            process.kill()
            process.wait()
    assert codes == [0, 0], [log.read_text() for _, log in begun]
    assert result(run_dir) == result(alone)


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_waits_in_vain_names_the_one_that_is_missing(index, small_dataset, tmp_path):
    addresses = local_addresses(2)
    code = "from trainer import meeting, task; meeting.MEETING_SECONDS = 0.5; task.main()"
    process, log = begin(small_dataset, tmp_path / "run", index, addresses, program=("-c", code))
    assert process.wait(DEADLINE) == 1, log.read_text()
    missing = ("worker 1 ({1}) did not come", "worker 0 ({0}) did not answer")[index]
    line = missing.format(*addresses) + " within 0.5 s"
    assert log.read_text().count("\n") == 2
    assert errors([log.read_text()]) == [line]
    assert [path.name for path in tmp_path.iterdir()] == [log.name]


def test_a_worker_whose_other_ends_as_they_are_connected_does_not_wait_for_ever(
    small_dataset, tmp_path
):
    addresses = local_addresses(2)
    code = "from trainer import strategy, task; strategy.CONNECT_SECONDS = 2; task.main()"
    process, log = begin(small_dataset, tmp_path / "run", 0, addresses, program=("-c", code))
    try:
        wait_for_line(process, log, waiting(0, addresses))
        meet(Cluster(addresses, 1))  # and no more of it
        assert process.wait(DEADLINE) == 1
    finally:
        process.kill()
        process.wait()
    assert "Timeout (0:00:02)!" in log.read_text()
    assert not (tmp_path / "run").exists()


# Sends itself SIGTERM before TensorFlow connects the workers, or after: it takes the signal for
# itself meanwhile.
CONNECTING = """
import os, signal, sys
from trainer import meeting, task
moment, meet = sys.argv.pop(1), meeting.meet

def met(cluster):
    import tensorflow as tf
    connect = tf.distribute.MultiWorkerMirroredStrategy

    def signalled():
        if moment == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        made = connect()
        if moment == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    tf.distribute.MultiWorkerMirroredStrategy = signalled
    return meet(cluster)

meeting.meet = met
task.main()
"""


@pytest.mark.parametrize(("index", "moment"), [(1, "before"), (0, "after")])
def test_a_stop_as_workers_connect_stops_both(index, moment, small_dataset, tmp_path):
    addresses, run_dir = local_addresses(2), tmp_path / "run"
    begun = []
    try:
        for each in range(2):
            program = ("-c", CONNECTING, moment if each == index else "never")
            begun.append(begin(small_dataset, run_dir, each, addresses, program=program))
        codes = [process.wait(DEADLINE) for process, _ in begun]
    finally:
        for process, _ in begun:
            process.kill()
            process.wait()
    said = [log.read_text() for _, log in begun]
    assert codes == [143, 143], said
    stopped = "stopped by SIGTERM; the same command goes on from the last checkpoint"
    assert [text.splitlines().count(stopped) for text in said] == [1, 1], said
    assert not (run_dir / "checkpoints").is_dir() or checkpoints(run_dir) == []


@pytest.mark.campaign
@pytest.mark.parametrize(("asked", "call"), [(1, CALLS + 1), (0, 2)])
def test_a_stop_of_one_worker_stops_both_and_they_end_as_one_would(
    asked, call, alone, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    flags = [("--checkpoint_seconds=1000",)] * 2  # the stop alone saves
    codes, said = run(small_dataset, [run_dir] * 2, signalled=(asked, call, "SIGTERM"), flags=flags)
    assert codes == [143, 143], said
    assert not (run_dir / "export").exists()
    assert checkpoints(run_dir) == [f"step-{STANDS[call - 1]:08d}.ckpt"]
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
def test_the_other_of_a_killed_worker_says_so_in_one_line_and_they_go_on_to_the_same_end(
    killed, alone, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    codes, said = run(small_dataset, [run_dir] * 2, signalled=(killed, CALLS + 2, "SIGKILL"))
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, said
    expected = "another worker ended; the same command on all goes on from the last checkpoint"
    assert errors(said)[1 - killed] == expected
    # A chief that is left alone may have been about to save when it learned of it.
    steps = STANDS[CALLS : CALLS + 1] if killed == 0 else STANDS[CALLS - 1 : CALLS + 1]
    assert checkpoints(run_dir)[-1] in [f"step-{step:08d}.ckpt" for step in steps]

    codes, said = run(small_dataset, [run_dir] * 2)
    assert codes == [0, 0], said
    assert "epoch 1/3" not in said[0]
    assert result(run_dir) == result(alone)


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
    assert [text.splitlines()[1:] for text in said] == [
        [f"{alone}: already trained and exported"],
        [],
    ]
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
    workers = Workers(exchange=lambda _: heard, part=lambda: parted.append(1))
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
