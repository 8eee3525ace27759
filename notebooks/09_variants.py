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
#     after: [01_cells_and_model]
#     produces: [tables/variants.csv, tables/variants_by_layer.csv]
#     libraries: [libraries]
#     exhibits: "beyond the paper"
#     modules: [transcoders/variants, enrichment/controls/other_dictionaries, report/plots/variants]
# ---

# %% [markdown]
# # Other dictionaries on the same sites
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Would another kind of dictionary have told the same story?
# - **The paper says.** It trains one kind: a {term}`transcoder` with ReLU and an L1 penalty.
# - **We find.** At the same {term}`L0` the eight kinds leave different shares of the variance unexplained
#   ({term}`FVU`): {glue:text}`variants.relu_normalized.fvu` with ReLU and
#   {glue:text}`variants.topk.fvu` with TopK. Between {glue:text}`variants.percentage_min` and
#   {glue:text}`variants.percentage_max` % of their live features are called interpretable.
# - **What it is worth.** That is {glue:text}`variants.above_null_min` to {glue:text}`variants.above_null_max` points
#   more than {term}`lists of random tokens <null list>`. A measure that hardly differs between a kind and
#   its own null lists cannot rank the kinds.
# ```
#
# Eight kinds of dictionary are trained on the same layers, the same tokens in the same order, from the
# same seed:
#
# - **ReLU + L1** under both losses of {doc}`02_training`. The one that this run uses is the reference.
# - **JumpReLU** {cite:p}`rajamanoharan2024jumping`: every feature has a threshold of its own, below
#   which it is silent; the penalty counts active features and does not shrink them.
# - **TopK** {cite:p}`gao2024scaling`: each token keeps its k largest features; there is no penalty.
#   **BatchTopK** {cite:p}`bussmann2024batchtopk`: a batch keeps k per token on average, and a learnt
#   threshold takes the batch's place afterwards.
# - **Skip** {cite:p}`paulo2025transcoders`: beside the features, a linear map from input to output.
# - **SAE**, the sparse autoencoder of the paper's Equations 1 to 3 {cite:p}`huben2024sparse`: it reads
#   the MLP's output and writes the same output.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np

from scfm_circuits.enrichment.controls.other_dictionaries import compare_dictionaries
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import variants as plots
from scfm_circuits.transcoders.variants import get_variants

chapter = open_chapter("09_variants", profile, overrides)
model, corpus, rule = chapter.model, chapter.corpus, chapter.profile.enrichment_rule
chapter.not_comparable()

# %% [markdown]
# ## At the same L0
#
# A dictionary that may use more features explains more, so kinds are compared at one L0, that of the
# reference. On held-out cells the others came out between {glue:text}`variants.l0_ratio_min` and
# {glue:text}`variants.l0_ratio_max` times it. Only the mean L0 is matched; its distribution over layers may
# differ.
#
# All of these are trained for {glue:text}`variants.steps` steps of {glue:text}`variants.batch` tokens,
# fewer than the transcoders of the other chapters, and once, at one L0. So differences have no interval,
# kinds whose sparsity has to be learnt may only be slower, and the numbers do not compare with those of
# other chapters. Their features are counted in {glue:text}`variants.counted` cells.

# %% [markdown] tags=["fold:How the L0 is matched"]
# TopK and BatchTopK are given the reference's L0 as k ({glue:text}`variants.k`, the mean over layers).
# JumpReLU's thresholds are moved towards it, all by one factor. Where there is an L1 penalty, its weight is
# steered while training: after each logged step it is raised or lowered according to how far the mean L0
# over layers is from the reference's at the same step, and to the sum of all such differences so far. The
# table below gives the weight at the end.

# %%
trained = get_variants(model, corpus, chapter.profile)

# %%
compared = compare_dictionaries(trained, model, corpus, chapter.libraries, chapter.profile)
table, layers = compared.table, compared.layers

# %%
chapter.library_warnings()

# %% mystnb={"image": {"alt": "Above: fraction of variance unexplained against active features per token, for eight kinds of dictionary. Below, a row per kind: loss added by replacing one layer, live features, and share of them called interpretable beside that of null lists."}, "figure": {"caption": "Eight kinds of dictionary at the same mean L0. Above: large symbols are means over layers, small ones single layers; lower is better. Below: grey bars are lists made from random tokens.", "name": "fig-variants"}} tags=["unfold"]
chapter.figure("variants", plots.variants(table, layers, rule))

# %%
chapter.table("variants", table, rows=0, caption="Every kind with all its numbers")
shown = {"label": "kind", "l1_coefficient": "penalty", "l0": "L0", "fvu": "FVU",
         "loss_increase": "loss +, one layer", "loss_increase_all": "loss +, all layers",
         "live_table4": "live (Table 4)", "seconds_ratio": "time of a step"}
