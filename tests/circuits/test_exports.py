"""Exports say what the circuit says, fit their formats, and survive hostile text."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
import numpy as np
import pytest
from helpers import logit_targets, tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits.circuits.attribution import logit_direction
from scfm_circuits.circuits.circuit import Circuit, Node
from scfm_circuits.circuits.exports import (
    Output,
    neuronpedia_graph,
    save_both,
    save_graphml,
)
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.graph import AttributionGraph, attribution_graph, feature_target
from scfm_circuits.circuits.graph_scores import influence, prune
from scfm_circuits.circuits.search import trace, trace_feature
from scfm_circuits.common.files import write_json

TEXTS = [f"t{i}" for i in range(8)]
GENES = ["VWF", None, "MT-CO1", "VWF", None, "PTPRB", None, None]
GRAPHML = "{http://graphml.graphdrawing.org/xmlns}"

NUMBER_OR_NULL = {"type": ["number", "null"]}
NODE = {
    "type": "object",
    "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
    "properties": {
        "node_id": {"type": "string"}, "feature": {"type": ["integer", "null"]},
        "layer": {"type": ["string", "integer"]}, "ctx_idx": {"type": "integer"},
        "feature_type": {"enum": ["cross layer transcoder", "mlp reconstruction error",
                                  "embedding", "logit"]},
        "jsNodeId": {"type": "string"}, "clerp": {"type": "string"},
        "influence": NUMBER_OR_NULL, "activation": NUMBER_OR_NULL,
        # Of circuit-tracer's own graphs; the schema leaves room for more.
        "token_prob": {"type": "number"}, "is_target_logit": {"type": "boolean"},
    },
    "additionalProperties": False,
}
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object", "required": ["slug", "scan", "prompt_tokens", "prompt"],
            "properties": {
                "slug": {"type": "string"}, "scan": {"type": "string"},
                "prompt_tokens": {"type": "array", "items": {"type": "string"}},
                "prompt": {"type": "string"},
                "info": {"type": "object", "properties": {"generator": {
                    "type": "object", "properties": {"name": {"type": "string"}}}}},
            },
        },
        "qParams": {
            "type": "object",
            "properties": {
                "pinnedIds": {"type": "array", "items": {"type": "string"}},
                "supernodes": {"type": "array"}, "linkType": {"type": "string"},
                "clickedId": {"type": "string"},
            },
        },
        "nodes": {"type": "array", "items": NODE},
        "links": {"type": "array", "items": {
            "type": "object", "required": ["source", "target", "weight"],
            "properties": {"source": {"type": "string"}, "target": {"type": "string"},
                           "weight": {"type": "number"}}}},
    },
}
"""What Neuronpedia's graph-schema.json demands of the parts that we write (draft 7)."""


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    model = tiny_model()
    return freeze(model, tiny_transcoders(model), tokens(8))


@pytest.fixture(scope="module")
def logits(frozen: Frozen) -> AttributionGraph:
    return attribution_graph(frozen, logit_targets(frozen, 7, most=3), max_features=60,
                             edges_per_row=30)


@pytest.fixture(scope="module", params=["greedy", "logits", "feature", "pruned"])
def circuit(request: pytest.FixtureRequest, frozen: Frozen, logits: AttributionGraph
            ) -> Circuit | AttributionGraph:
    if request.param == "greedy":
        return trace_feature(frozen, 2, 5, 7, branches=9, depth=4, max_nodes=60)
    if request.param == "feature":
        return attribution_graph(frozen, [feature_target(frozen, 2, 5, 7)])
    return prune(logits) if request.param == "pruned" else logits


def nodes_of(circuit: Circuit | AttributionGraph) -> dict[str, Any]:
    nodes = circuit.nodes.values() if isinstance(circuit, Circuit) else circuit.nodes
    return {node.id: node for node in nodes}


def as_graph(circuit: Circuit | AttributionGraph, texts: list[str] = TEXTS) -> dict[str, Any]:
    outputs = {name: Output(f"word {node.index}", 0.25)
               for name, node in nodes_of(circuit).items() if node.kind == "logit"}
    return neuronpedia_graph(circuit, texts, slug="s", scan="m", outputs=outputs)


def edges_of(circuit: Circuit | AttributionGraph) -> dict[tuple[str, str], float]:
    if isinstance(circuit, Circuit):
        return {(edge.source, edge.target): edge.weight for edge in circuit.edges}
    dense, nodes = circuit.matrix.toarray(), circuit.nodes
    return {(nodes[source].id, nodes[target].id): dense[target, source]
            for target, source in zip(*np.nonzero(dense), strict=True)}


# --- Neuronpedia ---------------------------------------------------------------------------------


