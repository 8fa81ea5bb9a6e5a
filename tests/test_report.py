import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from sample_report import MODEL, manifest

from pipeline import dataset, metrics, report

CONFUSION = [[8, 1, 1], [2, 6, 2], [0, 0, 5]]


def counts(confusion):
    confusion = np.array(confusion)
    return dataclasses.replace(metrics.zero_counts(len(confusion)), confusion=confusion)


def built(confusion, names=("a", "b", "c"), baseline=None):
    return report.build_report(
        counts(confusion), manifest=manifest(names), model=MODEL, split="test", baseline=baseline
    )


def other(counts, model=MODEL, **fields):
    """Another model that is right and wrong where the first one is."""
    paired = np.zeros((counts.num_classes, 4), np.int64)
    paired[:, 0] = counts.confusion.diagonal()
    paired[:, 3] = counts.support - paired[:, 0]
    return report.Compared(model=model, counts=counts, paired=paired, **fields)


# The numbers


def test_three_classes_by_hand():
    content = built(CONFUSION)
    assert (content["num_examples"], content["correct"], content["accuracy"]) == (25, 19, 0.76)
    assert content["accuracy_ci95"] == pytest.approx([0.565703, 0.885037], abs=2e-6)
    a, b, c = content["per_class"]
    assert [row["support"] for row in (a, b, c)] == [10, 10, 5]
    assert [row["correct"] for row in (a, b, c)] == [8, 6, 5]
    assert [row["accuracy"] for row in (a, b, c)] == [0.8, 0.6, 1.0]
    assert [row["recall"] for row in (a, b, c)] == [0.8, 0.6, 1.0]
    assert [row["precision"] for row in (a, b, c)] == [8 / 10, 6 / 7, 5 / 8]
    assert [row["f1"] for row in (a, b, c)] == [16 / 20, 12 / 17, 10 / 13]
    assert a["ci95"] == pytest.approx([0.490162, 0.943318], abs=2e-6)
    assert c["ci95"] == pytest.approx([0.565518, 1.0], abs=2e-6)


def test_has_the_fields_of_the_contract():
    content = built(CONFUSION)
    assert list(content) == [
        *("dataset_id", "model_id", "split", "test_id", "challengers_before", "judged_before"),
        *("num_examples", "correct", "accuracy", "accuracy_ci95", "log_loss", "calibration_error"),
        "per_class",
        *("confusion_matrix", "confusion_rates", "most_confused", "reliability", "slices"),
        *("data", "lineage", "baseline", "others"),
    ]
    assert content["dataset_id"] == "d" * 32
    assert content["model_id"] == MODEL["model_id"]
    assert content["split"] == "test"
    assert content["test_id"] is None
    assert content["confusion_matrix"] == CONFUSION
    assert content["log_loss"] == 0
    assert content["challengers_before"] is content["baseline"] is None
    assert content["others"] == []
    assert json.loads(report.report_json(content)) == content


def test_beside_other_models():
    old = other(counts([[7, 3, 0], *CONFUSION[1:]]), {"model_id": "old", "weights_sha256": "w"})
    content = report.build_report(
        counts(CONFUSION),
        manifest=manifest(),
        model=MODEL,
        split="test",
        baseline=old,
        others=[old, other(counts(CONFUSION))],
        test_id="t" * 32,
        challengers_before=5,
        judged_before=8,
    )
    assert (content["test_id"], content["challengers_before"]) == ("t" * 32, 5)
    assert content["judged_before"] == 8
    found = content["baseline"]
    assert found["paired"][0] == {
        "label": 0,
        "both": 7,
        "only_model": 0,
        "only_baseline": 0,
        "neither": 3,
    }
    plain = ("model_id", "weights_sha256", "correct", "accuracy", "log_loss")
    assert [found[key] for key in plain] == ["old", "w", 18, 0.72, 0]
    assert found["per_class_correct"] == [7, 6, 5]
    assert found["per_class"] == built([[7, 3, 0], *CONFUSION[1:]])["per_class"]
    assert found["accuracy_ci95"] == pytest.approx([0.524234, 0.857161], abs=2e-6)
    assert found.pop("drift") is None
    assert content["others"][0] == found
    assert content["others"][1]["model_id"] == MODEL["model_id"]
    text = report.text_table(content).splitlines()
    assert text[-3:] == [
        "the baseline old: 18 correct; 0 images right here alone, 0 there alone",
        "model old: 18 correct; 0 images right here alone, 0 there alone",
        "model 01234567: 19 correct; 0 images right here alone, 0 there alone",
    ]


