"""Processes of stages: how they end, and that they end with the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

from pipeline import stages, storage, watchdog
from pipeline.command import InputError, LockedError

STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path
how, = sys.argv[1:]
Path("pid").write_text(str(os.getpid()))

def save(*_):
    Path("saved").touch()
    sys.exit(143)

if how == "save":
    signal.signal(signal.SIGTERM, save)
if how in ("worker", "leave"):  # as Beam starts its own: in a shell, and without the lock
    worker = subprocess.Popen("sleep 600; true", shell=True)
    Path("worker").write_text(str(worker.pid))
if how == "full":
    from pipeline import command

    def execute(_):
        raise OSError(28, "No space left on device", "a file")

    del sys.argv[1:]
    command.run("a_stage", command.Parser("a_stage", "").parse_args, execute)
if how == "leave":
    sys.exit(1)
Path("ready").touch()
if how in ("sleep", "save", "worker"):
    time.sleep(600)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(how))
"""
CHAIN = """
import signal, sys
from pathlib import Path
from pipeline import storage, watchdog
from pipeline.stages import StageError, Stages
# A shell's job in the background begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with storage.locked(Path("root")) as lock, Stages(lock) as stages:
    for how in sys.argv[1:]:
        try:
            stages.run("a_stage", how)
        except StageError as error:
            print(error.stage, error.code, error, *["of us"] * error.stopped)
        else:
            print("well")
"""


@pytest.fixture
def chain(tmp_path):
    """Starts a chain of one stage after another."""
    (tmp_path / "a_stage.py").write_text(STAGE)
    started = []

    def start(*how):
        process = subprocess.Popen(
            [sys.executable, "-c", CHAIN, *how],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{helpers.ROOT}:{tmp_path}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid):
    """Whether a process has ended; what nobody waits for any more may stay as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def is_free(root):
    try:
        with storage.locked(root):
            return True
    except LockedError:
        return False


def test_stages_run_in_turn_and_say_how_they_ended(chain):
    said, _ = chain("0", "3", "killed", "143").communicate(timeout=60)
    assert said.splitlines() == [
        "well",
        "a_stage 3 a_stage ended with exit code 3",
        "a_stage -9 a_stage was killed by signal 9",
        "a_stage 143 a_stage ended with exit code 143",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock alone keeps others out")
def test_a_stage_dies_with_the_chain(chain, tmp_path):
    process = chain("sleep")
    until((tmp_path / "ready").exists)
    stage = int((tmp_path / "pid").read_text())
    assert not is_gone(stage)
    assert not is_free(tmp_path / "root")
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: is_gone(stage))
    until(lambda: is_free(tmp_path / "root"))


def test_the_workers_of_a_stage_die_with_the_chain_and_before_the_lock(chain, tmp_path):
    process = chain("worker")
    until((tmp_path / "ready").exists)
    worker = int((tmp_path / "worker").read_text())
    assert os.getpgid(worker) == int((tmp_path / "pid").read_text())
    assert not is_gone(worker)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: is_free(tmp_path / "root"))
    assert is_gone(worker)
    assert not watchdog.is_alive(int((tmp_path / "pid").read_text()))


def test_a_stage_knows_that_it_is_one(chain):
    said, _ = chain("full").communicate(timeout=60)
    assert said == "a_stage 74 a_stage ended with exit code 74\n"


def test_what_a_stage_leaves_behind_is_ended(chain, tmp_path):
    process = chain("leave", "sleep")
    until((tmp_path / "ready").exists)
    until(lambda: is_gone(int((tmp_path / "worker").read_text())))
    process.kill()


def test_the_lock_is_free_as_soon_as_the_chain_has_ended(chain, tmp_path):
    for _ in range(3):
        said, _ = chain("0").communicate(timeout=60)
        assert said == "well\n"
        assert is_free(tmp_path / "root")


def test_ctrl_c_lets_a_stage_save(chain, tmp_path):
    process = chain("save")
    until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert is_free(tmp_path / "root")


def test_whether_a_group_is_alive(tmp_path):
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    assert watchdog.is_alive(process.pid)
    watchdog.kill_group(process.pid)
    until(lambda: not watchdog.is_alive(process.pid))  # a zombie, until it is waited for
    assert process.wait() == -signal.SIGKILL
    watchdog.kill_group(process.pid)


def test_a_sigterm_of_somebody_else_is_none_of_ours(chain, tmp_path):
    process = chain("sleep", "0")
    until((tmp_path / "ready").exists)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines() == ["a_stage -15 a_stage was killed by signal 15", "well"]


def test_sigterm_is_handed_on_and_no_other_stage_begins(chain, tmp_path):
    process = chain("save", "0")
    until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines() == ["a_stage 143 a_stage ended with exit code 143 of us"] * 2
    assert (tmp_path / "saved").exists()


QUESTION = """
import os, signal, sys
how = os.environ["HOW"]
if how == "refuses amid noise":
    print("E1201 03:51:56 epoll1.cc:373] Bad file descriptor", file=sys.stderr)
    how = "refuses"
if how == "refuses":
    print("python -m trainer.task: error: --epochs 0", file=sys.stderr)
    sys.exit(2)
if how == "refuses in silence":
    sys.exit(2)
if how == "crashes":
    raise RuntimeError("no such library")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Asks a trainer that ends in some way."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").touch()
    (tmp_path / "trainer/task.py").write_text(QUESTION)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{helpers.ROOT}")
    monkeypatch.chdir(tmp_path)

    def ask(how):
        monkeypatch.setenv("HOW", how)
        return stages.ask_trainer(["--epochs=0"])

    return ask


def test_a_question_that_is_refused_is_wrong_input(ask):
    for how in ("refuses", "refuses amid noise"):
        with pytest.raises(InputError, match=r"^--epochs 0$"):
            ask(how)
    with pytest.raises(InputError, match=r"^trainer\.task refuses its flags: --epochs=0$"):
        ask("refuses in silence")


def test_a_question_that_crashes_is_a_failure(ask, capfd):
    with pytest.raises(stages.StageError, match=r"trainer\.task --dry_run ended with exit code 1"):
        ask("crashes")
    assert "RuntimeError: no such library" in capfd.readouterr().err
    with pytest.raises(stages.StageError, match="was killed by signal 9"):
        ask("is killed")
