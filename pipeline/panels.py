"""What the sections of the report page show: report.json in the order and the words of the page.

Everything here is plain data for the template, computed from ``report.json`` alone. A part that
the report lacks or has as null gives something empty, and the page leaves its section out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.metrics import PAIRED
from pipeline.templates import percent, thousands

HISTOGRAMS = {
    # Title, unit, width of a bin (four of 256 levels, one of which is 1/16 pixel), decimal places.
    "ink": ("Ink", "mean intensity, 0 to 255", 4.0, 1),
    "stroke_width": ("Stroke width", "pixels", 0.25, 2),
}
_STARTS = (0.98, 0.95, 0.9, 0.8, 0.5)


def scale(intervals: Iterable[Sequence[float] | None]) -> float:
    """Where bars of accuracy start: a round number below every interval."""
    lows = [interval[0] for interval in intervals if interval]
    return next((start for start in _STARTS if lows and start <= min(lows)), 0.0)


def reuse(challengers_before: int | None, judged_before: int | None = None) -> str:
    """Says how far to trust figures from a test set that has been asked before.

    Args:
        challengers_before: how many models were judged on the very same set; None: not recorded.
        judged_before: how many the root has judged in all, on sets that may differ by one image.
    """
    told = _exactly(challengers_before)
    if judged_before:
        told += f" This root has judged {_models(judged_before)} before it in all"
        others = judged_before > (challengers_before or 0)
        told += ", also on sets that may share most of these images." if others else "."
    if challengers_before == 0 and not judged_before:
        return (
            f"{told} Choosing over and over on one test set flatters what is chosen: the count"
            " starts here."
        )
    return (
        f"{told} Choosing over and over on one test set flatters what is chosen: part of its lead "
        "is luck with these very images, a larger part the more were tried. Only images that no "
        "choice ever saw tell what it is worth."
    )


def _exactly(models: int | None) -> str:
    if models is None:
        return (
            "How many models were judged on exactly this set of images before this one is not "
            "recorded."
        )
    if models == 0:
        return (
            "No model was judged on exactly this set of images before this one, as far as is "
            "recorded."
        )
    return f"Before this one, exactly this set of images has judged {_models(models)}."


def _models(number: int) -> str:
    return "one model" if number == 1 else f"{thousands(number)} models"


def leak(images: int, split: str) -> str:
    """Warns of test images that the model was trained on or chosen by; empty where there are none.

    Args:
        images: of test that stand in train or validation as well.
        split: what the report is about.
    """
    if not images or split != "test":
        return ""
    stand = "1 image of test stands" if images == 1 else f"{thousands(images)} images of test stand"
    return (
        f"{stand} in train or validation as well. The model may know their labels by heart, so "
        "these figures flatter it, and the gate does not promote it. --drop_leaks leaves such "
        "images out of both."
    )


# Side by side


def models(report: dict[str, Any]) -> list[dict[str, Any]]:
    """This model and those it is compared with, the most correct first; empty where it is alone."""
    if not others(report):
        return []
    own = report | {"role": "this model", "whole": None, "pairs": []}
    compared = [
        other
        | {
            "role": "baseline" if other is report["baseline"] else "",
            "pairs": duels(report, other),
            "whole": _whole(other["paired"]),
        }
        for other in others(report)
    ]
    rows = [row | {"ci95": row["accuracy_ci95"]} for row in (own, *compared)]
    return sorted(rows, key=lambda row: -row["correct"])


def others(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that are compared with the report's own; those with paired counts."""
    found = [report["baseline"], *(report.get("others") or [])]
    return [other for other in found if other is not None and other.get("paired")]


