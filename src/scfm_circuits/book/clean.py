"""`make clean`: remove the built book, caches and the results of one profile, and say what.

A program by itself (`python -m scfm_circuits.book.clean PROFILE`) that needs nothing but Python, as
it is wanted where the environment is missing or broken.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from scfm_circuits import InputError
from scfm_circuits.common.files import LOCK, only_one, owner_of

ROOT = Path(__file__).resolve().parents[3]
MADE = ("book/_build", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")
"""What others make again, and nobody else looks into."""
RUNS = "+*"
"""Ends the name of a profile whose runs with PARAMS are meant."""


def clean(profile: str, root: Path = ROOT) -> list[str]:
    """Remove what is named and can be made again; returns a line for each thing said.

    profile: its name or the path of its file; `NAME+*` means its runs with PARAMS. Raises
    InputError, and has removed nothing, if it is neither or the results are those of another file;
    and, after the rest has been removed, for what another run holds.
    """
    results = root / Path(os.environ.get("SCFM_RESULTS") or "results").expanduser()
    folders = _results(profile, results, root)
    caches = [path for name in ("src", "tests", "book")
              for path in sorted((root / name).rglob("__pycache__"))]
    removed, held = [], []
    for path in (*(root / name for name in MADE), *folders):
        if not path.exists() and not path.is_symlink():
            continue
        try:
            with _held(path):
                _remove(path)
            removed.append(_shown(path, root))
        except InputError as error:
            held.append(f"{_shown(path, root)} stays: {error}")
        except OSError as error:
            held.append(f"{_shown(path, root)} stays: it cannot be removed ({error.strerror}).")
    for path in caches:
        shutil.rmtree(path, ignore_errors=True)
    removed += ["Python's caches"] if caches else []
    said = [f"Removed {', '.join(removed)}." if removed else "There was nothing to remove."]
    name = folders[0].name if folders and not profile.endswith(RUNS) else ""
    others = sorted(path.name for path in results.glob(f"{name}+*")) if name else []
    if others and "+" not in name:
        said.append(f"Runs with PARAMS stay: {', '.join(others)}; remove them by their names, or "
                    f"all with `make clean PROFILE='{name}{RUNS}'`.")
    if held:
        raise InputError("\n".join([*said, *held]))
    return said


def _results(profile: str, results: Path, root: Path) -> list[Path]:
    """The folders of results that are meant, whether they are there or not."""
    is_file = profile.endswith((".yml", ".yaml"))
    name = Path(profile).stem if is_file else profile.removesuffix(RUNS)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise InputError(f"Nothing was removed: PROFILE is {profile!r}; give the name of one "
                         "profile, such as demo, or the path of its .yml file.")
    owner = owner_of(results / name, root)
    if is_file and owner is not None and owner.resolve() != (root / profile).resolve():
        raise InputError(f"Nothing was removed: {results / name} holds the results of {owner}, not "
                         f"of {profile}; `make clean PROFILE={name}` removes them all the same.")
    return sorted(results.glob(f"{name}{RUNS}")) if profile.endswith(RUNS) else [results / name]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the folder and every one in it that a run may hold; InputError if one does."""
    with contextlib.ExitStack() as stack:
        for folder in sorted({path, *(lock.parent for lock in path.rglob(LOCK))}):
            stack.enter_context(only_one(folder, "removing"))
        yield


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one.

    Its name is free at once: a run that begins meanwhile finds all or nothing.
    """
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)  # of a removal that was cut short
    path.rename(aside)
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside)


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def main(given: Sequence[str]) -> int:
    """Clean for one profile; returns the exit status."""
    try:
        print("\n".join(clean(given[0] if given else "demo")))
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
