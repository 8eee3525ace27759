"""How often other genes get the case's term: exact chances on small libraries, the real library."""

import os
from dataclasses import replace
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, fisher_exact

from scfm_circuits import InputError
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict, load_library
from scfm_circuits.enrichment.terms import term_table
from scfm_circuits.paper.case import (
    case_nulls,
    case_rules,
    in_words,
    named_term,
    null_row,
    paper_case,
    rates_by_rule,
)
from scfm_circuits.paper.exhibits import PAPER, read_paper

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
    over_all = shown["gseapy: 60 genes, BH over all terms"]
    assert over_all.iloc[0] == "no"
    assert over_all.iloc[2] == in_words(null_row(table, "anchor_prompt", "gseapy", "all"))
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


def test_the_whole_case_without_the_library() -> None:
    stand_in = replace(small(), source="bundled")
    found = paper_case(stand_in, GENES, read_paper())
    assert found.settings == [] and found.term is None and found.nulls(10, 0).empty
    assert found.table["setting"].tolist() == [
        "nine genes, enrichr: 20,000 genes, BH over the terms hit", "the paper, as printed"]
    assert found.nine[0] == "VWF" and len(found.prompt) == 64
    server = found.server
    low = server["FDR"] < 0.05
    assert found.ours["terms below 0.05"] == low.sum()
    assert found.single_gene == (low & (server["overlap"] == 1)).sum() > 0
    assert found.score_is_highest == (found.ours["score"] >= server.loc[low, "score"].max())
    # Two of the nine are in the term: scipy's own test of the 2 x 2 table.
    size = int(found.ours["term_size"])
    test = fisher_exact([[2, 7], [size - 2, 20_000 - size - 7]], alternative="greater")
    assert found.ours["overlap"] == 2 and found.ours["p"] == pytest.approx(test.pvalue)


def test_the_whole_case_under_every_rule() -> None:
    paper = read_paper()
    nine = paper.circuit["gene"].tolist()
    genes = [*nine, *(f"X{i}" for i in range(60))]
    library = gene_sets_from_dict("l", {"Endothelial cell:Heart": [*nine[:2], "X1"],
                                        "other": [*genes[20:50], nine[4]]})
    found = paper_case(library, genes, paper)
    assert found.term == "Endothelial cell:Heart" and not found.corpus_left_out
    labels = [one.label for one in found.settings]
    # The server's rule is given by overlap counts; the prompt's genes are tested under it alone.
    assert found.table["setting"].tolist()[1:-1] == [
        *(f"nine genes, {label}" for label in labels[1:]),
        f"all genes of the prompt, {labels[0]}"]
    assert (found.table["overlap"].iloc[1:-2] == 2).all()
    assert found.table["FDR"].iloc[-1] == 0.0013
    assert found.nulls(20, 0)["kind"].nunique() == 5
    without = paper_case(library, genes[1:], paper)
    assert without.corpus_left_out and len(without.settings) == len(found.settings) - 2


@pytest.mark.parametrize("mapping", [
    {"Mine": [f"X{i}" for i in range(40)]},
    {"Endothelial cell:Heart": [f"X{i}" for i in range(40)], "Other": ["X1"]},
    {"Endothelial cell:Heart": ["VWF", "X1"]},
    {"Endothelial cell:Heart": ["VWF"], "B": ["PTPRB"]},
    {"Mine": ["X1"]},
], ids=["neither genes nor term", "no gene", "tiny", "two genes", "one gene"])
def test_the_whole_case_with_a_library_of_somebodys_own(mapping: dict[str, list[str]]) -> None:
    library = gene_sets_from_dict("CellMarker_Augmented_2021", mapping)
    found = paper_case(library, [f"X{i}" for i in range(80)], read_paper())
    known = set(library.genes)
    hit = sum(bool(set(found.nine) & set(genes)) for genes in mapping.values())
    own = found.table.iloc[1:-2]
    assert (own["terms hit"] == hit).all()
    if not hit:
        assert own[["rank by p", "overlap", "p", "FDR"]].isna().all(axis=None)
    assert found.single_gene > 0 and found.ours["overlap"] == 2  # from the counts of the real one
    nulls = found.nulls(20, 0)
    assert (nulls["background_genes"] >= 9).all()
    assert nulls.empty == (found.term is None)
    assert {one.rule.name for one in found.settings} == {"enrichr"} | (
        {"gseapy"} if len(known) >= 9 else set())
    if len(nulls):
        assert rates_by_rule(nulls, found.settings).shape[1] == 2 + len(found.settings)


def test_the_whole_case_with_a_library_of_more_genes_than_the_server_s_background() -> None:
    library = gene_sets_from_dict("l", {"Endothelial cell:Heart": ["VWF", "PTPRB"],
                                        "big": [f"X{i}" for i in range(19_999)]})
    found = paper_case(library, [], read_paper())
    assert found.settings == [] and found.nulls(10, 0).empty
