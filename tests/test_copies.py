import dataclasses
import hashlib
import json

import numpy as np
import pytest

from pipeline import inspection, shards
from pipeline import records as codec
from pipeline.dataset import dataset_id, load_manifest, manifest_json
from pipeline.shards import ShardOptions
from pipeline.transforms import ROW

NUM_SHARDS = 2
NAMES = tuple("abcde")


def images_of(levels):
    """Images that differ in their first pixel; uint8 [n, 784]."""
    pixels = np.zeros((len(levels), 784), np.uint8)
    pixels[:, 0] = levels
    pixels[:, 1] = 9  # none is blank
    return pixels


def make(directory, rows, *, drop_leaks=False):
    """Writes a dataset of (split, label, level); returns its folder."""
    directory.mkdir(parents=True)
    split, label, level = np.array(rows, np.uint8).reshape(-1, 3).T
    table = np.zeros(len(split), ROW)
    table["split"], table["label"], table["pixels"] = split, label, images_of(level)
    digests = codec.image_digests(table["pixels"])
    table["id"] = digests.view(">u8").reshape(-1, 2)
    number = codec.digest_bits(digests, 64, 64) % np.uint64(NUM_SHARDS)
    options = ShardOptions(num_shards=NUM_SHARDS, drop_leaks=drop_leaks)
    written = [shards.write(table[number == i], i, options, directory) for i in range(NUM_SHARDS)]
    manifest = shards.make_manifest(
        written,
        source={"kind": "idx", "title": "by hand"},
        split_by="positional",
        class_names=NAMES,
        quarantined={},
    )
    (directory / "manifest.json").write_text(manifest_json(manifest))
    (directory / "quarantine").mkdir()
    (directory / "quarantine" / "records.jsonl").touch()
    return directory


TRAIN, VALIDATION, TEST = range(3)
# Levels 0 to 6 stand twice in train; 7 has two labels; 8 is in train and validation; 9 in train,
# validation and test; 10 twice in test; 11 in test, with the lower label, and in train.
ROWS = [
    *((TRAIN, 1, level) for level in range(7) for _ in range(2)),
    *((TRAIN, 1, 7), (TRAIN, 2, 7), (TRAIN, 0, 8), (VALIDATION, 0, 8)),
    *((TRAIN, 3, 9), (VALIDATION, 3, 9), (TEST, 4, 9), (TEST, 1, 10), (TEST, 1, 10)),
    *((TEST, 0, 11), (TRAIN, 1, 11)),
    *((TRAIN, 0, 20), (VALIDATION, 1, 21), (TEST, 2, 22)),
]
IDS = codec.image_ids(images_of(range(256)))


def edit(directory, change):
    raw = json.loads((directory / "manifest.json").read_text())
    change(raw)
    (directory / "manifest.json").write_text(json.dumps(raw))


def state(counts=None, examples=None, **values):
    def change(raw):
        raw["duplicates"] |= counts or {}
        raw["duplicates"]["examples"] |= examples or {}
        raw |= values

    return change


def lowest(*levels):
    return sorted(IDS[level] for level in levels)[:5]


def test_what_is_counted(tmp_path):
    manifest = load_manifest(make(tmp_path / "kept", ROWS))
    assert inspection.verify(tmp_path / "kept") == []
    counts = {"images": 12, "copies": 13, "conflicting": 3, "leaked": 2, "held_out": 2}
    examples = {
        "images": lowest(*range(12)),
        "conflicting": lowest(7, 9, 11),
        "leaked": lowest(9, 11),
        "held_out": lowest(8, 9),
    }
    assert manifest.duplicates == counts | {"examples": examples}
    manifest = load_manifest(make(tmp_path / "dropped", ROWS, drop_leaks=True))
    assert inspection.verify(tmp_path / "dropped") == []
    assert (manifest.dropped, manifest.duplicates) == (3, counts | {"examples": examples})


