"""Draws plots by matplotlib as ``<svg>`` elements that belong to the page around them.

Plots are drawn in stand-in colours that become the variables of the page's style sheet, so
that one picture serves the light page, the dark one and the printed one.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

INK = "#010101"
MUTED = "#010102"
LINE = "#010103"
PAGE = "#010104"
SERIES = ("#010105", "#010106", "#010107")
RIGHT = "#010108"
WRONG = "#010109"
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAGE: "var(--page)",
    RIGHT: "var(--right)",
    WRONG: "var(--wrong)",
} | {stand_in: f"var(--series-{i})" for i, stand_in in enumerate(SERIES)}

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


def draw(
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


# Classes beside an axis


def _short(name: str) -> str:
    """A class name that fits beside an axis; its end is kept, since names often differ there."""
    if len(name) <= MAX_LABEL:
        return name
    return name[: MAX_LABEL - 7] + "\N{HORIZONTAL ELLIPSIS}" + name[-6:]


def label_classes(axis: Any, names: Sequence[str]) -> None:
    """Labels an axis with class names, every k-th where there are many."""
    step = math.ceil(len(names) / MAX_LABELLED_CLASSES)
    size = FONT if len(names) <= 24 else FONT * 0.75
    axis.set_ticks(range(0, len(names), step), [_short(name) for name in names[::step]])
    axis.set_tick_params(labelsize=size)


def label_width(names: Sequence[str]) -> float:
    """Room for the longest tick label, in pixels; a guess that errs on the wide side."""
    return 0.62 * FONT * max(len(_short(name)) for name in names)
