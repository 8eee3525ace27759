"""Circuits and graphs for other programs: Neuronpedia's JSON, and GraphML.

- `neuronpedia_graph`: the attribution-graph schema of Neuronpedia and circuit-tracer, for their
  viewers. Attention heads, which it does not know, are collapsed exactly.
- `save_graphml`: for Cytoscape, Gephi, yEd, igraph and networkx; with heads, genes, signs, and for
  each node with a row how it adds up.
Both take a `Circuit` (greedy search) or an `AttributionGraph`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scfm_circuits.circuits.circuit import Circuit, Edge, Node
from scfm_circuits.circuits.graph import AttributionGraph
from scfm_circuits.circuits.graph_scores import cumulative_influence, influence
from scfm_circuits.common.files import atomic_path, write_json


class _Plain(NamedTuple):
    """What both kinds have in common; influence and targets by node id, and so are rows: what
    nodes' values add up from besides their edges, `constant` and `not_kept`."""

    nodes: list[Node]
    edges: list[Edge]
    influence: dict[str, float]
    rows: dict[str, dict[str, float]]
    targets: list[str]
    closure: float


def _plain(circuit: Circuit | AttributionGraph) -> _Plain:
    if isinstance(circuit, Circuit):
        rows = {one.node: {"constant": one.constant, "not_kept": one.rest_features
                           + one.rest_heads + one.rest_errors + one.rest_embedding}
                for one in circuit.expansions.values()}
        return _Plain(list(circuit.nodes.values()), circuit.edges, circuit.influence(), rows,
                      [circuit.target], circuit.closure_max_relative)
    nodes, edges = list(circuit.nodes), circuit.matrix.tocoo()
    found = influence(circuit) + circuit.weights
    parts = zip(nodes, circuit.constant, circuit.dropped, strict=True)
    return _Plain(
        nodes, [Edge(nodes[source].id, nodes[target].id, float(weight)) for target, source, weight
                in zip(edges.row, edges.col, edges.data, strict=True)],
        {node.id: float(value) for node, value in zip(nodes, found, strict=True)},
        {node.id: {"constant": float(constant), "not_kept": float(dropped)}
         for node, constant, dropped in parts if node.kind in ("feature", "logit")},
        [node.id for node, weight in zip(nodes, circuit.weights, strict=True) if weight > 0],
        circuit.closure_max_relative)


# --- Neuronpedia ---------------------------------------------------------------------------------


def collapsed_edges(circuit: Circuit) -> list[Edge]:
    """Edges between nodes other than heads.

    What contributes to a head's term contributes the same amount to the head's reader, so a head
    that was extended is replaced by its own edges; one that was not is dropped.
    """
    reader = {edge.source: edge.target for edge in circuit.edges
              if circuit.nodes[edge.source].kind == "head"}
    summed: dict[tuple[str, str], float] = {}
    for edge in circuit.edges:
        if circuit.nodes[edge.source].kind == "head":
            continue
        target = edge.target
        while circuit.nodes[target].kind == "head":
            target = reader[target]
        summed[edge.source, target] = summed.get((edge.source, target), 0.0) + edge.weight
    return [Edge(source, target, weight) for (source, target), weight in summed.items()]


class Output(NamedTuple):
    """What a logit node stands for: its text, such as a token or a label, and its probability."""

    text: str
    probability: float


_FEATURE_TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error",
                  "embedding": "embedding", "logit": "logit"}