def test_rates_of_the_confusion_matrix():
    content = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]])
    assert content["confusion_rates"] == [[0.8, 0.0, 0.2], [0.0, 1.0, 0.0], [None] * 3]
    assert content["most_confused"] == [{"label": 0, "predicted": 2, "count": 2, "rate": 0.2}]


def test_log_loss_and_calibration_of_each_class():
    probabilities = np.array([[0.75, 0.25, 0], [0.5, 0.5, 0]], np.float32)
    total = metrics.count(np.array([0, 1]), probabilities, ["a", "b"], np.zeros((2, 784), np.uint8))
    content = report.build_report(
        total, manifest=manifest(), model=MODEL, split="test", baseline=None
    )
    a, b, c = content["per_class"]
    assert a["log_loss"] == pytest.approx(-np.log(0.75), abs=1e-9)
    assert b["log_loss"] == pytest.approx(-np.log(0.5), abs=1e-9)
    assert a["calibration_error"] == (0.25 + 0.5) / 2  # of both, for both are answered with it
    assert (c["log_loss"], b["calibration_error"], c["calibration_error"]) == (None, None, None)
    filled = [row for row in content["reliability"] if row["count"]]
    assert filled == [
        {"low": 7 / 15, "high": 8 / 15, "count": 1, "accuracy": 0, "confidence": 0.5},
        {"low": 11 / 15, "high": 12 / 15, "count": 1, "accuracy": 1, "confidence": 0.75},
    ]
    empty = content["reliability"][0]
    assert empty == {"low": 0, "high": 1 / 15, "count": 0, "accuracy": None, "confidence": None}
    assert len(content["reliability"]) == 15


def test_slices():
    pixels = np.zeros((6, 784), np.uint8)
    pixels[:, :100] = np.array([8, 16, 16, 24, 32, 40])[:, None]  # ink 1, 2, 2, 3, 4, 5
    probabilities = np.eye(2, dtype=np.float32)[[0, 0, 1, 0, 0, 1]]
    total = metrics.count(np.zeros(6, int), probabilities, list("abcdef"), pixels)
    content = report.build_report(
        total, manifest=manifest(("a", "b")), model=MODEL, split="test", baseline=None
    )
    found = content["slices"]["ink"]
    assert [(row["low"], row["high"], row["support"], row["correct"]) for row in found] == [
        (1.0, 3.0, 3, 2),
        (3.0, 5.0, 2, 2),
        (5.0, 6.0, 1, 0),
    ]
    assert [row["accuracy"] for row in found] == [2 / 3, 1, 0]
    assert found[0]["ci95"] == list(metrics.wilson_interval(2, 3))
    (only,) = content["slices"]["stroke_width"]  # no pixel is ink
    assert (only["low"], only["high"], only["support"]) == (0, 1 / 16, 6)


def test_data_lineage_and_drift():
    histogram = [3, *[0] * 62, 3]
    histograms = {"test": {"ink": histogram, "stroke_width": histogram}}
    earlier = {"splits": {"test": {"label_counts": [2, 2, 2], "ink": [6, *[0] * 63]}}}
    content = report.build_report(
        counts(CONFUSION),
        manifest=manifest(),
        model=MODEL | {"dataset_id": "e" * 32},
        split="test",
        baseline=other(counts(CONFUSION), data=earlier),
        histograms=histograms,
    )
    splits = content["data"]["splits"]
    assert splits["test"]["ink"] == splits["test"]["stroke_width"] == histogram
    assert splits["train"]["ink"] is None
    assert splits["train"]["label_counts"] == [2, 2, 2]
    drift = content["baseline"]["drift"]
    assert drift["test"] == {
        "labels": 0,
        "ink": pytest.approx(0.3112781244591328),
        "stroke_width": None,
    }
    assert drift["train"] == {"labels": None, "ink": None, "stroke_width": None}
    assert content["lineage"] == {
        "source": {"kind": "idx", "title": "three kinds of things"},
        "split_by": "positional",
        "quarantined": {"count": 0, "by_reason": {}},
        "dropped": 0,
        "duplicates": dict.fromkeys(dataset.DUPLICATES, 0) | {"images": 3, "copies": 4},
        "trained_on": "e" * 32,
        "preset": "core",
        "seed": 22,
        "config": {"batch_size": 128, "optimizer": "adam"},
        "versions": {"python": "3.11"},
        "weights_sha256": "f" * 64,
    }


