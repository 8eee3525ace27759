"""Recall, precision and their nulls: by hand, by enumeration, and where the answer is planted."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.cells.simulated import Plan, Program, plan_of
from scfm_circuits.circuits import planted_genes
from scfm_circuits.circuits.circuit import node_table
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.planted_genes import (
    KnownTruth,
    circuit_gene_table,
    known_truth,
    named_right,
    recovery_summary,
    recovery_table,
    role_table,
)
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.common.profile import load_profile
from scfm_circuits.report.plots import circuits as plots

LABELS = ("CD4+ T cell", "B cell", "CD34+", "Dendritic {cell}")


def gene_rows(roles: str, influence: list[float], cell: str = "c0", label: str = "a",
              target: str = "call") -> pd.DataFrame:
    """One circuit's genes in the prompt's order: roles as letters, o for own."""
    names = {"o": "own", "s": "shared", "b": "background", "x": "other"}
    n = len(roles)
    return pd.DataFrame({
        "cell": cell, "cell_type": label, "target": target, "gene": [f"G{i}" for i in range(n)],
        "rank": np.arange(1, n + 1), "role": [names[role] for role in roles],
        "nodes": (np.array(influence) > 0).astype(int), "influence": influence})


# --- circuits ------------------------------------------------------------------------------------


def test_recovery_by_hand() -> None:
    #                       G0 most expressed; the circuit holds G1, G2, G4, G5
    rows = gene_rows("bobosbob", [0, .1, .3, 0, .2, .4, 0, 0])
    # Rows in another order are the same circuit.
    one = recovery_table(rows.sample(frac=1, random_state=0)).iloc[0]
    assert (one["prompt_genes"], one["planted"], one["circuit_genes"], one["found"]) == (8, 3, 4, 1)
    assert one["precision"] == 1 / 4 and one["recall"] == 1 / 3
    assert one["random_precision"] == 3 / 8 and one["random_recall"] == 1 / 2
    assert one["precision_most_expressed"] == 2 / 4
    # The three most influential: G5 (background), G2 (background), G4 (shared).
    assert one["top_found"] == 0 and one["top_share"] == 0 and one["top_p"] == 1
    assert one["top_share_most_expressed"] == 1 / 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=9))
def test_p_is_the_share_of_as_good_draws(genes: list[tuple[bool, int]]) -> None:
    rows = gene_rows("".join("o" if own else "b" for own, _ in genes),
                     [float(value) for _, value in genes])
    one = recovery_table(rows).iloc[0]
    own = [i for i, (planted, _) in enumerate(genes) if planted]

    def share(drawn: int, found: int) -> float:
        draws = [len(set(own) & set(draw)) >= found
                 for draw in combinations(range(len(genes)), drawn)]
        return float(np.mean(draws))

    assert one["p"] == pytest.approx(share(int(one["circuit_genes"]), int(one["found"])))
    top = min(len(own), int(one["circuit_genes"]))
    assert one["top_p"] == pytest.approx(share(top, int(one["top_found"])))


def many(rng: np.random.Generator, n: int, *, perfect: bool) -> pd.DataFrame:
    """n circuits of 10 of 40 genes, 10 of them planted: the planted ones, or any."""
    frames = []
    for i in range(n):
        roles = rng.permutation(list("o" * 10 + "b" * 30))
        own = roles == "o"
        inside = own if perfect else rng.permutation(40) < 10
        frames.append(gene_rows("".join(roles), np.where(inside, rng.random(40) + .1, 0).tolist(),
                                f"c{i}", "ab"[i % 2]))
    return pd.concat(frames, ignore_index=True)


def test_a_circuit_of_planted_genes_is_told_from_any() -> None:
    rng = np.random.default_rng(0)
    best = recovery_summary(recovery_table(many(rng, 6, perfect=True)), 0)
    assert best["cell_type"].tolist() == ["a", "b", "all types"]
    assert best["circuits"].tolist() == [3, 3, 6]
    for name in ("precision", "recall", "top_share"):
        assert (best[name] == 1).all()
    assert (best["p"] < 1e-3).all() and (best["top_p"] < 1e-3).all()
    assert best["random_precision"].tolist() == [0.25] * 3 == best["top_share_random"].tolist()
    assert best["precision_most_expressed"].between(0.05, 0.5).all()
    p = [recovery_summary(recovery_table(many(rng, 4, perfect=False)), seed, 400)["p"].iloc[-1]
         for seed in range(60)]
    assert np.mean(np.array(p) < 0.05) <= 0.15 and 0.3 < np.mean(p) < 0.75


def test_the_summary_adds_up_before_it_divides() -> None:
    rows = pd.concat([gene_rows("oobb", [1, 0, 0, 0], "c0"),
                      gene_rows("obbb", [1, 1, 1, 0], "c1")], ignore_index=True)
    one = recovery_summary(recovery_table(rows), 0).iloc[-1]
    assert one["precision"] == 2 / 4 and one["recall"] == 2 / 3
    assert one["random_precision"] == (2 * 1 / 4 + 1 * 3 / 4) / 4
    assert one["top_share"] == 2 / 3 and one["top_share_most_expressed"] == 3 / 3
    again = recovery_summary(recovery_table(rows), 0).iloc[-1]
    assert one["p"] == again["p"]


def test_a_circuit_without_genes_has_no_precision() -> None:
    one = recovery_table(gene_rows("obb", [0, 0, 0])).iloc[0]
    assert np.isnan(one["precision"]) and one["recall"] == 0 and one["p"] == 1
    assert np.isnan(recovery_table(gene_rows("bbb", [1, 0, 0])).iloc[0]["recall"])


def test_roles_hold_all_genes() -> None:
    roles = role_table(gene_rows("oosb", [3, 0, 1, 0])).set_index("role")
    assert roles["prompt_percent"].tolist() == [50, 25, 0, 0, 25]
    assert roles["circuit_percent"].tolist() == [50, 50, 0, 0, 0]
    assert roles["influence_percent"].tolist() == [75, 25, 0, 0, 0]


def test_circuits_of_a_tiny_model(monkeypatch, tmp_path) -> None:
    # Enough nodes that the strongest feature's circuit reaches genes.
    profile = tiny_profile(monkeypatch, tmp_path, case_type="B cell", circuit_branches=64,
                           circuit_nodes=400)
    corpus = tiny_corpus(16)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    plan = Plan(dict.fromkeys(LABELS, 0.25),
                (Program("t", ("CD3D", "CD8A"), ("CD4+ T cell",), 1.0),
                 Program("b", ("MS4A1",), ("B cell",), 1.0)), {})
    cells = [0, 1, 5]
    table = circuit_gene_table(model, transcoders, corpus, cells, plan, profile)
    assert set(table["target"]) == {"feature", "call"}
    for cell in cells:
        rows = table[table["cell"] == corpus.cell_ids[cell]]
        for _, part in rows.groupby("target"):
            assert part["gene"].tolist() == corpus.genes_of(cell)
            assert part["rank"].tolist() == list(range(1, len(part) + 1))
        own = [gene for one in plan.programs for gene in one.genes
               if one.cell_types == (str(corpus.labels[cell]),)]
        assert (rows["role"] == "own").tolist() == [gene in own for gene in rows["gene"]]
    # The feature's circuit is the case study's own.
    for cell in cells:
        case = answered_prompt(corpus, profile, cell, str(corpus.labels[cell]))
        frozen = freeze(model, transcoders, case.encoded.tokens)
        feature = strongest_features(frozen, 1, case.position, 1)[0]
        nodes = node_table(trace_feature(
            frozen, 1, feature, case.position, branches=profile.circuit_branches,
            depth=profile.circuit_depth, max_nodes=profile.circuit_nodes), case.texts, case.genes)
        ours = table[(table["cell"] == corpus.cell_ids[cell]) & (table["target"] == "feature")]
        for row in ours.itertuples():
            there = nodes[nodes["gene"] == row.gene]
            assert row.nodes == len(there)
            assert row.influence == pytest.approx(there["influence"].sum())
    assert (table.groupby("target")["nodes"].sum() > 0).all()
    with pytest.raises(InputError, match="train for more steps"):
        circuit_gene_table(model, transcoders, corpus, [], plan, profile)
    monkeypatch.setattr(planted_genes, "named_right", lambda model, corpus, n: cells)
    truth = known_truth(model, transcoders, corpus, plan, profile)
    pd.testing.assert_frame_equal(truth.genes, table)
    assert len(truth.circuits) == 2 * len(cells) and set(truth.roles["target"]) == {
        "feature", "call"}


def test_only_cells_that_are_named_right_are_taken(monkeypatch) -> None:
    corpus = tiny_corpus(40, validation_share=0.5)
    # The model is right for every second cell, and never for B cells.
    monkeypatch.setattr(planted_genes, "predict_answers", lambda model, corpus, cells: [
        "B" if cell % 2 or corpus.labels[cell] == "B cell" else corpus.labels[cell]
        for cell in cells])
    chosen = named_right(None, corpus, 2)
    assert corpus.held_out[chosen].all() and not (np.array(chosen) % 2).any()
    assert "B cell" not in corpus.labels[chosen]
    for label in set(corpus.labels[chosen]):
        there = np.flatnonzero(corpus.held_out & (corpus.labels == label))
        taken = [cell for cell in chosen if corpus.labels[cell] == label]
        assert taken == there[there % 2 == 0][:2].tolist()


def test_the_truth_is_known_for_planted_cells_only() -> None:
    assert "T cell" in plan_of(load_profile("planted")).cell_types
    with pytest.raises(InputError, match="not known"):
        plan_of(load_profile("demo"))


# --- for the page --------------------------------------------------------------------------------


def test_the_page_has_numbers_of_both_targets() -> None:
    rng = np.random.default_rng(0)
    rows = pd.concat([many(rng, 4, perfect=True), many(rng, 4, perfect=False).assign(
        target="feature")], ignore_index=True)
    summary = recovery_summary(recovery_table(rows), 0)
    truth = KnownTruth(rows, recovery_table(rows), summary, role_table(rows))
    numbers, words = truth.over_all_types(), truth.words()
    assert list(words) == list(numbers) == ["call", "feature"]
    assert (words["call"]["circuits"], words["call"]["precision"]) == ("4", "100 %")
    assert words["call"]["random_precision"] == words["feature"]["random_precision"] == "25 %"
    # All influence of the perfect circuits is on planted genes; no gene is shared.
    assert (words["call"]["own"], words["call"]["shared"]) == ("100 %", "0 %")
    assert numbers["feature"]["own"] + numbers["feature"]["background"] == pytest.approx(1)
    assert float(words["call"]["p"]) < 1e-3 < float(words["feature"]["p"])
    figure = plots.planted_recovery(summary)
    assert [axis.get_title() for axis in figure.axes] == ["circuits of the call",
                                                          "circuits of the feature"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "all types", "b", "a"]
