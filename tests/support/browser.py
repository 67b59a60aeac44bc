"""A headless Chromium, driven by its own driver over WebDriver."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 30.0


class Browser:
    """A window of Chromium.

    Args:
        url: Address of the driver's session.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        _ask("POST", f"{self._url}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Return what a script returns in the page."""
        return _ask("POST", f"{self._url}/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        """Return the text of an element as a reader sees it."""
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).innerText"))

    def press(self, key: str) -> None:
        """Press and let go of a key."""
        steps = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": steps}
        _ask("POST", f"{self._url}/actions", {"actions": [keyboard]})

    def resize(self, width: int, height: int) -> None:
        """Give the window a size in pixels, as a phone has it."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def devtools(self, command: str, **values: Any) -> Any:
        """Give a command of the DevTools protocol."""
        return _ask("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": values})

    def problems(self) -> list[str]:
        """Return what the console has said since the last time."""
        entries = _ask("POST", f"{self._url}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(_ask("GET", f"{self._url}/screenshot"))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser. Skips the test where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("no Chromium; in Debian: apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "started successfully on port" in line)
        address = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        wishes = {
            "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = _ask("POST", address, {"capabilities": {"alwaysMatch": wishes}})
        url = f"{address}/{session['sessionId']}"
        try:
            yield Browser(url)
        finally:
            _ask("DELETE", url)
    finally:
        process.terminate()
        process.communicate()


def _ask(method: str, url: str, values: dict[str, Any] | None = None) -> Any:
    content = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, content, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as answer:
        return json.load(answer)["value"]


def address_of(path: Path) -> str:
    """Return the address of a file."""
    return path.resolve().as_uri()
