"""A whole trainer that gets SIGTERM at a known moment, saves, and goes on to the same end.

Alone or as one of two workers: then it is the second that gets it, and both are busy.
"""

import json
import os
import subprocess
import sys

import helpers
import pytest
import signalled_trainer

FLAGS = (
    "--hidden_units=16,12",
    "--batch_size=20",
    "--epochs=2",
    "--reproducible",  # two workers end as one process does
    "--steps_per_call=10",
    "--checkpoint_seconds=1000",  # a stop alone saves
)
STEPS = 25  # of an epoch
# Sends itself the signal in the nth call of a compiled function, and is busy there for some
# seconds for each step, as a larger network would be: where Python sees to signals in between, or
# where it cannot. Prints the calls. A validation takes five steps.
STOPPED = """
import hashlib, os, signal, sys, time
from trainer import task, trained
trained.EVALUATION_BATCH = 20
name, number, seconds, how = sys.argv[1:5]
del sys.argv[1:5]

def be_busy(steps):
    if how == "deaf":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    time.sleep(float(seconds) * steps)

def watched(make, own):
    calls = 0

    def make_watched(*args, **options):
        function = make(*args, **options)

        def call(indices, *rest):
            nonlocal calls
            calls += 1
            print(own, len(indices), flush=True)
            if own == name:
                if calls == int(number):
                    os.kill(os.getpid(), signal.SIGTERM)
                be_busy(len(indices))
            return function(indices, *rest)

        return call

    return make_watched

trained.make_train_steps = watched(trained.make_train_steps, "train")
trained.make_evaluate = watched(trained.make_evaluate, "evaluate")
task.main()
"""


def begin(dataset, run_dir, name="nothing", number=0, seconds=0.0, how="hears", **environ):
    """Starts the command, to be stopped in the nth call of a name."""
    folders = (f"--dataset_dir={dataset}", f"--run_dir={run_dir}")
    quiet = {"PYTHONPATH": str(helpers.ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.Popen(
        [sys.executable, "-c", STOPPED, name, str(number), str(seconds), how, *folders, *FLAGS],
        env=os.environ | quiet | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*begun):
    """Of each process: exit code, the calls that were made, and what it said."""
    try:
        said = [process.communicate(timeout=300) for process in begun]
    finally:
        for process in begun:
            process.kill()
    return [
        (process.returncode, out.splitlines(), err)
        for process, (out, err) in zip(begun, said, strict=True)
    ]


def run(dataset, run_dir, *how):
    (ended,) = end(begin(dataset, run_dir, *how))
    return ended


def run_two(dataset, run_dir, name="nothing", number=0, *how):
    """Two workers, of which the second is stopped."""
    addresses = [f"127.0.0.1:{port}" for port in helpers.free_ports(2)]
    return end(
        *(
            begin(
                *(dataset, run_dir, name, number if rank else 0, *how),
                **signalled_trainer.cluster(addresses, rank),
            )
            for rank in range(2)
        )
    )


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    found = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    for line in found:
        del line["seconds"], line["examples_per_second"]
    return found


def model(run_dir):
    return json.loads((run_dir / "export" / "model.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(small_dataset, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _, said = run(small_dataset, run_dir)
    assert code == 0, said
    return run_dir


CASES = {
    # how it is stopped, the steps that are saved, and the lines that are written
    "in a long call": (("train", 2, 0.7), 2, 0),
    "in a validation": (("evaluate", 2, 0.1), STEPS, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_it_saves_and_the_same_command_ends_the_same(
    case, undisturbed, small_dataset, tmp_path
):
    how, steps, written = CASES[case]
    run_dir = tmp_path / "run"
    code, calls, said = run(small_dataset, run_dir, *how)
    assert code == 143, said
    assert said.splitlines()[-1] == (
        "stopped by SIGTERM after saving; the same command goes on from here"
    )
    assert calls[-1] == f"{how[0]} 1"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps:08d}.ckpt"]
    assert len(lines(run_dir)) == written
    assert not (run_dir / "export").exists()

    code, calls, said = run(small_dataset, run_dir)
    assert code == 0, said
    taken = [int(call.split()[1]) for call in calls if call.startswith("train")]
    assert sum(taken) == 2 * STEPS - steps
    assert lines(run_dir) == lines(undisturbed)
    assert model(run_dir) == model(undisturbed)


def test_both_workers_save_in_time_and_the_same_command_ends_the_same(
    undisturbed, small_dataset, tmp_path
):
    run_dir = tmp_path / "run"
    for code, calls, said in run_two(small_dataset, run_dir, "train", 3, 0.7):
        assert code == 143, said
        assert [call for call in calls if call.startswith("train")] == ["train 1"] * 3
        assert (
            said.splitlines().count(
                "stopped by SIGTERM after saving; the same command goes on from here"
            )
            == 1
        ), said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000003.ckpt"]

    for code, calls, said in run_two(small_dataset, run_dir):
        assert code == 0, said
        taken = [int(call.split()[1]) for call in calls if call.startswith("train")]
        assert sum(taken) == 2 * STEPS - 3
    assert lines(run_dir) == lines(undisturbed)
    assert model(run_dir)["weights_sha256"] == model(undisturbed)["weights_sha256"]


def test_stopped_as_training_compiles_both_workers_end(small_dataset, tmp_path):
    """The first waits for the second, which nobody could hear."""
    run_dir = tmp_path / "run"
    for code, calls, said in run_two(small_dataset, run_dir, "train", 1, 0.0, "deaf"):
        assert (code, calls) == (143, ["evaluate 1", "train 1"]), said
        assert (
            said.splitlines().count(
                "stopped by SIGTERM; the same command goes on from the last checkpoint"
            )
            == 1
        ), said
    assert list((run_dir / "checkpoints").iterdir()) == []
    assert lines(run_dir) == []


def test_stopped_as_validation_compiles_nothing_is_lost(small_dataset, tmp_path):
    code, calls, said = run(small_dataset, tmp_path / "run", "evaluate", 1, 0.0, "deaf")
    assert (code, calls) == (143, ["evaluate 1"]), said
    assert said.splitlines()[-1] == (
        "stopped by SIGTERM; the same command goes on from the last checkpoint"
    )
    assert lines(tmp_path / "run") == []
