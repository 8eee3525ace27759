"""A page as a headless Chromium leaves it, and what a script that drives it says."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ANSWER = """
function answered(said) {
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = encodeURIComponent(JSON.stringify(said));
  document.body.append(answer);
}
"""
"""For a page's script: `answered(value)` leaves a value for `answer_in`."""


def answer_in(page: str) -> Any:
    """What `answered` left in a page."""
    match = re.search(r'<pre id="answer">(.*?)</pre>', page)
    assert match, "the script that drives the page did not end"
    return json.loads(unquote(match[1]))


def opened(path: Path, *options: str, width: int = 1280, marker: str, budget: int) -> str:
    """The page's HTML after `budget` ms of virtual time; skips if no Chromium opens local files.

    options: more of the browser's options. marker: what the page holds if it was opened at all.
    """
    command = [*_chromium(path.parent), *options,
               f"--window-size={width},900", f"--virtual-time-budget={budget}",
               # Else no frame may be drawn, and nothing ever comes into view.
               "--run-all-compositor-stages-before-draw", "--dump-dom", path.as_uri()]
    try:
        page = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        page = ""
    if marker not in page:
        pytest.skip("Chromium does not open files of a temporary folder here")
    return page


def _chromium(folder: Path) -> list[str]:
    """The command of a Chromium whose files are kept in `folder`; skips if there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
        "google-chrome")
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    return [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'browser'}"]


# The pipe's ends are descriptors 3 and 4 of the browser, whatever they are here.
_PIPED = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 5) for end in sys.argv[1:3]]
for number, end in enumerate(ends, 3):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """A tab that is driven by Chromium's protocol; it keeps what pages write as errors."""

    def __init__(self, sent: int, received: int) -> None:
        self._sent, self._received = sent, received
        self._waiting, self._n, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True
                                  )["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method's result; RuntimeError if it has none within a minute."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._sent, json.dumps(message).encode() + b"\0")
        for said in self._said(60):
            if said.get("id") == self._n:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                result: dict[str, Any] = said["result"]
                return result
        raise RuntimeError(f"The browser did not answer to {method}.")

    def open(self, address: str) -> None:
        """Load a page until its load event; it has no errors yet."""
        self.errors.clear()
        self.events.clear()
        self.call("Page.navigate", url=address)
        loaded = "Page.loadEventFired"
        if not any(event["method"] == loaded for event in self.events) and not any(
                said.get("method") == loaded for said in self._said(30)):
            raise RuntimeError(f"{address} was not loaded in 30 seconds.")

    def run(self, script: str) -> Any:
        """The value of an expression in the page, waited for if it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                         returnByValue=True, userGesture=True)
        if "exceptionDetails" in done:
            raise RuntimeError(_exception(done["exceptionDetails"]))
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> Any:
        """The first value of an expression that is true; RuntimeError if it stays false."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise RuntimeError(f"This did not become true in {seconds} s: {script}")

    def screen(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The window's size and the colours that the reader's system asks for."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def _said(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The browser's messages as they come; errors that pages write are kept."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            first, zero, rest = self._waiting.partition(b"\0")
            if not zero:
                if select.select([self._received], [], [], left)[0]:
                    more = os.read(self._received, 1 << 20)
                    if not more:
                        raise RuntimeError("The browser has ended.")
                    self._waiting += more
                continue
            self._waiting = rest
            said = json.loads(first)
            if "method" in said:
                self.events.append(said)
                self._keep_error(said["method"], said["params"])
            yield said

    def _keep_error(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(_exception(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description")))
                                        for one in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")


def _exception(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details["text"]))


@contextmanager
def driven(folder: Path) -> Iterator[Tab]:
    """A tab of a headless Chromium with an empty profile in `folder`; skips if there is none."""
    (to_browser, sent), (received, from_browser) = os.pipe(), os.pipe()
    command = [*_chromium(folder), "--remote-debugging-pipe",
               "--host-resolver-rules=MAP * ~NOTFOUND"]
    process = subprocess.Popen(
        [sys.executable, "-c", _PIPED, str(to_browser), str(from_browser), *command],
        pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        os.close(to_browser)
        os.close(from_browser)
        yield Tab(sent, received)
    finally:
        process.terminate()
        process.wait(30)
        os.close(sent)
        os.close(received)
