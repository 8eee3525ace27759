# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   scfm:
#     after: [06_enrichment, 07_endothelial_case_study]
#     produces: [tables/controls_enrichment.csv, tables/circuit_faithfulness.csv]
#     exhibits: "beyond the paper"
#     modules: [enrichment, attribution, circuits, interventions]
# ---

# %% [markdown]
# # Would anything else have done as well?
#
# The paper has no control. This chapter asks two questions of its two main results. Are features
# called interpretable more often than gene lists that no model made? And does the circuit matter to
# the model: does its target change when the circuit is taken away, by as much as predicted, and more
# than when other active features are taken away?

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits import InputError, figures
from scfm_circuits.attribution import feature_direction, freeze
from scfm_circuits.circuits import strongest_features, trace_feature
from scfm_circuits.controls import control_lists, enriched_share, untrained_statistics
from scfm_circuits.enrichment import RULES, load_library, wilson_interval
from scfm_circuits.features import get_statistics
from scfm_circuits.interventions import FeatureAt, ablate, matched_features
from scfm_circuits.language_model import get_model
from scfm_circuits.profile import from_notebook
from scfm_circuits.report import Report
from scfm_circuits.sentences import answered_prompt, load_corpus
from scfm_circuits.training import get_transcoders

run = from_notebook(globals())
report = Report(run, "08_controls")
corpus = load_corpus(run)
model, _ = get_model(run, corpus)
transcoders, _ = get_transcoders(model, corpus, run)
statistics = get_statistics(model, transcoders, corpus, run)
report.not_comparable(run)

# %% [markdown]
# ## Interpretable by chance
#
# Each live feature's gene list is set beside lists of the same length that owe nothing to a trained
# feature, {glue:text}`controls.draws` draws for each:
#
# - **uniform**: genes of the corpus drawn at random. Under a correct rule about 5 % of them should be
#   called interpretable for each library; this tests the rule, not the features.
# - **frequency-matched**: genes as common in the corpus as the feature's own. A feature that fires
#   anywhere at random lists the commonest genes of the tissue.
# - **token-preserving**: the genes of as many random tokens as the feature fires on, as common and
#   contained in as many genes. Pieces of gene names are gene families, and gene families are terms.
# - **untrained encoder**: features of transcoders that were never trained, on the same model, with
#   thresholds such that they fire as often as the trained ones.

# %%
draws = 5
loaded = [load_library(name, run.gene_sets) for name in run.libraries]
libraries = {one.content_sha256: one for one in loaded}
symbols = corpus.symbols[np.unique(corpus.gene[corpus.gene >= 0])].tolist()
random_features = untrained_statistics(model, statistics, corpus, run)
rows = []
for layer in range(transcoders.n_layers):
    lists = control_lists(statistics, random_features, layer, corpus, run, draws)
    for name in dict.fromkeys([run.enrichment_rule, "enrichr", "corpus"]):
        rule = RULES[name]
        for kind, ragged in lists.items():
            hits = enriched_share(ragged, corpus.symbols, list(libraries.values()), rule, symbols,
                                  run.fdr)
            low, high = wilson_interval(int(hits.sum()), max(len(hits), 1))
            rows.append({"rule": name, "lists": kind, "layer": layer, "tested": len(hits),
                         "hits": int(hits.sum()),
                         "percentage": 100 * hits.mean() if len(hits) else np.nan,
                         "lower_95": 100 * low, "upper_95": 100 * high})

# %% mystnb={"image": {"alt": "Two panels, one per rule: percentage of lists called interpretable against layer, for the features and for four kinds of control lists."}, "figure": {"caption": "Share of lists called interpretable, layer by layer: the features, and lists that no trained feature made. Left the rule the paper most likely used, right the corpus as background with every term in the correction.", "name": "fig-controls"}} tags=["hide-input"]
controls = pd.DataFrame(rows)
report.figure("controls_enrichment", figures.share_with_controls(controls))

# %% tags=["hide-input"]
report.value("controls.draws", draws)
report.table("controls_enrichment", controls, rows=0)
pooled = controls.groupby(["rule", "lists"], sort=False)[["tested", "hits"]].sum().reset_index()
pooled["percentage"] = 100 * pooled["hits"] / pooled["tested"]
report.show(pooled, caption="All layers together")

# %% tags=["remove-input"]
report.warning(*(one.warning for one in loaded))

# %% tags=["remove-input"]
for rule, kind, value in pooled[["rule", "lists", "percentage"]].itertuples(index=False):
    report.value(f"controls.{rule}.{kind.replace(' ', '-')}", float(value), f"{value:.1f} %")
report.value("controls.libraries", ", ".join(
    f"{one.name} ({one.source})" for one in libraries.values()))

