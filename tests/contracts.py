"""The import contracts of pyproject.toml, and that a room's `__init__.py` holds its docstring only.

    python tests/contracts.py [FOLDER]     # of the project; by default this one

Prints nothing but what is broken; the exit status is 1 then.
"""

import ast
import contextlib
import io
import os
import sys
from pathlib import Path

from importlinter.application.use_cases import FAILURE, lint_imports
from importlinter.configuration import configure


def talkative_rooms(package: Path) -> list[str]:
    """The rooms whose `__init__.py` holds more than a docstring; also a folder without one."""
    found = []
    for folder in sorted({path.parent for path in package.rglob("*.py")} - {package}):
        file = folder / "__init__.py"
        body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
        if len(body) != 1 or ast.get_docstring(ast.Module(body, [])) is None:
            found.append(str(file))
    return found


def broken(root: Path) -> str:
    """What the project at `root` breaks, as text; empty if nothing."""
    configure()
    said = io.StringIO()
    before, path = Path.cwd(), list(sys.path)
    os.chdir(root)
    sys.path.insert(0, str(root / "src"))
    try:
        with contextlib.redirect_stdout(said):
            status = lint_imports(config_filename="pyproject.toml", cache_dir=None)
    finally:
        os.chdir(before)
        sys.path[:] = path
    rooms = [f"{one} must hold a docstring and nothing else."
             for one in talkative_rooms(root / "src" / "scfm_circuits")]
    return "\n".join([*([said.getvalue()] if status == FAILURE else []), *rooms])


if __name__ == "__main__":
    found = broken(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1])
    if found:
        sys.exit(found)
