"""The direct-effect graph of one text: every row exact, its size bounded, its shares stated.

In the frozen linear model (see `attribution`) each reading is a sum over everything that was
written into the residual stream anywhere upstream, whatever attention paths carried it:

    h = sum(features) + sum(errors) + sum(embeddings) + constant

1. `direct_effects` gives one row of the graph per reading.
2. `attribution_graph` starts from the targets and gives rows to the features of highest influence
   first, as circuit-tracer does, until `max_features` have one.
3. Of each row the strongest edges are kept; what is not kept is summed up as `dropped`.

Pruning and scores are in `graph_scores`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from scfm_circuits.circuits.attribution import Reading, feature_direction
from scfm_circuits.circuits.circuit import Kind, Node
from scfm_circuits.circuits.direct_effects import Sources, direct_effects, sources_of
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.circuits.search import feature_start, leaf_node


class Target(NamedTuple):
    """Where a graph starts: a node, its reading, and its share of the influence."""

    node: Node
    reading: Reading
    weight: float


@dataclass(frozen=True)
class AttributionGraph:
    """Nodes and the direct effects between them.

    nodes: features with a row, errors, embeddings, then targets that are no active feature.
    matrix: (n_nodes, n_nodes), row = the node acted on, column = its source, in units of the row's
    value. weights: (n_nodes,) the targets' shares, summing to 1, else 0. value: (n_nodes,)
    pre-activation or logit; constant: what biases give; dropped, dropped_absolute: sum and absolute
    sum of the edges not kept; all zero for errors and embeddings, which have no row.
    n_active: active features upstream of the targets, with or without a row.
    """

    nodes: tuple[Node, ...]
    matrix: csr_array
    weights: np.ndarray
    value: np.ndarray
    constant: np.ndarray
    dropped: np.ndarray
    dropped_absolute: np.ndarray
    n_active: int

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.matrix.nnz)

    @property
    def absolute(self) -> np.ndarray:
        """(n_nodes,) sum of all absolute parts of each row: kept, dropped and constant."""
        kept = np.asarray(abs(self.matrix).sum(axis=1), np.float64).ravel()
        return kept + self.dropped_absolute + np.abs(self.constant)

    @property
    def closure_max_relative(self) -> float:
        """Largest |edges + dropped + constant - value| over the row's absolute sum."""
        kept = np.asarray(self.matrix.sum(axis=1), np.float64).ravel()
        missing = np.abs(kept + self.dropped + self.constant - self.value)
        return float((missing / np.maximum(self.absolute, 1e-30)).max(initial=0.0))

    def of_kind(self, *kinds: Kind) -> np.ndarray:
        """(n_nodes,) whether a node is of one of these kinds."""
        return np.isin([node.kind for node in self.nodes], kinds)


# --- targets -------------------------------------------------------------------------------------


def feature_target(frozen: Frozen, layer: int, feature: int, position: int, weight: float = 1.0
                   ) -> Target:
    """One feature's pre-activation at one position."""
    return Target(*feature_start(frozen, layer, feature, position), weight)


# --- rows ----------------------------------------------------------------------------------------


class _Rows:
    """The rows so far, sparse, and what was left out of each.

    own: a row's own column, -1 for a target that is no active feature.
    """

    def __init__(self, sources: Sources, edges_per_row: int) -> None:
        self.sources, self.edges_per_row = sources, min(edges_per_row, sources.count)
        self.own: list[int] = []
        self.columns: list[np.ndarray] = []
        self.effects: list[np.ndarray] = []
        self.value: list[float] = []
        self.constant: list[float] = []
        self.dropped: list[float] = []
        self.dropped_absolute: list[float] = []

    def add(self, frozen: Frozen, own: Sequence[int], readings: Sequence[Reading]) -> None:
        """Compute and keep the rows of some readings."""
        effects, constant = direct_effects(frozen, self.sources, readings)
        size = effects.abs()
        kept = torch.topk(size, self.edges_per_row, dim=1).indices
        values = effects.gather(1, kept)
        # What is dropped is summed itself; the difference of two sums would lose its digits.
        effects.scatter_(1, kept, 0)
        size.scatter_(1, kept, 0)
        self.dropped += effects.sum(dim=1, dtype=torch.float64).tolist()
        self.dropped_absolute += size.sum(dim=1, dtype=torch.float64).tolist()
        for columns, row in zip(kept.cpu().numpy(), values.cpu().numpy(), strict=True):
            there = row != 0
            self.columns.append(columns[there].astype(np.int32))
            self.effects.append(row[there])
        self.own += own
        self.value += [float(one.value) for one in readings]
        self.constant += constant.double().tolist()

    def matrix(self) -> csr_array:
        """(n_rows, sources.count) the kept effects."""
        ends = np.cumsum([0, *map(len, self.columns)])
        return csr_array((np.concatenate(self.effects), np.concatenate(self.columns), ends),
                         shape=(len(self.own), self.sources.count))

    def reach(self, weights: np.ndarray) -> np.ndarray:
        """(sources.count,) influence of every source so far. weights: the targets', which are the
        first rows. A row passes its influence on by absolute effect, kept or dropped."""
        shares = abs(self.matrix()).astype(np.float64)
        total = np.asarray(shares.sum(axis=1)).ravel() + np.array(self.dropped_absolute)
        own = np.array(self.own)
        at_rows = np.concatenate([weights, np.zeros(len(own) - len(weights))])
        found = np.zeros(self.sources.count)
        while at_rows.any():
            passed = (at_rows / np.maximum(total, 1e-30)) @ shares
            found += passed
            at_rows = np.where(own >= 0, passed[own], 0.0)
        return found