def duels(report: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """For each class who alone is right; the classes that this model loses most come first."""
    widest = max(max(row["only_model"], row["only_baseline"]) for row in other["paired"]) or 1
    rows = [
        row
        | _sums(row)
        | {
            "name": report["per_class"][row["label"]]["name"],
            "won": 50 * row["only_model"] / widest,
            "lost": 50 * row["only_baseline"] / widest,
        }
        for row in other["paired"]
    ]
    return sorted(rows, key=lambda row: (row["difference"], row["label"]))


def _whole(paired: list[dict[str, int]]) -> dict[str, int]:
    """The paired counts of all classes together."""
    total = {key: sum(row[key] for row in paired) for key in PAIRED}
    return total | _sums(total)


def _sums(row: dict[str, int]) -> dict[str, int]:
    return {
        "difference": row["only_model"] - row["only_baseline"],
        "support": sum(row[key] for key in PAIRED),
    }


# Slices, confidence, data


def slices(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of the slices, each beside the baseline's where it has the same."""
    baseline = (report["baseline"] or {}).get("slices") or {}
    tables = []
    for kind, (title, unit, _, places) in HISTOGRAMS.items():
        rows = (report.get("slices") or {}).get(kind) or []
        other = baseline.get(kind) or []
        compared = len(other) == len(rows)
        tables.append(
            {
                "title": title,
                "unit": unit,
                "compared": compared,
                "rows": [
                    row
                    | {
                        "range": f"{row['low']:.{places}f} to {row['high']:.{places}f}",
                        "difference": row["correct"] - other[i]["correct"] if compared else None,
                    }
                    for i, row in enumerate(rows)
                ],
            }
        )
    return [table for table in tables if table["rows"]]


def reliability_words(bins: Sequence[dict[str, Any]], error: float | None) -> str:
    """The reliability curve in a sentence."""
    filled = [row for row in bins if row["count"]]
    if not filled:
        return "no images"
    widest = max(filled, key=lambda row: abs(row["accuracy"] - row["confidence"]))
    return (
        f"Accuracy over confidence in {len(filled)} bins; calibration error {percent(error)}. "
        f"The widest gap: {thousands(widest['count'])} images of mean confidence "
        f"{percent(widest['confidence'])} of which {percent(widest['accuracy'])} are right."
    )


def most_words(bins: Sequence[dict[str, Any]]) -> str:
    """Where most confidences lie, in a few words."""
    most = max(bins, key=lambda row: row["count"])
    return (
        f"{thousands(most['count'])} of {thousands(sum(row['count'] for row in bins))} between "
        f"{percent(most['low'])} and {percent(most['high'])}."
    )


def worst_words(report: dict[str, Any]) -> str:
    """The class with the lowest accuracy, in a few words."""
    known = [row for row in report["per_class"] if row["accuracy"] is not None]
    if not known:
        return "no images"
    worst = min(known, key=lambda row: row["accuracy"])
    return f"the least accurate class is {worst['name']}, {percent(worst['accuracy'])} right."


def histograms(report: dict[str, Any], splits: Sequence[str]) -> list[dict[str, Any]]:
    """The distributions of ink and stroke width in the splits that have them, in percent."""
    known = (report.get("data") or {}).get("splits") or {}
    found = []
    for kind, (title, unit, width, _) in HISTOGRAMS.items():
        counts = {name: known.get(name, {}).get(kind) for name in splits}
        if not counts or not all(values and sum(values) for values in counts.values()):
            continue
        means = ", ".join(f"{name} {_mean(values, width):.3g}" for name, values in counts.items())
        found.append(
            {
                "kind": kind,
                "title": f"{title}: {unit}, in percent of the split",
                "width": width,
                "unit": unit,
                "shares": [[100 * n / sum(values) for n in values] for values in counts.values()],
                "words": f"{title} of the images, mean about: {means}.",
            }
        )
    return found


def _mean(counts: Sequence[int], width: float) -> float:
    return sum((i + 0.5) * width * n for i, n in enumerate(counts)) / sum(counts)


def shares_words(splits: dict[str, Any], names: Sequence[str]) -> str:
    """The smallest and the largest class of each split."""
    parts = []
    for name, split in splits.items():
        order = sorted(range(len(names)), key=lambda i: split.label_counts[i])
        ends = [f"{names[i]} {percent(split.label_counts[i] / split.num_examples)}" for i in order]
        parts.append(f"{name} from {ends[0]} to {ends[-1]}")
    return "; ".join(parts)
