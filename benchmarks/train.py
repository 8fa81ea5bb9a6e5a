"""Seconds of one epoch: this trainer under MirroredStrategy, one replica, beside its peers.

python -m benchmarks.train                     # the peers, and this trainer's other ways
python -m benchmarks.train --growth            # with the examples, and with the width
python -m benchmarks.train --replicas 2        # two logical replicas beside one
python -m benchmarks.train --whole IDX         # commands, from start to exported model

The work is that of preset `core`: 784-700-500-10, Adam, float32, batches of 128, 50,000 images
in memory. The contestants take turns, an epoch each; the first turn, with tracing and compiling,
is shown apart. A ratio is the median of the ratios of single turns: the seconds depend on the
machine and on who else uses it. Those that should do the same have to end their first turn with
the same mean loss. JAX and PyTorch take part where they are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import train_peers as peers
from benchmarks.train_peers import BATCH, Epoch, make_work
from pipeline import command
from trainer.config import PRESETS

KERAS_CALLS = (1, 10, 39, 391)
# Of the mean loss of the first epoch, which falls by a quarter in it: in 391 steps, what is rounded
# in other ways grows to 1 or 2 per cent.
TOLERANCE = 0.03
KERAS_WHOLE = """
import sys
import numpy as np
import tensorflow as tf
with np.load(sys.argv[1]) as data:
    images, labels = data["images"], data["labels"]
dense = tf.keras.layers.Dense
model = tf.keras.Sequential(
    [tf.keras.Input((784,)), dense(700, "relu"), dense(500, "relu"), dense(10)]
)
loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"], jit_compile=True, steps_per_execution=39)
model.fit(images[10000:], labels[10000:], 128, 10, verbose=0,
          validation_data=(images[:10000], labels[:10000]))
model.export(sys.argv[2], verbose=False)
"""


def take_turns(contestants: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn, the first included; ends the program where losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        losses = {}
        for name, epoch in contestants.items():
            started = time.perf_counter()
            losses[name] = epoch(number)
            seconds[name].append(time.perf_counter() - started)
        if number == 0:  # later on, roundings tell even more
            require_equal(losses)
    return seconds


def require_equal(losses: dict[str, float | None]) -> None:
    """Ends the program unless all learned alike, as far as roundings let them."""
    known = {name: loss for name, loss in losses.items() if loss is not None}
    if known and max(known.values()) > (1 + TOLERANCE) * min(known.values()):
        sys.exit(f"these should have had the same loss: {known}")


def show(seconds: dict[str, list[float]], reference: str) -> None:
    """Prints a table; its ratios are to one contestant's seconds in the same turn."""
    print(f"{'':38} {'s/epoch':>8} {'first':>7} {'ratio':>6}")
    for name, (first, *turns) in seconds.items():
        pairs = zip(turns, seconds[reference][1:], strict=True)
        ratio = statistics.median(own / other for own, other in pairs)
        print(f"{name:38} {statistics.median(turns):8.2f} {first:7.2f} {ratio:6.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:,.0f} MiB\n", flush=True)


def compare(rounds: int) -> None:
    """The peers, and this trainer's other ways to the same weights."""
    from trainer.strategy import make_strategy

    strategy = make_strategy(1)
    work = make_work(50_000)
    optional = {
        "JAX, the epoch in one jitted scan": peers.jax(work),
        "PyTorch, eager, fused Adam": peers.torch(work),
    }
    contestants = {
        "this trainer": peers.ours(strategy, work),
        **{name: epoch for name, epoch in optional.items() if epoch},
        "Keras fit": peers.keras(work),
        **{
            f"Keras fit, jit, {calls} steps a call": peers.keras(
                work, jit_compile=True, steps_per_execution=calls
            )
            for calls in KERAS_CALLS
        },
        "the tutorial's loop, as written": peers.tutorial(work),
        "the matrix products alone": peers.products(work),
    }
    for name, epoch in optional.items():
        if epoch is None:
            print(f"{name.split(',')[0]}: not installed")
    show(take_turns(contestants, rounds), "this trainer")
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder))
        ways = {
            "resident": peers.ours(strategy, work),
            "streamed": peers.ours(strategy, work, dataset=dataset, input="stream"),
            "--gradients manual": peers.ours(strategy, work, gradients="manual"),
            "--reproducible": peers.ours(strategy, work, reproducible=True),
        }
        show(take_turns(ways, rounds), "resident")
    for batch in (BATCH, PRESETS["accurate"].batch_size):
        plain = f"batch {batch}"
        pair = {
            plain: peers.ours(strategy, work, batch_size=batch),
            f"batch {batch}, deformed": peers.ours(
                strategy, work, batch_size=batch, **peers.DEFORMED
            ),
        }
        show(take_turns(pair, rounds), plain)


