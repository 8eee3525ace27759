"""Influence in an attribution graph, pruning by it, and how much of the model a graph explains.

Definitions are circuit-tracer's (`graph.py`): with A_hat the row-normalised absolute matrix,
influence = weights (A_hat + A_hat^2 + ...). Its scores see kept edges only and know no biases;
`effect_ends` counts everything.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from scfm_circuits import InputError
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.circuits.graph import (
    AttributionGraph,
    Target,
    attribution_graph,
)


def _shares(matrix: csr_array, total: np.ndarray | None = None) -> csr_array:
    """|matrix| with rows divided by their sum, or by `total`."""
    size = abs(matrix).astype(np.float64)
    if total is None:
        total = np.asarray(size.sum(axis=1)).ravel()
    size.data /= np.repeat(np.maximum(total, 1e-30), np.diff(size.indptr))
    return size


def _passed_on(shares: csr_array, weights: np.ndarray) -> np.ndarray:
    """weights (S + S^2 + ...); ends because effects only go from earlier to later layers."""
    found, current = np.zeros(len(weights)), weights
    while (current := current @ shares).any():
        found = found + current
    return found


def influence(graph: AttributionGraph) -> np.ndarray:
    """(n_nodes,) share of the targets' kept absolute effects that comes from or through a node."""
    return _passed_on(_shares(graph.matrix), graph.weights)


def replacement_score(graph: AttributionGraph) -> float:
    """Influence of tokens over that of tokens and errors: how much of what reaches the targets
    starts at the text instead of at what the transcoders do not explain. NaN without either."""
    found = influence(graph)
    tokens = found[graph.of_kind("embedding")].sum()
    errors = found[graph.of_kind("error")].sum()
    return float(tokens / (tokens + errors)) if tokens + errors > 0 else float("nan")


def completeness_score(graph: AttributionGraph) -> float:
    """Influence-weighted share of the nodes' input that is no error; targets count by weight.

    As in circuit-tracer, tokens and errors, which have no input, count as complete.
    """
    shares = _shares(graph.matrix)
    output = _passed_on(shares, graph.weights) + graph.weights
    explained = 1 - shares @ graph.of_kind("error").astype(np.float64)
    return float(explained @ output / output.sum())


def effect_ends(graph: AttributionGraph) -> dict[str, float]:
    """Where the targets' absolute effects end, with nothing left out: shares that sum to 1.

    tokens; errors; constant: biases; dropped: edges too weak to keep, or to features without a row.
    """
    total = graph.absolute
    found = _passed_on(_shares(graph.matrix, total), graph.weights) + graph.weights
    arriving = found / np.maximum(total, 1e-30)
    return {
        "tokens": float(found[graph.of_kind("embedding")].sum()),
        "errors": float(found[graph.of_kind("error")].sum()),
        "constant": float(arriving @ np.abs(graph.constant)),
        "dropped": float(arriving @ graph.dropped_absolute),
    }


def cumulative_influence(influences: Sequence[float] | np.ndarray) -> np.ndarray:
    """For each node the share of all influence held by it and the nodes above it.

    Neuronpedia's viewer shows the nodes at or below a threshold of this.
    """
    values = np.asarray(influences, np.float64)
    order = np.argsort(-values, kind="stable")
    result = np.ones(len(values))
    total = values.sum()
    if total > 0:
        result[order] = np.minimum(np.cumsum(values[order]) / total, 1.0)
    return result


def _threshold(values: np.ndarray, share: float) -> float:
    """The value down to which the largest values hold `share` of the sum."""
    ordered = np.sort(values)[::-1]
    total = ordered.sum()
    if total <= 0:
        return np.inf
    place = int(np.searchsorted(np.cumsum(ordered) / total, share))
    return float(ordered[min(place, len(ordered) - 1)])


