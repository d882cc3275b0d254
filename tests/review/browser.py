"""A headless Chromium driven over its DevTools pipe: the protocol itself, no driver, no network.

`python -m tests.review.browser` installs Debian's Chromium where that is possible.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PACKAGE = "chromium"
PATIENCE_S = 60.0
KEY_CODES = {
    "ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Escape": 27, "Enter": 13,
    "Tab": 9,
}  # fmt: skip
SHIFT, CONTROL = 8, 2
# The browser reads commands from descriptor 3 and answers on 4; a process of its own puts the
# pipes there, as code between fork and exec is not for a process with threads.
PLACE_ENDS = """
import os, sys
for number, end in zip((100, 101), sys.argv[1:3]):
    os.dup2(int(end), number)
os.dup2(100, 3)
os.dup2(101, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def program() -> str | None:
    """Return the browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def needed() -> str:
    """Return the browser's path; none is a failure in CI, else a skip."""
    if path := program():
        return path
    message = "no Chromium; `make browser-package` installs it as root on Debian"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def install() -> None:
    """Install Chromium as root on Debian; elsewhere say what is missing."""
    if program():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"browser: no {PACKAGE}; root on Debian gets it from make, its tests are left out")
        return
    print(f"browser: installing {PACKAGE}", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", PACKAGE]):
        output = subprocess.run(["apt-get", "-qq", *command], env=quiet, capture_output=True)
        if output.returncode:
            sys.stderr.buffer.write(output.stdout + output.stderr)
            print(f"browser: apt-get {command[0]} failed; the browser's tests are left out")
            return


class Page:
    """One tab. `events` are what the browser told and nobody waited for yet, `seen` all of them."""

    def __init__(self, read: int, write: int, downloads: Path) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.downloads = downloads
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self._session, tab = None, self._session
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(downloads),
            eventsEnabled=True,
        )
        self._session = tab

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE_S)
            assert ready, "the browser is silent"
            block = os.read(self._read, 1 << 16)
            assert block, "the browser ended"
            self._buffer += block
        data, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(data)
        if "method" in message:
            self.seen.append(message)
        return message

    def wait(self, method: str) -> dict[str, Any]:
        """Return the next event of this name, taking earlier ones off the list."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["method"] == method:
                    return event["params"]
            self.events.append(self._receive())

    def open(self, url: str) -> None:
        """Load a page and wait until it is drawn."""
        self.call("Page.navigate", url=url)
        self._drawn()

    def reload(self) -> None:
        """Load the page again, as F5 does."""
        self.call("Page.reload")
        self._drawn()

    def _drawn(self) -> None:
        self.wait("Page.loadEventFired")
        self.frame()

    def frame(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript and return its value."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key, given by its name or letter."""
        named = key in KEY_CODES
        code = KEY_CODES[key] if named else ord(key.upper())
        common = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
        text = {} if named or modifiers & CONTROL else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Insert text where the cursor is."""
        self.call("Input.insertText", text=text)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Send mousePressed, mouseMoved, mouseReleased or mouseWheel at a point of the page."""
        common: dict[str, Any] = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **{**common, **more})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one point and release at another."""
        self.mouse("mousePressed", *start)
        self.mouse("mouseMoved", *end)
        self.mouse("mouseReleased", *end)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        box = self.box(selector)
        point = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.mouse("mousePressed", *point)
        self.mouse("mouseReleased", *point)

    def box(self, selector: str) -> dict[str, float]:
        """Return x, y, width and height of an element."""
        return self.run(
            f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        )

    def text(self, selector: str) -> str:
        """Return an element's text."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Give the page another size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.frame()

    def screenshot(self, path: Path | None = None) -> bytes:
        """Return the visible part of the page as PNG."""
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path:
            path.write_bytes(png)
        return png

    def downloaded(self) -> Path:
        """Wait for a download to end and return its file."""
        begun = self.wait("Browser.downloadWillBegin")
        while self.wait("Browser.downloadProgress")["state"] != "completed":
            pass
        return self.downloads / begun["suggestedFilename"]


@contextmanager
def browser(path: str, downloads: Path) -> Iterator[Page]:
    """Run a headless Chromium with a profile of its own, in use while the block lasts."""
    to_read, to_write = os.pipe(), os.pipe()
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--remote-debugging-pipe", "--window-size=1440,900",
    ]  # fmt: skip

    ends = [str(to_read[0]), str(to_write[1])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-ISc", PLACE_ENDS, *ends, path, *flags, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_read[0], to_write[1]),
        )
        os.close(to_read[0])
        os.close(to_write[1])
        try:
            page = Page(to_write[0], to_read[1], downloads)
            yield page
            page._session = None
            page.call("Browser.close")
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            os.close(to_read[1])
            os.close(to_write[0])


if __name__ == "__main__":
    install()
