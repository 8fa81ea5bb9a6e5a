"""Where the seconds of the whole chain go: retrain on MNIST, stage by stage, from an empty root.

python -m benchmarks.job --idx $MNIST_IDX_DIR

The command is that of a user, timed from outside. Its processes run under `benchmarks.probe`,
which changes nothing that they do. The start-up of a process is the time until its first line
runs and that of its imports, wherever they stand; its CPU seconds include those of its children,
its peak is that of the largest of them. Given again, the command finds nothing new. Where other
programs are at work as well, the CPU seconds tell more than those by the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.preprocess import Usage, timed
from benchmarks.probe import CHAIN

TARGET = 45.0  # seconds, on 2 cores
FRESH = re.compile(r"a fresh process answers .* \(([0-9.]+) s\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of the chain: its seconds, and its peak memory in MiB."""

    name: str
    wall: float
    startup: float
    cpu: float
    peak: float


def run_chain(idx: Path, root: Path, notes: Path) -> tuple[Usage, list[Stage]]:
    """Runs the chain; returns what all of it took, and its processes, the chain's own last."""
    notes.unlink(missing_ok=True)
    probe = ("-m", "benchmarks.probe", notes, str(time.monotonic()))
    total = timed(*probe, CHAIN, "--root", root, f"--source=idx:{idx}")
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    ended = {line["pid"]: line for line in lines if "startup" in line}
    # What only waits beside the others would be counted twice.
    for line in [line for line in lines if line.get("command", [""])[0] == "pipeline.watchdog"]:
        lines.remove(line)
        ended.pop(line["pid"])
    stages = [
        Stage(
            name=_name(line["command"]),
            startup=ended.pop(line["pid"])["startup"],
            **{key: line[key] for key in ("wall", "cpu", "peak")},
        )
        for line in lines
        if "command" in line
    ]
    (chain,) = ended.values()
    own = Stage(
        name="the chain itself",
        wall=total.wall - sum(stage.wall for stage in stages),
        startup=chain["startup"],
        cpu=total.cpu - sum(stage.cpu for stage in stages),
        peak=chain["own_peak"],
    )
    return total, [*stages, own]


def _name(command: list[str]) -> str:
    module, *flags = command
    asked = any(flag.startswith("--dry_run") for flag in flags)
    return f"{module}, asked for its flags" if asked else module


def show(total: Usage, stages: list[Stage]) -> None:
    """Prints a table."""
    print(f"{'':36}{'wall s':>8}{'start-up':>10}{'cpu s':>8}{'peak MiB':>10}")
    for stage in stages:
        print(
            f"{stage.name:36}{stage.wall:8.1f}{stage.startup:10.1f}{stage.cpu:8.1f}"
            f"{stage.peak:10,.0f}"
        )
        if stage.name == "trainer.task" and (found := FRESH.search(total.log)):
            print(f"  of it, waiting for a fresh process{float(found[1]):10.1f}")
    startup = sum(stage.startup for stage in stages)
    print(f"{'in all':36}{total.wall:8.1f}{startup:10.1f}{total.cpu:8.1f}{total.peak:10,.0f}\n")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, required=True, help="the folder of MNIST's archives")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, notes = Path(folder) / "root", Path(folder) / "notes"
        total, stages = run_chain(flags.idx, root, notes)
        show(total, stages)
        again, parts = run_chain(flags.idx, root, notes)
        if "nothing new" not in again.log:
            sys.exit("given again, the command found something new")
        print("given again, nothing is new:")
        show(again, parts)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"target: at most {TARGET:.0f} s on 2 cores; here {total.wall:.1f} s on {cores} cores,"
        f" {total.cpu / total.wall:.1f} of them at work for it; load average {load:.1f}"
    )


if __name__ == "__main__":
    main()
