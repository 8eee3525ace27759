"""How often other genes get the case's term: exact chances on small libraries, the real library."""

import os
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from scfm_circuits import InputError
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict, load_library
from scfm_circuits.enrichment.terms import term_table
from scfm_circuits.paper.case import (
    case_nulls,
    case_rules,
    in_prose,
    in_words,
    named_term,
    null_row,
    rates_by_rule,
)
from scfm_circuits.paper.exhibits import PAPER

GENES = [f"G{i}" for i in range(60)]
CIRCUIT = ["G0", "G1", "G20"]
PROMPT = [*CIRCUIT, "G2", "G21", "G22", "G23", "g24"]


def small() -> GeneSets:
    """The term T holds G0..G4; sixty genes in all, in sets of five."""
    return gene_sets_from_dict("small", {
        "T" if i == 0 else f"U{i}": GENES[5 * i : 5 * i + 5] for i in range(12)})


def run(library: GeneSets, corpus: list[str], draws: int = 400, seed: int = 0) -> pd.DataFrame:
    return case_nulls(case_rules(library, CIRCUIT, corpus), "T", CIRCUIT, PROMPT, draws=draws,
                      seed=seed)


def test_rules_that_can_be_applied_with_both_families() -> None:
    with_corpus = case_rules(small(), CIRCUIT, [gene.lower() for gene in GENES])
    assert [(rule.name, rule.family) for rule, _ in with_corpus] == [
        ("enrichr", "hit"), ("enrichr", "all"), ("corpus", "all"), ("corpus", "hit"),
        ("gseapy", "hit"), ("gseapy", "all")]
    assert [setting.universe.total for setting in with_corpus] == [20000, 20000, 60, 60, 60, 60]
    assert with_corpus[0].label == "enrichr: 20,000 genes, BH over the terms hit"
    without = case_rules(small(), CIRCUIT, GENES[1:])
    assert {rule.name for rule, _ in without} == {"enrichr", "gseapy"}


def test_rates_are_the_exact_chances() -> None:
    """Under the library's 60 genes and BH over all 12 terms, two genes of three are needed.

    p of two or more of a term's 5 genes among 3 is 0.0169 and of one 0.233: times 12 terms only
    three genes pass 0.05 (p = 0.000292). Over the terms hit, two of three pass (0.0169 * 2).
    """
    table = run(small(), GENES, draws=3000)
    assert null_row(table, "circuit", "gseapy", "hit")["n_called"] == 1
    assert null_row(table, "circuit", "gseapy", "all")["n_called"] == 0
    prompt = len(PROMPT)
    chances = {
        # The anchor is in the term: one or two of the other 59 (or 7) drawn must be, too.
        ("anchor_random", "hit"): 1 - comb(55, 2) / comb(59, 2),
        ("anchor_random", "all"): comb(4, 2) / comb(59, 2),
        ("anchor_prompt", "hit"): 1 - comb(prompt - 3, 2) / comb(prompt - 1, 2),
        ("anchor_prompt", "all"): 1 / comb(prompt - 1, 2),
        ("prompt", "hit"): (comb(3, 2) * (prompt - 3) + 1) / comb(prompt, 3),
        ("prompt", "all"): 1 / comb(prompt, 3),
        # Any of the 12 terms: two genes of one of them.
        ("random", "hit"): 12 * (comb(5, 2) * 55 + comb(5, 3)) / comb(60, 3),
        ("random", "all"): 12 * comb(5, 3) / comb(60, 3),
    }
    for (kind, family), chance in chances.items():
        row = null_row(table, kind, "gseapy", family)
        assert row["draws"] == 3000
        assert binomtest(int(row["n_called"]), 3000, chance).pvalue > 1e-4, (kind, family)
        assert row["low"] <= row["percent"] <= row["high"]
    assert np.isnan(null_row(table, "circuit")["low"])


def test_random_genes_of_a_number_are_mostly_nameless() -> None:
    table = run(small(), [], draws=2000)
    # 60 of the 20,000 have a name: nine in a thousand lists of three hold one of them at all.
    row = null_row(table, "random", "enrichr", "hit")
    assert row["background_genes"] == 20_000
    named = 1 - comb(20_000 - 60, 3) / comb(20_000, 3)
    assert binomtest(int(row["n_called"]), 2000, named).pvalue > 1e-4
    big = gene_sets_from_dict("big", {"T": [f"G{i}" for i in range(20_000)], "U": ["EXTRA"]})
    with pytest.raises(InputError, match="a random gene has no meaning"):
        run(big, [])


