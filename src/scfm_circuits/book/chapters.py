"""Which notebooks of a run are stale, and why.

A notebook is stale when anything its outputs depend on has changed since it was executed:

1. its own source (content, or a newer modification time, as with make);
2. a room of the package that it uses (`reach`), the lock, the cells, and of all else only what it
   reads: the profile's fields that its sources name, the files of those modules that it uses
   (`files_read`), the gene sets that its header names (`libraries`);
3. the execution of a notebook it follows (`after` in its header);
4. a result that it wrote or read again and that is no longer there, or has another size.

What was used is recorded in the executed notebook itself (`metadata.scfm`). Nothing heavy is
imported here, so an up-to-date book answers at once.
"""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits import InputError
from scfm_circuits.book import reach
from scfm_circuits.cells.dictionaries import FILES, dictionary_file
from scfm_circuits.common import kept, manifest
from scfm_circuits.common.files import (
    digest,
    lost_file,
    read_json,
    sha256_of_file,
    size_of_file,
)
from scfm_circuits.common.profile import ROOT, Profile, cells_path, load_profile, located
from scfm_circuits.common.profile_files import parse_overrides

NOTEBOOKS = ROOT / "notebooks"
SHOWN = {"name", "title", "seed", "cells_are", "cells_name"}
"""Profile fields that every page shows."""
_CHECKED = {"profile", "profile_files"}
"""Files of `common` that name fields only to define and check them."""
CACHED = "gene-set cache"
"""The kind of input that a notebook may make itself, by a download."""
LARGE = 2**25
"""Bytes from which a file's size and time stand for its content."""


@dataclass(frozen=True)
class Notebook:
    """A percent notebook of the book and what its header declares under `scfm`."""

    path: Path
    after: tuple[str, ...]
    """Names of the notebooks whose results it uses; without `after`, all before it."""
    produces: tuple[str, ...] = ()
    """Files it has to leave under `results/<profile>/`, as glob patterns."""
    exhibits: str = ""
    """The paper's exhibits it reproduces, for the exhibit map."""
    modules: tuple[str, ...] = ()
    """The package's modules that do its work, for the exhibit map."""
    libraries: tuple[str, ...] = ()
    """The gene-set libraries it reads: their names, or profile fields that hold them."""
    page: str = ""
    """The name of its page, which is its own unless the header says another."""
    applies: str = ""
    """The field or property of a profile that must be true, or not empty, for its book to have this
    chapter; every book has one without."""

    @property
    def name(self) -> str:
        """Its file's name without the ending."""
        return self.path.stem

    @property
    def title(self) -> str:
        """Its first level-one heading, or its name."""
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if line.startswith("# # "):
                return line.removeprefix("# # ").strip()
        return self.name


@dataclass(frozen=True)
class Run:
    """One profile with its overrides."""

    profile_name: str
    overrides: Mapping[str, Any]
    profile: Profile
    notebooks: tuple[Notebook, ...]

    def command(self, target: str) -> str:
        """`make` with this run's profile and overrides, as one types it in a shell."""
        words = ["make", target]
        if self.profile_name != "demo":
            words.append(shlex.quote(f"PROFILE={self.profile_name}"))
        pairs = " ".join(shlex.quote(_pair(*item)) for item in self.overrides.items())
        if pairs:
            words.append('PARAMS="' + re.sub(r'[\\"`$]', r"\\\g<0>", pairs) + '"')
        return " ".join(words)

    def output(self, name: str) -> Path:
        """Where the executed notebook stands."""
        return self.profile.results / "notebooks" / f"{name}.ipynb"


def _pair(key: str, value: Any) -> str:
    """`key=value` as `parse_overrides` reads it, without quotation marks where it needs none."""
    if isinstance(value, str) and value.isprintable():
        with contextlib.suppress(InputError):
            if parse_overrides([f"{key}={value}"], Profile.model_fields) == {key: value}:
                return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def load_run(profile_name: str, overrides: Mapping[str, Any] | None = None) -> Run:
    """Check profile, overrides and notebooks; InputError before anything is executed."""
    overrides = dict(overrides or {})
    profile = load_profile(profile_name, overrides)
    return Run(profile_name, overrides, profile, of_profile(read_notebooks(NOTEBOOKS), profile))


