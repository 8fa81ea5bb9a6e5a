"""Draws the README's picture: the page of the newest run under a root, by headless Chromium.

python docs/picture.py out docs/report.png
"""

import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Finds the newest report and takes its picture."""
    root, target = map(Path, sys.argv[1:3])
    pages = sorted(root.glob("runs/*/report/report.html"), key=lambda page: page.stat().st_mtime)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not pages or browser is None:
        sys.exit(f"expected a report under {root}/runs (make run) and chromium on the path")
    subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--hide-scrollbars",
            "--window-size=1100,4120",
            f"--screenshot={target}",
            pages[-1].resolve().as_uri(),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
