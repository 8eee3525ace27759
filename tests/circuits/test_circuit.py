"""Circuits: every extended node adds up, influence is a share, and the exports say the same."""

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits.circuits.attribution import (
    contributions,
    feature_direction,
    logit_direction,
)
from scfm_circuits.circuits.calls import (
    gene_contributions,
    sums_by_gene_or_not,
    sums_by_source,
)
from scfm_circuits.circuits.case_targets import strongest_at_end
from scfm_circuits.circuits.circuit import (
    Circuit,
    Node,
    circuit_genes,
    edge_table,
    expansion_table,
    gene_table,
    node_table,
    share_kept,
)
from scfm_circuits.circuits.exports import Output, collapsed_edges, neuronpedia_graph
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.search import strongest_features, trace, trace_feature
from scfm_circuits.common.files import write_json

OPTIONS = {"branches": 8, "depth": 4, "max_nodes": 40}
TEXTS = [f"t{i}" for i in range(9)]


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "sequential"])
def frozen(request: pytest.FixtureRequest) -> Frozen:
    model = tiny_model(parallel=request.param)
    return freeze(model, tiny_transcoders(model), tokens(9))


@pytest.fixture(scope="module")
def circuit(frozen: Frozen) -> Circuit:
    return trace_feature(frozen, 2, 5, 8, **OPTIONS)


def everything(frozen: Frozen, layer: int = 2, **options: Any) -> Circuit:
    """A circuit in which nothing is left out."""
    return trace_feature(frozen, layer, 5, 4, **{"branches": 10**6, "depth": 20,
                                                 "max_nodes": 10**6, **options})


@pytest.fixture(scope="module")
def whole(frozen: Frozen) -> Circuit:
    return everything(frozen)


def order(node: Node, parallel: bool) -> tuple[float, int]:
    """When the forward pass has a node: (layer, part of the layer)."""
    if node.kind == "embedding":
        return -1, 0
    if node.kind == "logit":
        return 10**6, 0
    return node.layer, 0 if node.kind == "head" else 1


# --- sums ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(1, 4), heads=st.sampled_from([1, 2, 4]), n=st.integers(1, 10),
       parallel=st.booleans(), seed=st.integers(0, 10_000), branches=st.integers(1, 40))
def test_every_extended_node_adds_up(layers, heads, n, parallel, seed, branches):
    model = tiny_model(layers=layers, heads=heads, parallel=parallel, seed=seed)
    run = freeze(model, tiny_transcoders(model, seed=seed), tokens(n, seed=seed))
    rng = np.random.default_rng(seed)
    layer, feature, position = (int(rng.integers(size)) for size in (layers, 24, n))
    circuit = trace_feature(run, layer, feature, position, branches=branches, depth=4,
                            max_nodes=30)
    assert circuit.closure_max_relative < 1e-10
    edges = defaultdict(float)
    for edge in circuit.edges:
        edges[edge.target] += edge.weight
    for name, one in circuit.expansions.items():
        rest = one.rest_features + one.rest_heads + one.rest_errors + one.rest_embedding
        assert abs(one.kept + rest + one.constant - one.value) < 1e-9
        assert abs(edges[name] - one.kept) < 1e-9
        node = circuit.nodes[name]
        if node.kind == "feature":
            assert one.value == float(run.pre[node.layer, node.position, node.index])
        else:
            weight = next(edge.weight for edge in circuit.edges if edge.source == name)
            assert abs(one.value - weight) < 1e-9
    share = circuit.influence()
    assert all(0 <= value <= 1 + 1e-9 for value in share.values())


def test_nothing_is_left_when_everything_is_kept(whole):
    for one in whole.expansions.values():
        assert max(abs(one.rest_features), abs(one.rest_heads), abs(one.rest_errors),
                   abs(one.rest_embedding)) < 1e-9
    kinds = {node.kind for node in whole.nodes.values()}
    assert kinds == {"feature", "head", "error", "embedding"}
    assert set(whole.expansions) == {
        name for name, node in whole.nodes.items() if node.kind in ("feature", "head")}


def test_edges_of_the_target_are_its_strongest_contributions(frozen, circuit):
    parts = contributions(frozen, feature_direction(frozen, 2, 5, 8))
    flat = torch.cat([parts.features.flatten(), parts.heads.flatten(), parts.errors,
                      parts.embedding])
    expected = sorted(flat.abs().tolist(), reverse=True)[:8]
    found = [edge for edge in circuit.edges if edge.target == circuit.target]
    assert [abs(edge.weight) for edge in found] == pytest.approx(expected)
    for edge in found:
        node = circuit.nodes[edge.source]
        exact = {"feature": lambda n: parts.features[n.layer, n.index],
                 "head": lambda n: parts.heads[n.layer, n.index, n.source],
                 "error": lambda n: parts.errors[n.layer],
                 "embedding": lambda n: parts.embedding}[node.kind](node)
        assert edge.weight == pytest.approx(float(exact))
    assert any(edge.weight < 0 for edge in circuit.edges)


