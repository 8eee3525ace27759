"""What a circuit is traced from is called what it is, and its genes stand beside random ones."""

from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from scipy.stats import mannwhitneyu

from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import case_targets
from scfm_circuits.circuits.calls import calls_of, trace_call
from scfm_circuits.circuits.case_study import CaseStudy
from scfm_circuits.circuits.circuit import circuit_genes, node_table
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import trace_feature
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import term_table

OPTIONS = {"circuit_branches": 64, "circuit_depth": 3, "circuit_nodes": 200}


@pytest.fixture(scope="module")
def corpus() -> Any:
    return tiny_corpus(40, validation_share=0.4, seed=1)


# --- how special is a feature? -------------------------------------------------------------------


def test_a_target_elsewhere_is_counted_by_cells_and_types(corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path)
    held_out = np.flatnonzero(corpus.held_out)
    strongest = np.where(np.arange(len(held_out)) % 3, 5, 7)
    monkeypatch.setattr(case_targets, "strongest_at_end", lambda model, transcoders, corpus, cells,
                        *given: strongest[:len(cells)])
    found = case_targets.target_elsewhere(None, None, corpus, profile, 1, 7)
    assert found.share == (strongest == 7).mean() < 0.5
    assert found.types == len(set(corpus.labels[held_out]))
    assert found.same_types == len(set(corpus.labels[held_out[strongest == 7]]))
    assert found.called != case_targets.PLACE
    # The strongest in over half of the cells is called what it is.
    often = case_targets.target_elsewhere(None, None, corpus, profile, 1, 5)
    assert often.share > 0.5 and often.called == "a feature of this place in the text"
    one = case_targets.target_elsewhere(None, None, corpus, profile, 1, 5, most=1)
    assert one == (0, 1, 0)


def test_a_place_needs_more_than_half_of_the_cells():
    assert case_targets.TargetElsewhere(0.5, 4, 4).called != case_targets.PLACE


def test_the_features_of_a_call_are_those_that_tell_its_type(corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path)
    model, label = model_for(corpus), str(corpus.labels[0])
    transcoders = tiny_transcoders(model)
    table = case_targets.call_features(model, transcoders, corpus, profile, label)
    assert sorted(table["feature"]) == list(range(transcoders.n_features))
    # By hand, cell by cell, for the first and the last of them.
    z = np.array([freeze(model, transcoders, corpus.tokens[cell][: corpus.answer_start[cell]])
                  .activations[-1, -1].numpy() for cell in range(len(corpus))])
    for row in (table.iloc[0], table.iloc[-1]):
        for name, wanted in (("auroc", ~corpus.held_out), ("held_out_auroc", corpus.held_out)):
            own = z[wanted & (corpus.labels == label), int(row["feature"])]
            areas = []
            for other in set(corpus.labels) - {label}:
                against = z[wanted & (corpus.labels == other), int(row["feature"])]
                u = mannwhitneyu(own, against).statistic
                areas.append(u / (len(own) * len(against)))
            assert row[name] == pytest.approx(np.mean(areas))
    assert table["auroc"].is_monotonic_decreasing
    ties = table[table["auroc"] == table["auroc"].iloc[-1]]
    assert (ties["own"] - ties["others"]).is_monotonic_decreasing


def test_held_out_cells_have_no_say_in_the_choice(corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path)
    model = model_for(corpus)
    transcoders, label = tiny_transcoders(model), str(corpus.labels[0])
    before = case_targets.call_features(model, transcoders, corpus, profile, label)
    swapped = corpus.labels.copy()
    swapped[corpus.held_out] = np.roll(swapped[corpus.held_out], 1)
    moved = replace(corpus, labels=swapped)
    after = case_targets.call_features(model, transcoders, moved, profile, label)
    pd.testing.assert_frame_equal(before.drop(columns="held_out_auroc"),
                                  after.drop(columns="held_out_auroc"))
    assert not before["held_out_auroc"].equals(after["held_out_auroc"])


def test_one_type_has_no_features_of_its_own(corpus, monkeypatch, tmp_path):
    model = model_for(corpus)
    alone = replace(corpus, labels=np.full(len(corpus), "B cell"))
    profile = tiny_profile(monkeypatch, tmp_path)
    for label in ("B cell", "a type that no cell has"):
        found = case_targets.call_features(model, tiny_transcoders(model), alone, profile, label)
        assert not len(found) and "auroc" in found


# --- what do its genes say? ----------------------------------------------------------------------

