"""The circuits of several cells, tested and taken apart: one function for each question of a page.

1. `circuit_study` traces and tests a few held-out cells of every type; all else reads its result.
2. `faithfulness`: does the target change, and more than with other features? (as much as
   predicted? see `prediction`)
3. `flow_shares`, `head_summary`, `supernode_table`, `overlap_study`: what are the circuits made of,
   and what have they in common? (see `structure`)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.circuits.attribution import Reading, contributions, feature_direction
from scfm_circuits.circuits.circuit import Circuit
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.interventions import (
    FeatureAt,
    compare_interventions,
    scale_each,
)
from scfm_circuits.circuits.search import limits, strongest_features, trace_feature
from scfm_circuits.circuits.structure import (
    ENDS,
    OverlapTest,
    circuit_features,
    features_at,
    flow_table,
    head_table,
    inhibition,
    overlap_test,
    pair_table,
    path_ends,
    shared_features,
    similarity,
    supernodes,
)
from scfm_circuits.circuits.token_means import (
    Means,
    cells_averaged,
    mean_activations,
    prompt_kinds,
)
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.contexts import token_families
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.common.profile import Profile

PER_TYPE, MOST, DRAWS = 3, 30, 5
"""Held-out cells of each type, and of all types at most; random circuits of either kind for
each."""
KEYS = ["cell", "cell_type", "target"]
"""Columns that name a cell's circuit: the cell, its type, the feature traced."""
RANDOM = ("same token", "same size")
"""Kinds of random circuits (`interventions.matched_features` within the token, the layer)."""


# --- the cells -----------------------------------------------------------------------------------


class CircuitStudy(NamedTuple):
    """The circuits of some cells; the tables have `KEYS` and what follows."""

    circuits: tuple[tuple[dict[str, Any], Circuit], ...]
    """Each circuit with the values of `KEYS`."""
    effects: pd.DataFrame
    """pre_activation, and the fields of `interventions.Comparison`: several rows a cell."""
    singles: pd.DataFrame
    """Each feature of each circuit by itself: layer, feature, position, intervention (`ablation`,
    `doubling`), predicted and measured change as shares of the target's pre-activation."""
    flow: pd.DataFrame
    """`structure.flow_table`: several rows a cell."""
    heads: pd.DataFrame
    """`structure.head_table`: several rows a cell."""
    inside: pd.DataFrame
    """A row a cell: shares of `structure.path_ends`, and `structure.inhibition`."""
    mean_cells: int
    """Training cells that means were taken over."""

    @property
    def types(self) -> list[str]:
        """The cells' types."""
        return [str(keys["cell_type"]) for keys, _ in self.circuits]

    @property
    def sets(self) -> list[set[tuple[int, int]]]:
        """Each circuit's features as (layer, index)."""
        return [set(circuit_features(circuit)) for _, circuit in self.circuits]


def studied_cells(corpus: Corpus, per_type: int = PER_TYPE, most: int = MOST,
                  among: np.ndarray | None = None) -> np.ndarray:
    """The first held-out cells of every type, or the first of `among`, sorted by type.

    Every type's first cell comes before any type's second, should there be too many types.
    """
    held_out = np.flatnonzero(corpus.held_out) if among is None else among
    labels = corpus.labels[held_out]
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    turns = np.lexsort((labels, turn))
    cells = held_out[turns[turn[turns] < per_type][:most]]
    return cells[np.argsort(corpus.labels[cells], kind="stable")]


def circuit_study(model: "PreTrainedModel", transcoders: Transcoders, corpus: Corpus,
                  profile: "Profile") -> CircuitStudy:
    """Trace the last layer's strongest feature of some held-out cells, and test each circuit.

    The target is read where the profile reads its case; a cell in which no feature is active there
    has no circuit.

    Raises:
        InputError: no cell has one.
    """
    rng = generator(profile.seed, "interventions")
    training = cells_averaged(corpus, rng)
    means = mean_activations(model, transcoders, corpus, training, profile.forward_cells)
    found = [_of_cell(model, transcoders, corpus, profile, int(cell), means, rng)
             for cell in studied_cells(corpus)]
    parts = [one for one in found if one is not None]
    if not parts:
        raise InputError("No feature of the last layer is active at the target of any held-out "
                         "cell; lower `l1_coefficient` or train on more tokens.")
    tables = {name: pd.concat([_keyed(some[name], keys) for keys, _, some in parts],
                              ignore_index=True) for name in parts[0][2]}
    return CircuitStudy(tuple((keys, circuit) for keys, circuit, _ in parts), **tables,
                        mean_cells=len(training))


