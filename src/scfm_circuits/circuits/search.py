"""The strongest paths upstream of a target, found best first."""

import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import (
    Contributions,
    Direction,
    Frozen,
    contributions,
    feature_direction,
    head_direction,
)
from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Node, feature_id
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.cells.corpus import Corpus

class _Candidate(NamedTuple):
    node: Node
    weight: float
    reading: Direction | None



def trace(frozen: Frozen, target: Node, reading: Direction, *, branches: int, depth: int,
          max_nodes: int, sign: str = "both") -> Circuit:
    """The circuit upstream of a target.

    branches: contributors kept at each expansion; depth: expansions between a node and the target;
    max_nodes: where the search stops. sign: `both` ranks by absolute value; `positive` keeps
    positive contributions only, as the code the paper builds on does.
    """
    if sign not in ("both", "positive"):
        raise InputError(f"`sign` is {sign!r}; use `both` or `positive`.")
    circuit = Circuit(target.id, {target.id: target})
    readings: dict[str, Direction] = {target.id: reading}
    best = {target.id: 1.0}
    queue: list[tuple[float, int, str]] = [(-1.0, 0, target.id)]
    while queue and len(circuit.nodes) < max_nodes:
        influence, level, name = heapq.heappop(queue)
        if name in circuit.expansions or level >= depth:
            continue
        parts = contributions(frozen, readings[name])
        kept = _strongest(frozen, circuit.nodes[name], readings[name], parts, branches, sign)
        kept = kept[: max(0, max_nodes - len(circuit.nodes)) or 1]
        circuit.expansions[name] = _expansion(name, readings[name], parts, kept)
        for candidate in kept:
            node = candidate.node
            circuit.nodes.setdefault(node.id, node)
            circuit.edges.append(Edge(node.id, name, candidate.weight))
            share = abs(candidate.weight) / max(circuit.expansions[name].absolute, 1e-30)
            reached = -influence * share
            if candidate.reading is not None and reached > best.get(node.id, 0.0):
                best[node.id] = reached
                readings.setdefault(node.id, candidate.reading)
                heapq.heappush(queue, (-reached, level + 1, node.id))
    return circuit



def trace_feature(frozen: Frozen, layer: int, feature: int, position: int, **options: Any
                  ) -> Circuit:
    """`trace` of one feature at one position; options as there."""
    reading = feature_direction(frozen, layer, feature, position)
    node = Node(feature_id(layer, feature, position), "feature", layer, position, position,
                feature, float(reading.value))
    return trace(frozen, node, reading, **options)



def _strongest(frozen: Frozen, target: Node, reading: Direction, parts: Contributions,
               branches: int, sign: str) -> list[_Candidate]:
    """The strongest contributors of all kinds, strongest first."""
    pieces = [parts.features.flatten(), parts.heads.flatten(), parts.errors,
              parts.embedding[None]]
    flat = torch.cat(pieces)
    score = flat if sign == "positive" else flat.abs()
    top = torch.topk(score, min(branches, len(flat)))
    ends = np.cumsum([len(piece) for piece in pieces])
    chosen = []
    for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if value <= 0:
            break
        kind = int(np.searchsorted(ends, place, side="right"))
        local = place - (ends[kind - 1] if kind else 0)
        chosen.append(_candidate(frozen, target, reading, parts, kind, int(local),
                                 float(flat[place])))
    return chosen



def _candidate(frozen: Frozen, target: Node, reading: Direction, parts: Contributions, kind: int,
               local: int, weight: float) -> _Candidate:
    """The node behind one entry of the flattened contributions."""
    position = reading.position
    if kind == 0:
        layer, feature = divmod(local, parts.features.shape[1])
        node = Node(feature_id(layer, feature, position), "feature", layer, position, position,
                    feature, float(frozen.activations[layer, position, feature]))
        return _Candidate(node, weight, feature_direction(frozen, layer, feature, position))
    if kind == 1:
        layer, head, source = (int(i) for i in np.unravel_index(local, parts.heads.shape))
        # What a head carries depends on who reads it, so the reader is part of its name.
        node = Node(f"A{layer}.{head}_P{position}_from_P{source}_for_{target.id}", "head", layer,
                    position, source, head, weight)
        return _Candidate(node, weight, head_direction(frozen, reading, layer, head, source))
    if kind == 2:
        return _Candidate(Node(f"err_L{local}_P{position}", "error", local, position, position, -1,
                               float(frozen.error[local, position].norm())), weight, None)
    return _Candidate(Node(f"E_P{position}", "embedding", -1, position, position,
                           int(frozen.tokens[position]), float(frozen.residual[0, position].norm())
                           ), weight, None)



def _expansion(name: str, reading: Direction, parts: Contributions, kept: list[_Candidate]
               ) -> Expansion:
    def rest(total: Tensor, kind: str) -> float:
        return float(total) - sum(one.weight for one in kept if one.node.kind == kind)

    absolute = sum(float(part.abs().sum()) for part in parts)
    return Expansion(
        name, float(reading.value), sum(one.weight for one in kept), float(parts.constant),
        rest(parts.features.sum(), "feature"), rest(parts.heads.sum(), "head"),
        rest(parts.errors.sum(), "error"), rest(parts.embedding, "embedding"), absolute)



def strongest_features(frozen: Frozen, layer: int, position: int, n: int) -> list[int]:
    """The n most active features of a layer at a position, strongest first (active ones only)."""
    z = frozen.activations[layer, position]
    top = torch.topk(z, min(n, len(z)))
    return [int(i) for i, value in zip(top.indices, top.values, strict=True) if value > 0]



@torch.no_grad()
def strongest_at_end(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: "Corpus",
                     cells: np.ndarray, layer: int, place: str, forward_cells: int) -> np.ndarray:
    """(n_cells,) the most active feature of a layer where each cell's case would be read; -1 if
    none is active. place: `answer` or `query`, as the profile's `case_position`."""
    ends = corpus.answer_end if place == "answer" else corpus.answer_start - 1
    found = []
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        # Kept tokens stand cell after cell, so a cell's own start where the earlier ones end.
        starts = np.concatenate([[0], np.cumsum(corpus.lengths[rows])[:-1]])
        chosen = torch.from_numpy(starts + ends[rows]).to(tokens.device)
        inputs = mlp_sites(model, tokens, mask).inputs[layer][chosen]
        strongest = transcoders.layer_activations(layer, inputs).max(dim=1)
        found.append(torch.where(strongest.values > 0, strongest.indices, -1).cpu().numpy())
    return np.concatenate(found)



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
