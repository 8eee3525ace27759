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
#     after: [07_endothelial_case_study]
#     produces: [tables/circuit_faithfulness.csv]
#     exhibits: "beyond the paper"
#     modules: [attribution, circuits, interventions]
# ---

# %% [markdown]
# # Is the circuit what the model uses?
#
# The paper has no control. {doc}`06_enrichment` sets its features beside gene lists that no trained
# feature made. This chapter asks the same of its circuit: does the target change when the circuit is
# taken away, by as much as predicted, and more than when other active features are taken away?

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits import InputError, figures
from scfm_circuits.attribution import feature_direction, freeze
from scfm_circuits.circuits import strongest_features, trace_feature
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
report.not_comparable(run)

# %% [markdown]
# ## Taking the circuit away
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
# - Closing to rounding is arithmetic; that the model's own value moves as predicted is evidence.
# - A circuit is a claim about the model, and can be tested in the model.
# ```