# --- shape ---------------------------------------------------------------------------------------


def test_edges_go_upwards(frozen, circuit, whole):
    for one in (circuit, whole):
        for edge in one.edges:
            source, target = one.nodes[edge.source], one.nodes[edge.target]
            below, above = (order(node, frozen.parallel) for node in (source, target))
            assert below < above
            if frozen.parallel:  # attention and MLP of one layer do not see each other
                assert source.layer < target.layer
            assert source.position == (target.source if target.kind == "head"
                                       else target.position)
            assert source.source <= source.position
        assert len({(edge.source, edge.target) for edge in one.edges}) == len(one.edges)


@pytest.mark.parametrize("max_nodes", [1, 2, 5, 17])
def test_no_more_nodes_than_allowed(frozen, max_nodes):
    circuit = trace_feature(frozen, 2, 5, 8, branches=6, depth=5, max_nodes=max_nodes)
    assert len(circuit.nodes) <= max_nodes
    assert circuit.closure_max_relative < 1e-10
    assert neuronpedia_graph(circuit, TEXTS, slug="s", scan="m")["nodes"]
    node_table(circuit, TEXTS, [None] * 9)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_deeper_than_allowed(frozen, depth):
    circuit = trace_feature(frozen, 2, 5, 8, branches=6, depth=depth, max_nodes=10**6)
    steps = {circuit.target: 0}
    for _ in range(depth + 1):
        for edge in circuit.edges:
            if edge.target in steps:
                steps[edge.source] = min(steps.get(edge.source, 99), steps[edge.target] + 1)
    assert set(steps) == set(circuit.nodes) and max(steps.values()) <= depth
    assert {name for name in circuit.expansions} == {
        name for name, step in steps.items()
        if step < depth and circuit.nodes[name].kind in ("feature", "head")}


def test_a_longer_search_holds_the_shorter_one(frozen):
    small, large = (trace_feature(frozen, 2, 5, 8, branches=6, depth=4, max_nodes=n)
                    for n in (20, 60))
    assert set(small.nodes) <= set(large.nodes)


# --- influence -----------------------------------------------------------------------------------


def influence_by_paths(circuit: Circuit) -> dict[str, float]:
    """Sum over all paths to the target of the product of shares."""
    found: dict[str, float] = defaultdict(float)

    def walk(name: str, share: float) -> None:
        found[name] += share
        for edge in circuit.edges:
            if edge.target == name:
                walk(edge.source, share * abs(edge.weight) / circuit.expansions[name].absolute)

    walk(circuit.target, 1.0)
    return found


def test_influence_is_the_sum_over_paths(circuit):
    found, expected = circuit.influence(), influence_by_paths(circuit)
    assert found[circuit.target] == 1 and set(found) == set(circuit.nodes)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=1e-12)


def test_all_influence_arrives_somewhere(whole):
    share = whole.influence()
    ends = sum(value for name, value in share.items() if name not in whole.expansions)
    biases = sum(share[name] * abs(one.constant) / one.absolute
                 for name, one in whole.expansions.items())
    assert ends + biases == pytest.approx(1) and ends > 0.2


# --- collapsing and export -----------------------------------------------------------------------


def heads_of(circuit: Circuit, name: str) -> list[str]:
    """The extended heads that write to a node, directly or through other heads."""
    found = [edge.source for edge in circuit.edges
             if edge.target == name and circuit.nodes[edge.source].kind == "head"]
    return found + [further for head in found for further in heads_of(circuit, head)]


@pytest.mark.parametrize("layer", [1, 2])
def test_collapsing_heads_keeps_the_total(frozen, whole, layer):
    circuit = whole if layer == 2 else everything(frozen, layer)
    incoming = defaultdict(float)
    for edge in collapsed_edges(circuit):
        assert "head" not in (circuit.nodes[edge.source].kind, circuit.nodes[edge.target].kind)
        incoming[edge.target] += edge.weight
    checked = 0
    for name, one in circuit.expansions.items():
        if circuit.nodes[name].kind == "head":
            continue
        biases = one.constant + sum(circuit.expansions[head].constant
                                    for head in heads_of(circuit, name))
        assert incoming[name] + biases == pytest.approx(one.value, abs=1e-9)
        checked += 1
    assert checked > 3


