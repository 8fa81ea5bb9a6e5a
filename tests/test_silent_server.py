"""Every command where its bucket's server does not answer: one line, exit code 1, no traceback."""

import os

import helpers
import pytest

ADDRESS = "http://127.0.0.1:1"  # nobody listens there
THERE = "gs://bucket/x"
PATIENCE = "from pipeline import gcs_client\ngcs_client.RETRY_SECONDS = 0.3\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """Variables for processes that give a server up soon, as do those that they start."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(PATIENCE)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(helpers.ROOT)]),
        "STORAGE_EMULATOR_HOST": ADDRESS,
    }


COMMANDS = {
    "preprocess to": ["pipeline.preprocess", "--source=digits", f"--output_dir={THERE}"],
    "preprocess from": [
        "pipeline.preprocess", f"--source=idx:{THERE}", "--output_dir={tmp}/out",
    ],
    "verify": ["pipeline.dataset", "verify", THERE],
    "train on": ["trainer.task", f"--dataset_dir={THERE}", "--run_dir={tmp}/out"],
    "train to": [
        "trainer.task", "--dataset_dir={dataset}", f"--run_dir={THERE}", "--epochs=1",
    ],
    "train from": [
        "trainer.task", "--dataset_dir={dataset}", "--run_dir={tmp}/out",
        f"--initial_weights={THERE}",
    ],
    "evaluate": [
        "pipeline.evaluate", f"--model_dir={THERE}", f"--dataset_dir={THERE}",
        "--report_dir={tmp}/out",
    ],
    "evaluate on": [
        "pipeline.evaluate", "--model_dir={model}", f"--dataset_dir={THERE}",
        "--report_dir={tmp}/out",
    ],
    "evaluate to": [
        "pipeline.evaluate", "--model_dir={model}", "--dataset_dir={dataset}",
        f"--report_dir={THERE}",
    ],
    "list": ["pipeline.registry", "list", f"--root={THERE}"],
    "registry verify": ["pipeline.registry", "verify", f"--root={THERE}"],
    "rollback": ["pipeline.registry", "rollback", f"--root={THERE}"],
    "prune": ["pipeline.registry", "prune", "--keep=1", f"--root={THERE}"],
    "retrain": ["pipeline.retrain", f"--root={THERE}", "--source=digits"],
    "retrain, as a plan": [
        "pipeline.retrain", f"--root={THERE}", "--source=digits", "--dry_run",
    ],
    "retrain on": ["pipeline.retrain", "--root={tmp}/out", f"--source=idx:{THERE}"],
    "retrain from": [
        "pipeline.retrain", "--root={tmp}/out", "--source=digits",
        f"--initial_weights={THERE}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return helpers.export_linear_model(tmp_path_factory.mktemp("model") / "export", 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line(name, impatient, small_dataset, model, tmp_path):
    module, *flags = (
        text.format(tmp=tmp_path, dataset=small_dataset, model=model) for text in COMMANDS[name]
    )
    done = helpers.run_cli(module, *flags, env=impatient)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"python -m {module}: error: gs://bucket/"), line
    assert line.endswith(f": no answer from {ADDRESS} within 0.3 seconds"), line
    assert not (tmp_path / "out").exists()
