"""Renders the pages' templates, and shows numbers as the pages do.

A page is one file. The only script on it sorts its tables; the page's own policy names that
script by its hash and forbids every other one, and everything from any network.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

_UNKNOWN = "\N{EN DASH}"
_PERCENT = "\N{NARROW NO-BREAK SPACE}%"
_SCRIPT = "sorting.js"


def render(template: str, **values: Any) -> str:
    """Renders a template of this package; every value is escaped unless the template says not."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_text),
    )
    environment.filters |= {
        "percent": percent,
        "rate": rate,
        "probability": probability,
        "thousands": thousands,
        "signed": signed,
        "interval": interval,
    }
    script = _text(_SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(script=script, script_sha=digest, **values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is in no alphabet


def _text(name: str) -> str:
    return resources.files("pipeline").joinpath(name).read_text("utf-8")


def percent(share: float | None) -> str:
    """A share in percent, to a hundredth."""
    return _UNKNOWN if share is None else f"{100 * share:.2f}{_PERCENT}"


def rate(value: float | None) -> str:
    """A number to four places."""
    return _UNKNOWN if value is None else f"{value:.4f}"


def probability(value: float) -> str:
    """A probability in percent that is never rounded to 0 or to 100."""
    if 0 < value < 0.0001:
        return f"< 0.01{_PERCENT}"
    if 0.9999 < value < 1:
        return f"> 99.99{_PERCENT}"
    return percent(value)


def thousands(count: int) -> str:
    """A count, its thousands parted."""
    return f"{count:,}"


def signed(count: int) -> str:
    """A difference of counts, with its sign."""
    sign = "+" if count > 0 else "\N{MINUS SIGN}" if count < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(count):,}"


def interval(bounds: list[float] | None) -> str:
    """Two shares in percent."""
    if bounds is None:
        return _UNKNOWN
    return f"{100 * bounds[0]:.2f}{_UNKNOWN}{percent(bounds[1])}"
