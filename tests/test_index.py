import datetime
import json
import re

import memory_bucket
import pytest
from helpers import tree
from html_page import Elements

from pipeline import gcs, history, index, plots
from pipeline.gcs import GcsPath

CHAMPION = {"version": 2, "run_id": "c-core-3", "accuracy": 0.985, "rolled_back_from": None}
HOSTILE = "<script>alert(1)</script>"


def line(run_id, outcome="kept", accuracy=0.97, *, day=1, **more):
    """A line of the ledger."""
    return {
        "run_id": run_id,
        "outcome": outcome,
        "promoted": outcome == "promoted",
        "reason": f"reason of {run_id}",
        "accuracy": accuracy,
        "per_class_accuracy": {"0": accuracy, "1": accuracy},
        "test_id": "t",
        "version": None,
        "time": f"2026-01-{day:02}T03:10:00+00:00",
    } | more


LEDGER = [
    line("a-core-1", "promoted", 0.97, day=1, version=1),
    line("b-core-2", "kept", 0.96, day=2),
    line("d-core-4", "failed", None, day=3, per_class_accuracy=None),
    line("c-core-3", "promoted", 0.985, day=4, version=2, forced=True),
]


@pytest.fixture
def root(tmp_path):
    """A root with four runs in its ledger, the folders of two of them, and one without an end."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "models").mkdir()
    write(folder, LEDGER)
    (folder / "models" / "champion.json").write_text(json.dumps(CHAMPION))
    for name in ("b-core-2", "c-core-3", "e-core-5", ".f-core-6.incomplete"):
        (folder / "runs" / name / "report").mkdir(parents=True)
        if not name.startswith("e"):
            (folder / "runs" / name / "report" / "report.html").write_text("page")
            (folder / "runs" / name / "decision.json").write_text("{}")
    return folder


def write(root, lines):
    (root / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def written(root):
    index.write_index(root)
    return (root / "index.html").read_text()


def rows(text):
    """The cells of the table of runs, without its heading."""
    (found,) = Elements(text).tables
    return found[1:]


def links(text):
    return [attributes["href"] for attributes in Elements(text).all("a")]


# Which runs


def test_all_runs_the_newest_first(root):
    assert rows(written(root)) == [
        ["e-core-5", "-", "unfinished", "-", "-", ""],
        ["c-core-3", "2026-01-04 03:10", "promoted, forced", "98.50 %", "2",
         "reason of c-core-3 decision"],
        ["d-core-4", "2026-01-03 03:10", "failed", "-", "-", "reason of d-core-4"],
        ["b-core-2", "2026-01-02 03:10", "kept", "96.00 %", "-", "reason of b-core-2 decision"],
        ["a-core-1", "2026-01-01 03:10", "promoted", "97.00 %", "1", "reason of a-core-1"],
    ]  # fmt: skip


def test_links_are_relative_and_lead_to_files(root):
    found = links(written(root))
    assert found == [
        "runs/c-core-3/report/report.html",  # of the champion
        "runs/c-core-3/report/report.html",
        "runs/c-core-3/decision.json",
        "runs/b-core-2/report/report.html",
        "runs/b-core-2/decision.json",
    ]
    assert all((root / link).is_file() for link in found)


def test_a_run_tried_again_is_one_row_with_its_last_end(root):
    again = line("d-core-4", "promoted", 0.99, day=9, version=3)
    write(root, [*LEDGER, line("d-core-4", "failed", None, day=8), again])
    found = rows(written(root))
    assert [row[0] for row in found] == ["e-core-5", "d-core-4", "c-core-3", "b-core-2", "a-core-1"]
    assert found[1][2:] == [
        "promoted", "99.00 %", "3", "reason of d-core-4 (came to an end 3 times)",
    ]  # fmt: skip


def test_lines_that_say_nothing_are_passed_over(root):
    whole = written(root)
    text = (root / "runs.jsonl").read_text()
    junk = '{"run_\n[1]\n"a"\nnull\n{"outcome": "kept"}\n\xff\n'
    (root / "runs.jsonl").write_bytes(junk.encode("latin-1") + text.encode() + b'{"run_id": "x"')
    assert written(root) == whole


def test_lines_of_an_older_ledger(root):
    old = {"run_id": "b-core-2", "promoted": False, "reason": "r", "accuracy": 0.9, "version": None}
    new = {"run_id": "a-core-1", "promoted": True, "reason": "r", "accuracy": 0.8, "version": 1}
    write(root, [new | {"time": "2026-01-01T00:00:00"}, old])
    found = rows(written(root))[2:]
    assert [row[1:5] for row in found] == [
        ["-", "kept", "90.00 %", "-"],
        ["2026-01-01 00:00", "promoted", "80.00 %", "1"],
    ]


@pytest.mark.parametrize("value", ["0.9", True, -0.1, 1.5, [0.9], {"a": 1}, float("nan"), 10**400])
def test_an_accuracy_that_is_none_is_unknown(root, value):
    write(root, [line("a-core-1", accuracy=value), line("b-core-2", accuracy=0.5)])
    assert [row[3] for row in rows(written(root))][-2:] == ["50.00 %", "-"]


@pytest.mark.parametrize(
    "entry",
    [
        {"time": 5},
        {"time": "yesterday"},
        {"time": None},
        {"reason": None},
        {"reason": {"a": 1}},
        {"outcome": ["kept"]},
        {"per_class_accuracy": [None, "x"]},
        {"per_class_accuracy": {"0": "x"}},
        {"per_class_accuracy": 7},
        {"version": "1"},
        {"test_id": 7},
        {"run_id": ""},
        {"run_id": "."},
        {"run_id": ".."},
        {"run_id": "a" * 5000},
        {"run_id": "a/b"},
        {"run_id": "a\0b"},
    ],
)
def test_odd_values_do_no_harm(root, entry):
    write(root, [line("z-core-1") | entry, line("b-core-2")])
    assert len(rows(written(root))) == 4  # with the two folders without a line


def test_an_empty_root_has_a_page(tmp_path):
    text = written(tmp_path)
    assert "No run has come to an end here yet." in text
    assert Elements(text).tables == []
    assert set(tree(tmp_path)) == {"index.html"}


def test_a_root_where_nothing_was_judged(root):
    write(root, [LEDGER[2]])
    text = written(root)
    assert len(Elements(text).all("svg")) == 0
    assert [row[2] for row in rows(text)] == ["unfinished", "unfinished", "unfinished", "failed"]


# The champion


def test_the_champion_is_named(root):
    text = written(root)
    assert "version 2</dd>" in text and "98.50\N{NARROW NO-BREAK SPACE}% when promoted</p>" in text
    again = CHAMPION | {"version": 3, "rolled_back_from": 1, "run_id": "gone"}
    (root / "models" / "champion.json").write_text(json.dumps(again))
    assert "; version 1 again</p>" in written(root)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"version": 1}', "\udcff"])
def test_a_champion_that_cannot_be_read(root, content):
    path = root / "models" / "champion.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content, errors="surrogateescape")
    assert "the pointer cannot be read" in written(root)


# Over time


def test_classes_over_time_by_hand(root):
    judged = [
        line("a-core-1", "promoted", 0.9, per_class_accuracy={"x": 0.8, "y": 1.0}),
        line("b-core-2", "kept", 0.9, per_class_accuracy={"x": 0.9, "y": None}),
        line("c-core-3", "promoted", 0.9, per_class_accuracy={"x": 1.0, "y": 0.9}),
    ]
    write(root, [*judged[:1], LEDGER[2], *judged[1:]])
    runs = [run for run in reversed(history.read_runs(root)) if run.judged]
    found = index.class_histories(runs)
    assert found["low"] == 0.8
    x, y = found["rows"]
    assert x["every"] == ["0,30 50,15 100,0"]
    assert x["champions"] == ["0,30 50,30 100,0"]
    assert y["every"] == ["0,0 0,0", "100,15 100,15"]
    assert y["champions"] == ["0,0 50,0 100,15"]
    assert (x["latest"], x["serving"], y["latest"], y["serving"]) == (1.0, 1.0, 0.9, 0.9)
    text = written(root)
    assert 'aria-label="Class x: the champion 100.00' in text
    assert text.count("<polyline ") == 5


@pytest.mark.parametrize("run_id", [7, None])
def test_a_line_of_no_run_is_passed_over(root, run_id):
    write(root, [line("z-core-1") | {"run_id": run_id}, line("b-core-2")])
    assert len(rows(written(root))) == 3  # with the two folders without a line


def test_accuracies_of_classes_come_from_the_report_where_the_ledger_has_none(root):
    report = {"per_class": [{"name": "cat", "accuracy": 0.5}, {"name": "dog", "accuracy": None}]}
    (root / "runs" / "c-core-3" / "report" / "report.json").write_text(json.dumps(report))
    write(root, [line(name, per_class_accuracy=None) for name in ("b-core-2", "c-core-3")])
    newest, before = history.read_runs(root)[1:]
    assert newest.per_class == {"cat": 0.5, "dog": None}
    assert before.per_class == {}


def test_of_many_classes_the_least_accurate_are_drawn(root):
    accuracies = {f"c{i}": 1 - i / 1000 for i in range(60)}
    write(root, [line("b-core-2", per_class_accuracy=accuracies)])
    found = index.class_histories(history.read_runs(root)[-1:])
    assert [row["name"] for row in found["rows"]] == [f"c{i}" for i in range(59, 19, -1)]
    assert "20 more are left out" in written(root)


def test_where_another_test_set_begins_is_marked(root):
    def dashes(lines):
        write(root, lines)
        return len(re.findall("stroke-dasharray", written(root)))

    many = [line(f"r-core-{i}", day=i) for i in range(1, 9)]
    assert dashes(many) == 0
    for i, entry in enumerate(many):
        entry["test_id"] = "old" if i < 3 else "new" if i < 6 else "newer"
    assert dashes(many) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hours", [0.01, 1, 24, 36, 48, 72, 96, 108, 168, 960, 8760, 40000])
def test_times_of_any_span_are_drawn(root, hours):
    """The library that picks the ticks warns on stderr where it finds none that fit."""
    start = datetime.datetime(2026, 1, 1, 3, 10, tzinfo=datetime.UTC)
    end = start + datetime.timedelta(hours=hours)
    write(root, [line("a", time=start.isoformat()), line("b", time=end.isoformat())])
    assert len(Elements(written(root)).all("svg")) == 3


def test_what_is_drawn_has_a_text_alternative(root):
    elements = Elements(written(root))
    assert len(elements.all("figure")) == 3  # the timeline and two classes
    assert all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in elements.all("figure"))
    assert all(svg["aria-hidden"] == "true" for svg in elements.all("svg"))
    labels = elements.all("figure")[0]["aria-label"].replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert labels == (
        "Accuracy over time of 3 runs, 2 promoted: "
        "the first champion has 97.00 %, the last 98.50 %."
    )


# After a rollback


@pytest.fixture
def rolled_back(root):
    """The root, where the first model came back, as version 3."""
    again = line("a-core-1", "rolled_back", 0.97, day=5, version=3, test_id=None)
    write(root, [*LEDGER, again | {"per_class_accuracy": None, "reason": "version 1 again: why"}])
    champion = {"version": 3, "run_id": "a-core-1", "accuracy": 0.97, "rolled_back_from": 1}
    (root / "models" / "champion.json").write_text(json.dumps(champion))
    return root


def test_a_rollback_has_a_row_of_its_own(rolled_back):
    text = written(rolled_back)
    assert rows(text)[1] == [
        "a-core-1", "2026-01-05 03:10", "rolled back", "97.00 %", "3", "version 1 again: why",
    ]  # fmt: skip
    assert rows(text)[-1][:5] == ["a-core-1", "2026-01-01 03:10", "promoted", "97.00 %", "1"]
    assert [row[0] for row in rows(text)] == [
        "e-core-5", "a-core-1", "c-core-3", "d-core-4", "b-core-2", "a-core-1",
    ]  # fmt: skip
    assert "5 runs, the newest first" in text
    assert "<dd>2</dd><p>of 3 judged" in text
    assert "came to an end" not in text


def test_after_a_rollback_the_old_model_is_drawn_as_the_champion(rolled_back):
    text = written(rolled_back).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert (
        "Accuracy over time of 3 runs, 2 promoted and 1 rolled back to: "
        "the first champion has 97.00 %, the last 97.00 %."
    ) in text
    assert "Class 0: the champion 97.00 %, the newest judged run 98.50 %" in text
    assert "stroke-dasharray" not in text  # the same test set throughout
    events = [run for run in reversed(history.read_runs(rolled_back)) if run.accuracy is not None]
    row = index.class_histories(events)["rows"][0]
    # 0.97, 0.96, 0.985 and back to 0.97, from 0.96 at the bottom to 1
    assert row["every"] == ["0,22.5 33.33,30 66.67,11.25"]
    assert row["champions"] == ["0,22.5 33.33,22.5 66.67,11.25 100,22.5"]


def test_the_pointer_tells_where_the_ledger_lacks_the_rollback(rolled_back):
    write(rolled_back, LEDGER)
    text = written(rolled_back).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "the last 97.00 %" in text
    assert "Class 0: the champion 97.00 %, the newest judged run 98.50 %" in text


# The file


def test_hostile_text_is_harmless(root):
    (root.parent / "secret").mkdir()
    (root.parent / "secret" / "decision.json").write_text("{}")
    write(
        root,
        [
            line(HOSTILE, reason=HOSTILE, per_class_accuracy={HOSTILE: 0.5}),
            line("../../secret", reason='" onclick="alert(1)', per_class_accuracy={'" x="': 0.5}),
            line("b-core-2", outcome='"><b>', reason="\udc80", per_class_accuracy={HOSTILE: 0.5}),
        ],
    )
    (root / "models" / "champion.json").write_text(
        json.dumps({"version": HOSTILE, "run_id": HOSTILE, "accuracy": HOSTILE})
    )
    text = written(root)
    elements = Elements(text)
    assert len(elements.all("script")) == 1 and not elements.all("b")
    assert not any(name.startswith("on") for _, attrs in elements.elements for name in attrs)
    assert not any("secret" in link or "script" in link for link in links(text))
    assert HOSTILE in [row[0] for row in rows(text)]


def test_asks_nothing_of_a_network(root):
    text = written(root)
    assert not re.search(r"https?://|@import|url\(\s*[^#\s]", text)
    assert not Elements(text).all("img") and not Elements(text).all("link")


def test_a_year_of_nights_is_of_modest_size(root):
    classes = {str(label): 0.97 + label / 1000 for label in range(10)}
    nights = [
        line(f"2026-01-01-core-{i:012x}", "promoted" if i % 5 == 0 else "kept", 0.9 + i / 10000,
             day=1 + i % 28, reason="why " * 25, per_class_accuracy=classes)
        for i in range(365)
    ]  # fmt: skip
    write(root, nights)
    assert len(written(root).encode()) < 400_000


def test_same_root_same_bytes(root):
    first = written(root)
    assert written(root) == first
    assert [name for name in tree(root) if name.startswith(".")] == []


def test_what_a_kill_left_of_the_page_goes_although_nothing_is_new(root):
    index.write_index(root)
    before = tree(root)
    (root / ".index.html.a1b2c3d4").write_text("<!doc")
    (root / ".somebody.else").write_text("")
    index.write_index(root)
    assert tree(root) == before | {".somebody.else": b""}


def test_in_a_bucket_as_in_a_folder(root, monkeypatch):
    local = written(root)
    (root / "index.html").unlink()
    memory = memory_bucket.Bucket()
    monkeypatch.setattr(gcs, "bucket", lambda name: memory)
    for name, content in tree(root).items():
        if not name.startswith("runs/.f"):
            memory.store(memory.blob(f"out/{name}"), content)
    index.write_index(GcsPath("bucket", "out"))
    # A bucket has no empty folders: the run without an end left nothing that could be listed.
    there = memory.contents()["out/index.html"].decode()
    assert [row[0] for row in rows(there)] == [row[0] for row in rows(local)][1:]
    assert links(there) == links(local)


@pytest.mark.parametrize("accuracies", [[1.0], [0.985], [0.0], [0.98, 0.9995], [0.004, 0.0]])
def test_the_timeline_shows_what_an_accuracy_can_be(accuracies):
    times = [
        datetime.datetime(2026, 1, 1 + day, tzinfo=datetime.UTC) for day in range(len(accuracies))
    ]
    drawn = plots.timeline(times, [100 * each for each in accuracies], [True] * len(times), [])
    labels = re.findall(r">([^<>\n]+)</text>", drawn)
    ticks = [float(label) for label in labels if re.fullmatch(r"[\d.]+", label)]
    assert len(ticks) > 1 and min(ticks) >= 0 and max(ticks) <= 100
    if len(times) == 1:
        assert [label for label in labels if "Jan" in label] == ["1 Jan"]
