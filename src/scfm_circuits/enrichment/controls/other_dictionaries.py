"""What dictionaries of different kinds are compared by: see `variants`.

All are measured on the same held-out cells, by the dictionaries as they are stored: thresholds of
`batchtopk` and `jumprelu` are those learnt in training.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits.cells.corpus import Corpus, of_cells
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.layer_counts import Tester, null_source, testers
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import ragged
from scfm_circuits.features.gene_lists import gene_list_ids
from scfm_circuits.features.statistics import FeatureStatistics, get_statistics
from scfm_circuits.transcoders.held_out import held_out_measures
from scfm_circuits.transcoders.variants import Trained

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM


NULL = "token-preserving"
"""The null lists: random tokens of the kinds, and as many, as the feature fires on."""
HELD_OUT = 32
"""Held-out cells on which losses and fits are measured."""


class Comparison(NamedTuple):
    """Kinds of dictionary side by side: `summary`, `by_layer`, and `held_out_measures` by row."""

    table: pd.DataFrame
    layers: pd.DataFrame
    scores: pd.DataFrame
    rules: tuple[str, ...]
    """Names of the enrichment rules that called features."""
    cells: int
    """Held-out cells measured on."""
    counted: int
    """Cells in which features were counted."""


def compare_dictionaries(trained: Sequence[Trained], model: "GPTNeoXForCausalLM", corpus: Corpus,
                         libraries: Sequence[GeneSets], profile: Profile) -> Comparison:
    """Measure all kinds on the same held-out cells, and test their features with all rules.

    trained: from `get_variants`, the reference first. One dictionary is in memory at a time.
    """
    held_out = corpus.held_out_cells(HELD_OUT)
    counted = cells_counted(corpus, profile)
    ready = testers(libraries, counted, profile)
    scores = held_out_measures(model, {one.setting.name: partial(one.load, model.device)
                                       for one in trained}, corpus, held_out,
                               profile.forward_cells)
    features = {one.setting.name: feature_measures(
        get_statistics(model, one.load(model.device), counted, one.profile, one.control), counted,
        profile, ready) for one in trained}
    layers = by_layer(trained, scores, features)
    return Comparison(summary(trained, layers, scores), layers, scores,
                      tuple(one.rule for one in ready), len(held_out), len(counted))


def cells_counted(corpus: Corpus, profile: Profile) -> Corpus:
    """The cells in which the features of all kinds are counted: all, or `variant_cells` of them.

    A pass over the paper's 67 million tokens costs more than training a kind does.
    """
    if profile.variant_cells is None or profile.variant_cells >= len(corpus):
        return corpus
    drawn = generator(profile.seed, "cells that kinds are counted in").permutation(len(corpus))
    return of_cells(corpus, np.sort(drawn[: profile.variant_cells]))


def feature_measures(statistics: FeatureStatistics, corpus: Corpus, profile: Profile,
                     ready: Sequence[Tester], null_kind: str = NULL) -> pd.DataFrame:
    """Live features and the interpretable ones among them: a row per layer.

    Columns: layer, live (Figure 3's cut), live_table4, dead (share that fires nowhere in the
    corpus); for each tester, called_<rule> and null_<rule>: how many of the features that are live
    at Table 4's cut it calls, and how many of as many null lists of `null_kind`, one for each.
    """
    live, rows = statistics.live(profile.live_cut_table4), []
    for layer in range(len(live)):
        features = np.flatnonzero(live[layer])
        own = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
        row = {"layer": layer, "live": int(statistics.live(profile.live_cut)[layer].sum()),
               "live_table4": len(features), "dead": float((statistics.fired[layer] == 0).mean())}
        null = None
        if len(features):
            source = null_source(statistics, layer, features, own, corpus, profile)
            rng = generator(profile.seed, "null lists of other dictionaries", layer)
            null = source.draw(null_kind, rng, 1)
        for tester in ready:
            row[f"called_{tester.rule}"] = int(tester.counted(own)[0].sum()) if null else 0
            row[f"null_{tester.rule}"] = int(tester.counted(null)[0].sum()) if null else 0
        rows.append(row)
    return pd.DataFrame(rows)


def by_layer(trained: Sequence[Trained], held_out: pd.DataFrame,
             features: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per variant and layer, measures of both kinds.

    `loss_increase`: loss with that layer's MLP replaced, less the model's own.
    """
    own = held_out.set_index(["variant", "layer"])["loss"]
    frames = []
    for one in trained:
        name = one.setting.name
        rows = held_out[(held_out["variant"] == name) & (held_out["layer"] >= 0)]
        rows = rows.assign(loss_increase=rows["loss"] - own["original", -1])
        frames.append(rows.merge(features[name], on="layer"))
    return pd.concat(frames, ignore_index=True)


def summary(trained: Sequence[Trained], layers: pd.DataFrame, held_out: pd.DataFrame
            ) -> pd.DataFrame:
    """One row per variant: means over layers, live features of all layers, pooled percentages.

    Columns: variant, label, l1_coefficient or k (what set its L0), l0, l0_ratio (to the
    reference's), fvu, loss_increase (one layer at a time), loss_increase_all (all at once), live,
    live_table4, dead, percentage_<rule>, null_<rule>, seconds_ratio (a training step's time to
    that of the reference).
    """
    own = held_out.set_index(["variant", "layer"])["loss"]
    rules = [str(name).removeprefix("called_") for name in layers
             if str(name).startswith("called_")]
    rows = []
    for one in trained:
        part = layers[layers["variant"] == one.setting.name]
        limited = one.setting.matched == "k"
        row = {"variant": one.setting.name, "label": one.setting.label,
               "l1_coefficient": np.nan if limited else one.l1_coefficient,
               "k": one.profile.active_features if limited else np.nan,
               "l0": part["l0"].mean(), "fvu": part["fvu"].mean(),
               "loss_increase": part["loss_increase"].mean(),
               "loss_increase_all": own[one.setting.name, -1] - own["original", -1],
               "live": int(part["live"].sum()), "live_table4": int(part["live_table4"].sum()),
               "dead": part["dead"].mean()}
        tested = row["live_table4"] or np.nan
        for rule in rules:
            row[f"percentage_{rule}"] = 100 * part[f"called_{rule}"].sum() / tested
            row[f"null_{rule}"] = 100 * part[f"null_{rule}"].sum() / tested
        row["seconds_ratio"] = one.seconds / trained[0].seconds
        rows.append(row)
    table = pd.DataFrame(rows)
    table.insert(5, "l0_ratio", table["l0"] / table["l0"].iloc[0])
    return table