def neuronpedia_graph(circuit: Circuit | AttributionGraph, texts: Sequence[str], *, slug: str,
                      scan: str, outputs: Mapping[str, Output] | None = None
                      ) -> dict[str, Any]:
    """The circuit in the graph schema of Neuronpedia and circuit-tracer.

    texts: (n_pos,) token texts, by which nodes are called. outputs: by node id, for every logit
    node; the viewer reads its probability out of its label. A node's `influence` is, as the viewer
    wants it, the share of all influence held by it and those above it; targets have 0, so that they
    are shown at every threshold. Error nodes have identifiers of
    their own (`err_...`), which cannot collide with features of layer 0. `feature` is unique over
    layers, as in circuit-tracer: Cantor's number of a feature's layer and index, a token's
    position, a logit's token, -1 for others.
    """
    plain, outputs = _plain(circuit), outputs or {}
    shown = [node for node in plain.nodes if node.kind != "head"]
    others = [node.id for node in shown if node.id not in plain.targets]
    above = dict(zip(others, cumulative_influence([plain.influence[one] for one in others]),
                     strict=True))
    nodes = [{
        "node_id": node.id, "feature": _feature_number(node),
        "layer": "E" if node.kind == "embedding" else str(node.layer), "ctx_idx": node.position,
        "feature_type": _FEATURE_TYPES[node.kind], "jsNodeId": f"{node.id}-0",
        "clerp": texts[node.position],
        "influence": float(above.get(node.id, 0.0)),
        "activation": max(node.value, 0.0) if node.kind == "feature" else None,
        **(_of_output(outputs[node.id], node.id in plain.targets) if node.kind == "logit" else {}),
    } for node in shown]
    edges = collapsed_edges(circuit) if isinstance(circuit, Circuit) else plain.edges
    return {
        "metadata": {
            "slug": slug, "scan": scan, "prompt_tokens": list(texts), "prompt": "".join(texts),
            "info": {"generator": {"name": "scfm-circuits"}},
            "closure_max_relative": plain.closure,
        },
        "qParams": {"pinnedIds": plain.targets, "supernodes": [], "linkType": "both",
                    "clickedId": plain.targets[0]},
        "nodes": nodes,
        "links": [{"source": e.source, "target": e.target, "weight": e.weight} for e in edges],
    }


def _feature_number(node: Node) -> int:
    if node.kind == "feature":
        both = node.layer + node.index
        return both * (both + 1) // 2 + node.index
    if node.kind == "embedding" and node.index >= 0:  # else it is of the position alone
        return node.position
    return node.index if node.kind == "logit" else -1


def _of_output(output: Output, target: bool) -> dict[str, Any]:
    # The viewer splits the label at "(p=" and takes the first such part.
    text = output.text.replace("(p=", "(p =")
    return {"clerp": f'Output "{text}" (p={output.probability:.3f})',
            "token_prob": output.probability, "is_target_logit": target}


# --- GraphML -------------------------------------------------------------------------------------

# What XML 1.0 has no way to write, not even escaped: most control characters, lone surrogates and
# two non-characters (section 2.2).
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _xml_text(text: str) -> str:
    return _NOT_XML.sub("", text)


def save_graphml(path: Path, circuit: Circuit | AttributionGraph, texts: Sequence[str],
                 genes: Sequence[str | None]) -> Path:
    """Write nodes and edges as GraphML.

    texts, genes: (n_pos,) token texts and the gene of each token (None outside genes); a head
    counts for the token it read. Nodes: kind, layer, position, source, index, token, gene, label,
    value, influence, target, and for nodes with a row `constant` and `not_kept`: with the edges
    they add up to the value. Edges, from source to target: weight, sign (1 or -1). Characters that
    XML cannot hold are left out of texts.
    """
    import networkx as nx

    plain = _plain(circuit)
    graph = nx.DiGraph(closure_max_relative=plain.closure)
    for node in plain.nodes:
        token = _xml_text(texts[node.source])
        graph.add_node(
            _xml_text(node.id), kind=node.kind, layer=node.layer, position=node.position,
            source=node.source, index=node.index, token=token,
            gene=_xml_text(genes[node.source] or ""), label=token, value=float(node.value),
            influence=plain.influence[node.id], target=node.id in plain.targets,
            **plain.rows.get(node.id, {}))
    for edge in plain.edges:
        graph.add_edge(_xml_text(edge.source), _xml_text(edge.target), weight=edge.weight,
                       sign=-1 if edge.weight < 0 else 1)
    with atomic_path(path) as temporary:
        nx.write_graphml_xml(graph, temporary)
    return Path(path)


# --- both ----------------------------------------------------------------------------------------


def save_both(results: Path, name: str, circuit: Circuit | AttributionGraph, texts: Sequence[str],
              genes: Sequence[str | None], *, slug: str, scan: str,
              outputs: Mapping[str, Output] | None = None) -> None:
    """Write `circuits/<name>.json` for Neuronpedia and `circuits/<name>.graphml` under results;
    outputs: as in `neuronpedia_graph`."""
    folder = Path(results) / "circuits"
    write_json(folder / f"{name}.json", neuronpedia_graph(circuit, texts, slug=slug, scan=scan,
                                                          outputs=outputs))
    save_graphml(folder / f"{name}.graphml", circuit, texts, genes)
