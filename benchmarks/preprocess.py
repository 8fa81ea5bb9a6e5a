"""Seconds, records per second and memory of the preprocess command, beside two peers.

python -m benchmarks.preprocess --idx $MNIST_IDX_DIR                 # the peers, at 70,000 records
python -m benchmarks.preprocess --idx $MNIST_IDX_DIR --scale 1 10    # how it grows

The peers do the same work on the same images: a plain loop of `tf.train.Example` with
``float_list(value=...)`` into `tf.io.TFRecordWriter`, and TensorFlow Datasets' own
`download_and_prepare` from archives that lie ready. Whole commands are timed from outside,
start-up included, in turn. Grown data are MNIST's images, shifted by a few pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

PLAIN_LOOP = """
import sys
import numpy as np
import tensorflow as tf
from pipeline.sources import open_sources
source = open_sources([sys.argv[1]])
for block in source.blocks():
    for rows in source.read(block):
        name = f"{sys.argv[2]}/{block.part}-{rows.positions[0]}.tfrecord"
        with tf.io.TFRecordWriter(name) as writer:
            for pixels, label in zip(rows.pixels, rows.labels):
                image = pixels.astype(np.float32) / np.float32(255)
                feature = {
                    "image": tf.train.Feature(float_list=tf.train.FloatList(value=image)),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
"""
TFDS = """
import sys
import tensorflow_datasets as tfds
tfds.builder("mnist", data_dir=sys.argv[1]).download_and_prepare()
"""
# As TensorFlow Datasets names its downloads: the address, then the base64 of the checksum.
DOWNLOADS = {
    "train-images-idx3-ubyte": "RA_Kv3PMVG-iFHXoHqNwJlYF9WviEKQCTSyo8gNSNgk",
    "train-labels-idx1-ubyte": "NVJTSgpVi77WrtMrMMSVzKI9Vn7FLKyL4aBzDoAQJVw",
    "t10k-images-idx3-ubyte": "jUIsewocHHkkWlvPB_6G4z7q_ueSuEWErsJ29aLbxOY",
    "t10k-labels-idx1-ubyte": "965g-S4A7G3r0jpgiMMdvSNx7KP_oN7677JZkkIErsY",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command took: seconds by the clock and of processor, peak memory in MiB.

    Attributes:
        log: what it wrote to stderr.
    """

    wall: float
    cpu: float
    peak: float
    log: str = ""


def timed(*command: str | Path) -> Usage:
    """Runs a command to its end, silently."""
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command[:4]))} ended with {process.returncode}")
        log.seek(0)
        return Usage(
            wall=wall,
            cpu=usage.ru_utime + usage.ru_stime,
            peak=usage.ru_maxrss / 1024,
            log=log.read(),
        )


def preprocess(idx: Path, output: Path, *flags: str) -> Usage:
    """Times our command into a new folder."""
    shutil.rmtree(output, ignore_errors=True)
    return timed(
        "-m", "pipeline.preprocess", f"--source=idx:{idx}", f"--output_dir={output}", *flags
    )


def plain_loop(idx: Path, output: Path) -> Usage:
    """Times the loop of `tf.train.Example`."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    return timed("-c", PLAIN_LOOP, f"idx:{idx}", output)


def tfds(idx: Path, output: Path) -> Usage:
    """Times TensorFlow Datasets."""
    shutil.rmtree(output, ignore_errors=True)
    return timed("-c", TFDS, lay_out_downloads(idx, output))


def lay_out_downloads(idx: Path, data_dir: Path) -> Path:
    """Lays MNIST's archives out as TensorFlow Datasets keeps what it has downloaded."""
    downloads = data_dir / "downloads/mnist"
    downloads.mkdir(parents=True)
    for name, digest in DOWNLOADS.items():
        copy = downloads / f"cvdf-datasets_mnist_{name}{digest}.gz"
        shutil.copyfile(idx / f"{name}.gz", copy)
        copy.with_name(f"{copy.name}.INFO").write_text("{}")
    return data_dir


