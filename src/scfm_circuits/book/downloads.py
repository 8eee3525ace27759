"""Fetching what a profile uses from elsewhere: `make data`.

Cells are fetched with requests, because a partial file of 9 GB must be taken up again (pooch, else
the obvious choice, begins anew); models and tokenizers by huggingface_hub, which does so itself.
A file is downloaded as `<name>.part`, checked against the manifest, and only then gets its name;
one that is not what it should be is set aside as `<name>.wrong`.

    python -m scfm_circuits.book.downloads --profile paper
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common.files import read_json, sha256_of_file, write_json
from scfm_circuits.common.profile import ROOT, Profile, cells_path, load_profile

if TYPE_CHECKING:
    import requests

MARGIN = 256 * 2**20
"""Bytes that must be left free on the disk."""
TIMEOUTS = 15.0, 60.0
"""Seconds to wait for a connection, and for the next bytes."""
ATTEMPTS = 6
"""Tries in a row that bring nothing."""
# What is lost of a cut connection is less than this.
_CHUNK = 1 << 16
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model"]


class Remote(NamedTuple):
    """A file elsewhere, and what it must be. instead: what to do if it cannot be had."""

    url: str
    bytes: int
    sha256: str
    instead: str = ""


class _TryAgain(Exception):
    """A fault that may pass; wait: seconds that the server asks for."""

    def __init__(self, reason: object, wait: float = 0.0) -> None:
        super().__init__(str(reason))
        self.wait = wait


def fetch(remote: Remote, path: Path, *, progress: bool = True) -> Path:
    """The file at `path`, downloaded unless it is there, and checked.

    A file that is there is hashed once; its size and time are remembered beside it.

    Raises:
        InputError: no network, no such file there, no room on the disk, another process at it, or
            content that is not what the manifest says (then it is set aside).
    """
    from scfm_circuits.common.files import only_one

    with only_one(path.parent, "downloading into"):
        if path.is_file():
            _verify(path, path, remote, progress)
            return path
        part = path.with_name(path.name + ".part")
        _check_disk(remote, path)
        _download(remote, part, progress)
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
    if state.st_size != remote.bytes:
        problem = f"{state.st_size:,} bytes instead of {remote.bytes:,}"
    elif sha256_of_file(found) != remote.sha256:
        problem = "another checksum (sha256) than data/manifest.yml says"
    if problem:
        wrong = path.with_name(path.name + ".wrong")
        found.replace(wrong)
        raise InputError(f"{path.name} has {problem}; it was set aside as {wrong} and is not used. "
                         f"Fetch it again. {remote.instead}".strip())
    found.replace(path)
    write_json(about, seen)
    _aside(path.with_name(path.name + ".part")).unlink(missing_ok=True)


def _aside(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _download(remote: Remote, part: Path, progress: bool) -> None:
    """Bytes into `part` until all are there; goes on where it, or an earlier run, has stopped."""
    import requests

    failures = 0
    size = part.stat().st_size if part.is_file() else 0
    with requests.Session() as session, tqdm(
            total=remote.bytes, initial=size, unit="B", unit_scale=True, desc=part.stem,
            disable=not progress) as bar:
        while size < remote.bytes:
            try:
                _attempt(session, remote, part, size, bar)
                return  # whole, though perhaps of another size, which is said when it is checked
            except _TryAgain as error:
                fault = error
            except requests.RequestException as error:
                fault = _TryAgain(error)
            now = part.stat().st_size if part.is_file() else 0
            failures = 0 if now > size else failures + 1
            size = now
            if failures >= ATTEMPTS:
                reason = " ".join(str(fault).split())[:200]
                raise InputError(f"{remote.url} cannot be fetched ({reason}); what is there so far "
                                 f"is kept, so run the same command again when the network is "
                                 f"back. {remote.instead}".strip())
            time.sleep(min(60.0, max(fault.wait, 0.5 * 2**failures)))


def _attempt(session: "requests.Session", remote: Remote, part: Path, size: int, bar: Any) -> None:
    """One request, and its body into the file."""
    headers = {"Accept-Encoding": "identity"}
    version = read_json(_aside(part)).get("version")
    if size and version:
        # Only the rest of this very version; of another one, all of it.
        headers |= {"Range": f"bytes={size}-", "If-Range": str(version)}
    with session.get(remote.url, headers=headers, timeout=TIMEOUTS, stream=True) as answer:
        status = answer.status_code
        if status == 429 or status >= 500:
            wait = answer.headers.get("Retry-After", "")
            raise _TryAgain(f"the server answers {status}", float(wait) if wait.isdigit() else 0.0)
        if status == 416:  # there is no such rest: what is here is of another file
            part.unlink(missing_ok=True)
            raise _TryAgain("the server has no such part")
        if status not in (200, 206):
            raise InputError(f"{remote.url} cannot be fetched: the server answers {status}. "
                             f"{remote.instead}".strip())
        # A weak ETag says "much the same", which does not do for half a file.
        now = next((value for value in (answer.headers.get("ETag"),
                                        answer.headers.get("Last-Modified"))
                    if value and not value.startswith("W/")), None)
        rest = status == 206 and now == version and answer.headers.get(
            "Content-Range", "").startswith(f"bytes {size}-")
        if status == 206 and not rest:
            part.unlink(missing_ok=True)
            raise _TryAgain("the server gives another part than it was asked for")
        bar.n = size if rest else 0
        bar.refresh()
        write_json(_aside(part), {"version": now})
        with open(part, "ab" if rest else "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > remote.bytes:
                    return


# --- a profile's needs ---------------------------------------------------------------------------


def fetch_cells(profile: Profile) -> Path | None:
    """The profile's cells, fetched and checked if it takes them by a name of the manifest."""
    listed = manifest.entry("cells", profile.cells)
    if listed is None:
        return None
    path = cells_path(profile, ROOT)
    assert path is not None
    return fetch(Remote(str(listed["url"]), int(listed["bytes"]), str(listed["sha256"]),
                        f"Or fetch {listed['url']} in another way and put its path under `cells` "
                        "in the profile."), path)