def test_same_seed_same_table_and_same_lists_for_both_families() -> None:
    first, again, other = (run(small(), GENES, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first["n_called"].equals(other["n_called"])
    for kind in ("anchor_random", "anchor_prompt", "prompt", "random"):
        counts = [null_row(first, kind, "gseapy", family)["n_called"] for family in ("hit", "all")]
        assert counts[0] >= counts[1]


def test_what_the_page_says() -> None:
    settings = case_rules(small(), CIRCUIT, GENES)
    table = run(small(), GENES)
    shown = rates_by_rule(table, settings)
    assert shown["list"].tolist() == [
        "the 3 genes of the circuit", "G0 and 2 random genes", "G0 and 2 other genes of the prompt",
        "any 3 genes of the prompt", "3 random genes"]
    assert shown["called"].tolist() == ["T"] * 4 + ["any term"]
    assert shown.shape[1] == 2 + len(settings)
    assert shown["gseapy: 60 genes, BH over all terms"].iloc[0] == "no"
    text = in_prose(table, 0.05)
    row = null_row(table, "anchor_prompt", family="all")
    assert in_words(row) in text and "FDR 0.05" in text
    called = int(table.loc[table["kind"] == "circuit", "n_called"].sum())
    assert f"under {called} of the 6 rules" in text
    empty = case_nulls([], "", CIRCUIT, PROMPT, draws=10, seed=0)
    assert empty.empty and empty.columns.tolist() == table.columns.tolist()


def test_a_term_is_found_whatever_its_capitals_and_spaces() -> None:
    library = gene_sets_from_dict("l", {"Endothelial cell:Heart": ["A"], "Other": ["B"]})
    assert named_term(library, "endothelial Cell: heart") == "Endothelial cell:Heart"
    assert named_term(library, "Endothelial cell: kidney") is None


def test_wrong_requests_are_errors() -> None:
    settings = case_rules(small(), CIRCUIT, GENES)
    with pytest.raises(InputError, match="number of draws is 0"):
        case_nulls(settings, "T", CIRCUIT, PROMPT, draws=0, seed=0)
    with pytest.raises(InputError, match="no term 'V'"):
        case_nulls(settings, "V", CIRCUIT, PROMPT, draws=5, seed=0)
    with pytest.raises(InputError, match="distinct genes from 1"):
        case_nulls(settings, "T", CIRCUIT, ["G0", "G1"], draws=5, seed=0)
    with pytest.raises(InputError, match="no list 'nine'"):
        null_row(run(small(), GENES), "nine")


def test_the_paper_s_case_with_the_real_library() -> None:
    folder = os.environ.get("SCFM_GENE_SETS")
    if not folder:
        pytest.skip("SCFM_GENE_SETS is not set: the real CellMarker library is not at hand")
    library = load_library("CellMarker_Augmented_2021", folder)
    nine = pd.read_csv(PAPER / "circuit_genes.csv")["gene"].tolist()
    prompt = pd.read_csv(PAPER / "figure4_genes.csv")["gene"].tolist()
    term = named_term(library, "Endothelial cell: heart")
    assert term == "Endothelial cell:Heart"
    settings = case_rules(library, nine, [])
    table = case_nulls(settings, term, nine, prompt, draws=500, seed=1)
    for setting in settings:
        full = term_table(nine, library, background=setting.universe, family=setting.rule.family)
        q = full.loc[full["Term"] == term, "Adjusted P-value"].iloc[0]
        row = null_row(table, "circuit", setting.rule.name, setting.rule.family)
        assert row["n_called"] == (q < 0.05)
    # Rates of an independent computation with 5,000 draws (its random genes: another atlas's).
    expected = {("anchor_prompt", "hit"): 0.860, ("anchor_prompt", "all"): 0.242,
                ("prompt", "hit"): 0.245, ("prompt", "all"): 0.053}
    for (kind, family), share in expected.items():
        row = null_row(table, kind, family=family)
        assert binomtest(int(row["n_called"]), 500, share).pvalue > 1e-4, (kind, family)
    assert 80 < null_row(table, "anchor_random")["percent"] < 95