def _of_cell(model: "PreTrainedModel", transcoders: Transcoders, corpus: Corpus,
             profile: "Profile", cell: int, means: Means, rng: np.random.Generator
             ) -> tuple[dict[str, Any], Circuit, dict[str, pd.DataFrame]] | None:
    """One cell's part of a `CircuitStudy`: `KEYS`, circuit, and tables without `KEYS` by name."""
    case = answered_prompt(corpus, profile, cell, str(corpus.labels[cell]))
    frozen = freeze(model, transcoders, case.encoded.tokens)
    last = transcoders.n_layers - 1
    strongest = strongest_features(frozen, last, case.position, 1)
    if not strongest:
        return None
    target = FeatureAt(last, strongest[0], case.position)
    circuit = trace_feature(frozen, *target, **limits(profile))
    chosen = features_at(circuit)
    reading = feature_direction(frozen, *target)
    compared = compare_interventions(model, frozen, chosen, target, reading, means,
                                     prompt_kinds(case), rng, draws=DRAWS)
    parts = contributions(frozen, reading)
    keys = dict(zip(KEYS, (str(corpus.cell_ids[cell]), str(corpus.labels[cell]), target.feature),
                    strict=True))
    return keys, circuit, {
        "effects": pd.DataFrame([{"pre_activation": float(reading.value), **one._asdict()}
                                 for one in compared]),
        "singles": _one_at_a_time(model, frozen, chosen, target, reading, profile.forward_cells),
        "flow": flow_table(circuit, parts), "heads": head_table(circuit, parts, case.genes),
        "inside": pd.DataFrame([{**path_ends(circuit), **inhibition(circuit)}])}


def _one_at_a_time(model: "PreTrainedModel", frozen: Frozen, features: Sequence[FeatureAt],
                   target: FeatureAt, reading: Reading, batch: int) -> pd.DataFrame:
    """A cell's part of `CircuitStudy.singles`, without `KEYS`."""
    done = {"ablation": 0.0, "doubling": 2.0}
    effects = scale_each(model, frozen, features, list(done.values()), target, reading, batch)
    rows = [(*feature, name, one.predicted_change / one.before, one.measured_change / one.before)
            for name, some in zip(done, effects, strict=True)
            for feature, one in zip(features, some, strict=True)]
    return pd.DataFrame(rows, columns=[*FeatureAt._fields, "intervention", "predicted", "measured"])


def _keyed(table: pd.DataFrame, keys: dict[str, Any]) -> pd.DataFrame:
    """The table with the values of `KEYS` as its first columns."""
    return table.assign(**keys)[[*KEYS, *table]]


# --- is it what the model uses? ------------------------------------------------------------------


class Faithfulness(NamedTuple):
    """What the interventions say; changes are shares of the target's pre-activation."""

    medians: pd.DataFrame
    """A row per intervention and kind of features: medians over cells."""
    by_type: pd.DataFrame
    """Taken away, a row per cell type."""
    numbers: dict[str, float]
    """Counts, and median changes."""
    ratios: dict[str, float]
    """What random circuits write relative to the circuit, and what is left of the target with a
    circuit alone."""