def test_a_class_without_support_has_nulls():
    row = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]])["per_class"][2]
    assert row == {
        "label": 2,
        "name": "c",
        "support": 0,
        "correct": 0,
        "accuracy": None,
        "ci95": None,
        "precision": 0.0,
        "recall": None,
        "f1": None,
        "log_loss": None,
        "calibration_error": None,
    }
    never_predicted = built([[8, 0, 0], [0, 9, 0], [1, 0, 0]])["per_class"][2]
    assert never_predicted["precision"] is None
    assert never_predicted["recall"] == never_predicted["f1"] == 0


def test_nothing_evaluated_gives_nulls():
    content = built(np.zeros((3, 3), np.int64))
    assert content["accuracy"] is content["accuracy_ci95"] is content["log_loss"] is None
    assert content["most_confused"] == []
    assert "all         0" in report.text_table(content)


def test_most_confused_is_ordered_by_count_then_label_then_prediction():
    pairs = built([[9, 1, 3], [3, 9, 0], [1, 4, 9]])["most_confused"]
    assert [(pair["count"], pair["label"], pair["predicted"]) for pair in pairs] == [
        (4, 2, 1),
        (3, 0, 2),
        (3, 1, 0),
        (1, 0, 1),
        (1, 2, 0),
    ]
    many = built(np.ones((5, 5), np.int64), names="abcde")["most_confused"]
    assert len(many) == report.MAX_CONFUSED


# Text


def test_csv_texts():
    content = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]], names=("a", 'b, "b"', "c"))
    low, high = content["per_class"][0]["ci95"]
    lines = report.per_class_csv(content).split("\n")
    assert lines[0] == (
        "label,name,support,correct,accuracy,ci95_low,ci95_high,precision,recall,f1"
        ",log_loss,calibration_error"
    )
    assert lines[1] == f"0,a,10,8,0.8,{low},{high},1.0,0.8,{16 / 18},0.0,"
    assert lines[3:] == ["2,c,0,0,,,,0.0,,,,", ""]
    matrix = report.confusion_matrix_csv(content)
    assert matrix == 'true class,a,"b, ""b""",c\na,8,0,2\n"b, ""b""",0,9,0\nc,0,0,0\n'
    assert next(csv.reader(io.StringIO(matrix)))[2] == 'b, "b"'


def test_text_table():
    content = built([[8, 0, 2], [0, 9, 0], [0, 0, 0]], names=("a", "b" * 40, "c"))
    assert report.text_table(content).splitlines() == [
        "class                           images  correct  accuracy %   95 % interval"
        "  precision  recall      f1",
        "-" * 102,
        "a                                   10        8       80.00   49.02 - 94.33"
        "     1.0000  0.8000  0.8889",
        "bbbbbbbbbbbbbbbbbbbbbbbbbbb...       9        9      100.00  70.09 - 100.00"
        "     1.0000  1.0000  1.0000",
        "c                                    0        0           -               -"
        "     0.0000       -       -",
        "-" * 102,
        "all                                 19       17       89.47   68.61 - 97.06",
    ]


def test_unprintable_class_names_stay_out_of_every_output():
    content = built(CONFUSION, names=("\udc80", "a\nb", "\x1b[31m"))
    assert [row["name"] for row in content["per_class"]] == ["�", "a b", "�[31m"]
    for text in (report.per_class_csv(content), report.text_table(content)):
        text.encode()
