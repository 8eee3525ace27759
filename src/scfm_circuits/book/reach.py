"""Which sources of the package a notebook uses, read from import statements; nothing is imported.

A module is followed into whatever it imports, at its top or within a function, unless it is for a
type checker alone. In `report`, where a chapter can open everything, only the imports count of
those functions and classes that the notebook names, directly or through others of that room.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from scfm_circuits.common import kept

_PACKAGE = "scfm_circuits"
_IMPORT = re.compile(rf"^([ \t]*)from {_PACKAGE}([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)
_UNTYPED = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t]+.*\n|\n)*", re.MULTILINE)


class Piece(NamedTuple):
    """A function, a class or the top of a module: the names that it uses and what it imports."""

    names: frozenset[str]
    imports: frozenset[Path]


def sources_of(notebook: Path) -> frozenset[Path]:
    """Source files of the package that the notebook reaches."""
    files = [notebook, *(path for some in kept.rooms().values() for path in some)]
    return _sources(notebook, tuple((path, path.stat().st_mtime_ns) for path in files))


@cache
def _sources(notebook: Path, _state: tuple[tuple[Path, int], ...]) -> frozenset[Path]:
    text = notebook.read_text(encoding="utf-8")
    tree = ast.parse("\n".join(line for line in text.splitlines()
                               if not line.startswith(("%", "!"))))
    names, found, left = _names(tree), set[Path](), [*_imports(text)]
    while left:
        while left:
            path = left.pop()
            if path not in found:
                found.add(path)
                left += [] if _in_report(path) else _imported(path, path.stat().st_mtime_ns)
        # What is named in `report` may name more there, and import more.
        for path in filter(_in_report, sorted(found)):
            for name, piece in _pieces(path, path.stat().st_mtime_ns):
                if name in names or name.startswith("__"):
                    more = not (piece.names <= names and piece.imports <= found)
                    names |= piece.names
                    left += [path, *piece.imports] if more else []
    return frozenset(found)


def words_of(files: Iterable[Path]) -> set[str]:
    """Every word in the files that are there, in code and beside it."""
    return set().union(*(_words(path, path.stat().st_mtime_ns) for path in files if path.is_file()))


@cache
def _words(path: Path, _changed: int) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", path.read_text(encoding="utf-8", errors="replace")))


def _in_report(path: Path) -> bool:
    return kept.room_of(path) == "report"


@cache
def _imported(path: Path, _changed: int) -> list[Path]:
    return list(_imports(path.read_text(encoding="utf-8")))


def _imports(text: str) -> Iterator[Path]:
    """What a text imports from the package. By pattern, as parsing every module takes a second."""
    for _, module, names in _IMPORT.findall(_UNTYPED.sub("", text)):
        named = re.sub(r"#.*", "", names).strip("() \n").split(",")
        yield from _files(module, (name.split()[0] for name in named if name.strip()))


def _files(module: str, names: Iterable[str]) -> Iterator[Path]:
    """The files behind `from scfm_circuits<module> import <names>`."""
    folder = kept.PACKAGE.joinpath(*module.strip(".").split(".")) if module else kept.PACKAGE
    for path in (folder.with_suffix(".py") if module else folder, folder / "__init__.py",
                 *(folder / f"{name}.py" for name in names)):
        if path.is_file():
            yield path


@cache
def _pieces(path: Path, _changed: int) -> list[tuple[str, Piece]]:
    """The functions, methods and classes of a module by name, with the imports that each uses.

    Special methods, as `__init__`, are called without being named.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {alias.asname or alias.name: node for node in tree.body
           if isinstance(node, ast.ImportFrom) for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            # A class's own body; its methods are pieces of their own.
            parts = node.body if isinstance(node, ast.FunctionDef) else [
                *node.bases, *(one for one in node.body if not isinstance(one, ast.FunctionDef))]
            names = frozenset().union(*(_names(part) for part in parts))
            used = [one for part in parts for one in ast.walk(part)
                    if isinstance(one, ast.ImportFrom)] + [top[name] for name in names & {*top}]
            files = frozenset(file for one in used if (one.module or "").startswith(_PACKAGE)
                              for file in _files((one.module or "")[len(_PACKAGE):],
                                                 [alias.name for alias in one.names]))
            found.append((node.name, Piece(names, files)))
    return found


def _names(tree: ast.AST) -> set[str]:
    """Names and attributes that occur in the code."""
    return {one.id if isinstance(one, ast.Name) else one.attr for one in ast.walk(tree)
            if isinstance(one, ast.Name | ast.Attribute)}
