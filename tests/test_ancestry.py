"""What a model had learned from before, found in the files of real datasets."""

import dataclasses
import json
import logging
import shutil

import pytest
from test_comparison import hand_made

from pipeline import ancestry
from pipeline.command import InputError, UnreachableError
from pipeline.dataset import load_manifest
from pipeline.gate import Inherited
from pipeline.models import UNNAMED, learned_from

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


def add_model(root, *learned_from, folder="models/1"):
    """Describes a model which has learned from these: (dataset, splits)."""
    entries = [{"dataset_id": name, "splits": splits.split()} for name, splits in learned_from]
    path = root / folder / "model.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"learned_from": entries}))
    return path


def examine(root, judged):
    learned = learned_from(root / "models/1/model.json")
    return dataclasses.asdict(ancestry.examine(root, learned, judged, load_manifest(judged)))


@pytest.mark.parametrize(
    ("splits", "images"), [("train", 2), ("train validation", 3), ("validation", 1), ("test", 1)]
)
def test_images_of_test_in_what_was_learned_from(root, judged, splits, images):
    # Of its test nothing has learned, unless the model says so.
    _, name = make(root / "datasets/old", train=[1, 2, 9], validation=[3, 8], test=[4])
    add_model(root, (name, splits))
    assert examine(root, judged) == {"images": images, "datasets": (name,), "unknown": ()}


@pytest.mark.parametrize("splits", ["", "all", "train all"])
def test_of_splits_that_there_are_not_nothing_is_known(root, judged, splits):
    _, name = make(root / "datasets/old", train=[9], test=[0])
    add_model(root, (name, splits))
    assert examine(root, judged) == {"images": 0, "datasets": (), "unknown": (name,)}


def test_an_image_counts_once_however_many_datasets_hold_it(root, judged):
    _, one = make(root / "datasets/one", train=[1, 2], test=[0])
    _, two = make(root / "datasets/two", train=[9], validation=[2, 3], test=[0])
    add_model(root, (one, "train"), (two, "train"), (two, "train validation"))
    found = examine(root, judged)
    assert (found["images"], found["datasets"]) == (3, (one, two))


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
    assert (found["images"], found["datasets"]) == (1, (one,))
    assert found["unknown"] == ("f" * 32, UNNAMED, two)


def test_a_server_that_does_not_answer_says_nothing_of_a_dataset(root, judged, monkeypatch):
    def unreachable(*_):
        raise UnreachableError("no answer")

    folder, name = make(root / "datasets/old", train=[9], test=[0])
    add_model(root, (name, "train"))
    manifest = load_manifest(judged)
    with monkeypatch.context() as patch, pytest.raises(UnreachableError):
        patch.setattr(ancestry, "load_manifest", unreachable)
        ancestry.examine(root, {name: {"train"}}, judged, manifest)
    hashes = ancestry._hashes
    with monkeypatch.context() as patch, pytest.raises(UnreachableError):
        patch.setattr(
            ancestry,
            "_hashes",
            lambda at, *more: (unreachable if at == folder else hashes)(at, *more),
        )
        examine(root, judged)


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


@pytest.mark.parametrize(
    "text",
    [None, "{", "{}", *(f'{{"learned_from": {told}}}' for told in ("[1]", "1", "[]", "null"))],
)
def test_a_model_that_does_not_say(root, judged, text):
    path = add_model(root)
    path.unlink()
    if text is not None:
        path.write_text(text)
    found = examine(root, judged)
    assert (found["images"], found["unknown"]) == (0, (UNNAMED,))


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
    assert start() is None  # the dataset of this name is gone
    assert start() is None
    (said,) = caplog.messages
    assert said == (
        "trained from new weights: whether models/1 has learned from images of test is not known of"
        f" all datasets that it was trained on: {name} cannot be read"
    )
    assert ancestry.told({"reason": "so"}, tmp_path / "run")["reason"] == f"so; {said}"


# Before a model is judged


def inherited(root, judged):
    return ancestry.inherited(root, root / "runs/r", judged, load_manifest(judged))


def add_export(root, *learned_from):
    return add_model(root, *learned_from, folder="runs/r/export")


def test_its_own_dataset_is_for_the_manifest_to_tell_of(root, judged, monkeypatch):
    own = load_manifest(judged).dataset_id
    add_export(root, (own, "train validation"))
    monkeypatch.setattr(ancestry, "_hashes", None)  # nothing is read
    assert inherited(root, judged) == Inherited()


def test_its_own_test_is_not(root, judged):
    own = load_manifest(judged).dataset_id
    add_export(root, (own, "train test"))
    assert inherited(root, judged) == Inherited(images=5, datasets=(own,))


def test_all_that_came_before_is_asked_whatever_it_began_from(root, judged):
    own = load_manifest(judged).dataset_id
    _, old = make(root / "datasets/old", train=[1, 2, 9], test=[0])
    add_export(root, (old, "train"), ("f" * 32, "train"), (None, ""), (own, "train"))
    assert inherited(root, judged) == Inherited(
        images=2, datasets=(old,), unknown=("f" * 32, UNNAMED)
    )


def test_what_was_asked_for_a_warm_start_is_known_although_it_is_gone(root, judged):
    folder, old = make(root / "datasets/old", train=[9], test=[0])
    add_model(root, (old, "train"))
    run_dir, manifest = root / "runs/r", load_manifest(judged)
    add_export(root, (old, "train"), (manifest.dataset_id, "train"))
    start = ancestry.starting_model(root, run_dir, "models/1", judged, manifest)
    assert start == root / "models/1"
    shutil.rmtree(folder)
    assert inherited(root, judged) == Inherited(datasets=(old,))
    (run_dir / ancestry.NOTE_FILE).unlink()
    assert inherited(root, judged) == Inherited(unknown=(old,))


def test_a_note_that_found_images_vouches_for_nothing(root, judged):
    _, old = make(root / "datasets/old", train=[1], test=[0])
    add_model(root, (old, "train"))
    run_dir, manifest = root / "runs/r", load_manifest(judged)
    add_export(root, (old, "train"))
    assert ancestry.starting_model(root, run_dir, "models/1", judged, manifest) is None
    assert inherited(root, judged) == Inherited(images=1, datasets=(old,))
