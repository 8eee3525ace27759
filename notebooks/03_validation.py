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
#     after: [02_training]
#     produces: [tables/table1.csv, tables/table2.csv, tables/table1_kinds.csv, tables/mlp_answers.csv,
#       tables/validation_layers.csv, figures/*.png, figures/*.svg]
#     exhibits: "Tables 1 and 2"
#     modules: [transcoders/validation]
# ---

# %% [markdown]
# # What replacing the MLPs costs
#
# ```{admonition} In short
# :class: in-short
# - **Question.** How much of the model is lost if every MLP is replaced by its {term}`transcoder`?
# - **The paper says.** The loss on {term}`held-out cells <held-out cell>` rises from
#   {glue:text}`table1.paper_original` to {glue:text}`table1.paper_transcoder` nats per token; without MLPs it
#   is {glue:text}`table1.paper_no_mlp` (Table 1). So the transcoders recover
#   {glue:text}`table1.paper_recovered` of what removing the MLPs costs.
# - **We find.** It rises from {glue:text}`table1.original` to {glue:text}`table1.transcoder`; without MLPs
#   it is {glue:text}`table1.no_mlp`. The transcoders recover {glue:text}`table1.recovered`
#   (the field's {term}`loss recovered`), and the model still names {glue:text}`mlps.right.transcoder` of the cells correctly
#   ({glue:text}`mlps.right.original` untouched).
# - **What it is worth.** With every MLP held at its mean over all tokens, which tells nothing of the cell, the model names
#   {glue:text}`mlps.right.mean`; with all but the first, {glue:text}`mlps.right.later`{glue:text}`mlps.tested`
#   {glue:text}`mlps.loss_is` And a small model on few cells is no evidence about the paper's.
# ```

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np

from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import cells_and_training as plots
from scfm_circuits.transcoders import validation

chapter = open_chapter("03_validation", profile, overrides)
chapter.not_comparable()

# %%
asked = (chapter.model, chapter.transcoders, chapter.corpus, chapter.held_out,
         chapter.profile.forward_cells)
found = validation.compare_configurations(*asked, chapter.profile.seed)
scores = found.scores
fvu, fvu_without_first = validation.fraction_of_variance_unexplained(*asked, skips=(0, 1))

# %% [markdown]
# ## Table 1: validation loss
#
# Mean cross-entropy of {glue:text}`table1.asked`. "No MLP" means that the MLPs write nothing
# ({term}`zero ablation`). Such a model can do worse than a uniform guess over all tokens, as the paper's
# {glue:text}`table1.paper_no_mlp` does ($\ln 50304 = 10.83$).

# %%
table1 = validation.table1(scores, chapter.paper.loss)
loss, printed = (table1.set_index("configuration")[name] for name in ("validation_loss", "paper"))
for name, value in zip(validation.NAMES, loss, strict=True):
    chapter.rounded(f"table1.{name}", value, 2)
    chapter.rounded(f"table1.paper_{name}", float(printed[validation.NAMES[name]]), 2)
chapter.table("table1", table1, caption="Table 1: validation loss (standard error over cells)")

# %% mystnb={"image": {"alt": "Two bar charts of validation loss for original, transcoders and no MLP: this run and the paper."}, "figure": {"caption": "Table 1 as a picture: two models on two sets of cells, so compare the pattern and not single bars.", "name": "fig-table1"}}
chapter.figure("table1", plots.loss_comparison(table1))

# %%
chapter.percent("table1.recovered", validation.recovered(loss))
chapter.percent("table1.paper_recovered", validation.recovered(printed))
order = loss["Original"] < loss["Transcoder"] < loss["No MLP"]
chapter.value("table1.order", order, "holds" if order else "does not hold")

# %% [markdown]
# The order original < transcoder < no MLP {glue:text}`table1.order` here. Of the loss that removing
# the MLPs costs, the transcoders recover {glue:text}`table1.recovered`; by the same arithmetic the
# paper's recover {glue:text}`table1.paper_recovered`. Even so, a model whose loss rises from
# {glue:text}`table1.paper_original` to {glue:text}`table1.paper_transcoder` has lost much of what it knew.
#
# ## Table 2: KL divergence
#
# {term}`KL(original || modified)` of the next token's distribution, in float32, over the same tokens.

# %%
table2 = validation.table2(scores, chapter.paper.kl)
chapter.values(dict(zip(("transcoder", "no_mlp"), table2["mean_kl"], strict=True)), "table2.")
chapter.table("table2", table2, caption="Table 2: KL(original || modified) in nats per token")

# %% [markdown]
# ## Beyond the paper: what the MLPs do for the model
#
# "No MLP" takes two things away: what an MLP says about the token at hand, and the constant that it
# writes on any token. Under {term}`mean ablation` the constant stays: every MLP writes its mean output over
# the tokens of {glue:text}`mlps.mean_cells` training cells. {glue:text}`mlps.constant`

# %% [markdown] tags=["only-if:mlps.in_words"]
# Table 1 is a mean over very different tokens, few of which are the answer.

# %% tags=["fold:The loss by kind of predicted token"]
whole = scores[scores["layer"] == -1].set_index("configuration")["loss"].rename(validation.NAMES)
better = whole["mean"] < whole["No MLP"]
chapter.values({"mean_cells": min(validation.MEAN_CELLS, int((~chapter.corpus.held_out).sum())),
                "loss_at_mean": float(whole["mean"])}, prefix="mlps.")
chapter.percent("mlps.recovered_from_mean", validation.recovered(whole, "mean"))
chapter.value("mlps.constant", bool(better), (
    f"The loss is then {whole['mean']:.2f}; with nothing written it is {whole['No MLP']:.2f}: "
    + ("a constant repairs that part of the damage, and no more." if better else
       "a constant repairs none of the damage.")))
