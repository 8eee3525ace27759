"""Which chapters a change in a room, in the profile or in a file makes stale."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scfm_circuits.book import chapters, reach
from scfm_circuits.book.chapters import (
    NOTEBOOKS,
    Notebook,
    Run,
    files_read,
    inputs_of,
    load_run,
    read_notebooks,
    source_inputs,
)
from scfm_circuits.common import kept, manifest
from scfm_circuits.common import profile as profiles
from scfm_circuits.common.profile import ROOT, Profile

TRACE = """from typing import TYPE_CHECKING
from scfm_circuits.features import statistics
if TYPE_CHECKING:

    from scfm_circuits.paper import claims
"""
CHAPTER = """from scfm_circuits.report.report import Report
class Chapter(Report):
    @property
    def statistics(self):
        from scfm_circuits.features.statistics import get
        return get()
    @property
    def baselines(self):
        return other(self.statistics)
    def circuit(self):
        from scfm_circuits.circuits import trace
def other(x):
    from scfm_circuits.enrichment.controls.tables import y
"""
STATISTICS = """def get():
    from scfm_circuits.cells.reading import (
        read,  # cells (all)
    )
"""
SOURCES = {
    "__init__": "", "common/files": "", "cells/reading": "from scfm_circuits.common import files",
    "features/statistics": STATISTICS, "circuits/trace": TRACE, "paper/claims": "",
    "enrichment/__init__": "", "enrichment/controls/tables": "", "report/chapter": CHAPTER,
    "report/report": "def table():\n    pass\nclass Report:\n    pass\n", "book/cli": "",
    "report/plots/circuits": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(kept, "PACKAGE", tmp_path / "package")
    return tmp_path / "package"


OPENS = "from scfm_circuits.report.chapter import Chapter\nchapter = Chapter()\n"
CHAPTERS = {
    "01_cells": "%matplotlib inline\nfrom scfm_circuits.cells.reading import read\n" + OPENS,
    "02_features": OPENS + "chapter.statistics.live()\n",
    "03_controls": OPENS + "chapter.baselines\n",
    "04_circuits": "from scfm_circuits.circuits import trace as t\n" + OPENS
                   + "from scfm_circuits.report.plots import circuits\n",
    "05_ledger": "from scfm_circuits.paper.claims import ledger\n" + OPENS,
}


@pytest.mark.parametrize(("changed", "stale"), [
    ("common/files", list(CHAPTERS)), ("__init__", list(CHAPTERS)), ("book/cli", []),
    ("cells/reading", ["01_cells", "02_features", "03_controls", "04_circuits"]),
    ("features/statistics", ["02_features", "03_controls", "04_circuits"]),
    ("enrichment/controls/tables", ["03_controls"]), ("enrichment/new", ["03_controls"]),
    ("circuits/trace", ["04_circuits"]), ("paper/claims", ["05_ledger"]),
    ("report/plots/circuits", ["04_circuits"]), ("report/report", list(CHAPTERS)),
])
def test_a_change_in_a_room_reaches_the_chapters_that_use_it(
        package: Path, tmp_path: Path, changed: str, stale: list[str]) -> None:
    notebooks = []
    for name, text in CHAPTERS.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        notebooks.append(Notebook(path, ()))
    before = [source_inputs(one) for one in notebooks]
    (package / f"{changed}.py").write_text(SOURCES.get(changed, "") + "\nx = 1\n")
    assert [one.name for one, old in zip(notebooks, before, strict=True)
            if source_inputs(one) != old] == stale


def test_what_the_real_chapters_use() -> None:
    rooms = {one.name: {kept.room_of(path) for path in reach.sources_of(one.path)}
             for one in read_notebooks(NOTEBOOKS)}
    for chapter, used in rooms.items():
        assert "book" not in used and ("cells" in used or chapter == "12_claims"), chapter
    assert {name for name, used in rooms.items() if "circuits" in used} >= {
        "07_endothelial_case_study", "08_controls"}
    for name in ("01_cells_and_model", "02_training", "03_validation", "04_sparsity",
                 "06_enrichment", "09_variants", "12_claims"):
        assert "circuits" not in rooms[name], name
    assert not rooms["12_claims"] & {"features", "interpretability", "transcoders"}
    assert "features" in rooms["04_sparsity"] and "enrichment" in rooms["06_enrichment"]


# --- what a chapter does not read cannot make it stale --------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the data of the repository; no gene sets but the bundled ones."""
    shutil.copytree(ROOT / "data", tmp_path / "data",
                    ignore=shutil.ignore_patterns("*.h5ad", "atlas"))
    for module in (chapters, manifest, profiles):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCFM_GENE_SETS", "")
    return tmp_path


def changes(before: Run, change: Callable[[], None], after: Run | None = None
            ) -> dict[str, set[str]]:
    """The kinds of input that a change changes, by the number of the real chapter."""
    old = [inputs_of(before, one) for one in before.notebooks]
    change()
    new = [inputs_of(after or before, one) for one in before.notebooks]
    found = {one.name[:2]: {kind for kind in then if then[kind] != now.get(kind)}
             for one, then, now in zip(before.notebooks, old, new, strict=True)}
    return {number: kinds for number, kinds in found.items() if kinds}


