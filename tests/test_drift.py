import json
import math

import numpy as np
import pytest

from pipeline import drift
from pipeline.dataset import load_manifest


@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [
        ([5, 5], [1, 1], 0),
        ([3, 0], [0, 9], 1),
        # H(3/4, 1/4) - H(1, 0) / 2 - H(1/2, 1/2) / 2
        ([1, 0], [1, 1], -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5),
        ([1, 2], [0, 0], None),
        ([0, 0], [1, 2], None),
        ([1, 2], [1, 2, 3], None),
        (None, [1, 2], None),
        ([1, 2], None, None),
        ([1, 2], [1, -2], None),
        ([1, 2], [1, 2.5], None),
        ([1, 2], [True, 2], None),
        ([1, 2], "12", None),
    ],
)
def test_divergence_by_hand(one, other, bits):
    found = drift.divergence(one, other)
    assert found == (None if bits is None else pytest.approx(bits, abs=1e-15))


def test_divergence_equals_scipys():
    distance = pytest.importorskip("scipy.spatial.distance")
    random = np.random.default_rng(0)
    for _ in range(20):
        one, other = random.integers(0, 9, (2, 64)).tolist()
        expected = distance.jensenshannon(one, other, base=2) ** 2
        assert drift.divergence(one, other) == pytest.approx(expected, abs=1e-12)
        assert drift.divergence(one, other) == pytest.approx(
            drift.divergence(other, one), abs=1e-12
        )


def test_the_data_of_a_dataset(small_dataset):
    manifest = load_manifest(small_dataset)
    splits = drift.data_of(manifest, drift.load_histograms(small_dataset))["splits"]
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"]["label_counts"] == list(manifest.splits["test"].label_counts)
    for name, size in (("train", 500), ("validation", 100), ("test", 120)):
        assert splits[name]["num_examples"] == size
        for measure in ("ink", "stroke_width"):
            assert len(splits[name][measure]) == 64 and sum(splits[name][measure]) == size


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"statistics": []}',
        '{"statistics": {"test": []}}',
        '{"statistics": {"test": {"ink": "x", "stroke_width": [1]}}}',
        '{"statistics": {"test": {"ink": %s}}}' % ([2] * 64),  # other images than the split has
    ],
)
def test_a_dataset_without_statistics(small_dataset, tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    data = drift.data_of(load_manifest(small_dataset), drift.load_histograms(tmp_path))
    for split in data["splits"].values():
        assert (split["ink"], split["stroke_width"]) == (None, None)
        assert split["num_examples"] == sum(split["label_counts"]) > 0


def data(**splits):
    return {"splits": splits}


def split(labels, ink, stroke_width=None):
    return {
        "num_examples": sum(labels),
        "label_counts": labels,
        "ink": ink,
        "stroke_width": stroke_width,
    }


def test_drift():
    ours = data(train=split([4, 4], [8, 0]), test=split([1, 0], [1, 0], [1, 0]))
    theirs = data(train=split([1, 1], [0, 5], [1, 1]))
    assert drift.drift(ours, theirs) == {
        "train": {"labels": 0.0, "ink": 1.0, "stroke_width": None},
        "test": {"labels": None, "ink": None, "stroke_width": None},
    }


@pytest.mark.parametrize("other", [{}, {"splits": 5}, {"splits": {"train": 5}}])
def test_nothing_is_trusted_of_the_other(other):
    found = drift.drift(data(train=split([1, 2], [3, 4])), other)
    assert found == {"train": {"labels": None, "ink": None, "stroke_width": None}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("{", None), ("[]", None), ("{}", None), ('{"data": 1}', None)],
)
def test_a_model_without_a_report(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert drift.load_data(tmp_path) == expected


def test_a_model_with_a_report(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"data": data(test=split([1], [1]))}))
    assert drift.load_data(tmp_path) == data(test=split([1], [1]))