def faithfulness(study: CircuitStudy) -> Faithfulness:
    """`effects` summed up over cells, in tables and one by one."""
    effects = study.effects
    medians: Any = effects.groupby(["intervention", "features"], sort=False)[
        ["n_features", "size", "predicted", "measured"]].median()
    cells: Any = effects.set_index(["intervention", "features"]).sort_index()
    own = cells.loc[("ablation", "circuit")]

    def measured(intervention: str, kind: str) -> float:
        return float(medians.loc[(intervention, kind), "measured"])

    numbers = {
        "cells": len(own), "targets": int(own["target"].nunique()), "per_type": PER_TYPE,
        "mean_cells": study.mean_cells, "draws": DRAWS, "types": int(own["cell_type"].nunique()),
        "n_features": float(medians.loc[("ablation", "circuit"), "n_features"]),
        "cells_beyond_random": _beyond_random(cells)}
    for name, intervention in (("", "ablation"), ("doubling_", "doubling")):
        for key, kind in zip(("circuit", "random", "random_size"), ("circuit", *RANDOM),
                             strict=True):
            numbers[f"{name}{key}"] = measured(intervention, kind)
    ratios = {f"size_{kind.replace(' ', '_')}": float(medians.loc[("ablation", kind), "size"])
              for kind in RANDOM}
    for kind in ("circuit", "none", *RANDOM):
        ratios[f"alone_{kind.replace(' ', '_')}"] = 1 + measured("alone", kind)
    for kind in ("circuit", "none"):
        ratios[f"own_kind_{kind}"] = 1 + measured("alone, own kind", kind)
    return Faithfulness(medians.reset_index(), _by_type(effects), numbers, ratios)


def _beyond_random(cells: Any) -> int:
    """Cells in which the circuit lowers the target by more than every random circuit."""
    own = cells.loc[("ablation", "circuit")].set_index("cell")["measured"]
    beyond = [own < cells.loc[("ablation", kind)].set_index("cell")["lowest"] for kind in RANDOM]
    return int((beyond[0] & beyond[1]).sum())


def _by_type(effects: pd.DataFrame) -> pd.DataFrame:
    taken = effects[effects["intervention"] == "ablation"].set_index(["cell_type", "cell"])
    table = taken[taken["features"] == "circuit"].groupby("cell_type").agg(
        cells=("measured", "size"), predicted=("predicted", "median"),
        measured=("measured", "median"), smallest=("measured", "max"), largest=("measured", "min"))
    for kind in RANDOM:
        table[kind] = taken[taken["features"] == kind].groupby("cell_type")["measured"].median()
    return table.reset_index()


# --- what are they made of? ----------------------------------------------------------------------


def end_table(study: CircuitStudy) -> pd.DataFrame:
    """Where the targets' contributions end (`structure.path_ends`), mean over cells."""
    ends = study.inside[[*ENDS]].mean()
    return ends.rename_axis("path ends at").rename("share").reset_index()


def flow_shares(study: CircuitStudy) -> dict[str, float]:
    """Means over cells: direct_<kind> of what is written straight to the target; ends_<end>;
    negative_edges (of the edges) and negative_carried (of what all edges carry)."""
    direct = study.flow.groupby(["cell", "kind"])["share"].sum().groupby("kind").mean()
    ends, inside = end_table(study).set_index("path ends at")["share"], study.inside
    return {
        **{f"direct_{kind}": float(direct[kind])
           for kind in ("attention", "features", "errors", "embedding", "biases")},
        **{f"ends_{end.replace(' ', '_')}": float(ends[end]) for end in ("errors", "not kept")},
        "negative_edges": float((inside["negative"] / inside["edges"]).mean()),
        "negative_carried": float(inside["carried"].mean())}


class HeadSummary(NamedTuple):
    """Which head brings the genes to the target's token."""

    listed: pd.DataFrame
    """For every cell the 20 strongest pairs of head and gene, by direct share."""
    to_genes: float
    """Share of what attention brings that was read at tokens of genes."""
    top: str
    """The head that brings most of the genes' part, as layer.head."""
    top_share: float
    """Its share of that part."""
    top_cells: int
    """Cells in which it is the strongest head on genes."""