def test_the_json_fits_the_schema(circuit, tmp_path):
    graph = as_graph(circuit)
    path = write_json(tmp_path / "graph.json", graph)
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all(link[end] in ids for link in graph["links"] for end in ("source", "target"))
    assert graph["links"] and set(graph["qParams"]["pinnedIds"]) <= set(ids)


def test_the_schema_in_this_test_refuses_what_is_wrong(circuit):
    for part, change in (("nodes", {"feature_type": "head"}), ("nodes", {"feature": "5"}),
                         ("links", {"weight": None}), ("nodes", {"ctx_idx": 1.5})):
        graph = as_graph(circuit)
        graph[part][0].update(change)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(graph, SCHEMA)


def test_identifiers_do_not_collide(frozen):
    """circuit-tracer's `0_<layer>_<position>` of an error is its feature `layer` of layer 0."""
    targets = [feature_target(frozen, 2, feature, 7) for feature in range(24)]
    graph = neuronpedia_graph(attribution_graph(frozen, targets, max_features=10**6), TEXTS,
                              slug="s", scan="m")
    kinds = {node["feature_type"] for node in graph["nodes"]}
    assert len(kinds) == 3
    for key in ("node_id", "jsNodeId"):
        assert len({node[key] for node in graph["nodes"]}) == len(graph["nodes"])


def test_a_graph_keeps_its_weights_in_json(logits):
    graph = as_graph(logits)
    assert {(link["source"], link["target"]): link["weight"] for link in graph["links"]
            } == pytest.approx(edges_of(logits))
    assert len(graph["qParams"]["pinnedIds"]) == (logits.weights > 0).sum()


def test_numbers_of_features_are_unique_over_layers(circuit):
    """One number, one feature: the viewer counts in how many tokens it occurs."""
    numbered: dict[tuple[bool, str], set[int]] = {}
    for node in as_graph(circuit)["nodes"]:
        # With the layer for all but features, as the viewer has it.
        kind = node["feature_type"]
        place = "" if kind == "cross layer transcoder" else node["layer"]
        numbered.setdefault((kind, place, node["feature"]), set()).add(
            node["node_id"].rsplit("_P", 1)[0] if not place else node["ctx_idx"])
    for (kind, _, number), found in numbered.items():
        assert isinstance(number, int)
        assert len(found) == 1 or (kind == "mlp reconstruction error" and number == -1)


def probability_in_the_viewer(clerp: str) -> float:
    """How Neuronpedia's front end takes a logit's probability from its label."""
    return float(clerp.split("(p=")[1].split(")")[0])


def test_logit_nodes_open_in_the_viewer(logits):
    targets = [node for node in logits.nodes if node.kind == "logit"]
    texts = [" the", "a (p=9) b", 'say "(p=1)"'][:len(targets)]
    shares = [0.5, 0.25, 0.125]
    outputs = {node.id: Output(text, share)
               for node, text, share in zip(targets, texts, shares, strict=False)}
    graph = neuronpedia_graph(logits, TEXTS, slug="s", scan="m", outputs=outputs)
    found = {node["node_id"]: node for node in graph["nodes"] if node["feature_type"] == "logit"}
    assert set(found) == set(outputs) and len(found) > 1
    for name, node in found.items():
        assert probability_in_the_viewer(node["clerp"]) == outputs[name].probability
        assert node["token_prob"] == outputs[name].probability and node["is_target_logit"]


def test_influence_in_json_is_cumulative(logits):
    """The viewer shows nodes up to a threshold: those above it hold that share of influence."""
    graph = as_graph(logits)
    found = dict(zip([node.id for node in logits.nodes], influence(logits), strict=True))
    targets = set(graph["qParams"]["pinnedIds"])
    total = sum(value for name, value in found.items() if name not in targets)
    for threshold in (0.3, 0.8):
        shown = {node["node_id"] for node in graph["nodes"] if node["influence"] <= threshold}
        assert targets < shown
        held = sum(found[name] for name in shown - targets) / total
        weakest = min(found[name] for name in shown - targets)
        assert held <= threshold + 1e-9
        assert all(found[name] <= weakest + 1e-12 for name in set(found) - shown)


# --- GraphML -------------------------------------------------------------------------------------


def read_graphml(path: Path) -> tuple[dict[str, dict[str, str]], dict[tuple[str, str], dict]]:
    """Nodes and edges with their attributes as text, by the format's own rules."""
    root = ElementTree.parse(path).getroot()
    names = {key.get("id"): key.get("attr.name") for key in root.iter(f"{GRAPHML}key")}

    def attributes(element: ElementTree.Element) -> dict[str, str]:
        return {names[data.get("key")]: data.text or "" for data in element.iter(f"{GRAPHML}data")}

    return ({node.get("id"): attributes(node) for node in root.iter(f"{GRAPHML}node")},
            {(edge.get("source"), edge.get("target")): attributes(edge)
             for edge in root.iter(f"{GRAPHML}edge")})


