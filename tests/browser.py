"""A page as a headless Chromium leaves it, and what a script that drives it says."""

import json
import re
import shutil
import subprocess
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
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
        "google-chrome")
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               *options, f"--user-data-dir={path.parent / 'browser'}",
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
