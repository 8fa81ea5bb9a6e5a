"""Headless Chromium, driven through DevTools over two pipes: all it takes is the standard library.

Synopsis::

    with Browser() as browser:
        browser.open(path.as_uri(), width=400)
        browser.evaluate("document.images.length"), browser.problems, browser.requests
        browser.screenshot(Path("page.png"))
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

HOW_TO_INSTALL = "chromium is not installed: apt-get install -y chromium"
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_DOMAINS = ("Page", "Runtime", "Log", "Network")
_PROBLEMS = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
_MEGABYTE = 1 << 20
_PATIENCE = 60  # seconds, for an answer


def find() -> str | None:
    """The browser's program, if there is one."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One tab. As a context manager it ends the browser and removes its profile.

    Attributes:
        problems: errors, warnings and log lines of the page that is open.
        requests: the addresses it asked for, its own and ``data:`` ones included.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._session = ""
        self._loaded = False
        self._buffer = b""

    def __enter__(self) -> Browser:
        program = find()
        if program is None:
            raise FileNotFoundError(HOW_TO_INSTALL)
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (child_in, self._out), (self._in, child_out) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4. The shell puts them there;
        # it is bash, since sh may know descriptors up to 9 alone.
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{child_in} 4>&{child_out}', "bash", program),
                *(*_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"),
            ],
            pass_fds=[child_in, child_out],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in _DOMAINS:
            self._call(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(
        self,
        url: str,
        *,
        width: int = 1100,
        height: int = 900,
        dark: bool = False,
        media: str = "",
        decode: bool = True,
    ) -> None:
        """Opens a page and waits until it and its images are loaded.

        Args:
            url: its address.
            width: of the window, in CSS pixels; up to 500 it is that of a phone.
            height: likewise.
            dark: whether the user prefers dark pages.
            media: "print" lays it out as for a printer.
            decode: whether to wait until every image can be shown; one that is broken raises.
        """
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width <= 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.problems, self.requests, self._loaded = [], [], False
        self._call("Page.navigate", url=url)
        while not self._loaded:
            self._notice(self._receive())
        if decode:
            self.evaluate("Promise.all([...document.images].map((i) => i.decode())).then(() => 1)")
        # Two frames: what the page logs while it is laid out has been reported by then.
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; a promise is waited for.

        Raises:
            RuntimeError: it threw.
        """
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Writes a PNG of the whole page, or of what the window shows."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it would be printed on A4, with its backgrounds as the page wants them."""
        answer = self._call(
            "Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.7
        )
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; takes notice of the events in between."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._notice(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], _PATIENCE)[0]:
                raise RuntimeError(f"{find()} said nothing for {_PATIENCE} seconds")
            chunk = os.read(self._in, _MEGABYTE)
            if not chunk:
                raise RuntimeError(f"{find()} ended with exit code {self._process.wait()}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _notice(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in _PROBLEMS:
            self.problems.append(f"{method}: {json.dumps(params)[:500]}")
