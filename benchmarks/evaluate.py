"""Seconds of the evaluate command, beside a bare loop over the same images.

python -m benchmarks.evaluate --idx $MNIST_IDX_DIR                       # 10,000 images, in turn
python -m benchmarks.evaluate --idx $MNIST_IDX_DIR --scale 1 10 100      # how it grows

The loop imports TensorFlow, loads the model and scores the test images, read from the IDX files,
in batches of the same size: no report, no check. The command is timed from outside, start-up
included; what the page takes is measured in it and taken off. The model is of one epoch. Grown
test sets are MNIST's, shifted by a few pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.preprocess import Usage, grow, median, timed

BARE_LOOP = """
import gzip, sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
serve = model.signatures["serving_default"]
def read(name, header):
    return np.frombuffer(gzip.open(f"{sys.argv[2]}/{name}.gz").read()[header:], np.uint8)
images = read("t10k-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1)
labels = read("t10k-labels-idx1-ubyte", 8)
correct = 0
for at in range(0, len(labels), 500):
    answer = serve(images=images[at : at + 500])
    correct += int((answer["classes"].numpy() == labels[at : at + 500]).sum())
print(correct / len(labels))
"""
# The command; what rendering the page takes, by the clock and of CPU, goes to a file.
COMMAND = """
import sys, time
from pathlib import Path
from pipeline import evaluate, page
render, place = page.render_html, Path(sys.argv.pop(1))
def timed(*args, **kwargs):
    started = time.perf_counter(), time.process_time()
    html = render(*args, **kwargs)
    place.write_text(f"{time.perf_counter() - started[0]} {time.process_time() - started[1]}")
    return html
page.render_html = timed
evaluate.main()
"""


class Page(NamedTuple):
    """Seconds that rendering the page took."""

    wall: float
    cpu: float


def evaluate(model: Path, dataset: Path, work: Path, *flags: str | Path) -> tuple[Usage, Page]:
    """Times our command; also returns what the page took of it."""
    page = work / "page"
    usage = timed(
        *("-c", COMMAND, page, "--model_dir", model, "--dataset_dir", dataset),
        *("--report_dir", work / "report", *flags),
    )
    return usage, Page(*map(float, page.read_text().split()))


def prepare(idx: Path, work: Path, output: str, *flags: str) -> Path:
    """Makes a dataset, unless it is there."""
    run("pipeline.preprocess", f"--source=idx:{idx}", f"--output_dir={work / output}", *flags)
    return work / output


def run(module: str, *flags: str) -> None:
    """Runs a command of ours to its end."""
    quiet = subprocess.DEVNULL
    subprocess.run(
        [sys.executable, "-m", module, *flags, "--verbosity=-2"], check=True, stdout=quiet
    )


def train(dataset: Path, work: Path) -> Path:
    """Trains a model for one epoch, unless it is there."""
    flags = (f"--dataset_dir={dataset}", f"--run_dir={work / 'run'}", "--epochs=1")
    run("trainer.task", *flags)
    return work / "run" / "export"


def compare(idx: Path, work: Path, rounds: int) -> None:
    """Prints the table of the peers, medians of some rounds in turn."""
    dataset = prepare(idx, work, "dataset")
    model = train(dataset, work)
    loops, ours, pages = [], [], []
    for _ in range(rounds):
        loops.append(timed("-c", BARE_LOOP, model, idx))
        usage, page = evaluate(model, dataset, work)
        wall, cpu = usage.wall - page.wall, usage.cpu - page.cpu
        ours.append(dataclasses.replace(usage, wall=wall, cpu=cpu))
        pages.append(page)
    print(f"{'':24}{'wall s':>8}{'cpu s':>8}{'peak MiB':>10}")
    for name, usages in (("bare loop", loops), ("evaluate, page aside", ours)):
        usage = median(usages)
        print(f"{name:24}{usage.wall:8.2f}{usage.cpu:8.2f}{usage.peak:10.0f}")
    wall, cpu = (
        statistics.median(
            getattr(one, what) / getattr(other, what)
            for one, other in zip(ours, loops, strict=True)
        )
        for what in ("wall", "cpu")
    )
    print(f"{'ratio of each turn':24}{wall:8.2f}{cpu:8.2f}")
    wall, cpu = (statistics.median(column) for column in zip(*pages, strict=True))
    print(f"{'the page':24}{wall:8.2f}{cpu:8.2f}")


def scales(idx: Path, work: Path, factors: list[int]) -> None:
    """Prints the table of growth, with answers saved and without."""
    model = train(prepare(idx, work, "dataset"), work)
    print(f"{'':36}{'answers saved':>20}")
    head = ("wall s", "cpu s", "peak MiB", "cpu s", "peak MiB")
    cells = [name.rjust(width) for name, width in zip(head, (8, 8, 10, 10, 10), strict=True)]
    print(f"{'records':>10}{''.join(cells)}", flush=True)
    for factor in factors:
        grown, dataset = work / f"idx{factor}", work / f"dataset{factor}"
        if not dataset.exists():
            grow(idx, grown, factor, grown=("t10k",))
            prepare(grown, work, dataset.name, f"--num_shards={8 * factor}")
            shutil.rmtree(grown)
        usage, _ = evaluate(model, dataset, work)
        saving, _ = evaluate(model, dataset, work, "--save_predictions")
        print(
            f"{10_000 * factor:10,}{usage.wall:8.1f}{usage.cpu:8.1f}{usage.peak:10,.0f}"
            f"{saving.cpu:10.1f}{saving.peak:10,.0f}",
            flush=True,
        )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, required=True, help="the folder of MNIST's archives")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--scale", type=int, nargs="+", help="measure growth instead")
    parser.add_argument("--work_dir", type=Path, help="kept between calls (default: temporary)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = flags.work_dir or Path(temporary)
        if flags.scale:
            scales(flags.idx, work, flags.scale)
        else:
            compare(flags.idx, work, flags.rounds)


if __name__ == "__main__":
    main()