def of_profile(notebooks: Iterable[Notebook], profile: Profile) -> tuple[Notebook, ...]:
    """The chapters that the profile's book has; none of them follows one that it lacks."""
    found = [one for one in notebooks if not one.applies or getattr(profile, one.applies)]
    names = {one.name for one in found}
    return tuple(replace(one, after=tuple(name for name in one.after if name in names))
                 for one in found)


def read_notebooks(folder: Path) -> Iterator[Notebook]:
    """The folder's notebooks in reading order, which is that of their names."""
    before: list[str] = []
    paths = sorted(folder.glob("[0-9]*.py"))
    if not paths:
        raise InputError(f"There are no notebooks in {folder} (names start with a number).")
    for path in paths:
        yield _read_header(path, tuple(before))
        before.append(path.stem)


def _read_header(path: Path, before: tuple[str, ...]) -> Notebook:
    """`scfm` of the jupytext header, a YAML block in comments between two lines `# ---`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header: Any = {}
    if lines and lines[0].strip() == "# ---" and "# ---" in lines[1:]:
        block = lines[1 : lines.index("# ---", 1)]
        try:
            header = yaml.safe_load("\n".join(line.removeprefix("#")[1:] for line in block))
        except yaml.YAMLError:
            raise InputError(f"The header of {path} is not valid YAML; check its syntax.") from None
    if not any(line.startswith("# %%") and '"parameters"' in line for line in lines):
        raise InputError(
            f'{path} has no cell tagged "parameters"; start one with `# %% tags=["parameters"]`.'
        )
    own = ((header or {}).get("jupyter") or {}).get("scfm") or {}
    unknown = set(own) - {field.name for field in fields(Notebook)[1:]}
    if unknown:
        raise InputError(f"The header of {path} has the unknown key scfm.{min(unknown)}.")
    declared: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    found = Notebook(path, **{"after": before, "page": path.stem, **declared})
    if found.applies and found.applies not in {*Profile.model_fields, *dir(Profile)}:
        raise InputError(f"The header of {path} says scfm.applies: {found.applies}, which is no "
                         "field or property of a profile.")
    for name in found.after:
        if name not in before:
            raise InputError(
                f"The header of {path} says it comes after {name!r}, "
                "which is no notebook before it."
            )
    return found


def _hash_files(paths: Iterable[Path]) -> str:
    """Names and contents of the files that are there, `none` without any."""
    lines = [f"{path.name}\0{_state(path, path.stat().st_size, path.stat().st_mtime_ns)}\n"
             for path in sorted(paths, key=lambda path: path.name) if path.is_file()]
    return digest("".join(lines)) if lines else "none"


@cache
def _state(path: Path, size: int, changed: int) -> str:
    return sha256_of_file(path) if size < LARGE else f"{size} {changed}"


def libraries_asked_for(notebook: Notebook, profile: Profile) -> list[str]:
    """The gene-set libraries that the notebook's header declares."""
    names: set[str] = set()
    for name in notebook.libraries:
        value = getattr(profile, name) if name in Profile.model_fields else name
        names |= {value} if isinstance(value, str) else set(value)
    return sorted(names)


def gene_set_inputs(run: Run, notebook: Notebook) -> dict[str, str]:
    """The libraries that the notebook asks for: those in folders and the bundled one, which may
    stand in; and those in the cache that no folder hides.

    Only its own: a library that a later chapter downloads must not make earlier ones stale.
    """
    names = libraries_asked_for(notebook, run.profile)
    folders = manifest.gene_set_folders(run.profile.gene_sets)
    found = {name: next((path for folder in folders if (path := folder / f"{name}.gmt").is_file()),
                        None) for name in names}
    bundled = ROOT.glob("data/gene-sets/*") if names else ()
    cached = [manifest.gene_set_cache() / f"{name}.gmt" for name, path in found.items()
              if path is None]
    return {"gene sets": _hash_files([*filter(None, found.values()), *bundled]),
            CACHED: _hash_files(cached)}


def files_read(profile: Profile) -> dict[str, tuple[set[str], list[Path]]]:
    """Files that some chapters read, by the word used when they have changed: the modules that read
    them, and the files."""
    named = {field: [located(field, path)] if path is not None else [] for field, path in (
        ("gene_groups", profile.gene_groups), ("case_sentence", profile.case_sentence))}
    return {
        "the paper's tables": ({"paper/exhibits.py", "interpretability/score_checks.py"},
                               [*ROOT.glob("data/paper/*")]),
        "rating sheets": ({"interpretability/ratings.py"}, [*ROOT.glob("data/human_eval/*.csv")]),
        "claims": ({"paper/claims.py"}, [ROOT / "data" / "claims.yml"]),
        "gene groups": ({"interpretability/scores.py"}, named["gene_groups"]),
        "case sentence": ({"circuits/case_study.py"}, named["case_sentence"]),
        "dictionaries": ({"cells/dictionaries.py"}, [
            path for field in FILES if (path := dictionary_file(profile, field)) is not None]),
    }


