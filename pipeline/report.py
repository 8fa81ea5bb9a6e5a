"""From counts to what people read: report.json, CSV tables, a table of text, and the page.

`build_report` computes every number once; the other functions only lay them out.

Synopsis::

    report = build_report(counts, manifest=manifest, model=model, split="test", baseline=None)
    print(text_table(report))
    page = render_html(report, manifest=manifest, model=model, curves=curves, counts=counts)
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from pipeline.command import InputError
from pipeline.dataset import SPLITS, Manifest
from pipeline.metrics import Counts, ScoredImage, ratio, wilson_interval

MAX_CONFUSED = 10
MAX_NAME = 30  # characters of a class name in the table for the terminal
MAX_SAMPLES = 400  # images on the page, however many classes there are

_CLASS_COLUMNS = ("label", "name", "support", "correct", "accuracy")
_RATE_COLUMNS = ("precision", "recall", "f1")


# The numbers


def build_report(
    counts: Counts,
    *,
    manifest: Manifest,
    model: dict[str, Any],
    split: str,
    baseline: tuple[dict[str, Any], Counts] | None,
) -> dict[str, Any]:
    """Computes the content of ``report.json``.

    Args:
        counts: the model's counts on all rows of the split.
        manifest: of the dataset evaluated.
        model: the model's ``model.json``.
        split: what was evaluated.
        baseline: ``model.json`` and counts of another model on the same rows.
    """
    names = [_printable(name) for name in manifest.class_names]
    return {
        "dataset_id": manifest.dataset_id,
        "model_id": model["model_id"],
        "split": split,
        "num_examples": counts.num_examples,
        "correct": counts.correct,
        "accuracy": counts.accuracy,
        "accuracy_ci95": _interval(counts.correct, counts.num_examples),
        "log_loss": counts.log_loss,
        "per_class": [_class_row(counts.confusion, i, name) for i, name in enumerate(names)],
        "confusion_matrix": counts.confusion.tolist(),
        "most_confused": _most_confused(counts.confusion),
        "calibration_error": counts.calibration_error,
        "baseline": _baseline(*baseline) if baseline else None,
    }


def _printable(name: str) -> str:
    """A class name that any terminal, CSV reader and XML parser takes."""
    spaced = " ".join(name.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def _interval(correct: int, total: int) -> list[float] | None:
    interval = wilson_interval(correct, total)
    return list(interval) if interval else None


def _class_row(confusion: np.ndarray, label: int, name: str) -> dict[str, Any]:
    """One entry of ``per_class``; what has no denominator is None."""
    correct = int(confusion[label, label])
    support = int(confusion[label].sum())
    predicted = int(confusion[:, label].sum())
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
    }


def _most_confused(confusion: np.ndarray) -> list[dict[str, int]]:
    """The commonest mistakes, at most `MAX_CONFUSED`, by count, then label, then prediction."""
    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(confusion), strict=True) if i != j]
    pairs.sort(key=lambda pair: (-confusion[pair], pair))
    return [
        {"label": i, "predicted": j, "count": int(confusion[i, j])} for i, j in pairs[:MAX_CONFUSED]
    ]


def _baseline(model: dict[str, Any], counts: Counts) -> dict[str, Any]:
    return {
        "model_id": model["model_id"],
        "correct": counts.correct,
        "accuracy": counts.accuracy,
        "log_loss": counts.log_loss,
        "per_class_correct": counts.confusion.diagonal().tolist(),
    }


# Files for machines


def report_json(report: dict[str, Any]) -> str:
    """The text of ``report.json``."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def per_class_csv(report: dict[str, Any]) -> str:
    """The per-class numbers as CSV, in full precision; what is unknown is an empty cell."""
    header = [*_CLASS_COLUMNS, "ci95_low", "ci95_high", *_RATE_COLUMNS]
    rows = [
        [
            *(row[column] for column in _CLASS_COLUMNS),
            *(row["ci95"] or (None, None)),
            *(row[column] for column in _RATE_COLUMNS),
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
    widths = [max(map(len, column)) for column in zip(header, *rows, overall, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        numbers = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([line(header), rule, *map(line, rows), rule, line(overall)]) + "\n"


def _text_cells(
    name: str, images: int, correct: int, interval: list[float] | None
) -> tuple[str, str, str, str, str]:
    """The cells that a class and the whole have alike."""
    short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."
    if interval is None:
        return short, str(images), str(correct), "-", "-"
    low, high = (f"{100 * bound:.2f}" for bound in interval)
    return short, str(images), str(correct), f"{100 * correct / images:.2f}", f"{low} - {high}"


# The page


def title(manifest: Manifest) -> str:
    """Says in words what the images are."""
    return str(manifest.source.get("title") or manifest.source.get("kind") or "images")


def require_page_libraries() -> None:
    """Raises InputError where the libraries that `render_html` needs are not installed."""
    missing = [name for name in ("matplotlib", "jinja2") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"report.html needs {' and '.join(missing)}: pip install '.[report]'")


def render_html(
    report: dict[str, Any],
    *,
    manifest: Manifest,
    model: dict[str, Any],
    curves: list[dict[str, Any]],
    counts: Counts,
) -> str:
    """Renders the page: one file without scripts that asks nothing of any network.

    Args:
        report: of `build_report`.
        manifest: of the dataset evaluated.
        model: the model's ``model.json``; only ``model_id`` must be there.
        curves: the lines of the trainer's ``metrics.jsonl``, or none.
        counts: what `report` was built of; its images are shown.
    """
    import jinja2

    names = [row["name"] for row in report["per_class"]]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "rate": _rate, "probability": _probability}
    template = resources.files("pipeline").joinpath("report.html.jinja").read_text("utf-8")
    page = environment.from_string(template).render(
        title=title(manifest),
        report=report,
        names=names,
        scale=_scale(report),
        lineage=_lineage(report, manifest, model),
        config=_pairs(model.get("config") or {}),
        **_plots(report, manifest, curves, names),
        **_pictures(counts),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is in no alphabet


def _plots(
    report: dict[str, Any], manifest: Manifest, curves: list[dict[str, Any]], names: list[str]
) -> dict[str, Any]:
    """The template's plots, each an ``<svg>`` element or empty."""
    from pipeline import plots

    epochs = [int(line.get("epoch", i)) for i, line in enumerate(curves, start=1)]
    loss, val_loss, accuracy, val_accuracy = (
        [line.get(key) for line in curves]
        for key in ("loss", "val_loss", "accuracy", "val_accuracy")
    )
    percents = [[None if v is None else 100 * v for v in s] for s in (accuracy, val_accuracy)]
    filled = {name: manifest.splits[name] for name in SPLITS if manifest.splits[name].num_examples}
    shares = [[100 * n / s.num_examples for n in s.label_counts] for s in filled.values()]
    return {
        "confusion_svg": plots.confusion_matrix(np.array(report["confusion_matrix"]), names),
        "loss_svg": plots.curves("loss", epochs, (loss, val_loss), 0) if curves else "",
        "accuracy_svg": plots.curves("accuracy", epochs, percents) if curves else "",
        "distribution_svg": plots.distribution(shares, names) if filled else "",
        "validated": any(value is not None for value in val_loss),
        "splits": filled,
    }


def _pictures(counts: Counts) -> dict[str, Any]:
    """The template's images: one strip of samples for each class, and each mistake by itself."""
    from pipeline import plots

    invert = plots.ink_is_bright([image.pixels for image in counts.samples + counts.mistakes])
    most = max(1, MAX_SAMPLES // counts.num_classes)
    by_class: dict[int, list[bytes]] = {}
    for image in counts.samples:
        by_class.setdefault(image.label, []).append(image.pixels)
    return {
        "samples": [
            {
                "label": label,
                "count": len(pixels[:most]),
                "uri": plots.strip(pixels[:most], invert=invert),
            }
            for label, pixels in sorted(by_class.items())
        ],
        "mistakes": [
            _mistake(image, plots.strip([image.pixels], invert=invert)) for image in counts.mistakes
        ],
    }


def _mistake(image: ScoredImage, uri: str) -> dict[str, Any]:
    probabilities = np.frombuffer(image.probabilities, np.float32)
    return {
        "label": image.label,
        "predicted": image.predicted,
        "p_label": float(probabilities[image.label]),
        "p_predicted": image.confidence,
        "uri": uri,
    }


def _scale(report: dict[str, Any]) -> float:
    """Where the accuracy bars start: a round number below every interval."""
    lows = [row["ci95"][0] for row in report["per_class"] if row["ci95"]]
    starts = (0.98, 0.95, 0.9, 0.8, 0.5)
    return next((start for start in starts if lows and start <= min(lows)), 0.0)


def _lineage(
    report: dict[str, Any], manifest: Manifest, model: dict[str, Any]
) -> list[tuple[str, str]]:
    """Where the model and the data come from, as pairs of term and value."""
    trained_on = model.get("dataset_id")
    rows = [
        ("dataset", manifest.dataset_id),
        ("trained on", None if trained_on == manifest.dataset_id else trained_on),
        ("split by", manifest.split_by),
        ("quarantined", f"{manifest.quarantined.get('count', 0)}, dropped {manifest.dropped}"),
        *((f"source {key}", value) for key, value in manifest.source.items()),
        ("model", report["model_id"]),
        ("weights sha256", model.get("weights_sha256")),
        ("preset", model.get("preset")),
        ("seed", model.get("seed")),
        ("versions", model.get("versions")),
        ("compared with", report["baseline"] and report["baseline"]["model_id"]),
    ]
    return _pairs({term: value for term, value in rows if value is not None})


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Terms and values as text; a nested dict becomes one line of its own items."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items())
        return value if isinstance(value, str) else json.dumps(value, default=str)

    return [(term.replace("_", " "), text(value)) for term, value in values.items()]


# Numbers as the page shows them

_UNKNOWN = "\N{EN DASH}"
_PERCENT = "\N{NARROW NO-BREAK SPACE}%"


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.2f}{_PERCENT}"


def _rate(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _probability(value: float) -> str:
    """A probability in percent that is never rounded to 0 or to 100."""
    if 0 < value < 0.0001:
        return f"< 0.01{_PERCENT}"
    if 0.9999 < value < 1:
        return f"> 99.99{_PERCENT}"
    return _percent(value)
