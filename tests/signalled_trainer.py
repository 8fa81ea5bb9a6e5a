"""trainer.task, which sends itself a signal in a call of the compiled steps; what such runs share.

    python tests/signalled_trainer.py CALL SIGNAL [flags of trainer.task]

It keeps Python's thread busy then, long enough for whatever would end the process at once. Of the
environment, BUCKET is a folder that stands for a bucket (see `kept_bucket`), CHECKPOINTS one
in it where a checkpoint of the second epoch has to be before the signal is sent, and LAPSE the
seconds of a lease.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve()
FLAGS = (
    "--hidden_units=16,12",
    "--batch_size=20",
    "--epochs=3",
    "--steps_per_call=10",
    "--reproducible",
    "--checkpoint_seconds=0",
)
EPOCH = 25  # steps
STANDS = (1, 11, 21, 25, 35, 45, 50, 60, 70, 75)  # after each call: the first takes one step
CALLS = 4  # of the first epoch
NEVER = 1000  # no such call


def arguments(dataset, run_dir):
    return (f"--dataset_dir={dataset}", f"--run_dir={run_dir}", *FLAGS)


def cluster(addresses, index):
    """What the worker of this number has in its environment."""
    task = {"type": "worker", "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}


def newest(folder):
    """The step of the newest checkpoint in a folder, 0 where there is none."""
    return max((int(path.name[5:-5]) for path in folder.glob("step-*.ckpt")), default=0)


def main():
    call, number = int(sys.argv.pop(1)), signal.Signals[sys.argv.pop(1)]
    if folder := os.environ.get("BUCKET"):
        import kept_bucket

        kept_bucket.use(folder)
    from pipeline import gcs, leases
    from trainer import stride, task, trained

    stride.CALL_SECONDS = 1e9  # a call takes as many steps as it may, whatever the clock says
    leases.HEARTBEAT_SECONDS, leases.LAPSE_SECONDS = 0.5, float(os.environ.get("LAPSE", "60"))
    awaited = os.environ.get("CHECKPOINTS")
    make, calls = trained.make_train_steps, itertools.count(1)

    def make_signalled(*args, **options):
        train = make(*args, **options)

        def signalled(*values):
            if next(calls) == call:
                while awaited and newest(gcs.parse(awaited)) <= EPOCH:
                    time.sleep(0.01)
                os.kill(os.getpid(), number)
                time.sleep(1)
            return train(*values)

        return signalled

    trained.make_train_steps = make_signalled
    task.main()


if __name__ == "__main__":
    main()
