"""Evaluations and sources in gs:// over the wire, against fake-gcs-server; see `test_gcs.py`."""

import json
import os
import subprocess
import sys

import helpers
import pytest
from test_decoding import GOOD
from test_evaluate_gcs import promote
from test_gcs import BUCKET, PROCESSES, assert_equal, files_of, server, wait_until
from test_images import write_files, write_tree

from benchmarks.preprocess import lay_out_downloads
from pipeline import reading, storage
from pipeline.command import InputError
from pipeline.gcs import GcsPath

pytestmark = pytest.mark.cloud

ROOT = GcsPath(BUCKET, "root")
HASTY = "from pipeline import gcs_client, evaluate\ngcs_client.RETRY_SECONDS = 1.0\nevaluate.main()"


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    with server(tmp_path_factory.mktemp("buckets") / "data") as process:
        yield process


def put_tree(folder, place):
    """Uploads every file under a local folder."""
    for name in storage.walk(folder):
        storage.write_atomic(place / name, (folder / name).read_bytes())
    return place


# Reading


def test_ranges_and_starts(monkeypatch):
    content = os.urandom(100_000)
    path = GcsPath(BUCKET, "reading/a")
    path.put(content, 0)
    monkeypatch.setattr(reading, "RANGE_BYTES", 1000)
    with reading.opened(path) as file:
        for first, size in ((0, 10), (99_990, 10), (5, 3000), (50_000, 0), (99_999, 50)):
            file.seek(first)
            assert file.read(size) == content[first : first + size]
    for size in (0, 1, 8192, 99_999, 100_000, 100_001):
        assert reading.read_start(path, size) == content[:size]
    empty = GcsPath(BUCKET, "reading/empty")
    empty.put(b"", 0)
    assert reading.read_start(empty, 10) == b""
    with reading.opened(empty) as file:
        assert file.read() == b""
    with pytest.raises(FileNotFoundError):
        reading.read_start(GcsPath(BUCKET, "reading/none"), 10)
    found = {name: stamp.size for name, stamp in reading.stamps(GcsPath(BUCKET, "reading")).items()}
    assert found == {"a": 100_000, "empty": 0}


def test_an_object_that_shrinks_while_it_is_open(monkeypatch):
    path = GcsPath(BUCKET, "shrinking")
    stat = path.put(bytes(10_000), 0)
    monkeypatch.setattr(reading, "RANGE_BYTES", 100)
    with reading.opened(path) as file:
        file.read(50)
        path.put(bytes(5_000), stat.generation)
        with pytest.raises(InputError, match="gs://digits/shrinking: "):
            file.read()


# Evaluation


