"""Files: written whole or not at all, hashed, noted, held by one process; and whose results a
folder holds.

Needs nothing but Python, as `make clean` does.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scfm_circuits import InputError

NOTES = "SCFM_NOTES"
"""Environment variable: the file in which a chapter's process notes what it writes, and what it
reads of what is kept. The book learns from it which results a chapter stands on."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because writers such as matplotlib choose a format by it.
    On an error the temporary file is removed and what stood at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-part-", suffix=path.suffix,
                                    dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; results are meant to be read like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        note(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` in one step and return the path."""
    with atomic_path(path) as temporary:
        data = content.encode("utf-8") if isinstance(content, str) else content
        temporary.write_bytes(data)
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON with sorted keys; NaN is refused, as JSON has none."""
    return write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as a hexadecimal string."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds it takes the place of `path` as a whole.

    What stood at `path` stays until then, and stays for good on an error. The files are on the disk
    before, so that a failure of power leaves no folder of empty ones.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-part-", dir=path.parent))
    old = fresh.with_name(fresh.name + "-old")
    try:
        yield fresh
        fresh.chmod(0o755)
        flush(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        note(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


_TEMPORARY = re.compile(r"\..+-part-[a-z0-9_]{8}(-old)?(\.\w+)?")


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing (`atomic_path`, `atomic_folder`) an hour ago or
    earlier; what is younger may be a living one's."""
    for path in [one for one in folder.rglob(".*") if _TEMPORARY.fullmatch(one.name)]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files of a folder, in order."""
    return [one for one in (path, *sorted(path.rglob("*"))) if one.is_file()]


def flush(path: Path) -> None:
    """Have a file, or all files of a folder, on the disk before whatever follows."""
    for one in files_of(path):
        with open(one, "rb") as handle:
            os.fsync(handle.fileno())


def note(path: Path) -> None:
    """Note a result of the chapter that runs, if one does (`NOTES`)."""
    if notes := os.environ.get(NOTES):
        with open(notes, "a", encoding="utf-8") as handle:
            handle.write(f"{path.absolute()}\n")


def size_of_file(path: Path) -> int:
    """A file's bytes."""
    return path.stat().st_size


def lost_file(folder: Path, known: Mapping[str, Any], measure: Callable[[Path], Any]) -> str:
    """What is wrong with the first file that is not as it is known; nothing if all are.

    known: what `measure` gave for each file, by its place in the folder.
    """
    for name, was in known.items():
        try:
            if measure(folder / name) != was:
                return f"{name} is not as it was written"
        except OSError:
            return f"{name} is missing"
    return ""


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object at `path`; an empty one if there is none or it cannot be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


LOCK = ".lock"


@contextlib.contextmanager
def only_one(folder: Path, doing: str, *, reads: bool = False) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go of it however the process ends.

    doing: what another run is told about this one, such as `executing notebooks into`. reads: hold
    it against those who write; several may read, and where nothing can be written there is no need.

    Raises:
        InputError: another process holds it, or nothing can be written there.
    """
    lock = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = open(lock, "a")  # noqa: SIM115
        except OSError as error:
            if not reads:
                raise InputError(f"Nothing can be written into {folder} ({error.strerror}); make "
                                 "it writable or name another folder.") from None
            yield
            return
        with handle:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if reads else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                theirs = lock.read_text(encoding="utf-8") or doing
                raise InputError(f"Another run is {theirs} {folder}; wait for it to end.") from None
            except OSError:
                pass  # a file system without locks
            if not _is_at(handle.fileno(), lock):
                continue  # it was removed with its folder, by the one that held it
            handle.truncate(0)
            handle.write(doing)
            handle.flush()
            yield
            return


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[bool]:
    """Make what is kept at `path` while no other process does; yields whether one was waited for.

    The kernel lets go of it however a process ends; the empty file beside `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}{LOCK}"), "a") as handle:
        waited = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(handle, fcntl.LOCK_EX)
            waited = True
        except OSError:
            pass  # a file system without locks
        yield waited


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


OWNER = "profile.json"


def owner_of(results: Path, root: Path) -> Path | None:
    """The profile's file whose results these are; None if none is known, or it is gone.

    root: the folder that a relative path starts from, so that a project can be moved.
    """
    named = read_json(results / OWNER).get("file")
    path = root / named if isinstance(named, str) and named else None
    return path if path is not None and path.is_file() else None


def digest(content: str | bytes) -> str:
    """A short hash (16 hexadecimal digits of SHA-256), to tell whether something is the same."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or else its kind; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def time_in_words(seconds: float) -> str:
    """A duration in the unit that suits it: `40 seconds`, `3.2 hours`, `36 days`."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, length = next((pair for pair in units if seconds >= 2 * pair[1]), units[-1])
    number = seconds / length
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
