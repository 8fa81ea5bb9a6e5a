"""From counts to what people read: report.json, CSV tables, and a table of text.

`build_report` computes every number once; the other functions only lay them out.

Synopsis::

    report = build_report(counts, manifest=manifest, model=model, split="test", baseline=None)
    print(text_table(report))
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline import command, drift, slices
from pipeline.dataset import Manifest
from pipeline.metrics import (
    PAIRED,
    Counts,
    calibration_error,
    mean,
    ratio,
    wilson_interval,
)

MAX_CONFUSED = 10
MAX_NAME = 30  # characters of a class name in the table for the terminal

_CLASS_COLUMNS = ("label", "name", "support", "correct", "accuracy")
_RATE_COLUMNS = ("precision", "recall", "f1")
_LOSS_COLUMNS = ("log_loss", "calibration_error")


# The numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Another model on the same rows.

    Attributes:
        model: its ``model.json``.
        counts: its own.
        paired: int64 [C, 4], `metrics.pair` of the model that the report is about with it.
        data: `drift.data_of` the dataset that it was judged on, where that is known.
    """

    model: dict[str, Any]
    counts: Counts
    paired: np.ndarray
    data: dict[str, Any] | None = None


def build_report(
    counts: Counts,
    *,
    manifest: Manifest,
    model: dict[str, Any],
    split: str,
    baseline: Compared | None,
    others: Sequence[Compared] = (),
    histograms: dict[str, Any] | None = None,
    test_id: str | None = None,
    challengers_before: int | None = None,
    judged_before: int | None = None,
) -> dict[str, Any]:
    """Computes the content of ``report.json``.

    Args:
        counts: the model's counts on all rows of the split.
        manifest: of the dataset evaluated.
        model: the model's ``model.json``.
        split: what was evaluated.
        baseline: the model that this one is to be no worse than.
        others: more models, to compare.
        histograms: of each split, as `drift.load_histograms` reads them.
        test_id: `tally.make_test_id` of the rows.
        challengers_before: how many models the same rows have judged before, if that is known.
        judged_before: how many models any rows have judged, in the same root.
    """
    names = [_printable(name) for name in manifest.class_names]
    data = drift.data_of(manifest, histograms or {})
    return {
        "dataset_id": manifest.dataset_id,
        "model_id": model["model_id"],
        "split": split,
        "test_id": test_id,
        "challengers_before": challengers_before,
        "judged_before": judged_before,
        "num_examples": counts.num_examples,
        **_overall(counts),
        "per_class": _per_class(counts, names),
        "confusion_matrix": counts.confusion.tolist(),
        "confusion_rates": _rates(counts.confusion),
        "most_confused": _most_confused(counts.confusion),
        "reliability": _reliability(counts.bins.sum(axis=0)),
        "slices": _slices(counts.levels),
        "data": data,
        "lineage": _lineage_of(manifest, model),
        "baseline": baseline
        and _compared(baseline, names)
        | {"drift": baseline.data and drift.drift(data, baseline.data)},
        "others": [_compared(other, names) for other in others],
    }


def _printable(name: str) -> str:
    """A class name that any terminal, CSV reader and XML parser takes."""
    spaced = " ".join(name.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def _interval(correct: int, total: int) -> list[float] | None:
    interval = wilson_interval(correct, total)
    return list(interval) if interval else None


def _overall(counts: Counts) -> dict[str, Any]:
    """What is said of a model as a whole."""
    return {
        "correct": counts.correct,
        "accuracy": counts.accuracy,
        "accuracy_ci95": _interval(counts.correct, counts.num_examples),
        "log_loss": counts.log_loss,
        "calibration_error": counts.calibration_error,
    }


def _per_class(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    return [_class_row(counts, label, name) for label, name in enumerate(names)]


def _class_row(counts: Counts, label: int, name: str) -> dict[str, Any]:
    """One entry of ``per_class``; what has no denominator is None.

    Log loss is of the rows of the class, the calibration error of those predicted as it.
    """
    correct = int(counts.confusion[label, label])
    support = int(counts.confusion[label].sum())
    predicted = int(counts.confusion[:, label].sum())
    return {
        "label": label,
        "name": name,
        "support": support,
        "correct": correct,
        "accuracy": ratio(correct, support),
        "ci95": _interval(correct, support),
        "precision": ratio(correct, predicted),
        "recall": ratio(correct, support),
        "f1": ratio(2 * correct, support + predicted) if support else None,
        "log_loss": mean(counts.log_loss_sums[label], support),
        "calibration_error": calibration_error(counts.bins[label]),
    }


def _rates(confusion: np.ndarray) -> list[list[float | None]]:
    """Each row of a confusion matrix as shares of its rows."""
    return [[ratio(cell, sum(row)) for cell in row] for row in confusion.tolist()]


def _most_confused(confusion: np.ndarray) -> list[dict[str, Any]]:
    """The commonest mistakes, at most `MAX_CONFUSED`, by count, then label, then prediction."""
    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(confusion), strict=True) if i != j]
    pairs.sort(key=lambda pair: (-confusion[pair], pair))
    return [
        {
            "label": i,
            "predicted": j,
            "count": int(confusion[i, j]),
            "rate": ratio(int(confusion[i, j]), int(confusion[i].sum())),
        }
        for i, j in pairs[:MAX_CONFUSED]
    ]