def compare(idx: Path, work: Path, rounds: int) -> None:
    """Prints the table of the peers; the last column takes the start-up, on few rows, off."""
    contestants = {"this pipeline": preprocess, "tf.train.Example loop": plain_loop, "tfds": tfds}
    found: dict[str, list[Usage]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(run(idx, work / "out"))
    medians = {name: median(usages) for name, usages in found.items()}
    grow(idx, work / "few", 1, rows=700)
    starts = {
        name: median([run(work / "few", work / "out") for _ in range(rounds)]).cpu
        for name, run in (("this pipeline", preprocess), ("tf.train.Example loop", plain_loop))
    }
    head = f"{'':24}{'wall s':>8}{'cpu s':>8}{'peak MiB':>10}{'ratio':>8}"
    print(f"{head}{'records/s of a core':>22}")
    for name, usage in medians.items():
        ratio = usage.wall / medians["this pipeline"].wall
        steady = f"{68_600 / (usage.cpu - starts[name]):,.0f}" if name in starts else "-"
        print(
            f"{name:24}{usage.wall:8.2f}{usage.cpu:8.2f}{usage.peak:10.0f}{ratio:8.2f}{steady:>22}"
        )


def median(usages: list[Usage]) -> Usage:
    """The median of each figure."""
    return Usage(
        wall=statistics.median(usage.wall for usage in usages),
        cpu=statistics.median(usage.cpu for usage in usages),
        peak=statistics.median(usage.peak for usage in usages),
    )


def read_idx(path: Path, header: int) -> np.ndarray:
    """The data of a gzipped IDX file; uint8."""
    return np.frombuffer(gzip.open(path).read()[header:], np.uint8)


def shifts() -> Iterator[tuple[int, int]]:
    """(0, 0), then the other shifts by up to five pixels, nearest first."""
    offsets = [(down, right) for down in range(-5, 6) for right in range(-5, 6)]
    yield from sorted(offsets, key=lambda offset: (max(map(abs, offset)), offset))


def opened(path: Path) -> IO[bytes]:
    """Opens a file to be written, gzipped by its name."""
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=1)  # type: ignore[return-value]
    return path.open("wb")


def grow(
    idx: Path,
    output: Path,
    scale: int,
    rows: int = 60_000,
    *,
    zipped: bool = False,
    grown: Sequence[str] = ("train", "t10k"),
) -> None:
    """Writes plain IDX files of `scale` times (the first `rows` images of each part of) MNIST.

    A part that is not to be `grown` is taken once.
    """
    output.mkdir(exist_ok=True)
    for part in ("train", "t10k"):
        times = scale if part in grown else 1
        images = read_idx(idx / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:rows]
        labels = read_idx(idx / f"{part}-labels-idx1-ubyte.gz", 8)[:rows]
        size = len(labels)
        ending = ".gz" if zipped else ""
        with opened(output / f"{part}-images-idx3-ubyte{ending}") as file:
            file.write(struct.pack(">4I", 0x803, size * times, 28, 28))
            for offset in itertools.islice(shifts(), times):
                file.write(np.roll(images, offset, axis=(1, 2)).tobytes())
        with opened(output / f"{part}-labels-idx1-ubyte{ending}") as file:
            file.write(struct.pack(">2I", 0x801, size * times))
            for _ in range(times):
                file.write(labels.tobytes())


def scales(idx: Path, work: Path, factors: list[int], *, zipped: bool, verify: bool) -> None:
    """Prints the table of growth."""
    tiny = work / "tiny"
    grow(idx, tiny, 1, rows=700)
    start = preprocess(tiny, work / "out").wall
    print(
        f"start-up, as the time of 1,400 records: {start:.1f} s, taken off the per-record figures"
    )
    print(
        f"{'records':>10}{'wall s':>8}{'cpu s':>8}{'us/record':>11}{'records/s':>11}"
        f"{'peak MiB':>10}{'GB out':>8}"
    )
    for factor in factors:
        grown, output = work / f"idx{factor}", work / "out"
        grow(idx, grown, factor, zipped=zipped)
        # As many files as keep each at the size it has at scale 1.
        usage = preprocess(grown, output, f"--num_shards={8 * factor}")
        if verify:
            timed("-m", "pipeline.dataset", "verify", output)
        size = sum(path.stat().st_size for path in output.glob("*.tfrecord"))
        shutil.rmtree(grown)
        records = 70_000 * factor
        steady = usage.wall - start
        print(
            f"{records:10,}{usage.wall:8.1f}{usage.cpu:8.1f}{steady / records * 1e6:11.1f}"
            f"{records / steady:11,.0f}{usage.peak:10,.0f}{size / 1e9:8.2f}",
            flush=True,
        )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, required=True, help="the folder of MNIST's archives")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--scale", type=int, nargs="+", help="measure growth instead")
    parser.add_argument("--gzip", action="store_true", help="grow gzipped files")
    parser.add_argument("--verify", action="store_true", help="verify what was written")
    parser.add_argument("--work_dir", type=Path, help="where to write (default: a temporary one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.work_dir) as work:
        if flags.scale:
            scales(flags.idx, Path(work), flags.scale, zipped=flags.gzip, verify=flags.verify)
        else:
            compare(flags.idx, Path(work), flags.rounds)


if __name__ == "__main__":
    main()
