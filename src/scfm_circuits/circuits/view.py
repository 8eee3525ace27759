"""A circuit as plain data for the interactive figure in the page.

`circuit_view` gives nodes, edges, rows (layers) and columns (tokens); `boxes.circuit` wraps them
as a script, because a page opened from disk may load a script but not fetch a file; and
`book/_static/circuit.js` draws them with d3 (book/_extra/vendor/d3). `feature_details` adds what is
known about features.

All texts are untrusted. Here they are only cut to a readable length; the script holds nothing that
could end it, and the page shows every text as text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from scfm_circuits import InputError

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.circuits.circuit import Circuit, Node
    from scfm_circuits.common.profile import Profile
    from scfm_circuits.enrichment.gene_sets import GeneSets
    from scfm_circuits.features.statistics import FeatureStatistics

MAX_EDGES = 300
"""Edges in a view; more are a tangle, and slow to draw on a phone."""
MAX_TOKENS, MAX_GENES, MAX_TEXT = 12, 24, 200
_ORDER = ("feature", "head", "embedding", "error", "logit")


class Detail(TypedDict, total=False):
    """What a reader wants to know of a node beyond the circuit; every part may be missing."""

    tokens: Sequence[str]
    """Tokens on which it fires, most often first."""
    genes: Sequence[str]
    """Its gene list, most active first."""
    term: str
    """The best term of its gene list, with how sure that is."""
    term_name: str
    """That term alone, if it is below the FDR; nodes are grouped by it."""
    label: str
    """What it is called in place of its kind, layer and number."""
    contexts: Sequence[Sequence[Any]]
    """Where it is strongest: [activation, the cell's label, [[token, activation, gene], ...]]."""
    types: Sequence[Sequence[Any]]
    """[cell type, share of its tokens on which it is active, cells looked at]."""


def circuit_view(
    circuit: "Circuit", texts: Sequence[str], genes: Sequence[str | None],
    details: Mapping[str, Detail] | None = None, *, max_edges: int = MAX_EDGES, about: str = "",
    types_note: str = "",
) -> dict[str, Any]:
    """The circuit's strongest edges and the nodes they join, as JSON without NaN.

    texts, genes: (n_pos,) token texts and the gene of each token (None outside genes).
    details: by node id. max_edges: the edges that carry most of the target's contributions are
    kept, as in the static figure. about: one sentence on the circuit; types_note: how activation
    by cell type was read.

    Keys: `about`; `types_note`; `target` (a node's id); `rows` (names of the occupied layers,
    lowest first); `columns`
    (tokens that carry a node: `position`, `text`, `gene`); `kinds`; `nodes` (`id`, `kind`, `label`,
    `name`, `row`, `column`, `layer`, `index`, `position`, `token`, `gene`, `value`, `value_name`,
    `influence`, and the parts of `Detail`); `edges`, heaviest first (`id`, `source`, `target`,
    `weight` in units of the target's value, `share` of its absolute contributions, `carried`: that
    share times the target's influence); `total_nodes` and `total_edges` of the whole circuit.

    A head stands in the column of the token it read, as in `node_table`.

    Raises InputError if a number is not finite.
    """
    details = details or {}
    _check(circuit)
    influence, carried = circuit.influence(), circuit.carried()
    # Equal edges stay in the circuit's order, so that a view is the same on every run.
    order = sorted(range(len(carried)), key=lambda i: -carried[i])[:max_edges]
    kept = {circuit.target, *(name for i in order for name in
                              (circuit.edges[i].source, circuit.edges[i].target))}
    nodes = [node for node in circuit.nodes.values() if node.id in kept]
    heights = sorted({_row(node) for node in nodes})
    positions = sorted({node.source for node in nodes})
    return {
        "about": about, "types_note": types_note, "target": circuit.target,
        "rows": [_row_name(height) for height in heights],
        "columns": [{"position": p, "text": _cut(texts[p]), "gene": _cut(genes[p] or "")}
                    for p in positions],
        "kinds": [kind for kind in _ORDER if any(node.kind == kind for node in nodes)],
        "nodes": [{
            **_node(node, circuit.target, texts, genes, details.get(node.id, {})),
            **_detail(details.get(node.id, {})),
            "row": heights.index(_row(node)), "column": positions.index(node.source),
            "influence": _short(influence[node.id]),
        } for node in nodes],
        "edges": [_edge(i, circuit, carried[i]) for i in order],
        "total_nodes": len(circuit.nodes), "total_edges": len(circuit.edges),
    }


def feature_details(
    circuit: "Circuit", statistics: "FeatureStatistics", corpus: "Corpus", profile: "Profile",
    library: "GeneSets",
) -> dict[str, Detail]:
    """Tokens, gene list and best term of each of the circuit's features, by node id.

    Gene lists follow the profile's gene and list rules. The term is that of smallest p in the
    library under the rule `corpus`: tested against the corpus's own genes, with Benjamini-Hochberg
    over all terms.
    """
    import numpy as np

    from scfm_circuits.enrichment.background import prepare_background
    from scfm_circuits.enrichment.rules import RULES
    from scfm_circuits.enrichment.terms import top_terms
    from scfm_circuits.features.contexts import token_table
    from scfm_circuits.features.gene_lists import gene_lists

    rule = RULES["corpus"]
    universe = prepare_background(library, rule.background_for(corpus.occurring_symbols))
    found: dict[tuple[int, int], Detail] = {}
    used = {(node.layer, node.index) for node in circuit.nodes.values() if node.kind == "feature"}
    for layer in sorted({layer for layer, _ in used}):
        features = np.array(sorted(feature for at, feature in used if at == layer))
        lists = gene_lists(statistics, layer, features, corpus, profile)
        best = top_terms(lists, library, background=universe, family=rule.family, odds=rule.odds,
                         k=1).set_index("list")
        for place, (feature, genes) in enumerate(zip(features.tolist(), lists, strict=True)):
            tokens = token_table(statistics, layer, feature, corpus, MAX_TOKENS)["token"]
            detail: Detail = {"tokens": tokens.tolist(), "genes": genes}
            if place in best.index:
                row = best.loc[place].to_dict()
                fdr = float(row["Adjusted P-value"])
                nearest = "" if fdr < profile.fdr else f"none below FDR {profile.fdr:g}; nearest: "
                detail["term_name"] = "" if nearest else str(row["Term"])
                detail["term"] = (f"{nearest}{row['Term']} ({row['Overlap']} genes, FDR {fdr:.2g}; "
                                  f"{library.name})")
            found[layer, feature] = detail
    return {node.id: found[node.layer, node.index] for node in circuit.nodes.values()
            if node.kind == "feature"}


# --- the parts -----------------------------------------------------------------------------------


def _check(circuit: "Circuit") -> None:
    for where, number in [*((edge.source, edge.weight) for edge in circuit.edges),
                          *((node.id, node.value) for node in circuit.nodes.values())]:
        if not math.isfinite(number):
            raise InputError(f"The circuit's node {where} has a value or an edge that is not a "
                             "finite number; trace it again in float32 or float64.")


def _node(node: "Node", target: str, texts: Sequence[str], genes: Sequence[str | None],
          detail: Detail) -> dict[str, Any]:
    names = {"feature": "activation", "head": "contribution to its reader",
             "embedding": "norm", "error": "norm", "logit": "value"}
    is_target = node.id == target
    return {
        "id": node.id, "kind": node.kind, "label": _cut(detail.get("label") or _label(node)),
        "name": _cut(_name(node, detail, texts, genes)), "layer": node.layer, "index": node.index,
        "position": node.source, "token": _cut(texts[node.source]),
        "gene": _cut(genes[node.source] or ""), "value": _short(node.value),
        # The target's value is what the circuit adds up to, before the ReLU.
        "value_name": "pre-activation" if is_target and node.kind == "feature"
        else names[node.kind],
    }


def _label(node: "Node") -> str:
    match node.kind:
        case "feature":
            return f"Feature {node.index}, layer {node.layer}"
        case "head":
            return f"Head {node.index}, layer {node.layer}"
        case "error":
            return f"Transcoder error, layer {node.layer}"
        case "embedding":
            return "Token embedding" if node.index >= 0 else "Embedding of the rank"
        case _:
            return "Logit"


def _name(node: "Node", detail: Detail, texts: Sequence[str], genes: Sequence[str | None]) -> str:
    """A few letters for the picture: a feature by its two main tokens, others by what they read."""
    if detail.get("label"):
        return str(detail["label"])
    read = genes[node.source] or texts[node.source]
    match node.kind:
        case "feature":
            return " ".join([f"L{node.layer}.F{node.index}", *list(detail.get("tokens", ()))[:2]])
        case "head":
            return f"head {node.layer}.{node.index}, {read}"
        case "error":
            return f"error of layer {node.layer}"
        case "embedding":
            return f"token {read}" if node.index >= 0 else f"rank of {read}"
        case _:
            return "logit"


def _edge(number: int, circuit: "Circuit", carried: float) -> dict[str, Any]:
    edge = circuit.edges[number]
    return {"id": f"e{number}", "source": edge.source, "target": edge.target,
            "weight": _short(edge.weight), "share": _short(circuit.share(edge)),
            "carried": _short(carried)}


def _detail(detail: Detail) -> dict[str, Any]:
    return {"tokens": [_cut(text) for text in list(detail.get("tokens", ()))[:MAX_TOKENS]],
            "genes": [_cut(text) for text in list(detail.get("genes", ()))[:MAX_GENES]],
            "n_genes": len(detail.get("genes", ())),
            "term": _cut(detail.get("term", "")), "term_name": _cut(detail.get("term_name", "")),
            "contexts": [[_short(strength), _cut(where), [
                [_cut(text), _short(active), _cut(gene or "")] for text, active, gene in pieces]]
                for strength, where, pieces in detail.get("contexts", ())],
            "types": [[_cut(name), _short(share), int(cells)]
                      for name, share, cells in detail.get("types", ())]}


def _row(node: "Node") -> tuple[float, int]:
    """Where the forward pass computes a node: layer, then heads below the MLP."""
    if node.kind == "logit":
        return math.inf, 0
    return node.layer, 0 if node.kind in ("head", "embedding") else 1


def _row_name(row: tuple[float, int]) -> str:
    layer, part = row
    if layer < 0:
        return "embedding"
    return f"L{layer:.0f} {'MLP' if part else 'heads'}" if math.isfinite(layer) else "logit"


def _short(number: float) -> float:
    """Six significant digits: what a reader can use, and the same on every machine."""
    return float(f"{number:.6g}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
