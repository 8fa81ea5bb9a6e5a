"""Ends the processes of a stage, those that they started included, when the chain has died.

Is started by `pipeline.stages`, with the read end of a pipe as its stdin and the lock of the
root: ``python -m pipeline.watchdog``. Each line that it reads is the number of the process group
that is at work, 0 where none is. The pipe ends with the chain, however that ends. The lock is
free once nothing of the group is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

WAIT_SECONDS = 0.02
PATIENCE_SECONDS = 60.0  # what the kernel does not let go of by then is beyond anybody's reach


def kill_group(group: int) -> None:
    """Kills every process of a group; one that has none is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of zombies alone
        os.killpg(group, signal.SIGKILL)


def is_alive(group: int) -> bool:
    """Whether any process of a group is left that is no zombie, which nobody may ever wait for."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    return any(_is_of(path, group) for path in Path("/proc").glob("[0-9]*/stat"))


def _is_of(stat: Path, group: int) -> bool:
    try:
        # The name, in brackets, may hold anything; then come state, parent and group: proc(5).
        state, _, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):  # it has ended meanwhile
        return False
    return int(its_group) == group and state not in "ZX"


def main() -> None:
    """Waits for the end of the pipe."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # meant for the chain
        signal.signal(number, signal.SIG_IGN)
    group = 0
    for line in sys.stdin:
        group = int(line)
    if group:
        kill_group(group)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while is_alive(group) and time.monotonic() < deadline:
            time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    main()
