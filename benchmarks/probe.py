"""Runs a command of ours as ``python -m`` does, and notes what it took to start.

python -m benchmarks.probe NOTES STARTED MODULE ARGUMENTS...

STARTED is `time.monotonic` as its parent started it. At its end it adds a line to NOTES: the
process, its peak memory in MiB and its seconds of start-up, which are those until its first line
runs and those of its imports, wherever they stand. Of the chain, each process that it starts is
noted as well: its command, wall and CPU seconds and peak memory, those of its children included.
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import resource
import runpy
import subprocess
import sys
import threading
import time
from typing import Any

CHAIN = "pipeline.retrain"


def main(notes: str, started: str, module: str, *arguments: str) -> None:
    """Runs the command; the process ends as the command does."""
    until_first_line = time.monotonic() - float(started)
    imports = time_imports()

    @atexit.register
    def note_own() -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        startup = until_first_line + imports["seconds"]
        note(notes, pid=os.getpid(), startup=startup, own_peak=peak)

    if module == CHAIN:
        watch_stages(notes)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def note(notes: str, **line: Any) -> None:
    """Adds a line; one write, so that lines of several processes never mix."""
    with open(notes, "a") as file:  # noqa: PTH123 - pathlib's import is part of what is measured
        file.write(json.dumps(line) + "\n")


def time_imports() -> dict[str, float]:
    """From here on, adds up the seconds of import statements, each within another left out."""
    plain, inside, total = builtins.__import__, threading.local(), {"seconds": 0.0}

    def timed(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "one", False):
            return plain(*args, **kwargs)
        inside.one, began = True, time.monotonic()
        try:
            return plain(*args, **kwargs)
        finally:
            inside.one = False
            total["seconds"] += time.monotonic() - began

    builtins.__import__ = timed
    return total


def watch_stages(notes: str) -> None:
    """Lets the chain start its stages under this module, and notes what each took."""
    from pipeline import stages

    class Watched(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()
            super().__init__(*args, **kwargs)

        def wait(self, timeout: float | None = None) -> int:
            if self.returncode is None:
                _, status, usage = os.wait4(self.pid, 0)
                self.returncode = os.waitstatus_to_exitcode(status)
                note(
                    notes,
                    pid=self.pid,
                    command=list(self.args[5:]),  # type: ignore[index]  # from MODULE on
                    wall=time.monotonic() - self.began,
                    cpu=usage.ru_utime + usage.ru_stime,
                    peak=usage.ru_maxrss / 1024,
                )
            return self.returncode

    def command(module: str, arguments: Any) -> list[str]:
        started = str(time.monotonic())
        return [
            *(sys.executable, "-m", "benchmarks.probe", notes, started, module),
            *map(str, arguments),
        ]

    subprocess.Popen = Watched  # type: ignore[misc]
    stages._command = command


if __name__ == "__main__":
    main(*sys.argv[1:])