def test_graphml_holds_all_nodes_and_edges(circuit, tmp_path):
    path = save_graphml(tmp_path / "circuit.graphml", circuit, TEXTS, GENES)
    found, links = read_graphml(path)
    nodes, edges = nodes_of(circuit), edges_of(circuit)
    assert set(found) == set(nodes) and set(links) == set(edges)
    for name, one in found.items():
        node = nodes[name]
        assert one["kind"] == node.kind and float(one["value"]) == node.value
        assert [int(one[key]) for key in ("layer", "position", "source", "index")] == [
            node.layer, node.position, node.source, node.index]
        assert one["token"] == TEXTS[node.source] and one["gene"] == (GENES[node.source] or "")
    for pair, one in links.items():
        assert float(one["weight"]) == edges[pair]
        assert int(one["sign"]) == np.sign(edges[pair])
    assert {one["sign"] for one in links.values()} == {"1", "-1"}


def test_rows_of_a_graphml_file_add_up(circuit, tmp_path):
    graph = nx.read_graphml(save_graphml(tmp_path / "one.graphml", circuit, TEXTS, GENES))
    checked = 0
    for name, node in graph.nodes(data=True):
        if "constant" in node:
            total = sum(weight for _, _, weight in graph.in_edges(name, data="weight"))
            total += node["constant"] + node["not_kept"]
            checked += 1
            assert total == pytest.approx(node["value"], abs=1e-9)
    targets = [name for name, target in graph.nodes(data="target") if target]
    assert checked > 3 and all("constant" in graph.nodes[name] for name in targets)
    assert nx.is_directed_acyclic_graph(graph)


HOSTILE = ["<img src=x onerror=alert(1)>", "a & b", "]]>", '"', "'", "\x00\x01\x1b[0m", "\ud800",
           "\ufffe"]


def test_hostile_text_stays_text(frozen, tmp_path):
    circuit = trace_feature(frozen, 2, 5, 7, branches=9, depth=4, max_nodes=60)
    path = save_graphml(tmp_path / "one.graphml", circuit, HOSTILE, HOSTILE)
    found, _ = read_graphml(path)
    assert set(found) == set(circuit.nodes)
    kept = [*HOSTILE[:5], "[0m", "", ""]
    for name, node in circuit.nodes.items():
        assert {found[name][key] for key in ("token", "label", "gene")} == {kept[node.source]}
    graph = neuronpedia_graph(circuit, HOSTILE, slug="s", scan="m")
    read = json.loads(write_json(tmp_path / "one.json", graph).read_text())
    assert read["metadata"]["prompt_tokens"] == HOSTILE


@settings(max_examples=60)
@given(st.lists(st.text(max_size=6), min_size=8, max_size=8))
def test_any_text_gives_well_formed_xml(tmp_path_factory, frozen, texts):
    circuit = trace_feature(frozen, 2, 5, 7, branches=3, depth=2, max_nodes=6)
    path = save_graphml(tmp_path_factory.mktemp("xml") / "one.graphml", circuit, texts, texts)
    found, _ = read_graphml(path)
    for name, node in circuit.nodes.items():
        # Parsers read every line end as \n (XML 1.0, section 2.11).
        expected = texts[node.source].replace("\r\n", "\n").replace("\r", "\n")
        if all(letter.isprintable() or letter == "\n" for letter in expected):
            assert found[name]["token"] == expected
        assert len(found[name]["token"]) <= len(expected)


def test_both_files_are_written(tmp_path):
    frozen = freeze(model := tiny_model(), tiny_transcoders(model), tokens(8))
    circuit = trace_feature(frozen, 2, 5, 7, branches=6, depth=2, max_nodes=20)
    save_both(tmp_path, "one", circuit, TEXTS, GENES, slug="s", scan="x")
    written = json.loads((tmp_path / "circuits" / "one.json").read_text())
    assert written == json.loads(json.dumps(neuronpedia_graph(circuit, TEXTS, slug="s", scan="x")))
    graph = nx.read_graphml(tmp_path / "circuits" / "one.graphml")
    assert set(graph.nodes) == set(circuit.nodes)
    # A circuit of a call ends in a logit, whose text and probability the viewer wants.
    logit = Node.of_logit(7, 7, 3, 1.5)
    call = trace(frozen, logit, logit_direction(frozen, 7, 7, [3, 9]), branches=6, depth=2,
                 max_nodes=20)
    save_both(tmp_path, "two", call, TEXTS, GENES, slug="s", scan="x",
              outputs={logit.id: Output("_CD", 0.25)})
    nodes = json.loads((tmp_path / "circuits" / "two.json").read_text())["nodes"]
    assert [node["clerp"] for node in nodes if node["feature_type"] == "logit"] == [
        'Output "_CD" (p=0.250)']
