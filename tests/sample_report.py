"""A report with everything in it, computed by NumPy from labels and probabilities."""

import dataclasses

import numpy as np

from pipeline import metrics
from pipeline.dataset import DUPLICATES, Manifest, Split
from pipeline.records import image_ids

SPLITS = ("train", "validation", "test")
MODEL = {
    "model_id": "0123456789abcdef",
    "weights_sha256": "f" * 64,
    "preset": "core",
    "seed": 22,
    "versions": {"python": "3.11"},
    "config": {"batch_size": 128, "optimizer": "adam"},
}
CURVES = [
    {"epoch": e, "loss": 1 / e, "accuracy": 1 - 0.1 / e, "val_loss": 1.1 / e, "val_accuracy": 0.9}
    for e in (1, 2, 3)
]


def manifest(names=("a", "b", "c"), *, title="three kinds of things", label_counts=None):
    counts = tuple(label_counts or (2,) * len(names))
    split = Split(num_examples=sum(counts), label_counts=counts, shards=())
    return Manifest(
        format_version=1,
        dataset_id="d" * 32,
        source={"kind": "idx", "title": title},
        split_by="positional",
        num_classes=len(names),
        class_names=tuple(names),
        image_shape=(28, 28, 1),
        splits=dict.fromkeys(SPLITS, split),
        quarantined={"count": 0, "by_reason": {}},
        dropped=0,
        flagged={},
        duplicates={
            **dict.fromkeys(DUPLICATES, 0),
            "images": 3,
            "copies": 4,
            "examples": {"images": []},
        },
    )


def counts_of(labels, probabilities, pixels):
    """`metrics.count`, with the least confident hits."""
    ids = image_ids(pixels)
    total = metrics.count(labels, probabilities, ids, pixels)
    hits = np.flatnonzero(probabilities.argmax(axis=1) == labels)
    hits = sorted(hits.tolist(), key=lambda i: (probabilities[i].max(), ids[i]))[:24]
    images = [
        metrics.ScoredImage(
            ids[i], int(labels[i]), int(labels[i]), probabilities[i].tobytes(), pixels[i].tobytes()
        )
        for i in hits
    ]
    return dataclasses.replace(total, uncertain=tuple(images))


def full_report(labels, probabilities, pixels, names, *, compared=(), drift=None, before=4):
    """report.json with every key; `compared` are probabilities of the baseline and of others."""
    own = _answers(labels, probabilities, pixels, names)
    rest = [
        _answers(labels, other, pixels, names)
        | {
            "model_id": f"{i}" * 16,
            "weights_sha256": f"{i}" * 64,
            "per_class_correct": [
                int(((other.argmax(1) == labels) & (labels == c)).sum()) for c in range(len(names))
            ],
            "paired": _paired(labels, probabilities, other, len(names)),
        }
        for i, other in enumerate(compared, start=1)
    ]
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    support = confusion.sum(axis=1)
    pairs = [(int(-confusion[i, j]), i, j) for i, j in np.argwhere(confusion).tolist() if i != j]
    return own | {
        "dataset_id": "d" * 32,
        "model_id": MODEL["model_id"],
        "split": "test",
        "num_examples": len(labels),
        "test_id": "e" * 32,
        "challengers_before": before,
        "confusion_matrix": confusion.tolist(),
        "confusion_rates": [
            (row / n).tolist() if n else [None] * len(names)
            for row, n in zip(confusion, support, strict=True)
        ],
        "most_confused": [
            {"label": i, "predicted": j, "count": -n, "rate": -n / int(support[i])}
            for n, i, j in sorted(pairs)[:10]
        ],
        "reliability": _reliability(labels, probabilities),
        "data": {"splits": dict.fromkeys(SPLITS, _statistics(labels, pixels, len(names)))},
        "lineage": {},
        "baseline": rest[0] | {"drift": drift} if rest else None,
        "others": rest[1:],
    }