@pytest.fixture(scope="module")
def here(small_dataset, tmp_path_factory):
    """A local root with two models and a ledger."""
    root = tmp_path_factory.mktemp("root")
    for seed, name in enumerate(("export", "champion"), start=1):
        helpers.export_linear_model(root / name, seed)
    promote(root / "champion")
    (root / "runs.jsonl").write_text(json.dumps({"run_id": "a", "outcome": "kept"}) + "\n")
    for name, content in helpers.tree(small_dataset).items():
        (root / "dataset" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "dataset" / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def there(here, running):
    """The same in the bucket."""
    return put_tree(here, ROOT)


def flags(root, report_dir):
    return [
        *(f"--model_dir={root}/export", f"--baseline_dir={root}/champion"),
        *(f"--dataset_dir={root}/dataset", f"--report_dir={report_dir}", "--save_predictions"),
        *(f"--ledger={root}/runs.jsonl", "--run_id=r"),
    ]


@pytest.mark.parametrize("kept", [False, True], ids=["temporary", "kept"])
def test_the_same_report_by_worker_processes(kept, here, there, tmp_path):
    done = helpers.run_cli("pipeline.evaluate", *flags(here, tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    env = {
        "TMPDIR": tmp_path / "tmp",
        "DIGITS_CACHE_DIR": tmp_path / "cache" if kept else None,
        "GOOGLE_APPLICATION_CREDENTIALS": None,
    }
    (tmp_path / "tmp").mkdir()
    place = there / f"report{kept}"
    done = helpers.run_cli("pipeline.evaluate", *flags(there, place), *PROCESSES, env=env)
    assert done.returncode == 0, done.stderr
    assert_equal(files_of(place), helpers.tree(tmp_path / "report"))
    assert len(place.walk()) == 4 + 3
    assert not (there / f".report{kept}.incomplete").exists()
    assert [path.name for path in (tmp_path / "tmp").glob("digits-*")] == []
    models = [here / "export", here / "champion"] if kept else []
    entries = list((tmp_path / "cache").iterdir()) if kept else []
    assert sorted(map(str, map(helpers.tree, entries))) == sorted(
        map(str, map(helpers.tree, models))
    )


def test_a_server_that_goes_away_leaves_no_report(here, tmp_path):
    with server(tmp_path / "data") as other:
        root = put_tree(here, ROOT)
        process = subprocess.Popen(
            [sys.executable, "-c", HASTY, *flags(root, root / "report")],
            env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until((root / ".report.incomplete/.lock").is_file, process)
        other.kill()
        shown, said = process.communicate()
    assert process.returncode == 1, said
    assert shown == "" and "Traceback" not in said
    assert "no answer from http://127.0.0.1:" in said.splitlines()[-1]


# Sources


@pytest.mark.parametrize("kind", ["plain", "gzip", "images"])
def test_the_same_dataset_by_worker_processes(kind, tmp_path):
    data = helpers.make_images()
    if kind == "images":
        local = write_tree(tmp_path / "in", data)
        write_files(local, {"train/3/bad.png": GOOD[:50], "train/3/bad.png.txt": b"not read"})
    else:
        local = helpers.write_idx(tmp_path / "in", data, gz=kind == "gzip")
    place = put_tree(local, GcsPath(BUCKET, f"sources/{kind}"))
    name = "images" if kind == "images" else "idx"
    here, there = tmp_path / "out", GcsPath(BUCKET, f"out/{kind}")
    for source, output, more in ((local, here, ()), (place, there, PROCESSES)):
        done = helpers.run_cli(
            "pipeline.preprocess", f"--source={name}:{source}", f"--output_dir={output}", *more
        )
        assert done.returncode == 0, done.stderr
    assert_equal(files_of(there), files_of(here))
    manifest = json.loads((there / "manifest.json").read_text())
    assert manifest["quarantined"]["count"] == (kind == "images")
    again = helpers.run_cli(
        "pipeline.preprocess", f"--source={name}:{place}", f"--output_dir={there}"
    )
    assert again.returncode == 0 and again.stderr.endswith(f"{there}: already there\n")


def test_tfds_is_shared_through_the_bucket(mnist_dir, tmp_path):
    lay_out_downloads(mnist_dir, tmp_path / "tfds")
    shared = GcsPath(BUCKET, "tfds")
    outputs = [tmp_path / "here", tmp_path / "there"]
    for kept, output, more in zip(
        (tmp_path / "tfds", shared), outputs, ((), PROCESSES), strict=True
    ):
        if kept == shared:
            put_tree(tmp_path / "tfds/mnist", shared / "mnist")
        done = helpers.run_cli(
            *("pipeline.preprocess", "--source=tfds:mnist", f"--output_dir={output}", *more),
            env={"TFDS_DATA_DIR": kept, "DIGITS_CACHE_DIR": tmp_path / "cache"},
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
    here, there = map(files_of, outputs)
    assert_equal(there, here)


# What cannot be used


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--source=idx:gs://no-such-bucket/x",), "there is no bucket no-such-bucket"),
        (("--source=images:gs://no-such-bucket/x",), "there is no bucket no-such-bucket"),
        (("--source=idx:gs://digits/none",), "--source idx:gs://digits/none: no such folder"),
        (("--source=images:gs://digits/none",), "--source images:gs://digits/none: no such folder"),
        (("--source=idx:http://x/y",), "expected a local folder or gs://bucket/folder"),
        (("--source=idx:gs://digits/half",), "gs://digits/half: no t10k-images-idx3-ubyte or"),
    ],
)
def test_sources_that_cannot_be_read(arguments, said, small_idx, tmp_path):
    half = GcsPath(BUCKET, "half")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        storage.write_atomic(half / name, (small_idx / name).read_bytes())
    done = helpers.run_cli("pipeline.preprocess", *arguments, f"--output_dir={tmp_path / 'out'}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["model_dir", "baseline_dir", "dataset_dir", "report_dir"])
def test_evaluations_of_no_such_bucket(flag, there):
    nowhere = "gs://no-such-bucket/x"
    given = [*flags(there, there / "unmade"), f"--{flag}={nowhere}"]
    done = helpers.run_cli("pipeline.evaluate", *given)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert nowhere in done.stderr
    assert not (there / "unmade").exists()
