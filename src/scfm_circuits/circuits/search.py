"""The strongest paths upstream of a target, found best first."""

import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scfm_circuits.circuits.attribution import (
    Contributions,
    Reading,
    contributions,
    feature_direction,
    head_direction,
    leaves_of,
    one_by_one,
)
from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Kind, Node
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus


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


def trace_feature(frozen: Frozen, layer: int, feature: int, position: int, **options: Any
                  ) -> Circuit:
    """`trace` of one feature at one position; options as there."""
    reading = feature_direction(frozen, layer, feature, position)
    node = Node.of_feature(layer, feature, position, reading.value)
    return trace(frozen, node, reading, **options)


def _contributors(frozen: Frozen, reading: Reading, branches: int
                  ) -> tuple[list[_Contributor], _Sums]:
    """The strongest contributors of all kinds, strongest first, and what all of them add up to."""
    found: list[_Contributor] = []
    totals, absolute = dict.fromkeys(_Sums._fields[:5], 0.0), 0.0
    for one in one_by_one(reading):
        parts = contributions(frozen, one)
        leaves = leaves_of(frozen, one)
        for name, part in zip(parts._fields, parts, strict=True):
            totals[name] += float(part.sum())
            absolute += float((leaves if name == "embedding" else part).abs().sum()) * (
                name != "constant")
        found += _strongest(one, parts, leaves, branches)
    # Of one reading they are in order already.
    found.sort(key=lambda each: -abs(each.weight))
    return found[:branches], _Sums(**totals, absolute=absolute + abs(totals["constant"]))


def _strongest(reading: Reading, parts: Contributions, leaves: Tensor, branches: int
               ) -> list[_Contributor]:
    by_kind: dict[Kind, Tensor] = {"feature": parts.features, "head": parts.heads,
                                   "error": parts.errors, "embedding": leaves}
    flat = torch.cat([part.flatten() for part in by_kind.values()])
    top = torch.topk(flat.abs(), min(branches, len(flat)))
    ends = np.cumsum([part.numel() for part in by_kind.values()])
    chosen = []
    for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if value <= 0:
            break
        which = int(np.searchsorted(ends, place, side="right"))
        kind, part = list(by_kind.items())[which]
        index = np.unravel_index(place - (ends[which] - part.numel()), part.shape)
        chosen.append(_Contributor(float(flat[place]), kind, [int(i) for i in index], reading))
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


@torch.no_grad()
def activations_at_end(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                       cells: np.ndarray, layer: int, place: str, forward_cells: int) -> np.ndarray:
    """(n_cells, n_features) activations of a layer where each cell's case would be read.

    place: `answer` or `query`, as the profile's `case_position`.
    """
    ends = corpus.answer_end if place == "answer" else corpus.answer_start - 1
    found = []
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        # Kept tokens stand cell after cell, so a cell's own start where the earlier ones end.
        starts = np.concatenate([[0], np.cumsum(corpus.lengths[rows])[:-1]])
        chosen = torch.from_numpy(starts + ends[rows]).to(tokens.device)
        inputs = mlp_sites(model, tokens, mask).inputs[layer][chosen]
        found.append(transcoders.layer_activations(layer, inputs).cpu().numpy())
    return np.concatenate(found)


def strongest_at_end(*where: Any) -> np.ndarray:
    """(n_cells,) the most active feature of a layer, -1 if none is active; `activations_at_end`
    says where, and takes the same arguments."""
    found = activations_at_end(*where)
    return np.where(found.max(axis=1) > 0, found.argmax(axis=1), -1)


def gene_contributions(parts: Contributions, genes: list[str | None]) -> pd.DataFrame:
    """What attention brings to a reading from each gene's tokens, directly, most positive first.

    genes: (n_pos,) the gene of each token. Columns: gene, contribution (signed sum over heads and
    tokens), absolute (sum of absolute values), strongest_head ("layer.head").
    """
    heads = parts.heads.cpu().numpy()
    rows = []
    for gene in dict.fromkeys(gene for gene in genes if gene):
        own = heads[:, :, [g == gene for g in genes]]
        layer, head = np.unravel_index(np.abs(own.sum(axis=2)).argmax(), own.shape[:2])
        rows.append((gene, float(own.sum()), float(np.abs(own).sum()), f"{layer}.{head}"))
    frame = pd.DataFrame(rows, columns=["gene", "contribution", "absolute", "strongest_head"])
    return frame.sort_values(["contribution", "gene"], ascending=[False, True], ignore_index=True)


def sums_by_source(parts: Contributions) -> dict[str, float]:
    """A reading's contributions summed by what they come from; they add up to its value."""
    return {
        "features of earlier layers": float(parts.features.sum()),
        "attention heads": float(parts.heads.sum()), "token embedding": float(parts.embedding),
        "transcoder error": float(parts.errors.sum()), "constant (biases)": float(parts.constant)}


def sums_by_gene_or_not(parts: Contributions, by_gene: pd.DataFrame) -> dict[str, float]:
    """`sums_by_source` with attention split by whether the token read belongs to a gene.

    by_gene: `gene_contributions` of the same parts.
    """
    on_genes, whole = float(by_gene["contribution"].sum()), sums_by_source(parts)
    features, heads, *others = whole.values()
    _, _, *names = whole
    return {"features": features, "attention to genes": on_genes,
            "attention to other tokens": heads - on_genes, **dict(zip(names, others, strict=True))}