def _answers(labels, probabilities, pixels, names):
    """What a model and each that it is compared with have alike."""
    right = probabilities.argmax(axis=1) == labels
    rows = []
    for label, name in enumerate(names):
        mask = labels == label
        answered = probabilities.argmax(axis=1) == label
        predicted = int(answered.sum())
        support, correct = int(mask.sum()), int(right[mask].sum())
        rows.append(
            {
                "label": label,
                "name": name,
                "support": support,
                "correct": correct,
                "accuracy": metrics.ratio(correct, support),
                "ci95": _interval(correct, support),
                "precision": metrics.ratio(correct, predicted),
                "recall": metrics.ratio(correct, support),
                "f1": metrics.ratio(2 * correct, support + predicted) if support else None,
                "log_loss": _log_loss(labels[mask], probabilities[mask]),
                "calibration_error": _error(
                    _reliability(labels[answered], probabilities[answered])
                ),
            }
        )
    return {
        "correct": int(right.sum()),
        "accuracy": metrics.ratio(int(right.sum()), len(labels)),
        "accuracy_ci95": _interval(int(right.sum()), len(labels)),
        "log_loss": _log_loss(labels, probabilities),
        "calibration_error": _error(_reliability(labels, probabilities)),
        "per_class": rows,
        "slices": {
            "ink": _quarters(ink(pixels), right),
            "stroke_width": _quarters(stroke_width(pixels), right),
        },
    }


def ink(pixels):
    return pixels.mean(axis=1)


def stroke_width(pixels):
    """2 A / P of each image, in sixteenths of a pixel."""
    dark = np.pad(pixels.reshape(-1, 28, 28) >= 128, ((0, 0), (1, 1), (1, 1)))
    edges = sum((np.diff(dark, axis=axis) != 0).sum(axis=(1, 2)) for axis in (1, 2))
    area = dark.sum(axis=(1, 2))
    return np.minimum(np.round(32 * area / np.maximum(edges, 1)), 255) / 16


def _interval(correct, total):
    found = metrics.wilson_interval(correct, total)
    return list(found) if found else None


def _log_loss(labels, probabilities):
    if not len(labels):
        return None
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-38)).mean())


def _reliability(labels, probabilities):
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    rows = []
    for i in range(15):
        mask = bins == i
        rows.append(
            {
                "low": i / 15,
                "high": (i + 1) / 15,
                "count": int(mask.sum()),
                "accuracy": float(right[mask].mean()) if mask.any() else None,
                "confidence": float(confidence[mask].mean()) if mask.any() else None,
            }
        )
    return rows


def _error(rows):
    total = sum(row["count"] for row in rows)
    gaps = (row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"])
    return sum(gaps) / total if total else None


def _quarters(values, right):
    if not len(values):
        return []
    rows = []
    for part in np.array_split(np.argsort(values, kind="stable"), 4):
        if len(part):
            correct = int(right[part].sum())
            rows.append(
                {
                    "low": float(values[part].min()),
                    "high": float(values[part].max()),
                    "support": len(part),
                    "correct": correct,
                    "accuracy": correct / len(part),
                    "ci95": _interval(correct, len(part)),
                }
            )
    return rows


def _paired(labels, one, other, num_classes):
    a, b = one.argmax(axis=1) == labels, other.argmax(axis=1) == labels
    return [
        {
            "label": label,
            "both": int((a & b & mask).sum()),
            "only_model": int((a & ~b & mask).sum()),
            "only_baseline": int((~a & b & mask).sum()),
            "neither": int((~a & ~b & mask).sum()),
        }
        for label, mask in ((c, labels == c) for c in range(num_classes))
    ]


def _statistics(labels, pixels, num_classes):
    return {
        "num_examples": len(labels),
        "label_counts": np.bincount(labels, minlength=num_classes).tolist(),
        "ink": np.bincount((ink(pixels) // 4).astype(int), minlength=64).tolist(),
        "stroke_width": np.bincount((stroke_width(pixels) * 4).astype(int), minlength=64).tolist(),
    }
