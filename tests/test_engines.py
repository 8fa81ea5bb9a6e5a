"""The same graph on other engines gives the same bytes; `make engines` installs what is needed."""

import json
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "engines"))

import install

pytestmark = pytest.mark.campaign

# The command, with blocks and batches of a few rows, so that even little data crosses an engine
# in many bundles.
SMALL_BLOCKS = """
from pipeline import preprocess
from pipeline.sources import idx, images
idx.ROWS_PER_BLOCK, idx.ROWS_AT_ONCE, images.ROWS_PER_BLOCK = 37, 10, 3
preprocess.main()
"""
PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
PRISM = ("--runner=PrismRunner", f"--prism_location={install.PRISM}")
FLINK = (
    "--runner=FlinkRunner",
    f"--flink_version={install.FLINK_VERSION}",
    f"--flink_job_server_jar={install.FLINK_JOB_SERVER}",
    "--environment_type=LOOPBACK",
)
# What an engine needs, beside its flags.
ENGINES = {
    "in_process": ((), None),
    "processes": (PROCESSES, None),
    "prism": (PRISM, install.PRISM),
    "flink": (FLINK, install.FLINK_JOB_SERVER),
}


def run_on_engine(name, entry, *args):
    """Runs a command on an engine, to its end."""
    flags, needs = ENGINES[name]
    if needs and not needs.exists():
        pytest.skip(f"{name} is not installed; `make engines` does")
    done = helpers.run_python(*entry, *args, *flags, timeout=600)
    assert done.returncode == 0, done.stderr


def on_engine(name, entry, output, *args):
    """Runs preprocess on an engine; {file: content} of the dataset, and what was counted."""
    run_on_engine(name, entry, *args, f"--output_dir={output}")
    files = helpers.tree(output)
    return files, json.loads(files.pop("metrics.json"))


@pytest.fixture(scope="session")
def faulty_sources(tmp_path_factory):
    """Flags that name IDX files and a PNG tree, in which everything goes wrong that can."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("faulty")
    data = helpers.make_images()
    (images, labels), (test_images, test_labels) = data["train"], data["test"]
    images[20:25] = images[10:15]
    labels[20:23] = labels[10:13]  # copies; the other two conflict
    test_images[:3] = images[30:33]  # leaked
    images[40] = 7  # blank
    labels[50:53] = 10, 200, 255  # out of range
    test_labels[5] = 11
    helpers.write_idx(folder / "idx", data)
    for index in range(30):
        path = folder / "png" / ("test" if index % 3 == 0 else "train") / str(index % 10)
        path.mkdir(parents=True, exist_ok=True)
        image.fromarray(images[100 + index] // 2).save(path / f"{index}.png")
    image.fromarray(images[60]).save(folder / "png" / "train" / "1" / "again.png")
    (folder / "png" / "train" / "1" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "png" / "test" / "0" / "small.png")
    return (
        f"--source=idx:{folder / 'idx'}",
        f"--source=images:{folder / 'png'}",
        "--num_classes=10",
        "--max_quarantined=0.5",
        "--num_shards=3",
    )


@pytest.fixture(scope="session")
def expected(faulty_sources, tmp_path_factory):
    """What the in-process runner makes of them in as few blocks as there are files."""
    output = tmp_path_factory.mktemp("expected") / "out"
    files, metrics = on_engine("in_process", ("-m", "pipeline.preprocess"), output, *faulty_sources)
    manifest = json.loads(files["manifest.json"])
    assert manifest["quarantined"]["count"] == 6
    assert len(files["quarantine/records.jsonl"].splitlines()) == 6
    assert min(manifest["duplicates"][kind] for kind in ("images", "conflicting", "leaked")) > 0
    assert manifest["flagged"] == {"blank": 1}
    return files, metrics


@pytest.mark.parametrize("engine", ENGINES)
def test_same_bytes_on_every_engine(engine, faulty_sources, expected, tmp_path):
    files, metrics = expected
    found, counted = on_engine(engine, ("-c", SMALL_BLOCKS), tmp_path / "out", *faulty_sources)
    assert sorted(found) == sorted(files)
    assert [name for name in files if found[name] != files[name]] == []
    assert counted["fingerprint"] == metrics["fingerprint"]
    # An engine may try a step again, and then counts it again: what was done once is a floor.
    for name, count in metrics["counters"].items():
        assert counted["counters"][name] >= count, name


@pytest.fixture(scope="session")
def evaluation(small_dataset, tmp_path_factory):
    """Flags of an evaluation of three models, and the files it comes to in this process."""
    folder = tmp_path_factory.mktemp("evaluation")
    models = [tmp_path_factory.mktemp(f"model{seed}") for seed in (1, 2, 3)]
    for seed, model in enumerate(models):
        helpers.export_linear_model(model, seed)
    flags = (
        f"--model_dir={models[0]}",
        f"--baseline_dir={models[1]}",
        f"--compare_dir={models[2]}",
        f"--dataset_dir={small_dataset}",
        "--save_predictions",
    )
    run_on_engine("in_process", ("-m", "pipeline.evaluate"), *flags, f"--report_dir={folder}")
    files = helpers.tree(folder)
    assert len(files) == 4 + 3
    return flags, files


@pytest.mark.parametrize("engine", ENGINES)
def test_same_report_on_every_engine(engine, evaluation, tmp_path):
    flags, files = evaluation
    run_on_engine(engine, ("-m", "pipeline.evaluate"), *flags, f"--report_dir={tmp_path / 'out'}")
    found = helpers.tree(tmp_path / "out")
    assert sorted(found) == sorted(files)
    assert [name for name in files if found[name] != files[name]] == []


@pytest.fixture(scope="session")
def expected_mnist(mnist_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("mnist") / "out"
    return on_engine(
        "in_process", ("-m", "pipeline.preprocess"), output, f"--source=idx:{mnist_dir}"
    )


@pytest.mark.parametrize("engine", ("processes", "prism", "flink"))
def test_same_bytes_of_real_mnist(engine, mnist_dir, expected_mnist, tmp_path):
    found, _ = on_engine(
        engine, ("-m", "pipeline.preprocess"), tmp_path / "out", f"--source=idx:{mnist_dir}"
    )
    files, _ = expected_mnist
    assert sorted(found) == sorted(files)
    assert [name for name in files if found[name] != files[name]] == []