def inputs_of(run: Run, notebook: Notebook) -> dict[str, str]:
    """Hash of each kind of input that the notebook's outputs depend on, by the word used when it
    has changed; and the modification time of its own source."""
    profile, used = run.profile, reach.sources_of(notebook.path)
    modules = {path.relative_to(kept.PACKAGE).as_posix() for path in used}
    read = {word: files for word, (readers, files) in files_read(profile).items()
            if readers & modules}
    # A field's name may also stand in a table, as in that of the paper's settings.
    words = reach.words_of([notebook.path, *(file for files in read.values() for file in files),
                            *(path for path in used if path.stem not in _CHECKED)])
    fields = {field: value for field, value in profile.model_dump(mode="json").items()
              if field in words | SHOWN}
    asked = [("cells", profile.cells), ("models", manifest.model_name(
        profile.model, profile.model_subfolder)), *(
        ("gene_sets", name) for name in libraries_asked_for(notebook, profile))]
    cells = cells_path(profile)
    return {
        **source_inputs(notebook),
        "profile": digest(json.dumps(fields, sort_keys=True)),
        "lock": _hash_files([ROOT / "requirements.lock"]),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "data/manifest.yml": digest(json.dumps(
            [manifest.entry(*one) for one in asked], sort_keys=True, default=str)),
        "cells": _hash_files([cells] if cells is not None else []),
        **{word: _hash_files(files) for word, files in read.items()},
        **gene_set_inputs(run, notebook),
    }


def read_again(run: Run) -> Run:
    """The run with its profile as the files now say."""
    return replace(run, profile=load_profile(run.profile_name, run.overrides))


def read_record(path: Path) -> dict[str, Any]:
    """What an executed notebook says about its execution; nothing without a readable one."""
    try:
        record = read_json(path)["metadata"]["scfm"]
    except (KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) and "run_id" in record else {}


def source_inputs(notebook: Notebook) -> dict[str, str]:
    """Hash and modification time of the notebook's own source, and hashes of what it uses of the
    package: whole rooms, and of `report`, which every chapter uses, the files."""
    used = reach.sources_of(notebook.path)
    wanted = {kept.COMMON, *map(kept.room_of, used)}
    rooms = {f"package ({room})": kept.sources_hash(
        files if room != "report" else [file for file in files if file in used])
        for room, files in kept.rooms().items() if room in wanted}
    return {"notebook": digest(notebook.path.read_bytes()),
            "touched": str(notebook.path.stat().st_mtime_ns), **rooms}


def changed_inputs(run: Run, notebook: Notebook, record: Mapping[str, Any]) -> list[str]:
    """The kinds of input that are not what the notebook's execution record says."""
    used, now = record.get("inputs", {}), inputs_of(run, notebook)
    touched = now.pop("touched")
    changed = [kind for kind, value in now.items() if used.get(kind) != value]
    if "notebook" not in changed and int(touched) > int(used.get("touched", 0)):
        changed.insert(0, "notebook touched")
    return changed


def why_stale(run: Run, notebook: Notebook, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the notebook has to be executed, or an empty string.

    records: the execution records of the notebooks before it that are fresh.
    """
    record = read_record(run.output(notebook.name))
    if not record:
        return "not executed yet"
    changed = changed_inputs(run, notebook, record)
    if changed:
        return changed[0] if changed[0] == "notebook touched" else f"{changed[0]} changed"
    for name in notebook.after:
        if name not in records or record.get("after", {}).get(name) != records[name]["run_id"]:
            return f"follows {name}"
    return lost_file(run.profile.results, record.get("files", {}), size_of_file)


def plan(run: Run) -> list[tuple[Notebook, str]]:
    """The stale notebooks in order, each with the reason."""
    records: dict[str, Mapping[str, Any]] = {}
    stale = []
    for notebook in run.notebooks:
        reason = why_stale(run, notebook, records)
        if reason:
            stale.append((notebook, reason))
        else:
            records[notebook.name] = read_record(run.output(notebook.name))
    return stale
