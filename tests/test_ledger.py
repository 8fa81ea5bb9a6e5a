"""What the ledger holds, and what it says of runs that came before."""

import datetime

import helpers
import memory_bucket
import pytest

from pipeline import gcs, ledger, storage
from pipeline.command import LockedError
from pipeline.gcs import GcsPath
from pipeline.ledger import Line


def line(**changed):
    given = {"run_id": "r", "outcome": "kept", "reason": "why", "config_id": "c"}
    return Line(**given | {"fingerprint": "f", "dataset_id": "d", "test_id": "t"} | changed)


def test_a_line_is_written_and_read_back(tmp_path):
    assert ledger.read(tmp_path) == []
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    ledger.append(tmp_path, line(accuracy=0.5, version=3, per_class_accuracy={"0": None}))
    (found,) = ledger.read(tmp_path)
    written = datetime.datetime.fromisoformat(found.pop("time"))
    assert before <= written <= datetime.datetime.now(datetime.UTC)
    assert found == {
        "run_id": "r", "window": None, "outcome": "kept", "promoted": False, "forced": False,
        "reason": "why", "accuracy": 0.5, "per_class_accuracy": {"0": None}, "model_id": None,
        "dataset_id": "d", "fingerprint": "f", "config_id": "c", "test_id": "t", "version": 3,
        "request": None,
    }  # fmt: skip


@pytest.mark.parametrize("torn", ["", '{"run_', '{"run_id": "b"}', "null\n", "[1]\n", "\n\n"])
def test_a_torn_line_does_not_count_and_the_next_one_does(tmp_path, torn):
    path = tmp_path / ledger.LEDGER_FILE
    path.write_text('{"run_id": "a"}\n' + torn)
    whole = ["a", "b"] if torn == '{"run_id": "b"}' else ["a"]
    assert [each["run_id"] for each in ledger.read(tmp_path)] == whole
    ledger.append(tmp_path, line(run_id="c"))
    assert [each["run_id"] for each in ledger.read(tmp_path)] == [*whole, "c"]
    assert path.read_text().startswith('{"run_id": "a"}\n' + torn)


def test_a_line_torn_within_a_letter(tmp_path):
    (tmp_path / ledger.LEDGER_FILE).write_bytes('{"reason": "é'.encode()[:-1])
    ledger.append(tmp_path, line(run_id="c"))
    assert [each["run_id"] for each in ledger.read(tmp_path)] == ["c"]


def test_lines_in_a_bucket(monkeypatch):
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    root = GcsPath("bucket", "root")
    ledger.append(root, line(run_id="a"))
    storage.write_atomic(root / ledger.LEDGER_FILE, (root / ledger.LEDGER_FILE).read_bytes()[:-1])
    ledger.append(root, line(run_id="b"))
    assert [each["run_id"] for each in ledger.read(root)] == ["a", "b"]

    def overtake(number):
        memory.before = lambda number: None
        ledger.append(root, line(run_id="quick"))

    memory.before = overtake
    with pytest.raises(LockedError, match="was changed by another process"):
        ledger.append(root, line(run_id="slow"))
    assert [each["run_id"] for each in ledger.read(root)] == ["a", "b", "quick"]


LIMITED = """
import errno, resource, signal, sys
from pathlib import Path
from pipeline import ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    ledger.append(root, ledger.Line(run_id="b", outcome="kept", reason="why"))
except OSError as error:
    assert error.errno == errno.EFBIG
    print(error.filename)
"""


@pytest.mark.parametrize("room", [0, 1, 40])
def test_what_does_not_fit_leaves_no_half_line(tmp_path, room):
    path = tmp_path / ledger.LEDGER_FILE
    ledger.append(tmp_path, line(run_id="a"))
    before = path.read_bytes()
    done = helpers.run_python("-c", LIMITED, tmp_path, len(before) + room)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "first"),
        ({"fingerprint": "f2"}, "second"),
        ({"fingerprint": "x"}, None),
        ({"fingerprint": "x", "dataset_id": "d"}, "second"),  # the latest of the same images
        ({"fingerprint": "x", "dataset_id": "e"}, None),
        ({"config_id": "c2"}, None),
        ({"fingerprint": "f3"}, None),  # was begun and failed, or was abandoned: never judged
    ],
)
def test_what_was_judged_is_found_by_source_or_images(asked, expected):
    lines = [
        vars(line(run_id="first", fingerprint="f")),
        vars(line(run_id="second", outcome="promoted", fingerprint="f2")),
        vars(line(run_id="third", outcome="failed", fingerprint="f3", dataset_id=None)),
        vars(line(run_id="fourth", outcome="abandoned", fingerprint="f3", dataset_id=None)),
        vars(line(run_id="first", outcome="rolled_back", fingerprint="f3", version=7)),
        {"run_id": "of an earlier format"},
    ]
    given = {"config_id": "c", "fingerprint": "f", "dataset_id": None} | asked
    found = ledger.find_judged(lines, **given)
    assert (found and found["run_id"]) == expected


def test_unknown_images_are_not_the_same_images():
    lines = [vars(line(dataset_id=None, fingerprint="other"))]
    given = {"config_id": "c", "fingerprint": "f", "dataset_id": None}
    assert ledger.find_judged(lines, **given) is None


def test_challengers_and_ends_are_counted():
    lines = [
        vars(line(model_id="1")),
        vars(line(model_id="1", outcome="promoted")),  # the same, by other rules
        vars(line(model_id="1", test_id="one image more")),
        vars(line(model_id="2", test_id="one image more")),
        vars(line(model_id="3", run_id="s")),
        vars(line(run_id="s")), vars(line(run_id="s")),  # of models that are not named
        vars(line(outcome="failed", test_id=None)), {"run_id": "of an earlier format"},
        vars(line(model_id="4", outcome="rolled_back")),
    ]  # fmt: skip
    assert ledger.count_judged(lines, "t") == 4
    assert ledger.count_judged(lines, "one image more") == 2
    assert ledger.count_judged(lines, "nobody") == 0
    assert ledger.count_judged(lines) == 5
    assert ledger.times_closed(lines, "r") == 5
    assert ledger.times_closed(lines, "nobody") == 0
