import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers

from pipeline import options, preprocess


@pytest.fixture(scope="session")
def mnist_dir():
    """The folder of the real MNIST files; a test that takes it is skipped where there is none."""
    directory = os.environ.get("MNIST_IDX_DIR")
    if not directory:
        pytest.skip("MNIST_IDX_DIR is not set: no real MNIST files")
    return Path(directory).resolve()


@pytest.fixture(scope="session")
def small_idx(tmp_path_factory):
    """IDX files of `helpers.make_images`: 600 train and 120 test images. Read only."""
    return helpers.write_idx(tmp_path_factory.mktemp("idx"), helpers.make_images())


@pytest.fixture(scope="session")
def small_dataset(small_idx, tmp_path_factory):
    """The dataset made of `small_idx`: 500 train, 100 validation, 120 test. Read only."""
    directory = tmp_path_factory.mktemp("dataset") / "small"
    config = options.PreprocessConfig(
        sources=(f"idx:{small_idx}",), output_dir=directory, num_shards=3
    )
    assert preprocess.execute(config) == 0
    return directory


def pytest_addoption(parser):
    parser.addoption(
        "--share", type=int, metavar="N", help="run the first N cases of each parametrised test"
    )


# Files are handed out whole, in this order: a long one that comes last keeps one process waiting.
LONGEST_FIRST = (
    "test_retrain.py", "test_preprocess.py", "test_runs.py", "test_step.py", "test_evaluate.py",
    "test_warm_start.py", "test_job.py", "test_browser.py", "test_chain.py",
    "test_broken_inputs.py",
)  # fmt: skip


def rank(item):
    """The place of a test's file among the longest; the others come after them."""
    name = item.path.name
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)


def pytest_collection_modifyitems(config, items):
    items.sort(key=rank)  # keeps the order of what is alike
    if (share := config.getoption("share")) is None:
        return
    taken = {}
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.split("[")[0]
        taken[name] = taken.get(name, 0) + 1
        (kept if taken[name] <= share else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