def head_summary(study: CircuitStudy) -> HeadSummary:
    """`heads` summed up over cells."""
    heads = study.heads
    on_gene = heads[heads["gene"] != ""]
    by_head = on_gene.groupby(["layer", "head"])["share"].sum()
    top: Any = by_head.idxmax()
    layer, head = top
    firsts = on_gene.groupby(["cell", "layer", "head"])["share"].sum().reset_index()
    firsts = firsts.sort_values("share", ascending=False, kind="stable").drop_duplicates("cell")
    return HeadSummary(
        on_gene.groupby("cell", sort=False).head(20),
        float(on_gene["share"].sum() / max(heads["share"].sum(), 1e-30)), f"{layer}.{head}",
        float(by_head.max() / max(by_head.sum(), 1e-30)),
        int(((firsts["layer"] == layer) & (firsts["head"] == head)).sum()))


class Supernodes(NamedTuple):
    """Features of each circuit that say the same."""

    table: pd.DataFrame
    """`KEYS`, then `structure.supernodes` with the first six tokens as texts."""
    features: float
    """Different features of the median circuit."""
    supernodes: float
    """Supernodes of the median circuit."""
    largest: float
    """Share of a circuit's features in its largest supernode, mean over circuits."""

    def of_one(self, cell_type: str) -> pd.DataFrame:
        """The first circuit of a type, or the first of all if the type has none."""
        first = int((self.table["cell_type"] == cell_type).argmax())
        chosen = self.table["cell"] == self.table["cell"][first]
        return self.table[chosen].drop(columns=KEYS)


def supernode_table(study: CircuitStudy, statistics: FeatureStatistics, corpus: Corpus
                    ) -> Supernodes:
    """Group each circuit's features by the tokens that they fire on most."""
    sets = study.sets
    families = token_families(statistics, sorted(set[tuple[int, int]]().union(*sets)))
    table = pd.concat([_keyed(supernodes(circuit, families), keys)
                       for keys, circuit in study.circuits], ignore_index=True)
    table["tokens"] = ["  ".join(token_texts(corpus.tokenizer, tokens[:6]))
                       for tokens in table["tokens"]]
    by_cell = table.groupby("cell", sort=False)
    return Supernodes(
        table, float(np.median([len(one) for one in sets])), float(by_cell.size().median()),
        float((by_cell["n_features"].max() / by_cell["n_features"].sum()).mean()))


# --- what have they in common? -------------------------------------------------------------------


class Overlap(NamedTuple):
    """Features that circuits share."""

    overlap: np.ndarray
    """(n_circuits, n_circuits) Jaccard index."""
    pairs: pd.DataFrame
    """`structure.pair_table`."""
    shared: pd.DataFrame
    """`structure.shared_features`."""
    of_all: OverlapTest
    """Are circuits of one type more alike than circuits of two?"""
    same_target: OverlapTest
    """The same among pairs with the same target."""

    def tests(self) -> pd.DataFrame:
        """Both tests, a row each; one where all circuits have one target."""
        tests = [("all pairs", self.of_all), ("pairs with the same target", self.same_target)]
        return pd.DataFrame([{"pairs": pairs, **test._asdict()}
                             for pairs, test in tests[: 1 if self.one_target else 2]])

    @property
    def one_target(self) -> bool:
        """Whether all circuits have the same target."""
        return bool(self.pairs["same_target"].all())

    def counts(self) -> dict[str, int]:
        """Features in any circuit, in every one, and in several of a single type only."""
        n = self.shared["n_circuits"]
        return {"all_features": len(self.shared),
                "in_every_circuit": int((n == len(self.overlap)).sum()),
                "one_type_only": int(((self.shared["n_types"] == 1) & (n > 1)).sum())}


def overlap_study(study: CircuitStudy, seed: int) -> Overlap:
    """Compare every pair of circuits, and test whether the cells' types explain what they share."""
    names, types, targets = ([keys[key] for keys, _ in study.circuits] for key in KEYS)
    overlap = similarity(study.sets)
    return Overlap(overlap, pair_table(overlap, names, types, targets),
                   shared_features(study.sets, types), overlap_test(overlap, types, seed=seed),
                   overlap_test(overlap, types, strata=targets, seed=seed))
