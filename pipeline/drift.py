"""What a dataset's images look like as numbers, and how far two datasets are apart in them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from pipeline import slices
from pipeline.dataset import METRICS_NAME, SPLITS, Manifest
from pipeline.storage import Place

REPORT_FILE = "report.json"
STATISTICS = "statistics"


def load_histograms(directory: Place) -> dict[str, Any]:
    """Reads what preprocess counted of each split's images by ink and stroke width.

    It is no part of a dataset's identity, and older ones lack it: then there is nothing.
    """
    try:
        found = json.loads((directory / METRICS_NAME).read_text())[STATISTICS]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def load_data(model_dir: Place) -> dict[str, Any] | None:
    """Reads `data_of` the dataset that a promoted model was judged on, from its report.

    The registry puts the report beside the model; where there is none, there is nothing.
    """
    try:
        data = json.loads((model_dir / REPORT_FILE).read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data if isinstance(data, dict) else None


def data_of(manifest: Manifest, histograms: dict[str, Any]) -> dict[str, Any]:
    """The statistics of a dataset, as they stand in a report.

    Args:
        manifest: of the dataset.
        histograms: of `load_histograms`; what does not agree with the manifest is left out.
    """
    splits = {}
    for name in SPLITS:
        split, found = manifest.splits[name], histograms.get(name)
        content: dict[str, Any] = {
            "num_examples": split.num_examples,
            "label_counts": list(split.label_counts),
        }
        for measure in slices.MEASURES:
            counts = found.get(measure) if isinstance(found, dict) else None
            right = is_counts(counts, slices.BINS) and sum(counts) == split.num_examples
            content[measure] = counts if right else None
        splits[name] = content
    return {"splits": splits}


def is_counts(counts: Any, size: int) -> TypeGuard[list[int]]:
    """Whether something is a histogram of so many numbers."""
    return (
        isinstance(counts, list)
        and len(counts) == size
        and all(type(count) is int and count >= 0 for count in counts)
    )


def drift(data: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """How far the splits of two datasets are apart: `divergence` of their labels and measures.

    Args:
        data: of `data_of`.
        other: that of another dataset, of which nothing is trusted.
    """
    found = {}
    for name, ours in data["splits"].items():
        splits = other.get("splits")
        theirs = splits.get(name) if isinstance(splits, dict) else None
        theirs = theirs if isinstance(theirs, dict) else {}
        found[name] = {
            term: divergence(ours[key], theirs.get(key))
            for term, key in (("labels", "label_counts"), *((m, m) for m in slices.MEASURES))
        }
    return found


def divergence(one: Sequence[int] | None, other: Any) -> float | None:
    """The Jensen-Shannon divergence of two histograms in bits: 0 of equal ones, 1 of disjoint ones.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", with logarithms of
    base 2: the mean of the divergences of both from their mean.

    Returns:
        None where one is unknown or empty, or their lengths differ.
    """
    if one is None or not is_counts(other, len(one)) or not sum(one) or not sum(other):
        return None
    shares = [(p / sum(one), q / sum(other)) for p, q in zip(one, other, strict=True)]
    terms = [
        share * math.log2(2 * share / (p + q)) / 2 for p, q in shares for share in (p, q) if share
    ]
    return min(1.0, max(0.0, math.fsum(terms)))
