"""The plots of the pages, each an ``<svg>`` element.

Only the pages import this module: matplotlib belongs to the optional extra ``report``.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.ticker import MaxNLocator

from pipeline import svg
from pipeline.svg import FONT, MUTED, PAGE, SERIES, draw, label_classes, label_width

MAX_SIDEWAYS_CLASSES = 12  # above, their names stand upright below an axis


# Confidence


def reliability(bins: Sequence[dict[str, Any]]) -> str:
    """The reliability curve: the accuracy of each bin over its mean confidence.

    A perfectly calibrated model lies on the diagonal; the bars from it are the gaps whose mean,
    weighted by images, is the calibration error.

    Args:
        bins: ``reliability`` of report.json.
    """
    filled = [row for row in bins if row["count"]]
    confidence = [100 * row["confidence"] for row in filled]
    accuracy = [100 * row["accuracy"] for row in filled]

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.vlines(confidence, confidence, accuracy, color=svg.WRONG, linewidth=3)
        axes.plot(confidence, accuracy, color=svg.RIGHT, marker="o", markersize=5, clip_on=False)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("confidence, %")

    return draw("reliability", (460, 280), (48, 12, 42, 8), paint)


def confidence_counts(bins: Sequence[dict[str, Any]]) -> str:
    """Bars of how many images fall into each bin of confidence, on a logarithmic scale.

    Args:
        bins: ``reliability`` of report.json.
    """
    edges = [100 * bins[0]["low"], *(100 * row["high"] for row in bins)]
    counts = [row["count"] for row in bins]

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        axes.set_yscale("log")
        axes.stairs(
            counts, edges, fill=True, color=SERIES[1], edgecolor=PAGE, baseline=0.5, linewidth=1
        )
        axes.set_xlim(0, 100)
        axes.set_ylim(0.5, max(10, *counts) * 1.5)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.set_xlabel("confidence, %")

    return draw("confidence", (460, 280), (48, 12, 42, 8), paint)


# Over the epochs, over the classes, over time


def curves(
    name: str,
    epochs: Sequence[int],
    series: Sequence[Sequence[float | None]],
    bottom: float | None = None,
) -> str:
    """Lines over the epochs, one for each of up to three series.

    Args:
        name: unique on the page.
        epochs: n epoch numbers.
        series: for each line n values; None and NaN leave a gap.
        bottom: where the vertical axis starts; just below the lines unless given.
    """

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        for values, colour in zip(series, SERIES, strict=False):
            known = [math.nan if value is None else value for value in values]
            marker = "o" if len(known) <= 30 else ""
            size = 4 if len(known) > 1 else 8
            axes.plot(epochs, known, color=colour, marker=marker, markersize=size, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.margins(x=0.03, y=0.08)
        axes.set_ylim(bottom=bottom)
        if len(set(epochs)) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
            axes.set_xticks(epochs[:1])
        axes.set_xlabel("epoch")

    return draw(name, (460, 260), (48, 8, 42, 8), paint)


def distribution(shares: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """Grouped bars: for each class the share it has in each of up to three splits.

    Args:
        shares: for each split C shares, in percent.
        names: C class names.
    """
    upright = len(names) > MAX_SIDEWAYS_CLASSES or max(map(len, names)) > 6

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        width = 0.8 / len(shares)
        for i, (values, colour) in enumerate(zip(shares, SERIES, strict=False)):
            left = np.arange(len(names)) - 0.4 + i * width
            # One outline that falls to zero between the bars: a single path however many classes.
            edges = np.stack([left, left + 0.9 * width], axis=1).ravel()
            tops = np.stack([values, np.zeros(len(names))], axis=1).ravel()[:-1]
            axes.stairs(tops, edges, fill=True, color=colour, linewidth=0)
        label_classes(axes.xaxis, names)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("% of the split", labelpad=8)

    bottom = 14 + (label_width(names) if upright else FONT)
    return draw("distribution", (940, 210 + bottom), (54, 4, bottom, 8), paint)


def histogram(name: str, shares: Sequence[Sequence[float]], width: float, label: str) -> str:
    """Outlines of up to three histograms with the same bins.

    Args:
        name: unique on the page.
        shares: for each histogram the share of each bin, in percent.
        width: of a bin, in units of the horizontal axis, which starts at 0.
        label: of the horizontal axis.
    """
    last = max((i for values in shares for i, v in enumerate(values) if v), default=0)
    edges = width * np.arange(last + 2)

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        for values, colour in zip(shares, SERIES, strict=False):
            axes.stairs(values[: last + 1], edges, color=colour, linewidth=1.75)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)

    return draw(name, (460, 240), (48, 8, 42, 8), paint)


def timeline(
    times: Sequence[datetime.datetime],
    values: Sequence[float],
    promoted: Sequence[bool],
    changes: Sequence[datetime.datetime],
) -> str:
    """What was reached over time: a dot for each run, full for a promoted one, and the champion's.

    Args:
        times: n times, oldest first.
        values: n accuracies in percent.
        promoted: n times whether the run became the champion.
        changes: when another test set begins, drawn as upright lines.
    """
    days = date2num(list(times))
    won = np.array(promoted, bool)
    heights = np.array(values, float)

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        for day in date2num(list(changes)):
            axes.axvline(day, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        served = np.append(heights[won], heights[won][-1:])  # the last champion still is
        span = np.append(days[won], days[-1:])[: len(served)]
        axes.plot(span, served, color=svg.RIGHT, drawstyle="steps-post")
        dots = {"linestyle": "", "clip_on": False, "zorder": 3}
        axes.plot(days[~won], heights[~won], marker="D", markersize=5, color=svg.WRONG, **dots)
        axes.plot(days[won], heights[won], marker="o", markersize=7, color=svg.RIGHT, **dots)
        locator = AutoDateLocator(minticks=3, maxticks=9, tz=datetime.UTC)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(DateFormatter(_date_format(days), tz=datetime.UTC))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.margins(x=0.02, y=0.1)
        if days[0] == days[-1]:
            axes.set_xlim(days[0] - 1, days[0] + 1)
            axes.set_xticks(days[:1])
        low, high = axes.get_ylim() if np.ptp(heights) else (heights[0] - 1, heights[0] + 1)
        axes.set_ylim(max(low, 0), min(high, 100))

    return draw("timeline", (940, 280), (54, 10, 40, 10), paint)


def _date_format(days: np.ndarray) -> str:
    """How to write a time among others, given in days."""
    span = days[-1] - days[0]
    if 0 < span < 1.5:
        return "%H:%M:%S" if span < 1 / 48 else "%H:%M"
    return "%-d %b" if span < 300 else "%b %Y"