chapter.show(table, columns=shown, digits=2, caption=f"Means over layers on "
            f"{compared.cells} held-out cells, evenly spaced; live features of all layers; "
            "time relative to the reference's")

# %%
shares = {"label": "kind"}
for name in compared.rules:
    shares |= {f"percentage_{name}": f"{name}: %", f"null_{name}": f"{name}: null lists, %"}
chapter.show(table, columns=shares, digits=3, caption="Live features called "
            "interpretable as in Table 4, and null lists of as many random tokens, one for each feature")

# %%
chapter.table("variants_by_layer", layers, rows=0, caption="The same per layer")

# %%
chapter.values({"steps": trained[0].history[-1]["step"], "batch": trained[0].profile.batch_tokens,
                "k": table["k"].dropna().astype(int).iloc[0], "cells": compared.cells,
                "counted": compared.counted}, prefix="variants.")
chapter.rounded("variants.l0_ratio_min", table["l0_ratio"][1:].min(), 2)
chapter.rounded("variants.l0_ratio_max", table["l0_ratio"][1:].max(), 2)
losses = compared.scores.set_index(["variant", "layer"])["loss"]
original, without = losses["original", -1], losses["no MLP"].drop(-1).to_numpy()
increase = without - original
chapter.values({"original_loss": original, "no_mlp_most": increase.max(),
                "no_mlp_layer": int(increase.argmax()),
                "no_mlp_others": np.sort(increase)[-2] if len(increase) > 1 else None},
               prefix="variants.")
for row in table.to_dict("records"):
    prefix = f"variants.{row['variant']}."
    chapter.values({key: row[key] for key in ("l0", "loss_increase", "live", "live_table4")}, prefix)
    chapter.percent(f"{prefix}fvu", row["fvu"], 1)
    chapter.rounded(f"{prefix}percentage", row[f"percentage_{rule}"], 1)
    chapter.rounded(f"{prefix}null", row[f"null_{rule}"], 1)
own = table[f"percentage_{rule}"]
for key, values in (("percentage", own), ("above_null", own - table[f"null_{rule}"])):
    chapter.rounded(f"variants.{key}_min", values.min(), 1)
    chapter.rounded(f"variants.{key}_max", values.max(), 1)

# %% [markdown]
# ## What may be concluded
#
# *Explaining the output.* ReLU leaves {glue:text}`variants.relu_normalized.fvu` (normalized loss) and
# {glue:text}`variants.relu_equation4.fvu` (Equation 4) of the variance unexplained, TopK
# {glue:text}`variants.topk.fvu`, BatchTopK {glue:text}`variants.batchtopk.fvu`, JumpReLU
# {glue:text}`variants.jumprelu.fvu`. An L1 penalty also shrinks the features that it leaves active,
# which costs fit at any L0; the others do not.
#
# *Keeping the model's loss.* To a loss of {glue:text}`variants.original_loss` nats, replacing the MLP of layer
# {glue:text}`variants.no_mlp_layer` by nothing adds {glue:text}`variants.no_mlp_most`, and that of any other
# at most {glue:text}`variants.no_mlp_others`. Where a layer matters little, differences between
# kinds are small too, and FVU tells more; replacing all layers at once adds up what each of them misses.
#
# *Interpretability.* Between {glue:text}`variants.percentage_min` and
# {glue:text}`variants.percentage_max` % of the live features are called interpretable. Less the percentage
# of lists of as many random tokens, that is {glue:text}`variants.above_null_min` to
# {glue:text}`variants.above_null_max` points.
#
# Because of four differences between the kinds no column should be read alone.

# %% [markdown] tags=["fold:Four differences between the kinds"]
#
# - **The losses have different units.** `normalized` weighs every token's error by its output's norm,
#   so tokens with small outputs count more, and FVU, which does not, counts them less.
# - **The autoencoder has another task.** It sees the answer and has to compress it; a transcoder has to
#   compute it. Their FVUs are not on one scale, and an autoencoder's features do not say what in the
#   input made them fire, which circuit tracing needs.
# - **A skip path carries a part of the function past the features.** A lower FVU is then partly the
#   linear map's work, and a circuit through features alone leaves it out.
# - **JumpReLU's thresholds are helped.** By its own penalty a step moves them by a factor of one plus
#   the learning rate at most, which a run this short does not give time for. Here they start at 0.2 and
#   all of them are moved by one factor towards the wanted L0; only how they differ from one another is
#   learnt. The penalty's weight is what makes an active feature cost what it costs the reference.
#
# {cite:t}`paulo2025transcoders` find transcoders' features more interpretable than
# autoencoders' in language models, and better fits with a skip path. They judge interpretability by
# explanations in words, not by gene sets.