SENTENCE = [f"G{i}" for i in range(20)]
LIBRARY = gene_sets_from_dict("a", {"one": SENTENCE[:4], "two": SENTENCE[10:], "far": ["X1", "X2"]})
RULE = RULES["enrichr"]


def said_of(genes: list[str], **options: Any) -> case_targets.GeneNodes:
    return case_targets.gene_nodes(genes, SENTENCE, LIBRARY, RULE, set(SENTENCE),
                                   **{"fdr": 0.05, "seed": 0, **options})


def test_random_gene_nodes_are_of_the_same_sentence():
    found = said_of(SENTENCE[:4], draws=2_000)
    expected = term_table(SENTENCE[:4], LIBRARY, background=20_000, family="hit", odds="enrichr")
    pd.testing.assert_frame_equal(found.terms, expected)
    assert (found.best_term, found.best_fdr) == ("one", expected["Adjusted P-value"][0])
    assert found.significant == 1
    # All four of `one` by chance, or four of the ten of `two`, whose term is as large a part of the
    # background: p of the first is smaller, so only the first is as good.
    assert found.p == pytest.approx(1 / comb(20, 4), abs=2 / 2_000)
    # Any of the twenty may be drawn, and most draws hold two genes of one term.
    assert 0.5 < found.random_significant < 2
    assert found.random_significant != said_of(SENTENCE[:4], seed=1).random_significant
    assert said_of(SENTENCE[:4]).p == said_of(SENTENCE[3::-1]).p


def test_all_genes_are_their_own_null():
    found = said_of(SENTENCE)
    assert found.p == 1 and found.random_significant == found.significant


def test_no_gene_node_has_no_term():
    found = said_of([])
    assert found.best_term is None and not found.genes
    assert np.isnan([found.p, found.random_significant, found.best_fdr]).all()


# --- traced --------------------------------------------------------------------------------------


def test_every_target_is_traced_in_the_same_way(corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, **OPTIONS)
    model, cell = model_for(corpus), 3
    transcoders, label = tiny_transcoders(model), str(corpus.labels[cell])
    prompt, sentence = answered_prompt(corpus, profile, cell, label), corpus.genes_of(cell)
    library = gene_sets_from_dict("a", {"one": sentence[:2], "two": sentence[1:]})
    targets = case_targets.case_targets(model, transcoders, corpus, profile, CaseStudy(
        prompt, sentence, label, label, ""), library)
    contrast = contrast_of(corpus, prompt)
    call = targets.call(contrast)
    assert call.circuit == trace_call(targets.frozen, contrast, profile)
    calls = calls_of(model, corpus, profile)
    by_gene = calls.by_gene(targets.frozen, contrast, prompt.genes)
    assert calls.parts(calls.sums(targets.frozen, contrast, by_gene)).startswith(
        f"{by_gene['contribution'].sum():.2g} come through attention from genes, ")
    others, tokens = sum(map(len, contrast.labels)), len(contrast.others)
    assert calls.about(prompt, contrast).endswith(
        f"{others} other labels have {tokens} other token{'s' * (tokens > 1)} there.")
    feature = int(targets.frozen.activations[1, prompt.position].argmax())
    traced = targets.feature(1, feature, prompt.position)
    assert traced.circuit == trace_feature(targets.frozen, 1, feature, prompt.position, branches=64,
                                           depth=3, max_nodes=200)
    for one in (call, traced):
        nodes = node_table(one.circuit, prompt.texts, prompt.genes)
        pd.testing.assert_frame_equal(one.nodes, nodes)
        assert one.genes.genes == circuit_genes(nodes) != []
        assert one.own_kind.whole == float(one.target.reading.value)
        assert one.own_kind.circuit != one.own_kind.nothing
        none = one.own_kind._replace(circuit=one.own_kind.nothing)
        assert none.faithfulness == 0 != one.own_kind.faithfulness
        assert none._replace(circuit=none.whole).faithfulness == 1
        assert none._replace(nothing=none.whole).faithfulness is None
        row = one.row("x")
        assert [row[name] for name in ("genes", "whole", "no_circuit")] == [
            len(one.genes.genes), one.own_kind.whole, one.own_kind.nothing]
        assert one.values()["gene_nodes"] == row["genes"]


def test_marker_genes_are_those_of_terms_with_the_types_name():
    library = gene_sets_from_dict("Cells", {
        "Beta cell: pancreas": ["INS", "IAPP"], "beta cell": ["MAFA"], "Alpha cell": ["GCG"]})
    assert case_targets.marker_genes(library, "Beta") == {"INS", "IAPP", "MAFA"}
    assert case_targets.marker_genes(library, "gamma") == set()
