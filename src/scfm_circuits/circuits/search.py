"""The strongest paths upstream of a target, found best first."""

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.circuits.attribution import (
    Contributions,
    Reading,
    contributions_each,
    feature_direction,
    head_direction,
    in_parts,
)
from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Kind, Node
from scfm_circuits.circuits.frozen import Frozen

if TYPE_CHECKING:
    from scfm_circuits.common.profile import Profile


class _Contributor(NamedTuple):
    """What contributes to a reading, before it is a node: where it stands in that kind's part of
    the contributions; reading: at the one token where it arrives."""

    weight: float
    kind: Kind
    where: list[int]
    reading: Reading


class _Sums(NamedTuple):
    """A reading's contributions summed by kind, and the sum of their absolute values."""

    features: float
    errors: float
    embedding: float
    heads: float
    constant: float
    absolute: float


class _Candidate(NamedTuple):
    node: Node
    weight: float
    reading: Reading | None


def trace(frozen: Frozen, target: Node, reading: Reading, *, branches: int, depth: int,
          max_nodes: int) -> Circuit:
    """The circuit upstream of a target.

    branches: contributors kept at each expansion, strongest first, whatever their sign; depth:
    expansions between a node and the target; max_nodes: where the search stops.
    """
    circuit = Circuit(target.id, {target.id: target})
    readings: dict[str, Reading] = {target.id: reading}
    best = {target.id: 1.0}
    queue: list[tuple[float, int, str]] = [(-1.0, 0, target.id)]
    while queue and len(circuit.nodes) < max_nodes:
        influence, level, name = heapq.heappop(queue)
        if name in circuit.expansions or level >= depth:
            continue
        strongest, sums = _contributors(frozen, readings[name], branches)
        kept = [_candidate(frozen, circuit.nodes[name], one)
                for one in strongest[: max(0, max_nodes - len(circuit.nodes)) or 1]]
        circuit.expansions[name] = _expansion(name, readings[name], sums, kept)
        for candidate in kept:
            node = candidate.node
            circuit.nodes.setdefault(node.id, node)
            circuit.edges.append(Edge(node.id, name, candidate.weight))
            reached = -influence * circuit.share(circuit.edges[-1])
            if candidate.reading is not None and reached > best.get(node.id, 0.0):
                best[node.id] = reached
                readings.setdefault(node.id, candidate.reading)
                heapq.heappush(queue, (-reached, level + 1, node.id))
    return circuit


def limits(profile: "Profile") -> dict[str, Any]:
    """The options of `trace` as the profile has them."""
    return {"branches": profile.circuit_branches, "depth": profile.circuit_depth,
            "max_nodes": profile.circuit_nodes}


def feature_start(frozen: Frozen, layer: int, feature: int, position: int) -> tuple[Node, Reading]:
    """A feature at a token as the node at which a circuit ends, and its pre-activation."""
    reading = feature_direction(frozen, layer, feature, position)
    return Node.of_feature(layer, feature, position, reading.value), reading


def trace_feature(frozen: Frozen, layer: int, feature: int, position: int, **options: Any
                  ) -> Circuit:
    """`trace` of one feature at one position; options as there."""
    return trace(frozen, *feature_start(frozen, layer, feature, position), **options)


def _contributors(frozen: Frozen, reading: Reading, branches: int
                  ) -> tuple[list[_Contributor], _Sums]:
    """The strongest contributors of all kinds, strongest first, and what all of them add up to."""
    found: list[_Contributor] = []
    totals, absolute = dict.fromkeys(_Sums._fields[:5], 0.0), 0.0
    for some in in_parts(reading):
        parts = contributions_each(frozen, some)
        for name, part in zip(parts._fields, parts, strict=True):
            totals[name] += float(part.sum())
            absolute += float(part.abs().sum()) * (name != "constant")
        found += _strongest(some, parts, branches)
    # Of one reading they are in order already.
    found.sort(key=lambda each: -abs(each.weight))
    return found[:branches], _Sums(**totals, absolute=absolute + abs(totals["constant"]))


def _strongest(readings: Sequence[Reading], parts: Contributions, branches: int
               ) -> list[_Contributor]:
    by_kind: dict[Kind, Tensor] = {"feature": parts.features, "head": parts.heads,
                                   "error": parts.errors, "embedding": parts.embedding}
    flat = torch.cat([part.flatten() for part in by_kind.values()])
    top = torch.topk(flat.abs(), min(branches, len(flat)))
    ends = np.cumsum([part.numel() for part in by_kind.values()])
    chosen = []
    for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if value <= 0:
            break
        which = int(np.searchsorted(ends, place, side="right"))
        kind, part = list(by_kind.items())[which]
        at, *index = np.unravel_index(place - (ends[which] - part.numel()), part.shape)
        chosen.append(_Contributor(float(flat[place]), kind, [int(i) for i in index],
                                   readings[at]))
    return chosen


def _candidate(frozen: Frozen, target: Node, found: _Contributor) -> _Candidate:
    """The node behind one contribution."""
    weight, kind, index, reading = found
    position = reading.token
    if kind == "feature":
        layer, feature = index
        node = Node.of_feature(layer, feature, position,
                               frozen.activations[layer, position, feature])
        return _Candidate(node, weight, feature_direction(frozen, layer, feature, position))
    if kind == "head":
        layer, head, source = index
        node = Node.of_head(layer, head, position, source, target.id, weight)
        return _Candidate(node, weight, head_direction(frozen, reading, layer, head, source))
    if kind == "error":
        node = Node.of_error(index[0], position, frozen.error[index[0], position].norm())
    else:
        node = leaf_node(frozen, index[0], position)
    return _Candidate(node, weight, None)


def leaf_node(frozen: Frozen, leaf: int, position: int) -> Node:
    """The node of what the stream begins with at a token: 0, the token's own embedding, or 1, its
    position's."""
    norm = frozen.leaves[leaf, position].norm()
    return (Node.of_embedding(frozen.tokens[position], position, norm) if leaf == 0
            else Node.of_rank(position, norm))


def _expansion(name: str, reading: Reading, sums: _Sums, kept: list[_Candidate]) -> Expansion:
    def rest(total: float, kind: str) -> float:
        return total - sum(one.weight for one in kept if one.node.kind == kind)

    return Expansion(
        name, float(reading.value), sum(one.weight for one in kept), sums.constant,
        rest(sums.features, "feature"), rest(sums.heads, "head"), rest(sums.errors, "error"),
        rest(sums.embedding, "embedding"), sums.absolute)


def strongest_features(frozen: Frozen, layer: int, position: int, n: int) -> list[int]:
    """The n most active features of a layer at a position, strongest first (active ones only)."""
    z = frozen.activations[layer, position]
    top = torch.topk(z, min(n, len(z)))
    return [int(i) for i, value in zip(top.indices, top.values, strict=True) if value > 0]
