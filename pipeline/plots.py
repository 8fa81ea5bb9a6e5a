"""The pictures of the report page: plots as inline SVG, images as PNG data URIs.

Plots are drawn in stand-in colours that become the variables of the page's style sheet, so
that one picture serves the light page, the dark one and the printed one. Only the report
page imports this module: matplotlib belongs to the optional extra ``report``.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

INK = "#010101"
MUTED = "#010102"
LINE = "#010103"
PAGE = "#010104"
SERIES = ("#010105", "#010106", "#010107")
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAGE: "var(--page)",
} | {stand_in: f"var(--series-{i})" for i, stand_in in enumerate(SERIES)}

# Mid-tones that carry dark text on a light page and light text on a dark one.
RIGHT = np.array([0x3B, 0x82, 0xC4]) / 255
WRONG = np.array([0xE8, 0x6A, 0x17]) / 255
ON_WRONG = "#14171a"  # text on a cell of (almost) full colour

MAX_NUMBERED_CLASSES = 12  # above, the cells of a confusion matrix are too small for numbers
MAX_LABELLED_CLASSES = 40  # above, only some of the classes get a tick label
MAX_LABEL = 16  # characters of a class name that fit beside an axis
FONT = 12  # pixels of the SVG's own coordinates, as are all sizes below

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # a class may be called "$x"
    "font.size": FONT,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "axes.edgecolor": LINE,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
}


# SVG


def _draw(
    name: str,
    size: tuple[float, float],
    margins: tuple[float, float, float, float],
    paint: Callable[[Any], None],
) -> str:
    """Lets `paint` fill one set of axes, and returns it as an ``<svg>`` element.

    Args:
        name: unique on the page; the element's ids start with it.
        size: width and height in pixels.
        margins: left, right, bottom and top of the axes, in pixels.
        paint: draws on the axes it is given.
    """
    (width, height), (left, right, bottom, top) = size, margins
    inner = (width - left - right, height - bottom - top)
    out = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser draws the text, so a glyph that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(width / 72, height / 72))  # an SVG has 72 dots to the inch
        axes = figure.add_axes((left / width, bottom / height, inner[0] / width, inner[1] / height))
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        paint(axes)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue(), name)


def _inline(svg: bytes, name: str) -> str:
    """Makes matplotlib's SVG file part of a page.

    Drops what belongs to a file alone (prolog, metadata, a style sheet that would rule the whole
    page, fixed size, the ids nobody refers to), makes the other ids unique on the page, and
    replaces stand-in colours by the page's.
    """
    root = ElementTree.fromstring(svg)
    used = {found.decode() for found in re.findall(rb'(?:url\(|href=")#([^)"]+)', svg)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib = {key: _attribute(key, value, name) for key, value in attributes.items()}
        element.tail = None
        if element.tag != "text":
            element.text = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """The name of a tag or an attribute without its namespace, which HTML does not want."""
    return name.rpartition("}")[2]


def _attribute(key: str, value: str, name: str) -> str:
    """One attribute of an element, as the page wants it."""
    if key == "id":
        return f"{name}-{value}"
    if key in ("clip-path", "href"):
        return re.sub(r"^(url\()?#", rf"\1#{name}-", value).replace("\n", "")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)  # the page's own font
        return re.sub(r"#0101\w\w", lambda found: _CSS.get(found[0], found[0]), value)
    return value


def _short(name: str) -> str:
    """A class name that fits beside an axis; its end is kept, since names often differ there."""
    if len(name) <= MAX_LABEL:
        return name
    return name[: MAX_LABEL - 7] + "\N{HORIZONTAL ELLIPSIS}" + name[-6:]


def _label_classes(axis: Any, names: Sequence[str]) -> None:
    """Labels an axis with class names, every k-th where there are many."""
    step = math.ceil(len(names) / MAX_LABELLED_CLASSES)
    size = FONT if len(names) <= 24 else FONT * 0.75
    axis.set_ticks(range(0, len(names), step), [_short(name) for name in names[::step]])
    axis.set_tick_params(labelsize=size)


def _label_width(names: Sequence[str]) -> float:
    """Room for the longest tick label, in pixels; a guess that errs on the wide side."""
    return 0.62 * FONT * max(len(_short(name)) for name in names)


# Plots


def confusion_matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    """A heat map of the confusion matrix.

    The diagonal has a colour of its own and the mistakes a logarithmic scale: of 10,000 images
    a good model gets 9,900 right, and it is the other hundred that one wants to see.

    Args:
        confusion: int [C, C]; rows are true classes, columns predicted ones.
        names: C class names.
    """
    side, label = 440.0, _label_width(names)
    upright = max(map(len, names)) > 2

    def paint(axes: Any) -> None:
        axes.imshow(_heat(confusion), interpolation="none", aspect="auto")
        for spine in axes.spines.values():
            spine.set_visible(False)
        _label_classes(axes.xaxis, names)
        _label_classes(axes.yaxis, names)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
        axes.set_xlabel("predicted class", labelpad=8)
        axes.set_ylabel("true class", labelpad=8)
        if len(names) <= MAX_NUMBERED_CLASSES:
            _number_cells(axes, confusion)

    bottom = 34 + (label if upright else FONT)
    size = (side + label + 44, side + bottom + 4)
    return _draw("confusion", size, (label + 40, 4, bottom, 4), paint)


def _mistakes(confusion: np.ndarray) -> np.ndarray:
    """The matrix without its diagonal; int [C, C]."""
    return confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))


def _heat(confusion: np.ndarray) -> np.ndarray:
    """The colours of the cells; float [C, C, 4], red, green, blue and opacity in [0, 1]."""
    diagonal = np.eye(len(confusion), dtype=bool)
    mistakes = _mistakes(confusion)
    share = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    shade = np.log1p(mistakes) / np.log1p(max(mistakes.max(), 1))
    opacity = np.where(mistakes > 0, 0.08 + 0.92 * shade, 0.0)
    opacity[diagonal] = 0.06 + 0.36 * share
    colours = np.where(diagonal[..., None], RIGHT, WRONG)
    return np.concatenate([colours, opacity[..., None]], axis=2)


def _number_cells(axes: Any, confusion: np.ndarray) -> None:
    """Writes the counts into the cells, zeros left out, and parts the cells by lines."""
    edges = np.arange(len(confusion) + 1) - 0.5
    axes.hlines(edges, edges[0], edges[-1], color=PAGE, linewidth=2)
    axes.vlines(edges, edges[0], edges[-1], color=PAGE, linewidth=2)
    opacity = _heat(confusion)[..., 3]
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = ON_WRONG if opacity[row, column] > 0.8 else INK
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center_baseline", color=colour)


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

    return _draw(name, (460, 260), (48, 8, 42, 8), paint)


def distribution(shares: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """Grouped bars: for each class the share it has in each of up to three splits.

    Args:
        shares: for each split C shares, in percent.
        names: C class names.
    """
    upright = len(names) > MAX_NUMBERED_CLASSES or max(map(len, names)) > 6

    def paint(axes: Any) -> None:
        axes.grid(axis="y")
        width = 0.8 / len(shares)
        for i, (values, colour) in enumerate(zip(shares, SERIES, strict=False)):
            left = np.arange(len(names)) - 0.4 + i * width
            # One outline that falls to zero between the bars: a single path however many classes.
            edges = np.stack([left, left + 0.9 * width], axis=1).ravel()
            tops = np.stack([values, np.zeros(len(names))], axis=1).ravel()[:-1]
            axes.stairs(tops, edges, fill=True, color=colour, linewidth=0)
        _label_classes(axes.xaxis, names)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("% of the split", labelpad=8)

    bottom = 14 + (_label_width(names) if upright else FONT)
    return _draw("distribution", (940, 210 + bottom), (54, 4, bottom, 8), paint)


# Images


def ink_is_bright(pixels: Sequence[bytes]) -> bool:
    """Whether images are bright strokes on a dark ground, as MNIST's are."""
    return bool(np.frombuffer(b"".join(pixels), np.uint8).mean() < 128) if pixels else False


def strip(pixels: Sequence[bytes], *, invert: bool, gap: int = 2) -> str:
    """Sets images side by side, parted by `gap` white columns, as a PNG data URI.

    Args:
        pixels: for each image 784 bytes.
        invert: swap dark and bright.
        gap: in pixels of the image.
    """
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, 28, 28)
    tiles = np.pad(
        255 - images if invert else images, ((0, 0), (0, 0), (0, gap)), constant_values=255
    )
    row = np.concatenate(list(tiles), axis=1)[:, : len(images) * (28 + gap) - gap]
    out = io.BytesIO()
    Image.fromarray(row).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