def test_a_folder_of_gene_sets_reaches_the_chapters_that_ask_for_them(
        data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data / "sets"
    folder.mkdir()

    def name_it() -> None:
        for name in ("KEGG_2021_Human", "CellMarker_Augmented_2021", "Unasked_2020"):
            (folder / f"{name}.gmt").write_text(f"{name}\t\tACE2\n")
        monkeypatch.setenv("SCFM_GENE_SETS", str(folder))

    run = load_run("demo")
    assert changes(run, name_it) == {
        key: {"gene sets"} for key in ("06", "07", "09", "10", "12", "13")}
    # The same content elsewhere is the same library.
    assert changes(run, lambda: monkeypatch.setenv("SCFM_GENE_SETS", str(
        shutil.copytree(folder, data / "moved")))) == {}
    assert changes(run, (data / "moved" / "KEGG_2021_Human.gmt").unlink) == {
        key: {"gene sets"} for key in ("06", "09", "10", "12", "13")}


@pytest.mark.parametrize(("path", "stale"), [
    ("data/human_eval/anna.csv", {"05": {"rating sheets"}}),
    ("data/claims.yml", {"12": {"claims"}}),
    ("data/paper/table1.csv", {number: {"the paper's tables"} for number in
                               ("02", "03", "04", "05", "06", "07", "12")}),
    ("data/gene-sets/bundled_markers.gmt", {number: {"gene sets"} for number in
                                            ("06", "07", "09", "10", "12", "13")}),
    ("data/README.md", {}), ("data/human_eval/README.md", {}), ("data/planted/programs.yml", {}),
])
def test_a_file_reaches_the_chapters_that_read_it(data: Path, path: str,
                                                  stale: dict[str, set[str]]) -> None:
    def write() -> None:
        with open(data / path, "a") as file:
            file.write("more\n")

    run = load_run("demo")
    assert changes(run, write) == stale
    if path.endswith("anna.csv"):
        assert changes(run, (data / path).unlink) == stale


def test_files_that_the_profile_names_reach_the_chapters_that_read_them(data: Path) -> None:
    run = load_run("demo", {"gene_groups": "groups.csv", "case_sentence": "case.csv"})

    def write() -> None:
        (data / "groups.csv").write_text("symbol,group\nACE2,a\n")
        (data / "case.csv").write_text("gene\nACE2\n")

    assert changes(run, write) == {"05": {"gene groups"}, "07": {"case sentence"},
                                   "10": {"gene groups"}}


def test_a_new_entry_of_the_manifest_concerns_nobody_yet(data: Path) -> None:
    def name_another() -> None:
        path = data / "data" / "manifest.yml"
        text = path.read_text()
        path.write_text(re.sub(r"^cells:\n", "cells:\n  - {name: other, bytes: 1}\n", text,
                               flags=re.MULTILINE))
        assert path.read_text() != text

    assert changes(load_run("demo"), name_another) == {}


@pytest.mark.parametrize(("field", "value", "first"), [
    ("seed", 1, "01"), ("title", "x", "01"), ("cells_name", "x", "01"), ("max_cells", 9, "01"),
    ("l1_coefficient", 2.0, "02"), ("fdr", 0.2, "02"), ("live_cut_table4", -2.0, "02"),
    ("human_decoys", 4, "05"), ("null_draws", 99, "05"), ("case_library", "Other_2020", "07"),
    ("case_position", "query", "07"), ("circuit_depth", 3, "07"), ("variant_cells", 7, "09"),
])
def test_a_field_reaches_the_chapters_whose_sources_name_it(data: Path, field: str, value: object,
                                                            first: str) -> None:
    run = load_run("demo")
    other = Run(run.profile_name, {}, run.profile.model_copy(update={field: value}), run.notebooks)
    found = changes(run, lambda: None, other)
    # The paper's settings, which chapter 02 shows, name `fdr` and the cuts.
    assert min(found) == first and all("profile" in kinds for kinds in found.values())


def test_planted_programs_are_the_cells_of_one_profile(data: Path) -> None:
    planted = load_run("planted")

    def change() -> None:
        with open(data / "data" / "planted" / "programs.yml", "a") as file:
            file.write("# more\n")

    assert {*changes(planted, change)} == {f"{number:02d}" for number in range(1, 14)}


def test_every_reader_of_the_data_folder_is_known() -> None:
    readers = {path.relative_to(kept.PACKAGE).as_posix() for path in kept.PACKAGE.rglob("*.py")
               if re.search(r'"data" */|/ "data"', path.read_text())}
    known = set().union(*(modules for modules, _ in files_read(load_run("demo").profile).values()))
    # The cells, the manifest's entries and the gene sets are inputs of their own.
    own = {"common/profile.py", "common/manifest.py", "enrichment/gene_sets.py",
           "book/chapters.py"}
    assert readers - own <= known and own <= readers
    assert known <= {path.relative_to(kept.PACKAGE).as_posix()
                     for path in kept.PACKAGE.rglob("*.py")}
    assert {*chapters.SHOWN} <= {*Profile.model_fields}