def _reliability(bins: np.ndarray) -> list[dict[str, Any]]:
    """How often answers of about one confidence are right: of each bin, from low to high."""
    return [
        {
            "low": number / len(bins),
            "high": (number + 1) / len(bins),
            "count": rows,
            "accuracy": ratio(right, rows),
            "confidence": mean(confidence, rows),
        }
        for number, (rows, right, confidence) in enumerate(bins.tolist())
    ]


def _slices(levels: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """The rows by quartiles of each measure: values from `low` on and below `high`."""
    return {
        name: [
            _slice(table[first : last + 1], first * step, (last + 1) * step)
            for first, last in slices.quartiles(table[:, 0])
        ]
        for name, table in zip(slices.MEASURES, levels, strict=True)
        for step in [slices.STEPS[name]]
    }


def _slice(table: np.ndarray, low: float, high: float) -> dict[str, Any]:
    support, correct = table.sum(axis=0).tolist()
    return {
        "low": low,
        "high": high,
        "support": support,
        "correct": correct,
        "accuracy": ratio(correct, support),
        "ci95": _interval(correct, support),
    }


def _lineage_of(manifest: Manifest, model: dict[str, Any]) -> dict[str, Any]:
    """Where the data and the model come from; a model from elsewhere may not say."""
    return {
        "source": manifest.source,
        "split_by": manifest.split_by,
        "quarantined": manifest.quarantined,
        "dropped": manifest.dropped,
        "duplicates": {
            kind: number for kind, number in manifest.duplicates.items() if kind != "examples"
        },
        "trained_on": model.get("dataset_id"),
        **{key: model.get(key) for key in ("preset", "seed", "config", "versions")},
        "weights_sha256": model.get("weights_sha256"),
    }


def _compared(other: Compared, names: Sequence[str]) -> dict[str, Any]:
    """One entry of ``others``, and, but for the drift, ``baseline``."""
    counts = other.counts
    return {
        "model_id": other.model["model_id"],
        "weights_sha256": other.model.get("weights_sha256"),
        **_overall(counts),
        "per_class_correct": counts.confusion.diagonal().tolist(),
        "per_class": _per_class(counts, names),
        "slices": _slices(counts.levels),
        "paired": [
            {"label": label, **dict(zip(PAIRED, row, strict=True))}
            for label, row in enumerate(other.paired.tolist())
        ],
    }


# Files for machines


def report_json(report: dict[str, Any]) -> str:
    """The text of ``report.json``."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def per_class_csv(report: dict[str, Any]) -> str:
    """The per-class numbers as CSV, in full precision; what is unknown is an empty cell."""
    header = [*_CLASS_COLUMNS, "ci95_low", "ci95_high", *_RATE_COLUMNS, *_LOSS_COLUMNS]
    rows = [
        [
            *(row[column] for column in _CLASS_COLUMNS),
            *(row["ci95"] or (None, None)),
            *(row[column] for column in (*_RATE_COLUMNS, *_LOSS_COLUMNS)),
        ]
        for row in report["per_class"]
    ]
    return _csv([header, *rows])


def confusion_matrix_csv(report: dict[str, Any]) -> str:
    """The confusion matrix as CSV: a line for each true class, a column for each predicted one."""
    names = [row["name"] for row in report["per_class"]]
    rows = [[name, *row] for name, row in zip(names, report["confusion_matrix"], strict=True)]
    return _csv([["true class", *names], *rows])


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


# The table for the terminal


def text_table(report: dict[str, Any]) -> str:
    """The per-class numbers as aligned plain text, with a row for all classes at the end."""
    header = ("class", "images", "correct", "accuracy %", "95 % interval", *_RATE_COLUMNS)
    rows = [
        (
            *_text_cells(row["name"], row["support"], row["correct"], row["ci95"]),
            *("-" if row[rate] is None else f"{row[rate]:.4f}" for rate in _RATE_COLUMNS),
        )
        for row in report["per_class"]
    ]
    total = (report["num_examples"], report["correct"], report["accuracy_ci95"])
    overall = (*_text_cells("all", *total), "", "", "")
    heading, *lines, last = command.aligned([header, *rows, overall])
    rule = "-" * len(heading)
    compared = [_side_by_side(report["baseline"], "the baseline")] if report["baseline"] else []
    compared += [_side_by_side(other, "model") for other in report["others"]]
    return "\n".join([heading, rule, *lines, rule, last, *compared]) + "\n"


def _side_by_side(other: dict[str, Any], what: str) -> str:
    """A line on another model of the same images."""
    ours, theirs = (
        sum(row[key] for row in other["paired"]) for key in ("only_model", "only_baseline")
    )
    return (
        f"{what} {other['model_id'][:8]}: {other['correct']} correct;"
        f" {ours} images right here alone, {theirs} there alone"
    )


def _text_cells(
    name: str, images: int, correct: int, interval: list[float] | None
) -> tuple[str, str, str, str, str]:
    """The cells that a class and the whole have alike."""
    short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."
    if interval is None:
        return short, str(images), str(correct), "-", "-"
    low, high = (f"{100 * bound:.2f}" for bound in interval)
    return short, str(images), str(correct), f"{100 * correct / images:.2f}", f"{low} - {high}"


# In words


def title(manifest: Manifest) -> str:
    """Says in words what the images are."""
    return str(manifest.source.get("title") or manifest.source.get("kind") or "images")