def test_a_head_that_was_not_extended_is_dropped(frozen):
    circuit = trace_feature(frozen, 2, 5, 8, branches=30, depth=1, max_nodes=10**6)
    kept = {(edge.source, edge.weight) for edge in circuit.edges
            if circuit.nodes[edge.source].kind != "head"}
    assert {(edge.source, edge.weight) for edge in collapsed_edges(circuit)} == kept
    assert len(kept) < len(circuit.edges)


def logit_circuit(frozen: Frozen) -> Circuit:
    reading = logit_direction(frozen, 7, 8)
    return trace(frozen, Node.of_logit(7, 8, 3, reading.value), reading, **OPTIONS)


def test_the_graph_has_the_schema_of_neuronpedia(frozen, circuit, whole, tmp_path):
    for one in (circuit, logit_circuit(frozen), whole):
        outputs = {name: Output("A", 0.5) for name, node in one.nodes.items()
                   if node.kind == "logit"}
        graph = neuronpedia_graph(one, TEXTS, slug="case", scan="model", outputs=outputs)
        assert set(graph) == {"metadata", "qParams", "nodes", "links"}
        assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(graph["metadata"])
        assert graph["metadata"]["prompt"] == "".join(TEXTS)
        ids = [node["node_id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids) and one.target in ids
        for node in graph["nodes"]:
            assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId",
                    "clerp"} <= set(node)
            assert node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error",
                                            "embedding", "logit")
            assert 0 <= node["ctx_idx"] < len(TEXTS) and isinstance(node["layer"], str)
            assert 0 <= node["influence"] <= 1 + 1e-9
            if node["feature_type"] == "cross layer transcoder":
                expected = float(frozen.activations[int(node["layer"]), node["ctx_idx"],
                                                    one.nodes[node["node_id"]].index])
                assert node["activation"] == pytest.approx(expected)
        assert graph["links"]
        for link in graph["links"]:
            assert link["source"] in ids and link["target"] in ids
            assert np.isfinite(link["weight"])
        path = write_json(tmp_path / "graph.json", graph)
        assert json.loads(path.read_text()) == json.loads(json.dumps(graph, allow_nan=False))


def test_a_logit_circuit_adds_up(frozen):
    circuit = logit_circuit(frozen)
    assert circuit.closure_max_relative < 1e-10
    target = circuit.expansions[circuit.target]
    mean = frozen.logits[8].mean()
    assert target.value == pytest.approx(float(frozen.logits[8, 7] - mean))


# --- tables --------------------------------------------------------------------------------------


def test_tables_hold_all_nodes_edges_and_expansions(whole):
    genes = ["CD3D", None, "LYZ", "LYZ", None, "CD3D", "NKG7", None, None]
    nodes = node_table(whole, TEXTS, genes)
    assert set(nodes["node"]) == set(whole.nodes) and nodes["node"][0] == whole.target
    assert nodes["influence"].is_monotonic_decreasing
    for line in nodes.itertuples():
        node = whole.nodes[line.node]
        assert line.token == TEXTS[node.source] and line.gene == (genes[node.source] or "")
        assert line.expanded == (line.node in whole.expansions)
        assert pd.isna(line.feature) == (node.kind != "feature")
    edges = edge_table(whole)
    assert len(edges) == len(whole.edges) and edges["share"].between(0, 1).all()
    table = expansion_table(whole)
    assert (table["residual"].abs() <= 1e-10 * table["absolute"]).all()
    # Genes by the summed influence of their nodes.
    total: dict[str, float] = defaultdict(float)
    for line in nodes.itertuples():
        if line.gene:
            total[line.gene] += line.influence
    assert circuit_genes(nodes) == sorted(total, key=lambda gene: -total[gene])
    assert len(total) > 1


def test_a_gene_counts_for_the_token_a_head_read():
    nodes = [Node.of_feature(2, 5, 3, 1.0), Node.of_head(1, 0, 3, 1, "x", 0.5)]
    circuit = Circuit(nodes[0].id, {node.id: node for node in nodes})
    table = node_table(circuit, list("abcd"), [None, "VWF", None, "ENG"]).set_index("node")
    assert table.loc[nodes[1].id, ["token", "gene"]].tolist() == ["b", "VWF"]
    assert table.loc[nodes[0].id, ["token", "gene"]].tolist() == ["d", "ENG"]


