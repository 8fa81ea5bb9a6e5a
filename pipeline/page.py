"""The report page: one file that asks nothing of any network.

Synopsis::

    html = render_html(report, manifest=manifest, model=model, curves=curves, counts=counts)
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import panels, templates
from pipeline.command import InputError
from pipeline.dataset import SPLITS, Manifest
from pipeline.gate import leaked_images
from pipeline.metrics import Counts, ScoredImage
from pipeline.report import title

MAX_SAMPLES = 400  # images on the page, however many classes there are


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
    """Renders the page: one file that asks nothing of any network.

    What a report lacks or has as null is left out of the page.

    Args:
        report: of `build_report`.
        manifest: of the dataset evaluated.
        model: the model's ``model.json``; only ``model_id`` must be there.
        curves: the lines of the trainer's ``metrics.jsonl``, or none.
        counts: what `report` was built of; its images are shown.
    """
    names = [row["name"] for row in report["per_class"]]
    models = panels.models(report)
    slices = panels.slices(report)
    return templates.render(
        "report.html.jinja",
        title=title(manifest),
        report=report,
        names=names,
        leak=panels.leak(leaked_images(manifest), report["split"]),
        reuse=panels.reuse(report.get("challengers_before"), report.get("judged_before")),
        scale=panels.scale(row["ci95"] for row in report["per_class"]),
        detailed=all("log_loss" in row for row in report["per_class"]),
        models=models,
        models_scale=panels.scale(row["ci95"] for row in models),
        slices=slices,
        slices_scale=panels.scale(row["ci95"] for table in slices for row in table["rows"]),
        worst=panels.worst_words(report),
        drift=(report["baseline"] or {}).get("drift"),
        lineage=_lineage(report, manifest, model),
        config=_pairs(model.get("config") or {}),
        **_answer_plots(report, names),
        **_curve_plots(curves),
        **_data_plots(report, manifest, names),
        **_pictures(counts),
    )


def _answer_plots(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What the model answered, and how sure it was."""
    from pipeline import heatmaps, plots

    confusion = np.array(report["confusion_matrix"])
    bins = report.get("reliability")
    return {
        "confusion_svg": heatmaps.confusion_matrix(confusion, names),
        "rates_svg": heatmaps.confusion_rates(confusion, names),
        "reliability": bins
        and {
            "svg": plots.reliability(bins),
            "counts_svg": plots.confidence_counts(bins),
            "words": panels.reliability_words(bins, report["calibration_error"]),
            "most": panels.most_words(bins),
        },
    }


def _curve_plots(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """The training, epoch by epoch; empty where nothing is known of it."""
    from pipeline import plots

    epochs = [int(line.get("epoch", i)) for i, line in enumerate(curves, start=1)]
    loss, val_loss, accuracy, val_accuracy = (
        [line.get(key) for line in curves]
        for key in ("loss", "val_loss", "accuracy", "val_accuracy")
    )
    percents = [[None if v is None else 100 * v for v in s] for s in (accuracy, val_accuracy)]
    return {
        "loss_svg": plots.curves("loss", epochs, (loss, val_loss), 0) if curves else "",
        "accuracy_svg": plots.curves("accuracy", epochs, percents) if curves else "",
        "validated": any(value is not None for value in val_loss),
        "loss_words": _curve_words("Loss", epochs, (loss, val_loss)),
        "accuracy_words": _curve_words("Accuracy in percent", epochs, percents),
    }


def _curve_words(what: str, epochs: Sequence[int], series: Sequence[Sequence[float | None]]) -> str:
    """A plot of curves in a sentence: where each starts, and where it ends."""
    ends = []
    for name, values in zip(("train", "validation"), series, strict=True):
        known = [value for value in values if value is not None]
        if known:
            ends.append(f"{name} from {known[0]:.4g} to {known[-1]:.4g}")
    return f"{what} over {len(epochs)} epochs: {', '.join(ends)}."


def _data_plots(report: dict[str, Any], manifest: Manifest, names: list[str]) -> dict[str, Any]:
    """What the splits hold: classes, ink and stroke width."""
    from pipeline import plots

    filled = {name: manifest.splits[name] for name in SPLITS if manifest.splits[name].num_examples}
    shares = [[100 * n / s.num_examples for n in s.label_counts] for s in filled.values()]
    return {
        "splits": filled,
        "distribution_svg": plots.distribution(shares, names) if filled else "",
        "shares_words": panels.shares_words(filled, names),
        "histograms": [
            row | {"svg": plots.histogram(row["kind"], row["shares"], row["width"], row["unit"])}
            for row in panels.histograms(report, list(filled))
        ],
    }


def _pictures(counts: Counts) -> dict[str, Any]:
    """The template's images: a strip of samples for each class, and single answers."""
    from pipeline import pictures

    shown = (*counts.samples, *counts.mistakes, *counts.uncertain)
    invert = pictures.ink_is_bright([image.pixels for image in shown])
    most = max(1, MAX_SAMPLES // counts.num_classes)
    by_class: dict[int, list[bytes]] = {}
    for image in counts.samples:
        by_class.setdefault(image.label, []).append(image.pixels)
    samples = [
        {
            "label": label,
            "count": len(pixels[:most]),
            "uri": pictures.strip(pixels[:most], invert=invert),
        }
        for label, pixels in sorted(by_class.items())
    ]
    mistakes, uncertain = (
        [
            _answer(image) | {"uri": pictures.strip([image.pixels], invert=invert)}
            for image in images
        ]
        for images in (counts.mistakes, counts.uncertain)
    )
    return {"samples": samples, "mistakes": mistakes, "uncertain": uncertain}


def _answer(image: ScoredImage) -> dict[str, Any]:
    """An image's true class, and the one it was taken for; of a hit, the one that came second."""
    probabilities = np.frombuffer(image.probabilities, np.float32)
    hit = image.predicted == image.label
    order = np.argsort(-probabilities, kind="stable")
    other = int(order[1 % len(order)]) if hit else image.predicted
    return {
        "label": image.label,
        "p_label": float(probabilities[image.label]),
        "other": other,
        "other_term": "second" if hit else "predicted",
        "p_other": float(probabilities[other]),
    }


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
        ("duplicates", {key: n for key, n in manifest.duplicates.items() if isinstance(n, int)}),
        ("test set", report.get("test_id")),
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
