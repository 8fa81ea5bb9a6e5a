import argparse
import os
import shutil
import sys

import helpers
import pytest

from pipeline import __version__, command
from pipeline.command import InputError, LockedError, UnreachableError


def parse(argv):
    parser = command.Parser("some.command", "What it does.")
    parser.add_argument("--number", type=command.positive_int, default=1)
    parser.add_argument("--share", type=command.fraction, default=0.5)
    parser.add_argument("--kind", choices=("a", "b"))
    return parser.parse_args(argv)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command with a command line; returns its exit code, stdout and stderr."""

    def run_command(*argv, parse=parse, execute=lambda config: 0):
        monkeypatch.setattr(sys, "argv", ["program", *argv])
        with pytest.raises(SystemExit) as caught:
            command.run("some.command", parse, execute)
        return caught.value.code, *capsys.readouterr()

    return run_command


def raising(error):
    def step(_):
        raise error

    return step


@pytest.mark.parametrize("code", [0, 3, 143])
def test_exit_code_is_what_the_command_returns(run, code):
    assert run(execute=lambda config: code) == (code, "", "")


def test_config_reaches_the_command(run):
    seen = []
    run("--number", "7", "--share=0.25", "--kind", "b", execute=seen.append)
    assert vars(seen[0]) == {"number": 7, "share": 0.25, "kind": "b"}


@pytest.mark.parametrize("step", ["parse", "execute"])
@pytest.mark.parametrize(
    ("error", "code"), [(InputError("x: wrong"), 2), (LockedError("x: wrong"), 75)]
)
def test_wrong_input_is_one_line_and_its_code(run, step, error, code):
    assert run(**{step: raising(error)}) == (
        code,
        "",
        "python -m some.command: error: x: wrong\n",
    )


def test_a_silent_server_is_a_failure_that_the_chain_knows(run, monkeypatch):
    said = "python -m some.command: error: x: no answer\n"
    silent = raising(UnreachableError("x: no answer"))
    assert run(execute=silent) == (1, "", said)
    monkeypatch.setenv("DIGITS_STAGE", "some.command")
    assert run(execute=silent) == (69, "", said)


def test_message_of_several_lines_becomes_one(run):
    code, _, stderr = run(execute=raising(InputError("first\n  second\n\nthird\n")))
    assert (code, stderr) == (2, "python -m some.command: error: first second third\n")


def test_interrupt(run):
    code, _, stderr = run(execute=raising(KeyboardInterrupt()))
    assert (code, stderr) == (130, "python -m some.command: interrupted\n")


def test_failure_of_the_job_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ValueError, match="broken"):
        command.run("some.command", parse, raising(ValueError("broken")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--number", "0"], "--number: expected an integer of at least 1, got 0"),
        (["--number=-1"], "--number: expected an integer of at least 1, got -1"),
        (["--number", "1.5"], "--number: "),
        (["--number", "many"], "--number: "),
        (["--number"], "--number: expected one argument"),
        (["--share", "1.1"], "--share: expected a number from 0 to 1, got 1.1"),
        (["--share", "-0.1"], "--share: expected a number from 0 to 1, got -0.1"),
        (["--share", "nan"], "--share: expected a number from 0 to 1, got nan"),
        (["--share", "half"], "--share: "),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["--kind", "a\nb"], "--kind: invalid choice"),
        (["--numbe", "2"], "unrecognized arguments: --numbe 2"),
        (["stray"], "unrecognized arguments: stray"),
        (["--verbosity=loud"], "flag --verbosity=loud"),
        (["--flagfile=/no/such/file"], "/no/such/file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flag_is_one_line_and_2(run, argv, message):
    code, stdout, stderr = run(*argv, execute=lambda _: pytest.fail("was run"))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("python -m some.command: error: ") and message in stderr
    assert stderr.count("\n") == 1


def test_help_and_version(run):
    code, stdout, stderr = run("--help")
    assert (code, stderr) == (0, "") and "What it does." in stdout and "--number" in stdout
    assert run("--version") == (0, f"some.command {__version__}\n", "")


def test_absl_flags_are_understood(run):
    assert run("--verbosity=-1", "--number=2", execute=lambda config: config.number) == (2, "", "")


@pytest.mark.parametrize(
    ("function", "text", "value"),
    [
        (command.positive_int, "1", 1),
        (command.positive_int, "60000", 60000),
        (command.open_fraction, "0.05", 0.05),
        (command.natural, "0", 0),
        (command.natural, "10000", 10000),
        (command.fraction, "0", 0.0),
        (command.fraction, "1", 1.0),
        (command.fraction, "1e-3", 0.001),
    ],
)
def test_values(function, text, value):
    assert function(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "", "1.0", "x", "inf"])
def test_what_is_no_positive_int(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        command.positive_int(text)
    assert str(caught.value) == f"expected an integer of at least 1, got {text}"


@pytest.mark.parametrize("text", ["-0.001", "1.001", "nan", "inf", "-inf", "", "x"])
def test_what_is_no_fraction(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        command.fraction(text)
    assert str(caught.value) == f"expected a number from 0 to 1, got {text}"


@pytest.mark.parametrize("text", ["0", "1", "0.0", "1.0", "-0.001", "1e-999", "nan", "", "x"])
def test_what_is_not_between_0_and_1(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        command.open_fraction(text)
    assert str(caught.value) == f"expected a number above 0 and below 1, got {text}"


@pytest.mark.parametrize("text", ["-1", "1.0", "", "many"])
def test_what_is_no_natural_number(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        command.natural(text)
    assert str(caught.value) == f"expected an integer of at least 0, got {text}"


# What libraries write


def test_quiet_import_holds_back_stderr(capfd):
    with command.quiet_import():
        os.write(2, b"no GPU found\n")
        print("nor this", file=sys.stderr, flush=True)
    os.write(2, b"after\n")
    assert "no GPU" not in (stderr := capfd.readouterr().err)
    assert "after" in stderr


def test_quiet_import_shows_why_it_failed(capfd):
    with pytest.raises(ImportError), command.quiet_import():
        os.write(2, b"libcuda.so: version mismatch\n")
        raise ImportError
    assert "version mismatch" in capfd.readouterr().err


LOADING = """
import sys
from pipeline import command
with command.quiet_import():
    import tensorflow as tf