def fetch_model(profile: Profile) -> list[Path]:
    """Folders of the profile's model and tokenizer in the Hugging Face cache, fetched if need be.

    Only safetensors, configuration and tokenizer files are fetched; HF_HOME, HF_HUB_OFFLINE and
    HF_ENDPOINT hold. A folder named in the profile is left alone.

    Raises:
        InputError: a model that cannot be had, or one without safetensors.
    """
    found = []
    for name in dict.fromkeys((profile.model, profile.tokenizer)):
        if name == "train" or Path(name).expanduser().exists():
            continue
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=profile.model_revision,
                                            allow_patterns=MODEL_FILES))
        except Exception as error:  # huggingface_hub raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise InputError(f"{name!r} cannot be fetched from Hugging Face ({reason}); check the "
                             "name and `model_revision` in the profile and the network, or name a "
                             "folder that holds it.") from None
        if name == profile.model and not any(folder.glob("*.safetensors")):
            raise InputError(f"The model {name!r} has no safetensors weights at this revision, and "
                             "others are not read, as they can run code; convert it first.")
        found.append(folder)
    return found


def fetch_gene_sets(profile: Profile) -> list[str]:
    """The profile's libraries as `gene_sets` finds or fetches them; returns its warnings."""
    from scfm_circuits.enrichment.gene_sets import load_library

    return [one.warning for name in profile.libraries
            if (one := load_library(name, profile.gene_sets)).warning]


def main(given: Sequence[str] | None = None) -> int:
    """Fetch a profile's cells, model and gene sets; 0 on success, 1 on an explained error."""
    from scfm_circuits.common.profile import add_profile_arguments, parse_overrides

    parser = argparse.ArgumentParser(prog="scfm_circuits.book.downloads", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_profile_arguments(parser)
    arguments = parser.parse_args(given)
    try:
        profile = load_profile(arguments.profile, parse_overrides(arguments.parameters))
        cells = fetch_cells(profile)
        folders = fetch_model(profile)
        warnings = fetch_gene_sets(profile)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what is there so far is kept, run the same command again to go on.",
              file=sys.stderr)
        return 130
    for what, where in (("Cells", [cells] if cells else []), ("Model and tokenizer", folders)):
        for one in where:
            with contextlib.suppress(ValueError):
                one = one.relative_to(ROOT)
            print(f"{what}: {one}")
    print(f"Gene sets: {', '.join(profile.libraries)}.")
    for warning in warnings:
        print(warning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
