"""The whole job on real MNIST, and on the digits that need no network, as a newcomer runs it."""

import json

import pytest
from helpers import run_cli, run_python

from benchmarks.preprocess import lay_out_downloads
from pipeline import registry
from pipeline.dataset import load_manifest

SCORE_RAW_IMAGES = """
import gzip, sys
import numpy as np
import tensorflow as tf
folder, idx = sys.argv[1:]
read = lambda name, skip: np.frombuffer(gzip.open(f"{idx}/{name}").read()[skip:], np.uint8)
images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
labels = read("t10k-labels-idx1-ubyte.gz", 8)
serve = tf.saved_model.load(folder).signatures["serving_default"]
assert not {"pipeline", "trainer"} & set(sys.modules)
print(np.mean(serve(images=tf.constant(images))["classes"].numpy() == labels))
"""


def only_run(root):
    champion = registry.champion(root)
    return champion, root / "runs" / champion.run_id


@pytest.fixture(scope="module")
def mnist_root(mnist_dir, tmp_path_factory):
    """(root, completed process) of the whole job on MNIST, preset core, as `make run` does it."""
    root = tmp_path_factory.mktemp("mnist") / "out"
    done = run_cli("pipeline.retrain", "--root", root, "--source=auto", timeout=600)
    assert done.returncode == 0, done.stderr
    return root, done


@pytest.mark.campaign
def test_mnist_reaches_the_tutorials_accuracy(mnist_root):
    root, done = mnist_root
    _, run = only_run(root)
    report = json.loads((run / "report/report.json").read_text())
    assert report["num_examples"] == 10_000
    assert report["accuracy"] >= 0.975
    assert [row["support"] for row in report["per_class"]] == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert f"test accuracy {report['accuracy']:.4f}" in done.stdout
    assert done.stderr.startswith("source auto: MNIST from $MNIST_IDX_DIR")


@pytest.mark.campaign
def test_mnist_is_split_as_the_tutorial_splits_it(mnist_root):
    champion, run = only_run(mnist_root[0])
    (dataset,) = (mnist_root[0] / "datasets").iterdir()
    manifest = load_manifest(dataset)
    assert {name: split.num_examples for name, split in manifest.splits.items()} == {
        "train": 50_000, "validation": 10_000, "test": 10_000,
    }  # fmt: skip
    assert manifest.dataset_id == champion.dataset_id
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10


@pytest.mark.campaign
def test_the_exported_model_alone_has_the_reported_accuracy(mnist_root, mnist_dir, tmp_path):
    root, _ = mnist_root
    champion, _ = only_run(root)
    done = run_python(
        "-c", SCORE_RAW_IMAGES, root / champion.path, mnist_dir,
        cwd=tmp_path, env={"PYTHONPATH": None},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == champion.accuracy


def test_digits_need_no_network_and_no_environment(tmp_path):
    root = tmp_path / "out"
    nowhere = {"MNIST_IDX_DIR": None, "TFDS_DATA_DIR": tmp_path / "tfds"}
    # The proxy that does not exist stands in for a machine without a network.
    blocked = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = run_cli(
        "pipeline.retrain", "--root", root, env=nowhere | blocked | {"HOME": tmp_path}, merged=True
    )
    assert done.returncode == 0, done.stdout
    first = done.stdout.splitlines()[0]
    assert "cannot be had" in first
    assert "digits that come with scikit-learn (not MNIST)" in first
    _, run = only_run(root)
    assert "not MNIST" in (run / "report/report.html").read_text().split("</title>")[0]
    (dataset,) = (root / "datasets").iterdir()
    assert "not MNIST" in load_manifest(dataset).source["title"]
    assert not (tmp_path / "tfds").exists()
    assert json.loads((run / "report/report.json").read_text())["accuracy"] > 0.9


@pytest.mark.campaign
def test_mnist_through_tfds_reaches_the_same_accuracy(mnist_root, mnist_dir, tmp_path):
    root = tmp_path / "out"
    data_dir = lay_out_downloads(mnist_dir, tmp_path / "tfds")
    done = run_cli(
        "pipeline.retrain", "--root", root, "--source=tfds:mnist",
        env={"TFDS_DATA_DIR": data_dir}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here, there = registry.champion(root), registry.champion(mnist_root[0])
    # Two standard deviations of the difference of two such runs on 10,000 images.
    assert abs(here.accuracy - there.accuracy) < 0.006
    (dataset,) = (root / "datasets").iterdir()
    assert load_manifest(dataset).source["name"] == "mnist/3.0.1"
