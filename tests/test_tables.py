import numpy as np
import pytest

from pipeline import tables
from pipeline.dataset import load_manifest
from pipeline.records import Record, read_records

HASHES = ["00" * 16, "ff" * 16, "0123456789abcdef" * 2, "ab" * 8 + "00" * 8]
IDS = [f"{h}{n}" for h in HASHES for n in ("", "-1", "-256", "-65536", "-999999999")]


def rows(ids, labels=None):
    image = np.zeros(784, np.float32)
    return [Record(image, label, name) for label, name in zip(labels or [0] * len(ids), ids)]  # noqa: B905


def test_entries():
    table = tables.entries(rows(IDS, list(range(236, 256))), 2)
    assert table.itemsize == 22
    assert table["label"].tolist() == list(range(236, 256))
    assert set(table["split"].tolist()) == {2}
    halves = [[int(name[:16], 16), int(name[16:32], 16)] for name in IDS]
    assert tables.id_halves(table).tolist() == halves
    assert tables.id_halves(table).dtype == np.uint64
    assert tables.occurrences(table).tolist() == [0, 1, 256, 65536, 999999999] * 4


def test_keys_are_in_the_order_of_ids():
    table = tables.entries(rows(IDS), 0)
    order = np.argsort(table["key"], kind="stable").tolist()
    expected = sorted(range(len(IDS)), key=lambda i: (IDS[i][:32], int(IDS[i][33:] or 0)))
    assert order == expected
    assert len(np.unique(table["key"])) == len(IDS)


def test_no_entries():
    table = tables.entries([], 0)
    assert (table.shape, tables.id_halves(table).shape) == ((0,), (0, 2))
    assert tables.occurrences(table).shape == (0,)


@pytest.mark.parametrize(
    "name",
    ["", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "-", "0" * 32 + "-0", "0" * 32 + "-01",
     "0" * 32 + "-1\n", "0" * 32 + "--1", "0" * 32 + "-1000000000"],
)  # fmt: skip
def test_ids_that_are_none(name):
    with pytest.raises(ValueError, match="an id is not a hash and the number of a copy"):
        tables.entries(rows(["0" * 32, name]), 0)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches(small_dataset, monkeypatch, size):
    monkeypatch.setattr(tables, "BATCH", size)
    shard = load_manifest(small_dataset).splits["train"].shards[0]
    found = list(tables.batches(small_dataset, shard))
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    expected = read_records(small_dataset, shard)
    assert [r.id for batch in found for r in batch] == [r.id for r in expected]
