"""The paper's own tables, and the checks of the paper against itself."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.paper.case import (
    TERM_IN_PROMPT,
    combined_score,
    server_case,
    term_overlap,
)
from scfm_circuits.paper.exhibits import PAPER, read_paper
from scfm_circuits.paper.internal_checks import internal_values, named_genes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of data/paper to change."""
    return Path(shutil.copytree(PAPER, tmp_path / "paper"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_shapes_of_the_exhibits() -> None:
    paper = read_paper()
    assert len(paper.table3) == 20 and len(paper.table4) == 24
    assert len(paper.prompt_genes) == 64
    assert paper.prompt_genes[:3] == ("KIAA1217", "VWF", "MT-CO1")
    assert paper.prompt_genes[-1] == "RDX"
    assert list(paper.circuit.query("literature == 'yes'")["gene"]) == [
        "VWF", "PTPRB", "KHDRBS1", "DIAPH2"]


def test_what_the_paper_says_about_itself() -> None:
    values = internal_values()
    assert values["internal.table3_count.yes"] == 7
    assert values["internal.table4_pattern.over_80"] == 23 / 24
    # The statements that do not hold.
    assert sorted(key for key, value in values.items() if value is False) == [
        "internal.circuit_genes.figure1",
        "internal.fdr_differs_from_p",
        "internal.score_is_gsea",
        "internal.table4_rises_after_layer0",
    ]
    literal = values["internal.table4_best_layer_of_all_features"]
    assert isinstance(literal, float) and literal < 80


@pytest.mark.parametrize(("file", "old", "new", "key"), [
    ("table4.csv", "78/116,67.24", "78/116,67.25", "table4_fractions"),
    ("table4.csv", "78/116", "79/116", "table4_fractions"),
    ("table3.csv", "6027,-2.66", "6027,-4.01", "table3_all_live"),
    ("table3.csv", "6027,-2.66", "6027,-4.01", "table3_row.6027"),
    ("table3.csv", "PSD token in PSD3", "PSX token in PSD3", "table3_row.6027"),
    ("table3.csv", "6027", "8192", "table3_ids_valid"),
    ("table3.csv", "6027", "2123", "table3_ids_valid"),
    ("figure4_genes.csv", "64,RDX", "64,VWF", "figure4.distinct"),
    ("case_study.csv", "2692", "8192", "case_feature_valid"),
])
def test_a_changed_number_is_noticed(
    folder: Path, file: str, old: str, new: str, key: str,
) -> None:
    assert internal_values(folder)[f"internal.{key}"] is True
    replace(folder / file, old, new)
    values = internal_values(folder)
    assert values.get(f"internal.{key}", False) is False


def test_counts_follow_the_rows(folder: Path) -> None:
    replace(folder / "table3.csv", "PSD token in PSD3 gene,Yes", "PSD token in PSD3 gene,No")
    replace(folder / "figure4_genes.csv", "64,RDX\n", "")
    replace(folder / "circuit_genes.csv", "ART4,no\n", "")
    values = internal_values(folder)
    assert values["internal.table3_count.yes"] == 6
    assert values["internal.table3_count.share"] == pytest.approx(0.3)
    assert values["internal.figure4.count"] == 63
    assert values["internal.circuit_genes.count"] == 8


def test_an_adjusted_fdr_would_be_seen(folder: Path) -> None:
    replace(folder / "case_study.csv", "0.0013", "0.0292")
    assert internal_values(folder)["internal.fdr_differs_from_p"] is True


def test_combined_score_against_fisher_s_exact_test() -> None:
    overlap, term, query, population = 2, 96, 9, 20_000
    score, p = combined_score(overlap, term, query, population)
    table = np.array([[overlap, query - overlap],
                      [term - overlap, population - term - query + overlap]])
    oracle = stats.fisher_exact(table, alternative="greater")
    assert p == pytest.approx(oracle.pvalue, rel=1e-9)
    assert score == pytest.approx(-math.log(oracle.pvalue) * oracle.statistic, rel=1e-9)


def test_the_rising_pattern_would_be_seen(folder: Path) -> None:
    table = pd.read_csv(folder / "table4.csv")
    table["percentage"] = 60.0 + table["layer"]
    table.to_csv(folder / "table4.csv", index=False)
    assert internal_values(folder)["internal.table4_rises_after_layer0"] is True


@pytest.mark.parametrize(("text", "token", "genes"), [
    ("PSD token in PSD3 gene", "PSD", ["PSD3"]),
    ("Trailing 2 token in genes", "2", []),
    ("Y tokens (non-specific)", "Y", []),
    ("AM token in LAM* genes (LAMC1, LAMTOR4)", "AM", ["LAM", "LAMC1", "LAMTOR4"]),
    ("PN token in PTPN family genes", "PN", ["PTPN"]),
])
def test_descriptions_of_table_3(text: str, token: str, genes: list[str]) -> None:
    assert named_genes(text) == (token, genes)


def test_a_description_of_another_form_is_an_error() -> None:
    with pytest.raises(InputError, match="does not read as"):
        named_genes("fires everywhere")


def test_the_papers_case_from_counts_equals_the_real_library() -> None:
    import os

    folder = os.environ.get("SCFM_GENE_SETS")
    if not folder:
        pytest.skip("SCFM_GENE_SETS is not set: the real CellMarker library is not at hand")
    from scfm_circuits.enrichment.gene_sets import load_library
    from scfm_circuits.enrichment.terms import term_table

    nine = pd.read_csv(PAPER / "circuit_genes.csv")["gene"].tolist()
    library = load_library("CellMarker_Augmented_2021", folder)
    table = term_table(nine, library, background=20_000, family="hit", odds="enrichr")
    counts = server_case()
    assert counts["p"].to_numpy() == pytest.approx(table["P-value"].to_numpy(), rel=1e-9)
    assert counts["FDR"].to_numpy() == pytest.approx(table["Adjusted P-value"].to_numpy(), rel=1e-9)
    assert sorted(counts["score"]) == pytest.approx(sorted(table["Combined Score"]), rel=1e-9)
    named = counts.loc[counts["term"] == "Endothelial cell:Heart"].iloc[0]
    assert (named["overlap"], named["term_size"]) == (2, 96)


def test_the_genes_of_the_term_are_counted_from_the_real_library() -> None:
    import os

    folder = os.environ.get("SCFM_GENE_SETS")
    if not folder:
        pytest.skip("SCFM_GENE_SETS is not set: the real CellMarker library is not at hand")
    from scfm_circuits.enrichment.gene_sets import load_library

    paper, library = read_paper(), load_library("CellMarker_Augmented_2021", folder)
    counts = term_overlap(library, paper.case["term"], paper.circuit["gene"].tolist(),
                          paper.prompt_genes)
    assert counts == {"found": 2, "named": TERM_IN_PROMPT, "drawn": 9, "of": 64}
    assert term_overlap(library, "no such term", [], []) == {}


def test_two_of_four_endothelial_genes_are_not_more_than_luck_gives() -> None:
    """Nine of the prompt's genes by luck hold two of the four or more in 9 % of draws."""
    values = internal_values()
    low, high = (values[f"internal.endothelial_genes.beyond.{end}"] for end in ("low", "high"))
    assert isinstance(low, float) and isinstance(high, float) and low <= 0 < high
    assert "p = 0.092" in str(values["internal.endothelial_genes.told"])


def test_a_dip_that_is_not_there_would_be_seen(folder: Path) -> None:
    assert internal_values()["internal.table4_pattern.layer0.high"] < 0
    replace(folder / "table4.csv", "0,116,78,78/116,67.24", "0,116,98,98/116,84.48")
    values = internal_values(folder)
    value, high = (values[f"internal.table4_pattern.layer0{end}"] for end in ("", ".high"))
    assert value < 0 < high, "below the mean of the others, and within their scatter"