OTHER = IDS[200]  # of no image in the dataset
STATED = {
    "one image more": (state({"images": 13}), ["duplicates: 13 images, found 12"]),
    "one image less": (state({"images": 11}), ["duplicates: 11 images, found 12"]),
    "one copy more": (state({"copies": 14}), ["duplicates: 14 copies, found 13"]),
    "no copies": (state({"copies": 0}), ["duplicates: 0 copies, found 13"]),
    "one conflict less": (
        state({"conflicting": 2}, {"conflicting": lowest(7, 9)}),
        [
            "duplicates: 2 conflicting, found 3",
            "duplicates: the examples of conflicting are not its lowest ids",
        ],
    ),
    "one leak more": (
        state({"leaked": 3}, {"leaked": lowest(9, 10, 11)}),
        [
            "duplicates: 3 leaked, found 2",
            "duplicates: the examples of leaked are not its lowest ids",
        ],
    ),
    "nothing held out": (
        state({"held_out": 0}, {"held_out": []}),
        [
            "duplicates: 0 held_out, found 2",
            "duplicates: the examples of held_out are not its lowest ids",
        ],
    ),
    "not the lowest": (
        state(None, {"images": sorted([*lowest(*range(12))[:4], max(IDS[:12])])}),
        ["duplicates: the examples of images are not its lowest ids"],
    ),
    "another image": (
        state(None, {"leaked": sorted([IDS[9], OTHER])}),
        ["duplicates: the examples of leaked are not its lowest ids"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), STATED.values(), ids=STATED.keys())
def test_other_counts_are_found(tmp_path, change, expected):
    folder = make(tmp_path / "set", ROWS)
    edit(folder, change)
    assert inspection.verify(folder) == [f"manifest.json: {line}" for line in expected]


# Of what was dropped: images 9 and 11 stand in test and elsewhere. Number 2 of image 9 is left
# (0 and 1 were dropped), and number 0 of image 11, so that the drop of its number 1 left no trace.
DROPPED = {
    "nothing dropped": (
        state(dropped=0),
        ["*: copies are not numbered from 0 in the order of their labels"],
    ),
    "one dropped": (state(dropped=1), ["1 dropped, but 2 copies are missing"]),
    "two dropped": (state(dropped=2), ["duplicates: 2 leaked, found 1"]),
    "four dropped": (state(dropped=4), ["duplicates: 13 copies, found 14"]),
    "no leaks": (
        state({"leaked": 0}, {"leaked": []}),
        ["duplicates: 0 leaked, expected 1 to 2"],
    ),
    "three leaks": (
        state({"leaked": 3}, {"leaked": lowest(9, 10, 11)}),
        ["duplicates: 3 leaked, expected 1 to 2"],
    ),
    "too few images": (state({"images": 10}), ["duplicates: 10 images, expected 11 to 12"]),
    "too many images": (state({"images": 13}), ["duplicates: 13 images, expected 11 to 12"]),
    "too many conflicts": (
        state({"conflicting": 4}, {"conflicting": lowest(7, 9, 11, 20)}),
        ["duplicates: 4 conflicting, expected 1 to 3"],
    ),
    "nothing held out": (
        state({"held_out": 0}, {"held_out": []}),
        [
            "duplicates: 0 held_out, expected 1 to 2",
            "duplicates: the examples of held_out are not its lowest ids",
        ],
    ),
    "an example of no image": (
        state(None, {"leaked": sorted([IDS[9], OTHER])}),
        ["duplicates: the examples of leaked are not its lowest ids"],
    ),
    "a leak that is not in test": (
        state(None, {"leaked": sorted([IDS[9], IDS[20]])}),
        ["duplicates: the examples of leaked are not its lowest ids"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), DROPPED.values(), ids=DROPPED.keys())
def test_what_contradicts_dropped_leaks(tmp_path, change, expected):
    folder = make(tmp_path / "set", ROWS, drop_leaks=True)
    edit(folder, change)
    number = int(IDS[9][16:], 16) % NUM_SHARDS
    files = f"*-0000{number}-of-00002.tfrecord: "
    assert inspection.verify(folder) == [
        files + line.removeprefix("*: ") if line.startswith("*: ") else f"manifest.json: {line}"
        for line in expected
    ]


def test_leaks_that_were_not_dropped(tmp_path):
    folder = make(tmp_path / "set", ROWS)
    edit(folder, state(dropped=3))
    problems = inspection.verify(folder)
    expected = {
        f"*-0000{int(IDS[level][16:], 16) % NUM_SHARDS}-of-00002.tfrecord: an image is both in"
        " test and elsewhere, although such were dropped"
        for level in (9, 11)
    }
    assert set(problems) == expected and len(problems) == len(expected)


def renumber(folder, level, split, change):
    """Changes the records of an image in one split, and every checksum with them."""
    number = int(IDS[level][16:], 16) % NUM_SHARDS
    manifest = load_manifest(folder)
    part = manifest.splits[split]
    found = codec.read_records(folder, part.shards[number])
    mine = change([record for record in found if record.id.startswith(IDS[level])])
    rows = [record for record in found if not record.id.startswith(IDS[level])] + mine
    rows.sort(key=lambda record: (record.id[:32], int(record.id[33:] or 0)))
    content = b"".join(
        codec.frame(codec.encode_record(codec.unscale(row.image).tobytes(), row.label, row.id))
        for row in rows
    )
    (folder / part.shards[number].file).write_bytes(content)
    shard = dataclasses.replace(
        part.shards[number],
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    every = [*part.shards[:number], shard, *part.shards[number + 1 :]]
    splits = manifest.splits | {split: dataclasses.replace(part, shards=tuple(every))}
    named = dataset_id([s for each in splits.values() for s in each.shards], NAMES)
    text = manifest_json(dataclasses.replace(manifest, splits=splits, dataset_id=named))
    (folder / "manifest.json").write_text(text)
    return f"*-0000{number}-of-00002.tfrecord: "


def ids(*numbers):
    def change(mine):
        named = [f"{r.id[:32]}-{n}" if n else r.id[:32] for r, n in zip(mine, numbers, strict=True)]
        return [record._replace(id=name) for record, name in zip(mine, named, strict=True)]

    return change


NUMBERS = {
    "a gap": (7, "train", ids(0, 2)),
    "not from 0": (7, "train", ids(1, 2)),
    "the other way round": (7, "train", ids(1, 0)),
    "one alone, numbered": (20, "train", ids(1)),
    "twice in two splits": (8, "validation", ids(0)),
    "against the order of splits": (8, "validation", ids(2)),
    "a leak": (9, "test", ids(3)),
}


@pytest.mark.parametrize(("level", "split", "change"), NUMBERS.values(), ids=NUMBERS.keys())
def test_wrong_numbers_of_copies(tmp_path, level, split, change):
    folder = make(tmp_path / "set", ROWS)
    before = (folder / "manifest.json").read_bytes()
    renumber(folder, level, split, list)
    assert (folder / "manifest.json").read_bytes() == before
    files = renumber(folder, level, split, change)
    assert inspection.verify(folder) == [
        files + "copies are not numbered from 0 in the order of their labels"
    ]


@pytest.mark.parametrize(
    ("level", "split", "change"),
    [(7, "train", ids(0, 2)), (8, "train", ids(1)), (20, "train", ids(1))],
)
def test_wrong_numbers_of_what_cannot_have_been_dropped(tmp_path, level, split, change):
    folder = make(tmp_path / "set", ROWS, drop_leaks=True)
    files = renumber(folder, level, split, change)
    assert inspection.verify(folder) == [
        files + "copies are not numbered from 0 in the order of their labels"
    ]


def test_more_missing_than_was_dropped(tmp_path):
    folder = make(tmp_path / "set", ROWS, drop_leaks=True)
    renumber(folder, 9, "test", ids(7))  # 0 to 6 are missing
    assert inspection.verify(folder) == ["manifest.json: 3 dropped, but 7 copies are missing"]


def test_dropped_where_no_image_is_in_test(tmp_path):
    folder = make(tmp_path / "set", [row for row in ROWS if row[0] != TEST])
    edit(folder, state(dropped=1))
    assert inspection.verify(folder) == [
        "manifest.json: duplicates: 0 leaked, and no image can have been dropped"
    ]


@pytest.mark.parametrize("drop_leaks", [False, True], ids=["kept", "dropped"])
def test_any_dataset_is_whole(tmp_path, drop_leaks):
    """Whatever copies there are: what is written is what verify expects."""
    dropped = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        size = int(random.integers(0, 60))
        rows = np.stack(
            [
                random.choice(3, size, p=(0.5, 0.2, 0.3)),
                random.integers(0, 1 + seed % 5, size),
                random.integers(0, 4 + seed, size),
            ],
            axis=1,
        )
        folder = make(tmp_path / str(seed), rows, drop_leaks=drop_leaks)
        assert inspection.verify(folder) == [], seed
        dropped += load_manifest(folder).dropped
    assert (dropped > 200) == drop_leaks
