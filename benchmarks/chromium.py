"""Drive a headless Chromium over the two pipes of its debugging protocol; no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser's path, where one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser refused something, or a script threw."""


class Chromium:
    """One browser with one page. A context manager."""

    def __init__(self, path: str, width: int = 1280, height: int = 900) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        # The protocol's pipes are file descriptors 3 and 4 of the browser.
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{read_commands} 4>&{write_answers}', "chromium"),
                path,
                *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
                *("--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"),
                *("--disable-background-networking", "--disable-component-update"),
                *(f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"),
                "about:blank",
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        """What the page has told since it was opened: console, exceptions, requests."""
        self._session = self._attach()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer. BrowserError if it is refused."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise BrowserError(json.dumps(done["exceptionDetails"])[:2000])
        return done["result"].get("value")

    def wait_for(self, script: str) -> float:
        """Wait until an expression is true; returns the seconds that took."""
        started = time.monotonic()
        while not self.evaluate(script):
            if time.monotonic() > started + PATIENCE_SECONDS:
                raise BrowserError(f"never true: {script}; {self.problems()}")
            time.sleep(0.02)
        return time.monotonic() - started

    def open(self, page: Path) -> None:
        """Load a file; what the page before has told is forgotten."""
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Set the size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path, whole_page: bool = False) -> None:
        """Write what is visible, or all of the page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(shot["data"]))

    def problems(self) -> list[str]:
        """Exceptions, and errors and warnings of the console, since the page was opened."""
        found = []
        for event in self.events:
            kind, data = event.get("method"), event.get("params", {})
            is_said = kind == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning")
            is_logged = kind == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning")
            if kind == "Runtime.exceptionThrown" or is_said or is_logged:
                found.append(json.dumps(data)[:500])
        return found

    def requests(self) -> list[str]:
        """Addresses that the page has asked for."""
        asked = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def _attach(self) -> str:
        while True:
            pages = self.call("Target.getTargets")["targetInfos"]
            page = next((one for one in pages if one["type"] == "page"), None)
            if page is not None:
                break
            time.sleep(0.05)
        target = {"targetId": page["targetId"], "flatten": True}
        return self.call("Target.attachToTarget", **target)["sessionId"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise BrowserError(f"no answer within {PATIENCE_SECONDS:g} seconds")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise BrowserError(f"the browser has left with {self._process.wait()}")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
