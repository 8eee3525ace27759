"""Structure adds up to what it was made of; overlap is found where it is, and only there."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import contributions, feature_direction
from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Node
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import trace_feature
from scfm_circuits.circuits.structure import (
    circuit_features,
    flow_table,
    head_table,
    inhibition,
    overlap_test,
    pair_table,
    path_ends,
    shared_features,
    similarity,
    supernodes,
)
from scfm_circuits.features.contexts import token_families
from scfm_circuits.features.statistics import FeatureStatistics

GENES = ["A", "A", None, "B", "C", None, "A", None, None]


def traced(*, parallel=True, seed=0, branches=6, depth=3, max_nodes=40):
    model = tiny_model(parallel=parallel, seed=seed)
    run = freeze(model, tiny_transcoders(model), tokens(9))
    circuit = trace_feature(run, 2, 5, 8, branches=branches, depth=depth, max_nodes=max_nodes)
    return circuit, contributions(run, feature_direction(run, 2, 5, 8))


def node(name: str, layer: int = 0, kind: str = "feature", source: int = 0) -> Node:
    return Node(name, kind, layer, 3, source, 0, 1.0)


def by_hand() -> Circuit:
    """T reads F (-2 of 4) and a head (1 of 4, with a bias of 1); F reads E (-1 of 2)."""
    nodes = [node("T", 2), node("F", 1), node("H", 0, "head", 1), node("E", -1, "embedding")]
    edges = [Edge("F", "T", -2.0), Edge("H", "T", 1.0), Edge("E", "F", -1.0)]
    expansions = {"T": Expansion("T", 0.0, -1.0, 1.0, 0, 0, 0, 0, 4.0),
                  "F": Expansion("F", 0.0, -1.0, 0.25, 0, 0, 0, 0, 2.0)}
    return Circuit("T", {one.id: one for one in nodes}, edges, expansions)


# --- flow ----------------------------------------------------------------------------------------


def test_signs_multiply_along_a_path():
    assert by_hand().influence(signed=True) == {"T": 1, "F": -0.5, "H": 0.25, "E": 0.25}


def test_where_paths_end_by_hand():
    assert path_ends(by_hand()) == {
        "embedding": 0.25, "errors": 0, "biases": 0.25 + 0.5 * 0.125, "features": 0,
        "attention": 0.25, "not kept": 0.5 * 0.375}


@settings(max_examples=15, deadline=None)
@given(parallel=st.booleans(), seed=st.integers(0, 50), branches=st.integers(1, 12),
       depth=st.integers(1, 5), max_nodes=st.integers(1, 60))
def test_flow_and_ends_add_up_to_the_expansion(parallel, seed, branches, depth, max_nodes):
    circuit, parts = traced(parallel=parallel, seed=seed, branches=branches, depth=depth,
                            max_nodes=max_nodes)
    flow = flow_table(circuit, parts)
    whole = circuit.expansions.get(circuit.target)
    assert flow["contribution"].sum() == pytest.approx(circuit.nodes[circuit.target].value,
                                                       abs=1e-10)
    assert flow["share"].sum() == pytest.approx(1, abs=1e-12)
    if whole is None:  # no room for any node
        return
    biases = flow.set_index("kind").loc["biases"]
    assert biases["contribution"] == pytest.approx(whole.constant)
    assert biases["share"] == pytest.approx(abs(whole.constant) / whole.absolute)
    features = flow[flow["kind"] == "features"]["contribution"].sum()
    kept = sum(edge.weight for edge in circuit.edges if edge.target == circuit.target
               and circuit.nodes[edge.source].kind == "feature")
    assert features == pytest.approx(kept + whole.rest_features, abs=1e-10)
    influence = circuit.influence()
    assert flow["passing"].sum() == pytest.approx(sum(influence.values()) - 1)
    ends = path_ends(circuit)
    assert sum(ends.values()) == pytest.approx(1, abs=1e-9)
    assert min(ends.values()) >= -1e-12
    signed = circuit.influence(signed=True)
    assert all(abs(signed[name]) <= influence[name] + 1e-12 for name in influence)


def test_passing_is_the_influence_of_the_nodes_of_a_layer():
    circuit, parts = traced(branches=20, max_nodes=80)
    flow = flow_table(circuit, parts).set_index(["kind", "layer"])["passing"]
    influence = circuit.influence()
    heads = [influence[n.id] for n in circuit.nodes.values() if n.kind == "head" and n.layer == 1]
    assert heads
    assert flow["attention", 1] == pytest.approx(sum(heads))


# --- heads and genes -----------------------------------------------------------------------------


def test_heads_and_genes_add_up_to_attention():
    circuit, parts = traced(branches=20, max_nodes=80)
    table = head_table(circuit, parts, GENES)
    assert table["contribution"].sum() == pytest.approx(float(parts.heads.sum()))
    whole = circuit.expansions[circuit.target].absolute
    assert table["share"].sum() == pytest.approx(float(parts.heads.abs().sum()) / whole)
    row = table[(table["gene"] == "A") & (table["layer"] == 1) & (table["head"] == 0)].iloc[0]
    assert row["contribution"] == pytest.approx(float(parts.heads[1, 0, [0, 1, 6]].sum()))
    signed = circuit.influence(signed=True)
    expected = sum(signed[n.id] for n in circuit.nodes.values()
                   if n.kind == "head" and n.position == 8)
    assert table["through"].sum() == pytest.approx(expected)
    assert expected != 0
    assert table["share"].is_monotonic_decreasing
    assert set(table["gene"]) == {"A", "B", "C", ""}


# --- negative edges ------------------------------------------------------------------------------


def test_negative_edges_by_hand():
    found = inhibition(by_hand())
    assert (found["edges"], found["negative"]) == (3, 2)
    assert found["carried"] == pytest.approx((0.5 + 0.25) / (0.5 + 0.25 + 0.25))
    assert by_hand().carried() == [0.5, 0.25, 0.25]


def test_a_circuit_of_positive_edges_takes_nothing_away():
    circuit, _ = traced()
    found = inhibition(circuit)
    assert 0 < found["negative"] < found["edges"]
    circuit.edges = [edge for edge in circuit.edges if edge.weight > 0]
    assert inhibition(circuit) == {"edges": found["edges"] - found["negative"], "negative": 0,
                                   "carried": 0}


# --- supernodes ----------------------------------------------------------------------------------


def statistics(counts: np.ndarray, pair_token: list[int]) -> FeatureStatistics:
    """One layer: counts (n_features, n_pairs)."""
    n = len(pair_token)
    return FeatureStatistics(100, counts.sum(axis=1)[None], np.array(pair_token), np.zeros(n, int),
                             np.ones(n, int), (sp.csr_matrix(counts),), np.zeros((1, 1)))


def test_families_hold_half_of_the_activations_and_pairs_of_one_token_count_together():
    counts = np.array([[3, 3, 5, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
    found = token_families(statistics(counts, [7, 7, 4, 9]), [(0, 0), (0, 1), (0, 2)])
    assert found == {(0, 0): (7,), (0, 1): (), (0, 2): (4, 7)}
    few = token_families(statistics(counts, [7, 7, 4, 9]), [(0, 0)], share=0.99, most=2)
    assert few == {(0, 0): (7, 4)}


def test_supernodes_join_chains_and_keep_influence():
    circuit, _ = traced(branches=8, max_nodes=60)
    members = sorted(circuit_features(circuit))
    assert len(members) >= 5
    # The first three are a chain whose ends share nothing; the fourth has no tokens.
    families = {one: (100 + place,) for place, one in enumerate(members)}
    families |= dict(zip(members, [(1, 2), (1, 2, 3, 4), (3, 4), ()], strict=False))
    table = supernodes(circuit, families)
    chain = table[table["n_features"] == 3]
    assert chain["features"].tolist() == [" ".join(f"{a}.{b}" for a, b in members[:3])]
    assert chain["tokens"].iloc[0] == [1, 2, 3, 4]
    assert len(table) == len(members) - 2
    influence = circuit.influence()
    features = [n.id for n in circuit.nodes.values()
                if n.kind == "feature" and n.id != circuit.target]
    assert table["influence"].sum() == pytest.approx(sum(influence[name] for name in features))
    signed = circuit.influence(signed=True)
    assert table["signed"].sum() == pytest.approx(sum(signed[name] for name in features))
    assert table["supernode"].tolist() == list(range(1, len(table) + 1))
    reordered = Circuit(circuit.target, dict(reversed(circuit.nodes.items())), circuit.edges,
                        circuit.expansions)
    pd.testing.assert_frame_equal(supernodes(reordered, families), table)


# --- several circuits ----------------------------------------------------------------------------


def planted(rng, *, own: int, common: int, types: int = 4, cells: int = 4):
    """Sets of `own` features of their type, `common` of all types, and ten random ones."""
    labels = [f"type {i}" for i in range(types) for _ in range(cells)]
    return [{*[(0, i) for i in range(common)], *[(int(label[-1]) + 1, i) for i in range(own)],
             *[(9, int(i)) for i in rng.choice(200, 10)]} for label in labels], labels


def test_planted_overlap_is_found():
    sets, labels = planted(np.random.default_rng(0), own=5, common=10)
    found = overlap_test(similarity(sets), labels, permutations=999)
    assert found.p == pytest.approx(1 / 1000)
    assert found.within > found.between
    assert (found.n_within, found.n_between) == (4 * 6, 96)
    assert overlap_test(similarity(sets), labels, permutations=999) == found


def test_without_overlap_p_is_uniform():
    p = [overlap_test(similarity(planted(np.random.default_rng(seed), own=0, common=10)[0]),
                      planted(np.random.default_rng(seed), own=0, common=10)[1],
                      permutations=199, seed=seed).p for seed in range(100)]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.05) < 0.15


def test_p_is_scipys():
    rng = np.random.default_rng(5)
    overlap = rng.random((7, 7))
    overlap = (overlap + overlap.T) / 2
    labels = ["a", "a", "a", "b", "b", "c", "c"]
    first, second = np.triu_indices(7, 1)

    def statistic(order):
        mixed = np.array(labels)[order.astype(int)]
        same = mixed[first] == mixed[second]
        values = overlap[first, second]
        return values[same].mean() - values[~same].mean()

    exact = permutation_test((np.arange(7),), statistic, permutation_type="pairings",
                             alternative="greater", n_resamples=np.inf).pvalue
    found = overlap_test(overlap, labels, permutations=20_000)
    assert found.p == pytest.approx(exact, abs=0.015)


def test_what_the_strata_explain_counts_for_nothing():
    # Types 0 and 1 have one target, 2 and 3 another; the target alone decides the features.
    rng = np.random.default_rng(1)
    labels = [f"type {i}" for i in range(4) for _ in range(5)]
    targets = [int(label[-1]) // 2 for label in labels]
    sets = [{*[(target, i) for i in range(10)], *[(9, int(i)) for i in rng.choice(50, 5)]}
            for target in targets]
    overlap = similarity(sets)
    assert overlap_test(overlap, labels, permutations=999).p < 0.01
    within = overlap_test(overlap, labels, strata=targets, permutations=999)
    assert within.p > 0.05
    assert (within.n_within, within.n_between) == (4 * 10, 2 * 25)


def test_groups_without_pairs_of_both_sorts_are_left_out():
    overlap = np.eye(5)
    nothing = overlap_test(overlap, list("abcde"))
    assert (nothing.within, nothing.between, nothing.p) == (None, None, None)
    assert overlap_test(overlap, list("aaaaa")).p is None
    assert overlap_test(np.zeros((0, 0)), []).p is None
    # Only the second group has both.
    some = overlap_test(overlap, list("aabbc"), strata=[0, 0, 1, 1, 1])
    assert (some.n_within, some.n_between, some.within) == (1, 2, 0)
    assert some.p == 1


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        overlap_test(np.eye(3), ["a", "b"])


def test_pairs_and_shared_features():
    sets = [{(0, 1), (1, 2)}, {(0, 1)}, {(0, 1), (2, 2)}]
    pairs = pair_table(similarity(sets), ["x", "y", "z"], ["T", "T", "B"], [4, 5, 4])
    assert pairs["overlap"].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2])
    assert pairs["same_type"].tolist() == [True, False, False]
    assert pairs["same_target"].tolist() == [False, True, False]
    shared = shared_features(sets, ["T", "T", "B"])
    assert shared.to_dict("list") == {
        "layer": [0, 1, 2], "feature": [1, 2, 2], "n_circuits": [3, 1, 1], "n_types": [2, 1, 1],
        "most_of": ["B", "T", "B"], "share_of_type": [1, 0.5, 1]}
