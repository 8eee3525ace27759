"""The import contracts hold, and an import against them is seen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "tests" / "contracts.py"), str(folder)],
                          capture_output=True, text=True, check=False)


def test_the_contracts_hold() -> None:
    done = checked(ROOT)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(("file", "line", "said"), [
    ("cells/ranking.py", "from scfm_circuits.features.counting import fixed_bytes",
     "scfm_circuits.cells is not allowed to import scfm_circuits.features"),
    ("paper/case.py", "import scfm_circuits.circuits.circuit",
     "scfm_circuits.paper is not allowed to import scfm_circuits.circuits"),
    ("transcoders/training/gradients.py", "def late():\n    import pandas",
     "scfm_circuits.transcoders.training is not allowed to import pandas"),
    ("models/__init__.py", "from scfm_circuits.models.loading import get_model",
     "must hold a docstring and nothing else"),
])
def test_an_import_against_them_is_seen(tmp_path: Path, file: str, line: str, said: str) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "scfm_circuits" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    done = checked(tmp_path)
    assert done.returncode == 1 and said in " ".join(done.stderr.split()), done.stderr
