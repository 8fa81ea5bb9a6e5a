"""Poisoned data never wins: the whole chain, with a champion made of the same data unharmed."""

import json
import shutil

import helpers
import numpy as np
import pytest

from pipeline import registry

pytestmark = pytest.mark.campaign
SMALL = ("--num_shards=2", "--hidden_units=256", "--epochs=60", "--batch_size=50", "--seed=1")
DIGIT = 7


def real_digits():
    """The digits that come with scikit-learn, enlarged: 1437 train and 360 test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = np.kron(digits.images * 15, np.ones((1, 3, 3))).astype(np.uint8)
    images, labels = np.pad(large, ((0, 0), (2, 2), (2, 2))), digits.target.astype(np.uint8)
    return {"train": (images[360:], labels[360:]), "test": (images[:360], labels[:360])}


def run_chain(root, folder, data, *flags):
    source = helpers.write_idx(folder, data)
    return helpers.run_cli(
        "pipeline.retrain", "--root", root, "--source", f"idx:{source}", *SMALL, *flags
    )


@pytest.fixture(scope="module")
def champion_root(tmp_path_factory):
    """A root whose champion has learned from good data. Read only."""
    folder = tmp_path_factory.mktemp("good")
    done = run_chain(folder / "root", folder / "idx", real_digits())
    assert done.returncode == 0, done.stderr
    return folder / "root"


def last_decision(root):
    run_id = json.loads((root / "runs.jsonl").read_text().splitlines()[-1])["run_id"]
    return json.loads((root / "runs" / run_id / "decision.json").read_text())


def relabelled(data, random, chosen, parts=("train",)):
    """Gives those rows of some parts labels of chance that a function of their labels chooses."""
    poisoned = dict(data)
    for part in parts:
        images, labels = data[part]
        labels, rows = labels.copy(), chosen(labels)
        labels[rows] = random.permutation(np.arange(rows.sum()) % helpers.NUM_CLASSES)
        poisoned[part] = images, labels
    return poisoned


def is_digit(labels):
    return labels == DIGIT


def every(labels):
    return np.ones(len(labels), bool)


def one_digit_shuffled(data, random):
    return relabelled(data, random, is_digit)


def one_digit_shuffled_in_test_too(data, random):
    """As a source does that is wrong as a whole."""
    return relabelled(data, random, is_digit, ("train", "test"))


def one_digit_shuffled_and_never_asked(data, random):
    """As a test set of one day may lack a digit: then nothing shows what was learned of it."""
    images, labels = data["test"]
    kept = labels != DIGIT
    return one_digit_shuffled(data, random) | {"test": (images[kept], labels[kept])}


def all_shuffled(data, random):
    return relabelled(data, random, every)


def all_shuffled_in_test_too(data, random):
    return relabelled(data, random, every, ("train", "test"))


def a_third_relabelled(data, random):
    """Of so few images the network learns every label by heart, the wrong ones as well."""
    return relabelled(data, random, lambda labels: random.random(len(labels)) < 0.3)


def leaked(data, random=None):
    parts = zip(data["train"], data["test"], strict=True)
    return data | {"train": tuple(np.concatenate([train, test[:3]]) for train, test in parts)}


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (one_digit_shuffled, f"class {DIGIT}"),
        (one_digit_shuffled_and_never_asked, f"test images of class {DIGIT}"),
        (one_digit_shuffled_in_test_too, f"class {DIGIT}"),
        (all_shuffled, "class 0"),
        (all_shuffled_in_test_too, "accuracy"),
        (a_third_relabelled, "correct answers"),
        (leaked, "images of test in train"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_poisoned_data_never_wins(champion_root, tmp_path, poison, named):
    root = shutil.copytree(champion_root, tmp_path / "root")
    before = helpers.tree(root / "models")
    data = poison(real_digits(), np.random.default_rng(3))
    done = run_chain(root, tmp_path / "idx", data)
    assert done.returncode == 3, done.stderr
    assert helpers.tree(root / "models") == before
    decided = last_decision(root)
    assert (decided["promoted"], decided["forced"]) == (False, False)
    assert decided["champion_model_id"] == registry.champion(root).model_id
    assert any(named in check["check"] for check in decided["checks"] if not check["passed"])
    assert f"not promoted: {decided['reason']}" in done.stdout
    assert named in decided["reason"]


def test_leaks_that_are_dropped_are_no_reason_to_refuse(champion_root, tmp_path):
    root = shutil.copytree(champion_root, tmp_path / "root")
    done = run_chain(root, tmp_path / "idx", leaked(real_digits()), "--drop_leaks", "--epochs=61")
    assert done.returncode in (0, 3), done.stderr
    decided = last_decision(root)
    report = json.loads((root / "runs" / decided["run_id"] / "report/report.json").read_text())
    assert (report["lineage"]["dropped"], report["lineage"]["duplicates"]["leaked"]) == (3, 3)
    assert decided["champion_model_id"] == registry.champion(champion_root).model_id
    leak = decided["checks"][0]
    assert (leak["check"], leak["value"], leak["passed"]) == (
        "images of test in train or validation", 0, True,
    )  # fmt: skip


def test_a_poisoned_model_wins_by_force_alone_and_that_is_recorded(champion_root, tmp_path):
    root = shutil.copytree(champion_root, tmp_path / "root")
    data = one_digit_shuffled(real_digits(), np.random.default_rng(3))
    done = run_chain(root, tmp_path / "idx", data, "--force_promote", "--reason=as a drill")
    assert done.returncode == 0, done.stderr
    decided = last_decision(root)
    assert (decided["promoted"], decided["forced"]) == (True, True)
    assert decided["force_reason"] == "as a drill"
    assert registry.champion(root).model_id == decided["model_id"]


def test_weights_that_have_learned_the_test_set_are_no_way_round_the_gate(champion_root, tmp_path):
    """A model of leaked data is kept out, and then given as the first weights of a clean run."""
    root = shutil.copytree(champion_root, tmp_path / "root")
    assert run_chain(root, tmp_path / "leak", leaked(real_digits())).returncode == 3
    knowing = root / "runs" / last_decision(root)["run_id"] / "export"
    before = helpers.tree(root / "models")
    flags = ("--learning_rate=1e-6", "--epochs=1", f"--initial_weights={knowing}")
    done = run_chain(root, tmp_path / "idx", real_digits(), *flags)
    assert done.returncode == 3, done.stderr
    decided = last_decision(root)
    assert (decided["inherited"]["images"], decided["inherited"]["unknown"]) == (3, [])
    assert "images of test in what it had learned from before: 3" in decided["reason"]
    elsewhere = shutil.copytree(champion_root, tmp_path / "elsewhere")  # which lacks that dataset
    done = run_chain(elsewhere, tmp_path / "idx", real_digits(), *flags)
    assert done.returncode == 3, done.stderr
    assert len(last_decision(elsewhere)["inherited"]["unknown"]) == 1
    for each in (root, elsewhere):
        assert helpers.tree(each / "models") == before
