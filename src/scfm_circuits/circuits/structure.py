"""What a circuit is made of, and what the circuits of several cells have in common.

Shares are of the target's absolute contributions (`Expansion.absolute`), so that features, heads,
errors, the embedding and the biases are counted in one unit and none cancels another. Two views:

- direct: what is written into the stream at the target's token, from one exact sum;
- through the circuit: every extended node hands its share on to its own contributors, in
  proportion to their absolute contributions (`Circuit.influence`).

The signed share of a node (`influence(signed=True)`) multiplies the signs of the edges along each
path: a node that takes away from one that takes away adds.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import Contributions
from scfm_circuits.circuits.circuit import Circuit, Node
from scfm_circuits.circuits.interventions import FeatureAt
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.contexts import FeatureOf

_KIND_NAMES = {"head": "attention", "feature": "features", "error": "errors",
               "embedding": "embedding", "logit": "logit"}


# --- what flows where ----------------------------------------------------------------------------


def flow_table(circuit: Circuit, parts: Contributions) -> pd.DataFrame:
    """Layer by layer, what writes the target's value, directly and through the circuit.

    parts: the target's contributions. Columns: kind (attention, features, errors, embedding,
    biases), layer (-1: none), contribution (signed; they add up to the target's value), share (of
    the absolute contributions; they add up to 1), passing (share that passes through the circuit's
    nodes of this kind and layer; a path passes several layers, so these do not add up to 1).
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for kind, part in (("attention", parts.heads), ("features", parts.features),
                       ("errors", parts.errors)):
        for layer in range(len(part)):
            cells[kind, layer] = [float(part[layer].sum()), float(part[layer].abs().sum())]
    embedding = float(parts.embedding.sum())
    cells["embedding", -1] = [embedding, abs(embedding)]
    cells["biases", -1] = [float(parts.constant), abs(float(parts.constant))]
    whole = max(sum(absolute for _, absolute in cells.values()), 1e-30)
    passing = dict.fromkeys(cells, 0.0)
    for name, share in circuit.influence().items():
        node = circuit.nodes[name]
        if name != circuit.target:
            passing[_KIND_NAMES[node.kind], node.layer] += share
    return pd.DataFrame(
        [(*key, signed, absolute / whole, passing[key])
         for key, (signed, absolute) in cells.items()],
        columns=["kind", "layer", "contribution", "share", "passing"])


ENDS = ("embedding", "errors", "biases", "features", "attention", "not kept")
"""Where following a circuit upstream ends."""


def path_ends(circuit: Circuit) -> dict[str, float]:
    """Where the target's absolute contributions end when followed through the circuit.

    The shares add up to 1. embedding, errors: these have nothing upstream. biases: of extended
    nodes. features, attention: nodes that were kept but not extended. not kept: contributions too
    small to be kept.
    """
    ends = dict.fromkeys(ENDS, 0.0)
    influence = circuit.influence()
    kept: dict[str, float] = {}
    for edge in circuit.edges:
        kept[edge.target] = kept.get(edge.target, 0.0) + abs(edge.weight)
    for name, share in influence.items():
        expansion = circuit.expansions.get(name)
        if expansion is None:
            ends[_KIND_NAMES[circuit.nodes[name].kind]] += share
            continue
        whole = max(expansion.absolute, 1e-30)
        bias = abs(expansion.constant)
        ends["biases"] += share * bias / whole
        ends["not kept"] += share * (expansion.absolute - bias - kept.get(name, 0.0)) / whole
    return ends


# --- heads and genes -----------------------------------------------------------------------------


