"""Draws the README's picture: the first sections of the page of the newest run under a root.

python docs/picture.py out docs/report.png
"""

import sys
from pathlib import Path

from browser import HOW_TO_INSTALL, Browser, find

WIDTH, MAX_HEIGHT = 1100, 4400
LAST_WHOLE_SECTION = f"""
    Math.max(...[...document.querySelectorAll("section")]
        .map((section) => section.getBoundingClientRect().bottom)
        .filter((bottom) => bottom < {MAX_HEIGHT}))
"""


def main() -> None:
    """Finds the newest report and takes its picture."""
    root, target = map(Path, sys.argv[1:3])
    pages = sorted(root.glob("runs/*/report/report.html"), key=lambda page: page.stat().st_mtime)
    if not pages:
        sys.exit(f"expected a report under {root}/runs (make run)")
    if find() is None:
        sys.exit(HOW_TO_INSTALL)
    address = pages[-1].resolve().as_uri()
    with Browser() as browser:
        browser.open(address, width=WIDTH)
        browser.open(address, width=WIDTH, height=round(browser.evaluate(LAST_WHOLE_SECTION)) + 24)
        browser.screenshot(target, whole=False)


if __name__ == "__main__":
    main()
