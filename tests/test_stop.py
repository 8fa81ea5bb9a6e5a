"""SIGTERM, seen from outside: each case is a process of its own."""

import signal
import subprocess
import sys

import helpers
import pytest

# One call of the C library, which Python cannot interrupt, as TensorFlow's compiler is one.
BUSY = """
import hashlib, os, signal, socket, sys, time
from trainer import stop
from trainer.meeting import STOP, Line
stop.GRACE_SECONDS = 0.5
stop.SECOND_SIGNAL_SECONDS = 0.2

def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def tell():
    print("ready", flush=True)

def connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]
"""
CASES = {
    "nothing to save, where Python cannot look": (
        "with stop.StopSignal():\n    tell(); busy()",
        1,
        143,
    ),
    "something to save, where Python cannot look": (
        "with stop.StopSignal() as s:\n    s.unsaved = True; tell(); busy()",
        1,
        143,
    ),
    "the loop saves and returns": (
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    time.sleep(0.2)\n"
        "sys.exit(9)",
        1,
        9,
    ),
    "the loop takes too long to return": (
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    time.sleep(100)",
        1,
        143,
    ),
    "saved before, and busy again": (
        "with stop.StopSignal() as s:\n    s.unsaved = True; s.unsaved = False; tell(); busy()",
        1,
        143,
    ),
    "saved as the stop came": (
        "stop.GRACE_SECONDS = 1000\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    s.unsaved = False; busy()",
        1,
        143,
    ),
    "a second signal after a while": (
        "stop.GRACE_SECONDS = 1000\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); busy()",
        1,
        143,
    ),
    "a second signal at once": (
        "stop.SECOND_SIGNAL_SECONDS = stop.GRACE_SECONDS = 1000\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3)\n"
        "sys.exit(9)",
        1,
        9,
    ),
    "nothing to save, but others to be told": (
        "stop.GRACE_SECONDS = 0\n"
        "with stop.StopSignal() as s:\n"
        "    s.with_others = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    time.sleep(0.3)\n"
        "sys.exit(9)",
        1,
        9,
    ),
    "others to be told, where Python cannot look": (
        "stop.GRACE_WITH_OTHERS_SECONDS = 0.5\n"
        "with stop.StopSignal() as s:\n    s.with_others = True; tell(); busy()",
        1,
        143,
    ),
    "something else takes the signal": (
        "with stop.StopSignal() as s, s.held():\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(); busy()",
        1,
        143,
    ),
    "something else took the signal meanwhile": (
        "with stop.StopSignal() as s:\n"
        "    with s.held(): signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    tell(); busy()",
        1,
        143,
    ),
    "a signal that was held goes to nobody else": (
        "stop.GRACE_SECONDS = 1000\n"
        "came = []\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True\n"
        "    with s.held():\n"
        "        signal.signal(signal.SIGTERM, lambda *_: came.append(1)); tell()\n"
        "        while not s.received: time.sleep(0.001)\n"
        "    time.sleep(0.3)\n"
        "sys.exit(8 if came else 9)",
        1,
        9,
    ),
    "another worker was told to stop": (
        "here, there = connected()\n"
        "with stop.StopSignal() as s:\n"
        "    s.line = Line([here]); tell(); there.send(STOP); busy()",
        0,
        143,
    ),
    "another worker has ended": (
        "here, there = connected()\n"
        "with stop.StopSignal() as s:\n"
        "    s.line = Line([here]); tell(); there.close()\n"
        "    sys.exit(8 if s.wait(0.3) else 9)",
        0,
        9,
    ),
    "another worker was told to stop, and this one as well after a while": (
        "here, there = connected()\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; s.line = Line([here]); tell(); there.send(STOP)\n"
        "    if not s.wait(60): sys.exit(8)\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3)\n"
        "sys.exit(9)",
        0,
        9,
    ),
    "others are told": (
        "here, there = connected()\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; s.line = Line([here]); tell()\n"
        "    sys.exit(9 if there.recv(64) == STOP else 8)",
        1,
        9,
    ),
    "others are told of what another one told": (
        "(first, its), (second, other) = connected(), connected()\n"
        "with stop.StopSignal() as s:\n"
        "    s.unsaved = True; s.line = Line([first, second]); tell(); its.send(STOP)\n"
        "    sys.exit(9 if other.recv(64) == STOP else 8)",
        0,
        9,
    ),
    "no signal": ("with stop.StopSignal():\n    tell()\nsys.exit(9)", 0, 9),
    "afterwards it kills as ever": (
        "with stop.StopSignal(): pass\ntell(); busy()",
        1,
        -signal.SIGTERM,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_process_ends(case):
    code, signals, expected = CASES[case]
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY + code],
        stdout=subprocess.PIPE,
        cwd=helpers.ROOT,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == expected
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(("hurried", "printed"), [(False, "last\n"), (True, "")])
def test_the_last_thing_is_done_but_not_for_a_second_signal(hurried, printed):
    code = (
        "stop.GRACE_SECONDS = 1000 if sys.argv[1:] else 0.1\n"
        "with stop.StopSignal() as s:\n"
        "    s.last = lambda: print('last', flush=True)\n"
        "    s.unsaved = True; tell()\n"
        "    while not s.received: time.sleep(0.001)\n"
        "    time.sleep(0.5)\n"
        "    if sys.argv[1:]: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    busy()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY + code, *(["hurried"] if hurried else [])],
        stdout=subprocess.PIPE,
        cwd=helpers.ROOT,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stdout.read() == printed
    finally:
        process.kill()
        process.stdout.close()