def head_table(circuit: Circuit, parts: Contributions, genes: Sequence[str | None]) -> pd.DataFrame:
    """Which head brings each gene's tokens to the target's token, strongest first.

    parts: the target's contributions; genes: (n_pos,) the gene of each token. Columns: gene (empty:
    all tokens of no gene), layer, head, contribution (direct, signed, summed over the gene's
    tokens), share (its absolute contributions, token by token, of all of the target's), through
    (signed share through the circuit's heads that read the gene at the target's token, whether the
    target reads them or a feature in between does).
    """
    named = np.array([gene or "" for gene in genes])
    heads = parts.heads.cpu().numpy()
    whole = max(sum(float(part.abs().sum()) for part in parts), 1e-30)
    position, signed = circuit.nodes[circuit.target].position, circuit.influence(signed=True)
    through: dict[tuple[str, int, int], float] = {}
    for node in circuit.nodes.values():
        if node.kind == "head" and node.position == position:
            key = str(named[node.source]), node.layer, node.index
            through[key] = through.get(key, 0.0) + signed[node.id]
    rows = []
    for gene in dict.fromkeys(named.tolist()):
        own = heads[:, :, named == gene]
        direct, absolute = own.sum(axis=2), np.abs(own).sum(axis=2)
        for layer in range(heads.shape[0]):
            for head in range(heads.shape[1]):
                rows.append((gene, layer, head, float(direct[layer, head]),
                             float(absolute[layer, head]) / whole,
                             through.get((gene, layer, head), 0.0)))
    frame = pd.DataFrame(rows, columns=["gene", "layer", "head", "contribution", "share",
                                        "through"])
    return frame.sort_values(["share", "gene", "layer", "head"],
                             ascending=[False, True, True, True], ignore_index=True)


# --- negative edges ------------------------------------------------------------------------------


def inhibition(circuit: Circuit) -> dict[str, float]:
    """How much of a circuit takes away.

    edges, negative: kept edges, and those with a negative weight. carried: the share of negative
    edges in what all edges carry (`Circuit.carried`).
    """
    carried = circuit.carried()
    negative = [one for edge, one in zip(circuit.edges, carried, strict=True) if edge.weight < 0]
    return {"edges": len(carried), "negative": len(negative),
            "carried": sum(negative) / max(sum(carried), 1e-30)}


# --- supernodes ----------------------------------------------------------------------------------


def features_at(circuit: Circuit) -> list[FeatureAt]:
    """The circuit's features (without the target), each at its token."""
    return [FeatureAt(node.layer, node.index, node.position) for node in circuit.features]


def circuit_features(circuit: Circuit) -> dict[FeatureOf, list[Node]]:
    """The circuit's features (without the target), each with its nodes."""
    found: dict[FeatureOf, list[Node]] = {}
    for node in circuit.features:
        found.setdefault((node.layer, node.index), []).append(node)
    return found


def supernodes(circuit: Circuit, families: Mapping[FeatureOf, tuple[int, ...]]) -> pd.DataFrame:
    """Features of a circuit in groups that fire on the same tokens, most influential first.

    Two features belong together if the Jaccard index of their families is at least a half, and so
    do all that such pairs connect; a feature without a family stands alone. Columns: supernode
    (from 1), n_features, features (such as `2.17`), layers, tokens (ids of the members' families,
    in most members first), influence and signed (summed over the members' nodes).
    """
    members = circuit_features(circuit)
    order = sorted(members)
    alike = similarity([families[one] for one in order]) >= 0.5  # 0 without a family
    n, group = connected_components(alike, directed=False)
    influence, signed = circuit.influence(), circuit.influence(signed=True)
    rows = []
    for place in range(n):
        own = [one for one, of in zip(order, group, strict=True) if of == place]
        counts = Counter(token for one in own for token in families[one])
        nodes = [node.id for one in own for node in members[one]]
        rows.append((len(own), " ".join(f"{layer}.{index}" for layer, index in own),
                     " ".join(map(str, sorted({layer for layer, _ in own}))),
                     sorted(counts, key=lambda token: (-counts[token], token)),
                     sum(influence[name] for name in nodes), sum(signed[name] for name in nodes)))
    frame = pd.DataFrame(rows, columns=["n_features", "features", "layers", "tokens", "influence",
                                        "signed"])
    frame = frame.sort_values(["influence", "features"], ascending=[False, True],
                              ignore_index=True)
    frame.insert(0, "supernode", np.arange(1, len(frame) + 1))
    return frame


# --- several circuits ----------------------------------------------------------------------------


