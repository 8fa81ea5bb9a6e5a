"""Commands that kill themselves at a moment of what they do to the files of a folder."""

import os
import subprocess
import sys
from typing import NamedTuple

import helpers

MANY = 1_000_000  # more steps than any command takes
# What a program begins with that is to end by SIGKILL: before the nth thing it does itself to a
# file under the folder, or when so many seconds have passed since the first.
WATCH = """
import atexit, os, signal, sys, threading, time
folder, how, moment = sys.argv[1:4]
del sys.argv[1:4]
WATCHED = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile"}
steps, began = 0, None

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    global steps, began
    if event not in WATCHED or not isinstance(arguments[0], (str, os.PathLike)):
        return
    # Where a tree is removed, names are relative to a folder that is open.
    relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
    if not relative and not os.fspath(arguments[0]).startswith(folder):
        return
    steps += 1
    if began is None:
        began = time.monotonic()
        if how == "seconds":
            timer = threading.Timer(float(moment), die)
            timer.daemon = True
            timer.start()
    if how == "step" and steps > int(moment):
        die()

sys.addaudithook(watch)

def tell():
    now = time.monotonic()
    print("steps and seconds:", steps, now - (began or now))

atexit.register(tell)
"""


class Ended(NamedTuple):
    """How a command ended: by itself or by us.

    Attributes:
        code: its exit code.
        log: what it wrote to stderr.
        steps: the things it did to files, 0 where it was killed.
        seconds: from the first of them to its end, likewise.
    """

    code: int
    log: str
    steps: int = 0
    seconds: float = 0.0


def run(program, folder, *arguments, how="step", moment=MANY):
    """Runs a program to its end, its own or ours, and watches a folder.

    Args:
        program: what comes after `WATCH`, whose names it may use.
        folder: which is watched.
        arguments: of the program.
        how: step or seconds; where it is anything else, the program itself says when.
        moment: how many of them.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH + program, *map(str, (folder, how, moment, *arguments))],
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT), "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, log = process.communicate(timeout=600)
    finally:
        process.kill()  # does nothing to one that has ended
    if process.returncode < 0:
        return Ended(process.returncode, log)
    steps, seconds = said.splitlines()[-1].split()[-2:]
    return Ended(process.returncode, log, int(steps), float(seconds))