def write_dataset(folder: Path) -> Path:
    """Writes 50,000 random examples to train on, and some others, as a dataset of eight shards."""
    from pipeline import options, preprocess

    random = np.random.default_rng(0)
    idx = folder / "idx"
    idx.mkdir()
    for part, size in (("train", 60_000), ("t10k", 100)):
        images = random.integers(0, 256, (size, 28, 28), np.uint8)
        labels = random.integers(0, 10, size).astype(np.uint8)
        header = struct.pack(">4I", 0x803, size, 28, 28)
        (idx / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2I", 0x801, size)
        (idx / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    output = folder / "dataset"
    preprocess.execute(options.PreprocessConfig(sources=(f"idx:{idx}",), output_dir=output))
    return output


def growth(rounds: int) -> None:
    """1, 4 and 16 times the examples; 1, 2 and 4 times the width."""
    from trainer.strategy import make_strategy

    strategy = make_strategy(1)
    for factor in (1, 4, 16):
        name = f"{12_500 * factor:,} examples"
        show(take_turns({name: peers.ours(strategy, make_work(12_500 * factor))}, rounds), name)
    for factor in (1, 2, 4):
        work = make_work(12_500, (700 * factor, 500 * factor))
        contestants = {
            f"width {factor}x": peers.ours(strategy, work),
            "the matrix products alone": peers.products(work),
        }
        show(take_turns(contestants, rounds), "the matrix products alone")


def replicas(count: int, rounds: int) -> None:
    """Some replicas beside one: a process has one number, so the turns are taken by processes."""
    for batch in (128, 1024):
        found: dict[int, list[float]] = {1: [], count: []}
        for _ in range(rounds):
            for number, seconds in found.items():
                flags = ["--one_of_replicas", str(number), "--batch", str(batch), "--rounds", "2"]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.train", *flags],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
                seconds.append(json.loads(done.stdout))
        pairs = zip(found[count], found[1], strict=True)
        ratio = statistics.median(many / one for many, one in pairs)
        one, many = (statistics.median(seconds) for seconds in found.values())
        print(f"batch {batch}: 1 replica {one:.2f} s, {count} replicas {many:.2f} s: {ratio:.2f}")


def one_of_replicas(count: int, batch: int, rounds: int) -> None:
    """Prints the median seconds of an epoch on this many replicas."""
    from trainer.strategy import make_strategy

    epoch = peers.ours(make_strategy(count), make_work(50_000), batch_size=batch)
    print(statistics.median(take_turns({"": epoch}, rounds)[""][1:]))


def whole(idx: Path, rounds: int) -> None:
    """Whole commands beside Keras: from start to exported model, with MNIST.

    The trainer's check of the export in a fresh process, which Keras does not make, is taken off.
    """
    from benchmarks.preprocess import median, read_idx, timed

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        timed("-m", "pipeline.preprocess", f"--source=idx:{idx}", f"--output_dir={folder}/data")
        images = read_idx(idx / "train-images-idx3-ubyte.gz", 16).reshape(-1, 784)
        labels = read_idx(idx / "train-labels-idx1-ubyte.gz", 8)
        np.savez(folder / "mnist.npz", images=images / np.float32(255), labels=labels)
        (folder / "peer.py").write_text(KERAS_WHOLE)
        found = []
        for i in range(rounds):
            task = ("-m", "trainer.task", f"--dataset_dir={folder}/data")
            ours = timed(*task, f"--run_dir={folder}/run{i}")
            check = re.search(r"a fresh process answers .* \(([0-9.]+) s\)", ours.log)
            assert check is not None
            ours = dataclasses.replace(ours, wall=ours.wall - float(check[1]))
            theirs = timed(folder / "peer.py", folder / "mnist.npz", folder / f"keras{i}")
            found.append((ours, theirs))
        ratio = statistics.median(ours.wall / theirs.wall for ours, theirs in found)
        for i, name in enumerate(("this trainer", "Keras, jit, 39")):
            usage = median([usages[i] for usages in found])
            print(f"{name:20} {usage.wall:7.1f} s {usage.peak:8,.0f} MiB at its peak")
        print(f"ratio {ratio:.2f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="epochs counted of each")
    parser.add_argument("--growth", action="store_true", help="measure growth instead")
    parser.add_argument("--replicas", type=int, help="measure that many beside one instead")
    parser.add_argument("--whole", type=Path, metavar="IDX", help="measure whole commands instead")
    parser.add_argument("--one_of_replicas", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=128, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    with command.quiet_import():
        import tensorflow as tf  # noqa: F401
    if flags.one_of_replicas:
        one_of_replicas(flags.one_of_replicas, flags.batch, flags.rounds)
    elif flags.replicas:
        replicas(flags.replicas, flags.rounds)
    elif flags.growth:
        growth(flags.rounds)
    elif flags.whole:
        whole(flags.whole, flags.rounds)
    else:
        compare(flags.rounds)


if __name__ == "__main__":
    main()
