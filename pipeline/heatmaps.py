"""Heat maps of a confusion matrix, each an ``<svg>`` element; see `pipeline.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.svg import FONT, INK, PAGE, draw, label_classes, label_width

# Mid-tones that carry dark text on a light page and light text on a dark one.
RIGHT_CELL = np.array([0x3B, 0x82, 0xC4]) / 255
WRONG_CELL = np.array([0xE8, 0x6A, 0x17]) / 255
ON_WRONG = "#14171a"  # text on a cell of (almost) full colour

MAX_NUMBERED_CLASSES = 12  # above, the cells of a confusion matrix are too small for numbers


def confusion_matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    """A heat map of the confusion matrix.

    The diagonal has a colour of its own and the mistakes a logarithmic scale: of 10,000 images
    a good model gets 9,900 right, and it is the other hundred that one wants to see.

    Args:
        confusion: int [C, C]; rows are true classes, columns predicted ones.
        names: C class names.
    """
    mistakes = _mistakes(confusion)
    shade = np.log1p(mistakes) / np.log1p(max(mistakes.max(), 1))
    return _matrix("confusion", confusion, shade, confusion.astype(str), names)


def confusion_rates(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The same with each row divided by its sum, in percent; the mistakes on a square-root scale.

    Args:
        confusion: int [C, C]; rows are true classes, columns predicted ones.
        names: C class names.
    """
    rates = _mistakes(confusion) / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shade = np.sqrt(rates / (rates.max() or 1))
    percents = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    texts = np.array([["100" if v == 100 else f"{v:.1f}" for v in row] for row in percents])
    return _matrix("rates", confusion, shade, texts, names)


def _matrix(
    name: str, confusion: np.ndarray, shade: np.ndarray, texts: np.ndarray, names: Sequence[str]
) -> str:
    """A heat map; `shade` in [0, 1] and `texts` are of each cell, both [C, C]."""
    side, label = 440.0, label_width(names)
    upright = max(map(len, names)) > 2

    def paint(axes: Any) -> None:
        heat = _heat(confusion, shade)
        axes.imshow(heat, interpolation="none", aspect="auto")
        for spine in axes.spines.values():
            spine.set_visible(False)
        label_classes(axes.xaxis, names)
        label_classes(axes.yaxis, names)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
        axes.set_xlabel("predicted class", labelpad=8)
        axes.set_ylabel("true class", labelpad=8)
        if len(names) <= MAX_NUMBERED_CLASSES:
            _write_cells(axes, confusion, texts, heat[..., 3])

    bottom = 34 + (label if upright else FONT)
    size = (side + label + 44, side + bottom + 4)
    return draw(name, size, (label + 40, 4, bottom, 4), paint)


def _mistakes(confusion: np.ndarray) -> np.ndarray:
    """The matrix without its diagonal; int [C, C]."""
    return confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))


def _heat(confusion: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """The colours of the cells; float [C, C, 4], red, green, blue and opacity in [0, 1]."""
    diagonal = np.eye(len(confusion), dtype=bool)
    share = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    opacity = np.where(_mistakes(confusion) > 0, 0.08 + 0.92 * shade, 0.0)
    opacity[diagonal] = 0.06 + 0.36 * share
    colours = np.where(diagonal[..., None], RIGHT_CELL, WRONG_CELL)
    return np.concatenate([colours, opacity[..., None]], axis=2)


def _write_cells(axes: Any, confusion: np.ndarray, texts: np.ndarray, opacity: np.ndarray) -> None:
    """Writes into the cells that count anything, and parts all cells by lines."""
    edges = np.arange(len(confusion) + 1) - 0.5
    axes.hlines(edges, edges[0], edges[-1], color=PAGE, linewidth=2)
    axes.vlines(edges, edges[0], edges[-1], color=PAGE, linewidth=2)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = ON_WRONG if opacity[row, column] > 0.8 else INK
        text = texts[row, column]
        axes.text(column, row, text, ha="center", va="center_baseline", color=colour)
