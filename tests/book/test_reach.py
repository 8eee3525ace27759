"""Which chapters a change in a room makes stale."""

from pathlib import Path

import pytest

from scfm_circuits.book import reach
from scfm_circuits.book.chapters import NOTEBOOKS, Notebook, read_notebooks, source_inputs
from scfm_circuits.common import kept

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
        assert "book" not in used and ("cells" in used or chapter == "11_claims"), chapter
    assert {name for name, used in rooms.items() if "circuits" in used} >= {
        "07_endothelial_case_study", "08_controls"}
    for name in ("01_cells_and_model", "02_training", "03_validation", "04_sparsity",
                 "06_enrichment", "09_variants", "11_claims"):
        assert "circuits" not in rooms[name], name
    assert not rooms["11_claims"] & {"features", "interpretability", "transcoders"}
    assert "features" in rooms["04_sparsity"] and "enrichment" in rooms["06_enrichment"]
