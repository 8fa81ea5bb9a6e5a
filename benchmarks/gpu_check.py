"""Shows on a machine's GPUs what the tests show on logical CPUs, with the trainer's own command.

python -m benchmarks.gpu_check

    losses      epochs on the GPUs add up to the losses of a CPU
    resume      a run that is killed in the middle ends in the weights of one that is not
    --reproducible      a run on one GPU, and one on each of one, two and four that is killed in
                the middle, end in the same weights, bit for bit
    --tf32      how far its losses are from a CPU's
    speed       examples per second of `benchmarks.train`: 50,000 in batches of 128

Ends with 1 if anything differs, and with 0 where there is no GPU, saying so. What takes more GPUs
than there are is not checked, and told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import command

TOLERANCE = 1e-4  # of losses: float32, added up in another order
COUNTS = (1, 2, 4)
TRAIN = ("trainer.task", "--epochs=6", "--steps_per_call=2")
LOOK_SECONDS = 0.01
EXAMPLES = 50_000  # of an epoch of `benchmarks.train`


class Found(NamedTuple):
    """What a run came to: the checksum of its weights, and the lines of its epochs."""

    sha256: str
    lines: list[dict[str, Any]]

    def difference(self, other: Found) -> float:
        """The largest relative difference of an epoch's loss from another run's."""
        pairs = zip(self.lines, other.lines, strict=True)
        return max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)


def start(*words: str, cpu: bool = False) -> subprocess.Popen[bytes]:
    """Starts a command of this repository, its output to be read."""
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"} if cpu else {}
    command_line = [sys.executable, "-m", *words]
    return subprocess.Popen(command_line, env=os.environ | hidden, stdout=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> bytes:
    """Waits for a command, and gives what it printed; raises if it fails."""
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return output


def train(folder: Path, name: str, *flags: str, cpu: bool = False, killed: bool = False) -> Found:
    """Trains on the set in a folder; with `killed`, again after a kill in the middle.

    Raises:
        RuntimeError: the run was over before it could be killed.
    """
    run_dir = folder / name
    words = (*TRAIN, f"--dataset_dir={folder / 'data'}", f"--run_dir={run_dir}", *flags)
    if killed:
        first = start(*words, "--checkpoint_seconds=0", cpu=cpu)
        while first.poll() is None and not any(run_dir.glob("checkpoints/*.ckpt")):
            time.sleep(LOOK_SECONDS)
        first.kill()
        if first.wait() != -signal.SIGKILL:
            raise RuntimeError(f"{name}: ended with {first.returncode} before it could be killed")
    finish(start(*words, cpu=cpu))
    text = (run_dir / "metrics.jsonl").read_text()
    model = json.loads((run_dir / "export" / "model.json").read_text())
    return Found(model["weights_sha256"], [json.loads(line) for line in text.splitlines()])


def speed(replicas: int) -> float:
    """Examples per second of this many replicas."""
    return EXAMPLES / float(finish(start("benchmarks.train", f"--one_of_replicas={replicas}")))


def tell(what: str, *, is_so: bool) -> bool:
    """Prints one line of the result."""
    print(f"{'ok  ' if is_so else 'FAIL'}  {what}", flush=True)
    return is_so


def check(gpus: int, folder: Path) -> bool:
    """Compares; whether everything that could be checked is as it should be."""
    finish(start("pipeline.preprocess", "--source=digits", f"--output_dir={folder / 'data'}"))
    cpu = train(folder, "cpu", "--replicas=1", cpu=True)
    good = []
    checksums = {train(folder, "same", "--replicas=1", "--reproducible").sha256}
    counts = [count for count in COUNTS if count <= gpus]
    for count in counts:
        flag = f"--replicas={count}"
        found = train(folder, f"gpu-{count}", flag)
        again = train(folder, f"killed-{count}", flag, killed=True)
        same = train(folder, f"same-{count}", flag, "--reproducible", killed=True)
        checksums.add(same.sha256)
        difference = found.difference(cpu)
        losses = f"{count} x GPU: losses within {difference:.1e} of a CPU's"
        good.append(tell(losses, is_so=difference < TOLERANCE))
        resumed = f"{count} x GPU: killed and gone on, the same weights bit for bit"
        good.append(tell(resumed, is_so=again.sha256 == found.sha256))
        print(f"told  {count} x GPU: {speed(count):,.0f} examples/s")
    equal = f"--reproducible: {len(checksums)} sha256 over {counts} GPUs, killed on each"
    good.append(tell(equal, is_so=len(checksums) == 1))
    left_out = [count for count in COUNTS if count > gpus]
    if left_out:
        print(f"not checked: --reproducible over {left_out} GPUs; this machine has {gpus}")
    rounded = train(folder, "tf32", "--replicas=1", "--tf32").difference(cpu)
    print(f"told  --tf32: losses within {rounded:.1e} of a CPU's")
    return all(good)


def main() -> int:
    """Checks, and prints what was found."""
    with command.quiet_import():
        import tensorflow as tf
    gpus = len(tf.config.list_physical_devices("GPU"))
    if not gpus:
        print("no GPU that TensorFlow can use on this machine: nothing was checked")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if check(gpus, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