def prune(graph: AttributionGraph, node_share: float = 0.8, edge_share: float = 0.98
          ) -> AttributionGraph:
    """The nodes that hold `node_share` of all influence, then the edges that hold `edge_share`.

    Targets and tokens always stay. Features without an edge in or out, and errors without one out,
    go. The edges taken away are added to `dropped`, so each row still adds up.
    """
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 <= share <= 1:
            raise InputError(f"`{name}` is {share}; it must lie between 0 and 1.")
    always = graph.of_kind("embedding") | (graph.weights > 0)
    feature = graph.of_kind("feature")
    found = influence(graph)
    keep = (found >= _threshold(found, node_share)) | always
    edges = graph.matrix.tocoo()
    target, source = edges.row, edges.col
    inside = keep[target] & keep[source]
    inner = csr_array((np.where(inside, edges.data, 0), (target, source)), shape=edges.shape)
    shares = _shares(inner)
    through = _passed_on(shares, graph.weights) + graph.weights
    # The matrix and its shares have the same order of entries, row by row.
    order = np.lexsort((source, target))
    shares.sort_indices()
    score = np.empty(len(target))
    score[order] = shares.data * np.repeat(through, np.diff(shares.indptr))
    kept = inside & (score >= _threshold(score, edge_share)) & (score > 0)
    while True:
        kept &= keep[target] & keep[source]
        gives = np.bincount(source[kept], minlength=len(keep)) > 0
        takes = np.bincount(target[kept], minlength=len(keep)) > 0
        stays = keep & (always | (gives & (takes | ~feature)))
        if (stays == keep).all():
            return _restricted(graph, keep, kept)
        keep = stays


def _restricted(graph: AttributionGraph, keep: np.ndarray, kept: np.ndarray) -> AttributionGraph:
    """The graph of some nodes and some of the edges (in `tocoo` order) among them."""
    edges, size = graph.matrix.tocoo(), len(keep)
    lost = edges.data[~kept].astype(np.float64)
    dropped = graph.dropped + np.bincount(edges.row[~kept], lost, size)
    dropped_absolute = graph.dropped_absolute + np.bincount(edges.row[~kept], np.abs(lost), size)
    new = np.cumsum(keep) - 1
    matrix = csr_array((edges.data[kept], (new[edges.row[kept]], new[edges.col[kept]])),
                       shape=(int(keep.sum()),) * 2)
    return replace(
        graph, nodes=tuple(node for node, stays in zip(graph.nodes, keep, strict=True) if stays),
        matrix=matrix, weights=graph.weights[keep], value=graph.value[keep],
        constant=graph.constant[keep], dropped=dropped[keep],
        dropped_absolute=dropped_absolute[keep])


# --- of a target ---------------------------------------------------------------------------------


class GraphStudy(NamedTuple):
    """The graph of one target, whole and pruned."""

    whole: AttributionGraph
    pruned: AttributionGraph
    ends: dict[str, float]
    """`effect_ends` of the whole graph."""

    @property
    def replacement(self) -> float:
        """`replacement_score` of the whole graph."""
        return replacement_score(self.whole)

    @property
    def completeness(self) -> float:
        """`completeness_score` of the whole graph."""
        return completeness_score(self.whole)

    def table(self) -> pd.DataFrame:
        """Before and after pruning: nodes by kind, edges, scores, and where effects end."""
        graphs = (self.whole, self.pruned)
        return pd.DataFrame({
            "graph": ["before pruning", "after pruning"],
            **{kind: [int(one.of_kind(kind).sum()) for one in graphs]
               for kind in ("feature", "error", "embedding")},
            "edges": [one.n_edges for one in graphs],
            "replacement_score": [replacement_score(one) for one in graphs],
            "completeness_score": [completeness_score(one) for one in graphs],
            **{f"ends_in_{end}": [effect_ends(one)[end] for one in graphs] for end in self.ends}})

    def counts(self, greedy: set[str]) -> dict[str, int]:
        """Active features, features with a row, those left by pruning, and what the ids `greedy` of
        another circuit's features share with them; the target does not count."""
        def features(graph: AttributionGraph) -> int:
            return int((graph.of_kind("feature") & (graph.weights == 0)).sum())

        shared = greedy & {node.id for node in self.pruned.nodes}
        return {"active": self.whole.n_active, "rows": features(self.whole),
                "pruned_features": features(self.pruned), "pruned_edges": self.pruned.n_edges,
                "greedy_features": len(greedy), "shared_features": len(shared)}


def graph_study(frozen: Frozen, target: Target, *, max_features: int) -> GraphStudy:
    """Everything upstream of a target, as `graph.attribution_graph` has it, and pruned."""
    whole = attribution_graph(frozen, [target], max_features=max_features)
    return GraphStudy(whole, prune(whole), effect_ends(whole))