names = found.kinds.rename(columns=validation.SHOWN)
chapter.table("table1_kinds", names, digits=3,
              caption="Loss in nats per token by kind of predicted token; the last row is Table 1's")

# %%
in_words = chapter.profile.in_words
chapter.values({"in_words": in_words, "by_state": not in_words,
                "shares": validation.shares_said(found.kinds)}, prefix="mlps.")
chapter.value("mlps.loss_is", in_words, "The loss is a mean over all tokens, few of which are the answer."
              if in_words else
              "The loss is a mean over the genes that are asked, common and rare.")
chapter.value("table1.asked", in_words, validation.asked_said(chapter.model, in_words))

# %% [markdown] tags=["unfold"]
# {glue:text}`mlps.shares` Of what mean ablation costs, the transcoders recover
# {glue:text}`mlps.recovered_from_mean`.
#
# ### Does the model still know the cell?

# %% [markdown] tags=["only-if:mlps.by_state"]
# Nothing is asked in words. A cell counts as right here if, of the types' mean embeddings in the untouched
# model, its own type's is nearest to what it has become ({doc}`01_cells_and_model`). Intervals are
# Wilson's; *lost* and *gained* count cells that the change has made wrong or right.

# %% [markdown] tags=["only-if:mlps.in_words"]
# An answer counts as right if every one of its tokens, full stop included, is the likeliest after those
# before it: then the model says just that when it is asked. Intervals are Wilson's; *lost* and *gained*
# count cells whose answer the change has made wrong or right.

# %% tags=["fold:Right answers when several MLPs are changed together"]
answers = found.answers
together = answers[answers["layer"] < 0].replace({
    "configuration": validation.SHOWN,
    "layer": {validation.ALL: "all", validation.LATER: "all but the first"}})
chapter.table("mlp_answers", answers, rows=0, caption="Right answers with MLPs changed, one layer "
              "alone and several together")
chapter.show(together.rename(columns={"layer": "layers"}), digits=3,
             caption="Held-out cells answered correctly when several MLPs are changed together")

# %% mystnb={"image": {"alt": "Percentage of held-out cells answered correctly against layer when one layer's MLP is replaced, at its mean or removed, beside several layers together; a line marks the untouched model."}, "figure": {"caption": "Held-out cells answered correctly when the MLP of one layer, of all but the first, or of all, is replaced by its transcoder, held at its mean, or removed, with 95 % intervals. Grey: the untouched model.", "name": "fig-answers"}} tags=["unfold"]
chapter.figure("mlp_answers", plots.answers_by_layer(answers))

# %%
right = answers.set_index(["layer", "configuration"])["percentage"] / 100
for name, share in right[validation.ALL].items():
    chapter.percent(f"mlps.right.{name}", share)
alone = right.xs("mean", level="configuration")
chapter.percent("mlps.right.later", alone.get(validation.LATER, alone.get(1)))
chapter.percent("mlps.right.worst_later", alone[alone.index > 0].min())
later = answers[(answers["configuration"] == "mean") & (answers["layer"] == (
    validation.LATER if validation.LATER in alone else 1))]
unmoved = bool(len(later) > 0 and not later[["lost", "gained"]].to_numpy().any()
               and right[validation.ALL, "mean"] < right[validation.ALL, "original"])
chapter.value("mlps.tested", unmoved, ": no answer changes, so answers test the first layer's "
              "transcoder alone." if unmoved else ".")
chapter.value("mlps.stand_in", not unmoved, "" if unmoved else "If single layers cost little and all "
              "together much, layers can stand in for each other, and changing one alone does not show "
              "what it does.")

# %% [markdown]
# The untouched model is right for {glue:text}`mlps.right.original` of the held-out cells, with
# transcoders for {glue:text}`mlps.right.transcoder`, with all MLPs at their mean for
# {glue:text}`mlps.right.mean` and without any for {glue:text}`mlps.right.no_mlp`. The first layer is
# a case of its own: it alone reads tokens before any attention. With all later MLPs at their mean
# the model is right for {glue:text}`mlps.right.later`, with one of them alone for
# {glue:text}`mlps.right.worst_later` at worst. {glue:text}`mlps.stand_in`
#
# ## Beyond the paper: one layer at a time
#
# Errors of early layers are fed to later ones, so the tables above do not say which transcoders are
# good. Replacing one layer alone does, and so does each layer's fraction of variance unexplained
# (FVU) on the original model's activations. A text's first token can be a special case that no other
# token is like; the table therefore has FVU without it, too.

# %% mystnb={"image": {"alt": "Left: KL against layer when one layer is replaced, at its mean, or removed. Right: bars of fraction of variance unexplained per layer."}, "figure": {"caption": "Each layer alone: what replacing it, holding it at its mean or removing it does to the predictions, and how much of its output its transcoder leaves unexplained.", "name": "fig-layers"}}
chapter.figure("validation_layers", plots.layer_alone(scores, fvu))

# %% tags=["fold:Each layer alone as a table"]
chapter.table("validation_layers", validation.each_layer(found, fvu, fvu_without_first), digits=3,
              caption="Each layer alone: its MLP replaced, at its mean, and removed")

# %%
chapter.percent("validation.fvu_mean", float(np.mean(fvu)), 1)
chapter.percent("validation.fvu_without_first_mean", float(np.mean(fvu_without_first)), 1)

# %% [markdown] tags=["unfold"]
# On average over layers {term}`FVU` is {glue:text}`validation.fvu_mean`, and without the first token
# {glue:text}`validation.fvu_without_first_mean`.
