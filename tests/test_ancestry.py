"""What a warm start has learned from, found in the files of real datasets."""

import json
import logging
import shutil

import pytest
from test_comparison import hand_made

from pipeline import ancestry
from pipeline.command import InputError
from pipeline.dataset import load_manifest

CLASSES = ("a", "b")


def make(folder, train=(), validation=(), test=()):
    """A dataset of blank images of these grey levels; its folder and its id."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = {"train": train, "validation": validation, "test": test}
    rows = {name: [(level, CLASSES[level % 2]) for level in part] for name, part in parts.items()}
    hand_made(folder, rows, CLASSES)
    return folder, load_manifest(folder).dataset_id


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def judged(root):
    """Where the model is judged: test holds the levels 1 to 5."""
    return make(root / "datasets/judged", train=[6], test=[1, 2, 3, 4, 5])[0]


def add_model(root, *learned_from):
    """Describes models/1, which has learned from these: (dataset, splits)."""
    entries = [{"dataset_id": name, "splits": splits.split()} for name, splits in learned_from]
    path = root / "models/1/model.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"learned_from": entries}))
    return path


def examine(root, judged):
    return ancestry.examine(root, "models/1", judged, load_manifest(judged))


@pytest.mark.parametrize(
    ("splits", "images"), [("train", 2), ("train validation", 3), ("validation", 1), ("", 0)]
)
def test_images_of_test_in_what_was_learned_from(root, judged, splits, images):
    # 4 was in its test as well: nothing has learned from that.
    _, name = make(root / "datasets/old", train=[1, 2, 9], validation=[3, 8], test=[4])
    add_model(root, (name, splits))
    assert examine(root, judged) == {
        "model": "models/1", "images": images, "datasets": [name], "unknown": [],
    }  # fmt: skip


def test_an_image_counts_once_however_many_datasets_hold_it(root, judged):
    _, one = make(root / "datasets/one", train=[1, 2], test=[0])
    _, two = make(root / "datasets/two", train=[9], validation=[2, 3], test=[0])
    add_model(root, (one, "train"), (two, "train"), (two, "train validation"))
    found = examine(root, judged)
    assert (found["images"], found["datasets"]) == (3, [one, two])


def test_the_same_dataset_in_another_order_of_its_parts(root, judged):
    """What a moved split looks like: not one image is new."""
    _, name = make(root / "datasets/old", train=[1, 2, 3, 4, 5], test=[6])
    add_model(root, (name, "train"))
    assert examine(root, judged)["images"] == 5


def test_what_is_gone_or_damaged_is_not_known(root, judged):
    _, one = make(root / "datasets/one", train=[1], test=[0])
    folder, two = make(root / "datasets/two", train=[2], test=[0])
    (shard,) = folder.glob("train-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    (root / "datasets/.incomplete").mkdir()  # what a killed process left, and what is no dataset
    (root / "datasets/notes").touch()
    add_model(root, ("f" * 32, "train"), (None, ""), (two, "train"), (one, "train"))
    found = examine(root, judged)
    assert (found["images"], found["datasets"]) == (1, [one])
    assert found["unknown"] == ["f" * 32, ancestry.UNNAMED, two]


@pytest.mark.parametrize(
    ("count", "listed"), [(1, "d0"), (3, "d0, d1, d2"), (4, "4 of them (d0, d1, d2, ...)")]
)
def test_many_unknown_datasets_are_counted(count, listed):
    note = {"model": "models/1", "images": 0, "unknown": [f"d{i}" for i in range(count)]}
    assert ancestry.in_words(note).endswith(f"trained on: {listed} cannot be read")


def test_each_manifest_is_read_once(root, judged, monkeypatch):
    names = [make(root / f"datasets/{i}", train=[i], test=[0])[1] for i in (1, 2, 9)]
    add_model(root, *((name, "train") for name in names))
    read = []

    def noted(folder):
        read.append(folder.name)
        return load_manifest(folder)

    monkeypatch.setattr(ancestry, "load_manifest", noted)
    assert examine(root, judged)["images"] == 2
    assert sorted(read) == ["1", "2", "9", "judged"]


@pytest.mark.parametrize("text", [None, "{", "{}", '{"learned_from": [1]}', '{"learned_from": 1}'])
def test_a_model_that_does_not_say(root, judged, text):
    path = add_model(root)
    path.unlink()
    if text is not None:
        path.write_text(text)
    found = examine(root, judged)
    assert (found["images"], found["unknown"]) == (0, [ancestry.UNNAMED])


def test_a_damaged_test_is_told(root, judged):
    add_model(root)
    next(judged.glob("test-*")).write_bytes(b"")
    with pytest.raises(InputError, match=r"test-00000-of-00001.tfrecord: has 0 bytes"):
        examine(root, judged)


def test_what_was_found_stays_for_the_whole_run(root, judged, tmp_path, caplog):
    def start(model="models/1"):
        return ancestry.starting_model(root, tmp_path / "run", model, judged, load_manifest(judged))

    caplog.set_level(logging.WARNING)
    (tmp_path / "run").mkdir()
    assert start(None) is None
    assert ancestry.told({"reason": "so"}, tmp_path / "run") == {
        "reason": "so", "warm_start": None,
    }  # fmt: skip
    folder, name = make(root / "datasets/old", train=[7], test=[0])
    add_model(root, (name, "train"))
    assert start() == root / "models/1"
    assert caplog.messages == []
    told = ancestry.told({"reason": "so"}, tmp_path / "run")
    assert (told["reason"], told["warm_start"]["datasets"]) == ("so", [name])
    shutil.rmtree(folder)
    make(folder, train=[1], test=[0])
    assert start() == root / "models/1"
    (tmp_path / "run" / ancestry.NOTE_FILE).unlink()
    assert start() == root / "models/1"  # the dataset of this name is gone
    (said,) = caplog.messages
    assert said == (
        "whether models/1 has learned from images of test is not known of all datasets that it was"
        f" trained on: {name} cannot be read"
    )
    assert ancestry.told({"reason": "so"}, tmp_path / "run")["reason"] == f"so; {said}"