def test_genes_of_equal_influence_are_in_order_of_name():
    table = pd.DataFrame({"gene": ["B", "A", "", "C"], "influence": [0.2, 0.2, 0.9, 0.5]})
    assert circuit_genes(table) == ["C", "A", "B"]
    assert circuit_genes(table[table["gene"] == ""]) == []


def test_gene_contributions_add_up_to_attention_on_genes():
    model = tiny_model()
    run = freeze(model, tiny_transcoders(model), tokens(6))
    parts = contributions(run, feature_direction(run, 2, 4, 5))
    genes = ["B", None, "A", "A", None, "B"]
    table = gene_contributions(parts, genes)
    heads = parts.heads.numpy()
    expected = {"A": heads[:, :, [2, 3]].sum(), "B": heads[:, :, [0, 5]].sum()}
    assert dict(zip(table["gene"], table["contribution"], strict=True)) == pytest.approx(expected)
    assert table["contribution"].is_monotonic_decreasing
    layer, head = (int(i) for i in table["strongest_head"].iloc[0].split("."))
    places = [2, 3] if table["gene"].iloc[0] == "A" else [0, 5]
    by_head = np.abs(heads[:, :, places].sum(axis=2))
    assert by_head[layer, head] == by_head.max()


@pytest.mark.parametrize("place", ["answer", "query"])
def test_strongest_at_end_is_that_of_each_cells_own_run(place):
    corpus = tiny_corpus()
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    cells = np.arange(len(corpus))
    found = strongest_at_end(model, transcoders, corpus, cells, 1, place, 5)
    for cell in cells:
        end = corpus.answer_end[cell] if place == "answer" else corpus.answer_start[cell] - 1
        run = freeze(model, transcoders, corpus.tokens[cell][: end + 1])
        assert [found[cell]] == strongest_features(run, 1, int(end), 1)


def test_strongest_features_are_active_and_in_order(frozen):
    for n in (1, 4, 100):
        found = strongest_features(frozen, 1, 6, n)
        z = frozen.activations[1, 6]
        active = [f for f in z.argsort(descending=True).tolist() if z[f] > 0]
        assert found == active[:n]


def test_a_circuit_of_a_real_sentence_in_float32():
    corpus = tiny_corpus()
    model = model_for(corpus, layers=3, dtype=torch.float32)
    ids = corpus.tokens[0][: corpus.answer_end[0] + 1]
    run = freeze(model, tiny_transcoders(model), ids)
    last = len(ids) - 1
    feature = strongest_features(run, 2, last, 1)[0]
    circuit = trace_feature(run, 2, feature, last, **OPTIONS)
    assert circuit.closure_max_relative < 1e-4
    genes = [str(corpus.symbols[g]) if g >= 0 else None for g in corpus.gene[0][: last + 1]]
    table = node_table(circuit, corpus.pieces(0)[: last + 1], genes)
    assert set(circuit_genes(table)) <= set(corpus.genes_of(0))


def test_the_target_keeps_what_its_expansion_keeps(circuit):
    first = circuit.expansions[circuit.target]
    kept = [edge.weight for edge in circuit.edges if edge.target == circuit.target]
    assert share_kept(circuit) == pytest.approx(np.abs(kept).sum() / first.absolute)
    assert 0 < share_kept(circuit) <= 1
    ids = [node.id for node in circuit.features]
    assert ids and circuit.target not in ids and all(name.startswith("L") for name in ids)


def test_the_gene_table_orders_genes_as_the_circuit_does(circuit):
    genes = ["A", "B", None, "A", "C", None, "B", "D", None]
    nodes = node_table(circuit, TEXTS, genes)
    table = gene_table(nodes)
    assert table["gene"].tolist() == circuit_genes(nodes)
    assert table["nodes"].sum() == (nodes["gene"] != "").sum()
    assert table["influence"].is_monotonic_decreasing


def test_sums_by_source_add_up_with_attention_split_or_not(frozen):
    reading = logit_direction(frozen, 7, 8)
    parts = contributions(frozen, reading)
    genes = ["A", "A", None, "B", "C", None, None, "A", None]
    split = sums_by_gene_or_not(parts, gene_contributions(parts, genes))
    for sums in (sums_by_source(parts), split):
        assert sum(sums.values()) == pytest.approx(float(reading.value))
    on_genes = parts.heads[:, :, [gene is not None for gene in genes]].sum()
    assert split["attention to genes"] == pytest.approx(float(on_genes))
    assert list(split) == ["features", "attention to genes", "attention to other tokens",
                           "token embedding", "transcoder error", "constant (biases)"]