# --- the graph -----------------------------------------------------------------------------------


def attribution_graph(frozen: Frozen, targets: Sequence[Target], *, max_features: int = 1_000,
                      edges_per_row: int = 2_000, batch: int = 32) -> AttributionGraph:
    """The direct-effect graph upstream of the targets.

    max_features: features that get a row, the most influential first; edges to others are dropped,
    as are those beyond the `edges_per_row` strongest of a row, and both are accounted for.
    batch: rows computed at once; influence is taken anew after as many, or after an eighth more
    than there are.
    """
    readings = [one.reading for one in targets]
    sources = sources_of(frozen, readings)
    rows = _Rows(sources, edges_per_row)
    for start in range(0, len(targets), batch):
        first = targets[start:start + batch]
        rows.add(frozen, [_column(sources, one.node) for one in first],
                 [one.reading for one in first])
    weights = np.array([one.weight for one in targets], np.float64)
    weights /= weights.sum()
    _expand(frozen, rows, weights, max_features, batch)
    return _assembled(frozen, targets, sources, rows, weights)


def _expand(frozen: Frozen, rows: _Rows, weights: np.ndarray, left: int, batch: int) -> None:
    """Give rows to up to `left` features, those with most influence so far first."""
    sources = rows.sources
    waiting = np.ones(sources.n_active, bool)
    waiting[[column for column in rows.own if column >= 0]] = False
    while left > 0:
        reached = np.where(waiting, rows.reach(weights)[: sources.n_active], 0.0)
        # Influence costs a pass over all rows so far, so a large graph takes it anew less often.
        at_once = min(max(batch, len(rows.own) // 8), left)
        chosen = np.argsort(-reached, kind="stable")[:at_once]
        chosen = chosen[reached[chosen] > 0]
        if not len(chosen):
            break
        for start in range(0, len(chosen), batch):
            part = chosen[start:start + batch]
            rows.add(frozen, part.tolist(), [feature_direction(
                frozen, int(sources.layer[i]), int(sources.feature[i]), int(sources.position[i]))
                for i in part])
        waiting[chosen] = False
        left -= len(chosen)


def _column(sources: Sources, node: Node) -> int:
    """The column of an active feature; -1 for anything else."""
    if node.kind != "feature" or node.layer >= sources.n_layers:
        return -1
    place = node.layer * sources.n_pos + node.position
    first, last = sources.starts[place], sources.starts[place + 1]
    found = first + int(np.searchsorted(sources.feature[first:last], node.index))
    return found if found < last and sources.feature[found] == node.index else -1


def _assembled(frozen: Frozen, targets: Sequence[Target], sources: Sources, rows: _Rows,
               weights: np.ndarray) -> AttributionGraph:
    """Rows become nodes; columns without one are dropped, errors without an edge left out."""
    effects, own = rows.matrix(), np.array(rows.own)
    has_node = np.zeros(sources.count, bool)
    has_node[own[own >= 0]] = True
    has_node[effects.indices[effects.indices >= sources.errors]] = True
    has_node[sources.embeddings:] = True
    columns = np.flatnonzero(has_node)
    new = np.full(sources.count, -1)
    new[columns] = np.arange(len(columns))
    apart = np.flatnonzero(own < 0)
    size = len(columns) + len(apart)
    row_of = new[own]
    row_of[apart] = np.arange(len(columns), size)

    leaves = effects[:, ~has_node].astype(np.float64)
    inner = effects[:, columns].tocoo()
    signed, size_of = (np.asarray(one.sum(axis=1)).ravel() for one in (leaves, abs(leaves)))
    per_node = np.zeros((5, size))
    per_node[:, row_of] = np.stack([
        np.array(rows.value), np.array(rows.constant), np.array(rows.dropped) + signed,
        np.array(rows.dropped_absolute) + size_of,
        np.concatenate([weights, np.zeros(len(own) - len(weights))])])
    matrix = csr_array((inner.data, (row_of[inner.row], inner.col)), shape=(size, size))
    nodes = [_node(frozen, sources, int(column)) for column in columns]
    nodes += [targets[int(row)].node for row in apart]
    return AttributionGraph(tuple(nodes), matrix, per_node[4], per_node[0], per_node[1],
                            per_node[2], per_node[3], sources.n_active)


def _node(frozen: Frozen, sources: Sources, column: int) -> Node:
    """The node behind a column."""
    if column < sources.errors:
        layer, position, feature = (int(part[column]) for part in (
            sources.layer, sources.position, sources.feature))
        return Node.of_feature(layer, feature, position, sources.activation[column])
    if column < sources.embeddings:
        layer, position = divmod(column - sources.errors, sources.n_pos)
        return Node.of_error(layer, position, frozen.error[layer, position].norm())
    leaf, position = divmod(column - sources.embeddings, sources.n_pos)
    return leaf_node(frozen, leaf, position)
