"""Results that are kept: read if they are current, else made and kept.

A result is current if it bears the stamp of what it would now be made from (`stamp_of`): fields of
the profile, the sources of rooms, versions of libraries, and whatever else its maker names. A room
is a folder of the package; a file beside the folders belongs to `common`. What is kept is a file of
arrays, or a folder with a record in it, which lists the other files. It counts only if it is whole;
where it is not, a line says so, and it is made again.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scfm_circuits.common.files import (
    atomic_path,
    digest,
    files_of,
    first_line,
    flush,
    in_turn,
    lost_file,
    note,
    read_json,
    sha256_of_file,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    from scfm_circuits.common.profile import Profile

PACKAGE = Path(__file__).resolve().parents[1]
COMMON = "common"
Stamp = dict[str, Any]
Made = TypeVar("Made")


def room_of(path: Path) -> str:
    """The room that a source file of the package belongs to."""
    inside = path.parts[len(PACKAGE.parts):]
    # The one program only calls what others do.
    return inside[0] if len(inside) > 1 else "book" if path.stem == "__main__" else COMMON


def rooms() -> dict[str, list[Path]]:
    """The source files of every room, wherever in it they are."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(room_of(path), []).append(path)
    return found


def sources_hash(paths: Iterable[Path]) -> str:
    """A short hash of source files and of their places in the package."""
    return digest("".join(f"{path.relative_to(PACKAGE).as_posix()}\0"
                          f"{_sha256(path, path.stat().st_mtime_ns, path.stat().st_size)}\n"
                          for path in sorted(paths)))


@cache
def _sha256(path: Path, _changed: int, _size: int) -> str:
    return sha256_of_file(path)


@cache
def room_hash(room: str) -> str:
    """A short hash of a room's sources, or of a file or folder in it, as this process has them.

    room: such as `cells`, `transcoders/training` or `features/baselines`. Raises KeyError if there
    is no such thing.
    """
    paths = rooms().get(room) or [path for place in (PACKAGE / room, PACKAGE / f"{room}.py")
                                  for path in (place, *place.rglob("*.py")) if path.is_file()]
    if not paths:
        raise KeyError(room)
    return sources_hash(paths)


def stamp_of(profile: "Profile", fields: Iterable[str], rooms: Iterable[str] = (), **more: Any
             ) -> Stamp:
    """What a result depends on: fields of the profile, sources of rooms, versions of libraries.

    rooms: folders of the package (`transcoders/training`) or files in them, without `.py`;
    `common` counts always. more: what else, such as another result's stamp. All of it is as JSON
    gives it back, so that it equals what a record holds.
    """
    values = {field: getattr(profile, field) for field in fields}
    sources = {room: room_hash(room) for room in {COMMON, *rooms}}
    # A new release of these may give other numbers from the same sources.
    versions = {name: version(name) for name in ("numpy", "tokenizers", "torch", "transformers")}
    found = {"fields": values, "sources": sources, "versions": versions, **more}
    return dict(json.loads(json.dumps(found, sort_keys=True)))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a kept folder, when all else is there: `record`, with its `stamp`, and
    the hashes of the folder's other files."""
    files = {one.relative_to(path.parent).as_posix(): sha256_of_file(one)
             for one in files_of(path.parent) if one != path}
    write_json(path, {**record, "files": files})


def read_record(path: Path, stamp: Stamp) -> dict[str, Any] | None:
    """The record of a kept folder; None if it bears another stamp or the folder is not whole."""
    if not path.parent.is_dir():
        return None
    record = read_json(path)
    if record and record.get("stamp") != stamp:
        return None
    lost = (lost_file(path.parent, record["files"], sha256_of_file) if "files" in record
            else f"{path.name} cannot be read")
    if lost:
        say_not_whole(path.parent, lost)
        return None
    note(path.parent)
    return record


def say_not_whole(path: Path, reason: str) -> None:
    """The line about a kept file or folder that cannot be used though it is current."""
    print(f"{os.path.relpath(path)} is not whole ({reason}); it is made again.", flush=True)


def read_arrays(path: Path, stamp: Stamp) -> "dict[str, np.ndarray] | None":
    """The arrays of an .npz file; None if it is missing or broken or bears another stamp."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored) if json.loads(str(stored["stamp"])) == stamp else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say_not_whole(path, first_line(error))
        return None


def write_arrays(path: Path, stamp: Stamp, arrays: Mapping[str, Any]) -> None:
    """Write what `read_arrays` reads."""
    import numpy as np

    found = {name: np.asarray(one) for name, one in arrays.items()}
    # Compressing gigabytes takes longer than making them.
    large = sum(one.nbytes for one in found.values()) > 2**28
    with atomic_path(path) as temporary:
        (np.savez if large else np.savez_compressed)(
            temporary, stamp=np.array(json.dumps(stamp)), allow_pickle=False, **found)
        flush(temporary)


def if_current(path: Path, stamp: Stamp, made_of: "Callable[[dict[str, np.ndarray]], Made]"
               ) -> Made | None:
    """`made_of` the arrays at `path` if they bear the stamp, else None.

    made_of: may raise KeyError and ValueError for a file that is not whole.
    """
    stored = read_arrays(path, stamp)
    if stored is None:
        return None
    try:
        made = made_of(stored)
    except (KeyError, ValueError) as error:
        say_not_whole(path, first_line(error))
        return None
    note(path)
    return made


def kept_arrays(path: Path, stamp: Stamp, make: Callable[[], Made],
                arrays_of: Callable[[Made], Mapping[str, Any]],
                made_of: "Callable[[dict[str, np.ndarray]], Made]") -> Made:
    """`if_current`, or else what `make` gives, kept at `path` as `arrays_of` it.

    Another process that makes the same is waited for, and what it has made is read.
    """
    made = if_current(path, stamp, made_of)
    if made is not None:
        return made
    with in_turn(path) as waited:
        made = if_current(path, stamp, made_of) if waited else None
        if made is None:
            made = make()
            write_arrays(path, stamp, arrays_of(made))
        return made
