"""The files that set the project up agree with each other and with what is imported."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scfm_circuits.book import pages
from scfm_circuits.book.chapters import NOTEBOOKS, Notebook, read_notebooks

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    """Package and version of each line of a lock; anything but `==` fails."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("-c "):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def imported() -> set[str]:
    """Top-level packages imported by the package, the notebooks and the book's extensions."""
    names: set[str] = set()
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "notebooks").glob("*.py"),
             *(ROOT / "book" / "_ext").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"scfm_circuits"}


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_every_dependency_is_pinned_in_the_lock(text: str) -> None:
    requirement = Requirement(text)
    locked = pins("requirements.lock")
    name = canonicalize_name(requirement.name)
    assert name in locked, f"{name} is not in requirements.lock"
    assert requirement.specifier.contains(Version(locked[name]))


@pytest.mark.parametrize("text", PROJECT["optional-dependencies"]["dev"])
def test_every_test_tool_is_pinned(text: str) -> None:
    requirement = Requirement(text)
    locked = pins("requirements-dev.lock")
    assert requirement.specifier.contains(Version(locked[canonicalize_name(requirement.name)]))


def test_no_package_is_pinned_twice() -> None:
    assert not set(pins("requirements.lock")) & set(pins("requirements-dev.lock"))


def test_progress_is_shown_as_text() -> None:
    """`tqdm.auto` makes widgets in a notebook, whose page then fetches scripts from other hosts: no
    book could be built of cells that are read in several chunks."""
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    assert len(sources) > 100
    assert not [path.name for path in sources
                if re.search(r"tqdm\.(auto|notebook|autonotebook)|tqdm_notebook",
                             path.read_text(encoding="utf-8"))]


def test_what_is_imported_is_declared() -> None:
    wanted = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["filters"])
    declared = {canonicalize_name(Requirement(text).name) for text in wanted}
    declared.add(canonicalize_name("triton"))  # comes with torch for a GPU; done without elsewhere
    distributions = packages_distributions()
    undeclared = [
        name for name in sorted(imported())
        if not declared & {canonicalize_name(d) for d in distributions.get(name, [name])}
    ]
    assert not undeclared


def test_pins_that_have_a_reason() -> None:
    locked = pins("requirements.lock")
    # Jupyter Book 2 fetches its theme at build time; later ipykernels warn in every notebook.
    assert Version(locked["jupyter-book"]) < Version("2")
    assert locked["ipykernel"] == "7.2.0"
    assert Version(locked["sphinx"]) < Version("8")


def test_conda_environment_delegates_to_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-r requirements.lock"]
    assert {re.split("[=<> ]", item)[0] for item in conda} == {"python", "make", "pip"}
    version = next(item for item in conda if item.startswith("python")).split("=")[-1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)


def test_make_says_when_there_is_no_python(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["make", "-C", str(ROOT), f"{tmp_path}/venv/bin/python", f"VENV={tmp_path}/venv",
         "PYTHON=no-such-python"], capture_output=True, text=True,
    )
    assert answer.returncode != 0
    assert "Python 3.11 or newer is needed" in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_make_hands_overrides_on() -> None:
    answer = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "book", "PROFILE=smoke", "PARAMS=seed=1 fdr=0.1"],
        capture_output=True, text=True, check=True,
    )
    assert 'book --profile "$PROFILE" --params="$PARAMS"' in answer.stdout


@pytest.mark.parametrize("name", ["PARAMS", "PROFILE", "H5AD", "OUT"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_make_hands_on_what_was_typed(name: str, by: str) -> None:
    text = "seed=1 'case_type=CD14$^+$ \"Mono\" `cyte` $x $(shell echo no) $$ #1 \\'"
    given = [f"{name}={text}"] * (by == "argument")
    answer = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "profile", "READY=", f"RUN=printenv {name}; true", *given],
        capture_output=True, text=True, check=True,
        env=os.environ | ({name: text} if by == "environment" else {}))
    assert answer.stdout == f"{text}\n"


@pytest.mark.parametrize("given", ["seed=1", "profile=smoke", "PROFIL=smoke"])
def test_make_passes_over_no_name(given: str) -> None:
    """Else `make book seed=1` would make the book of the default profile."""
    answer = subprocess.run(["make", "-n", "-C", str(ROOT), "book", given, "PARAMS=fdr=0.1"],
                            capture_output=True, text=True)
    assert answer.returncode != 0 and "scfm_circuits" not in answer.stdout
    assert f"make takes no {given.split('=')[0]}=; a field of the profile goes into PARAMS" in (
        answer.stderr)


@pytest.mark.parametrize("given", ["PROFILE=a b", "PROFILE=a'; echo b", "PROFILE=", "JOBS="])
def test_clean_needs_no_environment(tmp_path: Path, given: str) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("results/demo", "results/a", "book/_build", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    broken = tmp_path / ".venv" / "bin" / "python"
    broken.write_text("no program")
    broken.chmod(0o755)
    answer = subprocess.run(
        ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "clean", given],
        capture_output=True, text=True,
    )
    left = {path.name for path in (tmp_path / "results").iterdir()}
    if given == "JOBS=":
        assert answer.returncode == 0 and left == {"a"}
        assert "Removed book/_build, results/demo.\n" in answer.stdout
    else:
        assert answer.returncode != 0 and left == {"a", "demo"}
        assert "Nothing was removed: PROFILE is" in answer.stderr
    assert (tmp_path / "book" / "_build").exists() == (given != "JOBS=")
    assert broken.exists() and not [*(tmp_path / "src").rglob("__pycache__")]