# %% [markdown]
# Libraries: {glue:text}`controls.libraries`. Under the rule `enrichr`, {glue:text}`controls.enrichr.features`
# of the features are called interpretable, and so are {glue:text}`controls.enrichr.uniform` of
# uniformly random lists, {glue:text}`controls.enrichr.frequency-matched` of frequency-matched ones
# and {glue:text}`controls.enrichr.token-preserving` of those that keep the number and the kind of
# tokens. Under the rule `corpus` the same numbers are {glue:text}`controls.corpus.features`,
# {glue:text}`controls.corpus.uniform`, {glue:text}`controls.corpus.frequency-matched` and
# {glue:text}`controls.corpus.token-preserving`. Encoders that were never trained score
# {glue:text}`controls.enrichr.untrained-encoder` under `enrichr` and
# {glue:text}`controls.corpus.untrained-encoder` under `corpus`. A percentage says something about the features only
# by as much as it is above its controls.
#
# In a corpus of few, hand-picked genes, as the demo's blood cells are, the genes of the corpus share
# terms to begin with: a background of 20,000 genes then finds almost any list enriched.

# %% [markdown]
# ## Is the circuit what the model uses?
#
# For held-out cells of every type, the strongest feature of the last layer is traced at the place
# where the case study reads its target ({glue:text}`faithfulness.targets` different features over
# {glue:text}`faithfulness.cells` cells). Then everything the circuit's features write is taken out of the real model, and the
# target's pre-activation is read again; attention, LayerNorm and the MLPs in between respond as they
# will. The prediction holds attention and LayerNorm still and lets only attention carry the
# difference on. The control takes away as many other features, active at the same tokens of the same
# layers.

# %%
rng = np.random.default_rng([run.seed, 8])
held_out = np.flatnonzero(corpus.held_out)
cells = np.concatenate([held_out[corpus.labels[held_out] == label][:2]
                        for label in np.unique(corpus.labels[held_out])])[:24]
last, rows = transcoders.n_layers - 1, []
for cell in cells:
    case = answered_prompt(corpus, run, int(cell), str(corpus.labels[cell]))
    position = case.position
    frozen = freeze(model, transcoders, case.encoded.tokens)
    strongest = strongest_features(frozen, last, position, 1)
    if not strongest:
        continue
    target = FeatureAt(last, strongest[0], position)
    circuit = trace_feature(frozen, *target, branches=run.circuit_branches,
                            depth=run.circuit_depth, max_nodes=run.circuit_nodes)
    chosen = [FeatureAt(node.layer, node.index, node.position) for node in circuit.nodes.values()
              if node.kind == "feature" and node.id != circuit.target]
    reading = feature_direction(frozen, *target)
    other = matched_features(frozen, chosen, target, rng)
    for kind, ablated in (("circuit", chosen), ("random", other)):
        effect = ablate(model, frozen, ablated, target, reading)
        rows.append({
            "cell": str(corpus.cell_ids[cell]), "cell_type": str(corpus.labels[cell]),
            "target": target.feature, "features": kind, "n_features": len(ablated),
            "pre_activation": effect.before,
            "predicted": effect.predicted_change / effect.before,
            "measured": effect.measured_change / effect.before,
        })

# %% mystnb={"image": {"alt": "Left: predicted against measured change of the target when circuit features or random features are ablated. Right: measured changes of both kinds."}, "figure": {"caption": "What taking features away does to the circuit's target, as a share of its pre-activation; -1 means that the target is gone. Each point is a cell.", "name": "fig-faithfulness"}} tags=["hide-input"]
effects = pd.DataFrame(rows)
if effects.empty:
    raise InputError("No feature of the last layer is active at the target of any held-out cell; "
                     "lower `l1_coefficient` or train on more tokens.")
report.figure("circuit_faithfulness", figures.faithfulness(effects))

# %% tags=["hide-input"]
report.table("circuit_faithfulness", effects, rows=8,
             caption="Predicted and measured change, as shares of the target's pre-activation")

# %% tags=["remove-input"]
by_kind = effects.groupby("features")[["n_features", "predicted", "measured"]].median()
own = effects[effects["features"] == "circuit"]
correlation = own["predicted"].corr(own["measured"], method="spearman")
report.value("faithfulness.cells", len(own))
report.value("faithfulness.targets", int(own["target"].nunique()))
report.value("faithfulness.circuit", float(by_kind.loc["circuit", "measured"]))
report.value("faithfulness.random", float(by_kind.loc["random", "measured"]))
report.value("faithfulness.n_features", float(by_kind.loc["circuit", "n_features"]))
report.value("faithfulness.correlation", float(correlation), f"{correlation:.2f}")

# %% [markdown]
# Over {glue:text}`faithfulness.cells` cells, taking away the circuit's features (a median of
# {glue:text}`faithfulness.n_features`) changes the target by a median of
# {glue:text}`faithfulness.circuit` of its pre-activation, and as many other active features by
# {glue:text}`faithfulness.random`. Predicted and measured changes have a rank correlation of
# {glue:text}`faithfulness.correlation` over cells. Where they differ, attention, LayerNorm and
# features outside the circuit have responded. The random features are active at the same tokens, but
# not as strongly: the control is for their number and place, not for how much they write.
#
# ```{admonition} Key points
# - A share of "interpretable" features needs a control; without one it mostly measures the rule.
# - A circuit is a claim about the model, and can be tested in the model.
# ```