def jaccard(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """Shared over all members of two sets; 0 if both are empty."""
    one, other = set(first), set(second)
    return len(one & other) / max(len(one | other), 1)


def similarity(sets: Sequence[Iterable[Hashable]]) -> np.ndarray:
    """(n, n) Jaccard index of every pair of sets."""
    return np.array([[jaccard(one, other) for other in sets] for one in sets]).reshape(
        len(sets), len(sets))


class OverlapTest(NamedTuple):
    """Mean overlap of pairs of one label and of pairs of two, and how rare the difference is.

    p: one-sided, (1 + permutations with at least this difference) / (1 + permutations); None, like
    the means, if there are not pairs of both sorts.
    """

    within: float | None
    between: float | None
    n_within: int
    n_between: int
    p: float | None
    permutations: int


def overlap_test(overlap: np.ndarray, labels: Sequence[Hashable], *,
                 strata: Sequence[Hashable] | None = None, permutations: int = 9999, seed: int = 0
                 ) -> OverlapTest:
    """Are circuits of one cell type more alike than circuits of two?

    overlap: (n, n) of every pair, such as `similarity`; labels: (n,). strata: (n,) groups, such as
    the circuits' targets: only pairs of one group are compared, of groups with pairs of both sorts,
    and labels are permuted within groups, so that what the groups explain counts for nothing.
    """
    n = len(labels)
    groups = list(strata) if strata is not None else [0] * n
    if overlap.shape != (n, n) or len(groups) != n:
        raise InputError(f"{n} labels and {len(groups)} strata do not fit an overlap of shape "
                         f"{overlap.shape}.")
    code = pd.factorize(pd.Series(list(labels), dtype=object))[0]
    group = pd.factorize(pd.Series(groups, dtype=object))[0]
    first, second = np.triu_indices(n, 1)
    same = code[first] == code[second]
    both = [one for one in np.unique(group) if len(np.unique(
        same[(group[first] == one) & (group[second] == one)])) == 2]
    chosen = (group[first] == group[second]) & np.isin(group[first], both)
    if not chosen.any():
        return OverlapTest(None, None, 0, 0, None, permutations)
    first, second, same = first[chosen], second[chosen], same[chosen]
    values, n_same = overlap[first, second], int(same.sum())

    def means(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Within and between, (n_rows,) each, for (n_rows, n) codes; permuting them within groups
        leaves the number of pairs of either sort as it is."""
        alike = codes[:, first] == codes[:, second]
        return (np.where(alike, values, 0).sum(axis=1) / n_same,
                np.where(alike, 0, values).sum(axis=1) / (len(values) - n_same))

    rng = generator(seed, "permuted circuits")
    permuted = np.tile(code, (permutations, 1))
    for one in np.unique(group):
        members = np.flatnonzero(group == one)
        permuted[:, members] = rng.permuted(permuted[:, members], axis=1)
    (within,), (between,) = means(code[None])
    differences = np.subtract(*means(permuted))
    # Permutations that only swap equal circuits must count as equal, whatever the rounding.
    reached = int((differences >= within - between - 1e-12).sum())
    return OverlapTest(float(within), float(between), n_same, len(values) - n_same,
                       (1 + reached) / (1 + permutations), permutations)


def pair_table(overlap: np.ndarray, cells: Sequence[str], labels: Sequence[str],
               targets: Sequence[int]) -> pd.DataFrame:
    """One row per pair of cells: their types and targets, and how much their circuits overlap."""
    first, second = np.triu_indices(len(cells), 1)
    name, label, target = np.array(cells), np.array(labels), np.array(targets)
    return pd.DataFrame({
        "cell": name[first], "other_cell": name[second], "cell_type": label[first],
        "other_cell_type": label[second], "same_type": label[first] == label[second],
        "same_target": target[first] == target[second], "overlap": overlap[first, second]})


def shared_features(sets: Sequence[Iterable[FeatureOf]], labels: Sequence[str]) -> pd.DataFrame:
    """One row per feature of any circuit, most circuits first.

    Columns: layer, feature, n_circuits, n_types (types with such a circuit), most_of (the type in
    whose circuits it is found most, by share; ties by name), share_of_type.
    """
    totals = pd.Series(labels).value_counts()
    found: dict[FeatureOf, list[str]] = {}
    for features, label in zip(sets, labels, strict=True):
        for one in sorted(set(features)):
            found.setdefault(one, []).append(label)
    rows = []
    for (layer, feature), types in sorted(found.items()):
        shares = {label: types.count(label) / int(totals[label]) for label in sorted(set(types))}
        top = max(shares, key=lambda label: shares[label])
        rows.append((layer, feature, len(types), len(shares), top, shares[top]))
    frame = pd.DataFrame(rows, columns=["layer", "feature", "n_circuits", "n_types", "most_of",
                                        "share_of_type"])
    return frame.sort_values(["n_circuits", "layer", "feature"], ascending=[False, True, True],
                             ignore_index=True)