print([name for name in ("keras", "sklearn", "matplotlib") if name in sys.modules])
print(tf.keras.layers.Dense(3).units, "keras" in sys.modules)
with command.quiet_import():
    print(sys.modules["keras"].__name__)
"""


def test_tensorflow_loads_without_keras_and_has_it_later():
    done = helpers.run_python("-c", LOADING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "3 True", "keras"]


LOGGING = """
import logging
from pipeline import command
def parse(argv):
    return command.Parser("x", "x").parse_args(argv)
def execute(_):
    command.log.info("our line")
    command.log.warning("our warning")
    for name in ("apache_beam.some", "tensorflow", "absl"):
        library = logging.getLogger(name)
        library.info("chatter of %s", name)
        library.warning("warning of %s", name)
    for deed in ("starting", "destroying"):
        logging.getLogger("apache_beam.utils").warning("Really %s service at %s", deed, "x:1")
    try:
        raise command.InputError("of a worker")
    except command.InputError:
        logging.getLogger("apache_beam.runners.common").exception("with its traceback")
    logging.getLogger("apache_beam.x").error("relayed: pipeline.command.InputError: text")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("apache_beam.runners.common").exception("a real failure")
    return 0
command.run("x", parse, execute)
"""


def test_what_is_shown():
    done = helpers.run_python("-c", LOGGING)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert lines[:6] == [
        "our line",
        "WARNING: our warning",
        "WARNING: warning of apache_beam.some",
        "WARNING: warning of tensorflow",
        "WARNING: warning of absl",
        "ERROR: a real failure",
    ]
    assert lines[-1] == "ValueError: broken"


@pytest.mark.parametrize(
    ("verbosity", "shown", "hidden"),
    [(1, "chatter of apache_beam.some", "nothing"), (-2, "ERROR: a real failure", "our line\n")],
    ids=["debug", "errors"],
)
def test_verbosity(verbosity, shown, hidden):
    done = helpers.run_python("-c", LOGGING, f"--verbosity={verbosity}")
    assert shown in done.stderr and hidden not in done.stderr


def full(*names):
    return OSError(28, "No space left on device", *names)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (full("/a/file"), "/a/file"),
        (full("/from", None, "/to"), "/to"),
        (OSError(122, "Disk quota exceeded", "/a b"), "/a b"),
        (full(), "the disk"),
        (caused(RuntimeError("it failed"), full("/a/file")), "/a/file"),
        # As Beam tells of a step that failed, and TensorFlow of a file.
        (
            RuntimeError("OSError: [Errno 28] No space left on device: '/a b' [while running 'X']"),
            "/a b",
        ),
        (ValueError("RESOURCE_EXHAUSTED: /a/variables.data; No space left on device"),
         "/a/variables.data"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: '/a' -> '/b'")]), "/b"),
        (RuntimeError("[Errno 122] Disk quota exceeded\n"), "the disk"),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line(run, error, place):
    code, stdout, stderr = run(execute=raising(error))
    assert (code, stdout) == (1, "")
    assert stderr == (
        f"python -m some.command: error: {place}: no room left on the disk; once there is some,"
        " the same command goes on from here\n"
    )


@pytest.mark.parametrize(
    "error", [OSError(27, "File too large", "/a"), OSError(2, "No such file"), ValueError("28")]
)
def test_another_error_is_none_of_a_full_disk(error):
    assert command.full_disk(error) is None
    assert command.full_disk(caused(RuntimeError("x"), error)) is None


def test_a_stage_tells_the_chain_of_a_full_disk(run, monkeypatch):
    monkeypatch.setenv("DIGITS_STAGE", "some.command")
    assert run(execute=raising(full("/a/file")))[0] == 74
    assert run(execute=raising(InputError("no")))[0] == 2


def test_aligned_columns():
    rows = [("name", "count", ""), ("a", "1,000,000", "note"), ("bcdef", "", "")]
    assert command.aligned(rows) == [
        "name       count",
        "a      1,000,000  note",
        "bcdef",
    ]
    assert command.aligned(rows, left=(), least=6, gap=" | ") == [
        "  name |     count |",
        "     a | 1,000,000 |   note",
        " bcdef |           |",
    ]
    assert command.aligned([]) == []
    with pytest.raises(ValueError, match="zip"):
        command.aligned([("a", "b"), ("c",)])