CONTRACT = {
    *(f"tables/{name}.csv" for name in (
        "table1", "table2", "l0", "live_features", "human_eval_sample", "table4", "circuit_nodes",
        "circuit_enrichment", "knock_out")),
    "figures/*.png", "figures/*.svg", "transcoders/config.yaml", "transcoders/layer_*.safetensors",
    "circuits/*.json", "claims.csv",
}
"""What scripts may rely on under `results/<profile>/`, beside the executed notebooks."""


def test_notebooks_declare_every_file_of_the_contract() -> None:
    # The gate refuses a chapter that has not written what it declares.
    declared = {pattern for notebook in read_notebooks(NOTEBOOKS) for pattern in notebook.produces}
    missing = {
        pattern for pattern in CONTRACT
        if not any(fnmatch(name, pattern) or fnmatch(pattern, name) for name in declared)
    }
    assert not missing


BOX = ["Question", "The paper says", "We find", "What it is worth"]


@pytest.mark.parametrize("notebook", [
    one for one in read_notebooks(NOTEBOOKS) if one.name[:2] not in ("11", "12")],
    ids=lambda one: one.name)
def test_a_chapter_begins_with_its_box_and_folds_whole_sections(notebook: Notebook) -> None:
    """What is found comes from the run: no number is typed there."""
    cells = jupytext.read(notebook.path).cells  # nbformat checks the tags
    box = re.search(r"```\{admonition\} In short\n:class: in-short\n(.*?)\n```", cells[0].source,
                    re.DOTALL)
    assert box, "the chapter's first cell has no box"
    parts = dict(re.findall(r"(?ms)^- \*\*(.+?)\.\*\* (.+?)(?=\n- \*\*|\Z)", box[1]))
    assert list(parts) == BOX
    found = parts["We find"]
    assert "{glue:text}" in found
    assert not re.search(r"\b\d", re.sub(r"\{[\w:]+\}`.*?`|Table \d", "", found))
    assert "Key points" not in notebook.path.read_text(encoding="utf-8")
    fold = None
    for cell in cells:
        cell.metadata.setdefault("tags", [])
        fold = pages._fold_at(cell, fold, notebook.name)


@pytest.mark.parametrize("notebook", read_notebooks(NOTEBOOKS), ids=lambda one: one.name)
def test_what_a_chapter_imports_is_there(notebook: Notebook) -> None:
    """mypy reads no notebook, and a chapter of few profiles is seldom executed."""
    imports = [node for node in ast.walk(ast.parse(notebook.path.read_text(encoding="utf-8")))
               if isinstance(node, ast.ImportFrom) and str(node.module).startswith("scfm_circuits")]
    assert imports
    for node in imports:
        exec(ast.unparse(node), {})


@pytest.mark.parametrize("notebook", read_notebooks(NOTEBOOKS), ids=lambda one: one.name)
def test_every_file_that_a_chapter_writes_says_what_it_holds(notebook: Notebook) -> None:
    """The page of downloads lists it with its caption."""
    silent = []
    for cell in jupytext.read(notebook.path).cells:
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("chapter"), attr=made)) if (
                        made in ("table", "browse", "figure")):
                    said = figure if made == "figure" else {one.arg for one in node.keywords}
                    silent += [] if "caption" in said else [ast.unparse(node.args[0])]
    assert silent == []


def test_the_neighbouring_data_folder_is_named_in_one_place() -> None:
    needle = "../" + "shared"
    folders = ["src", "notebooks", "book", "tests", "data", ".github", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")
             if path.is_file() and not {"_build", "__pycache__"} & set(path.parts)]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    naming = [path.relative_to(ROOT).as_posix() for path in files
              if needle in path.read_text(encoding="utf-8", errors="ignore")]
    assert naming == [".ci/run"]


def test_a_test_that_hangs_is_named_and_ended(tmp_path: Path) -> None:
    (tmp_path / "test_lock.py").write_text(
        "import threading\n\n\ndef test_lock():\n    lock = threading.Lock()\n"
        "    lock.acquire()\n    lock.acquire()\n\n\ndef test_other():\n    pass\n")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", "-c", str(ROOT / "pyproject.toml"),
         "-p", "conftest", "-o", "faulthandler_timeout=2", f"--rootdir={tmp_path}", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "SCFM_TESTS_NAMED_AFTER": "0.5"},
        capture_output=True, text=True, timeout=120)
    assert "Waiting for test_lock.py::test_lock" in answer.stderr
    assert "test_lock.py\", line 7 in test_lock" in answer.stderr, "where it waits"
    assert "crashed while running 'test_lock.py::test_lock'" in answer.stdout
    assert "1 failed, 1 passed" in answer.stdout and answer.returncode == 1
