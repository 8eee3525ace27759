"""The strongest paths upstream of a target, found best first."""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from scfm_circuits.common.profile import Profile


class _Contributor(NamedTuple):
    """What contributes to a reading, before it is a node: where it stands in that kind's part of
    the contributions; reading: at the one token where it arrives."""

    weight: float
    kind: Kind
    where: list[int]
    reading: Reading


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
        strongest, sums, absolute = _contributors(frozen, readings[name], branches)
        kept = [_node_of(frozen, circuit.nodes[name], one)
                for one in strongest[: max(0, max_nodes - len(circuit.nodes)) or 1]]
        weights = [one.weight for one in strongest[: len(kept)]]
        circuit.expansions[name] = _expansion(name, float(readings[name].value), sums, absolute, [
            (weight, node.kind) for weight, (node, _) in zip(weights, kept, strict=True)])
        for weight, (node, onward) in zip(weights, kept, strict=True):
            circuit.nodes.setdefault(node.id, node)
            circuit.edges.append(Edge(node.id, name, weight))
            reached = -influence * circuit.share(circuit.edges[-1])
            if onward is not None and reached > best.get(node.id, 0.0):
                best[node.id] = reached
                readings.setdefault(node.id, onward)
                heapq.heappush(queue, (-reached, level + 1, node.id))
    return circuit


def limits(profile: Profile) -> dict[str, Any]:
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
                  ) -> tuple[list[_Contributor], dict[str, float], float]:
    """The strongest contributors of all kinds, strongest first; and all contributions summed by
    kind, as in `Contributions`, and the sum of their absolute values."""
    found: list[_Contributor] = []
    sums, absolute = dict.fromkeys(Contributions._fields, 0.0), 0.0
    for some in in_parts(reading):
        parts = contributions_each(frozen, some)
        for name, part in zip(parts._fields, parts, strict=True):
            sums[name] += float(part.sum())
            absolute += float(part.abs().sum()) * (name != "constant")
        found += _strongest(some, parts, branches)
    # Of one reading they are in order already.
    found.sort(key=lambda each: -abs(each.weight))
    return found[:branches], sums, absolute + abs(sums["constant"])


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


def _node_of(frozen: Frozen, target: Node, found: _Contributor) -> tuple[Node, Reading | None]:
    """The node behind one contribution to `target`, and its own reading if it has one."""
    weight, kind, index, reading = found
    position = reading.token
    if kind == "feature":
        layer, feature = index
        z = frozen.activations[layer, position, feature]
        return (Node.of_feature(layer, feature, position, z),
                feature_direction(frozen, layer, feature, position))
    if kind == "head":
        layer, head, source = index
        return (Node.of_head(layer, head, position, source, target.id, weight),
                head_direction(frozen, reading, layer, head, source))
    if kind == "error":
        norm = frozen.error[index[0], position].norm()
        return Node.of_error(index[0], position, norm), None
    return leaf_node(frozen, index[0], position), None


def leaf_node(frozen: Frozen, leaf: int, position: int) -> Node:
    """The node of what the stream begins with at a token: 0, the token's own embedding, or 1, its
    position's."""
    norm = frozen.leaves[leaf, position].norm()
    return (Node.of_embedding(frozen.tokens[position], position, norm) if leaf == 0
            else Node.of_rank(position, norm))


def _expansion(name: str, value: float, sums: dict[str, float], absolute: float,
               kept: list[tuple[float, Kind]]) -> Expansion:
    def rest(part: str, of: Kind) -> float:
        return sums[part] - sum(weight for weight, kind in kept if kind == of)

    return Expansion(name, value, sum(weight for weight, _ in kept), sums["constant"],
                     rest("features", "feature"), rest("heads", "head"), rest("errors", "error"),
                     rest("embedding", "embedding"), absolute)


def strongest_features(frozen: Frozen, layer: int, position: int, n: int) -> list[int]:
    """The n most active features of a layer at a position, strongest first (active ones only)."""
    z = frozen.activations[layer, position]
    top = torch.topk(z, min(n, len(z)))
    return [int(i) for i, value in zip(top.indices, top.values, strict=True) if value > 0]
