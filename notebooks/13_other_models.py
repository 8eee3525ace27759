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
#     applies: counts_at_hand
#     produces: [tables/other_models.csv, tables/other_models_parts.csv]
#     libraries: [libraries]
#     exhibits: "beyond the paper"
#     modules: [models/small_models, cells/rank_value, circuits/origins, report/other_models]
# ---

# %% [markdown]
# # Other foundation models
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Do {term}`transcoders <transcoder>` and exact circuits work in models whose tokens are genes,
#   and what do such models read in a cell?
# - **The paper says.** Its first direction for the future is "applying transcoders to other scFMs to assess
#   generalizability". It has no number.
# - **We find.** On small models of MaxToki's and Geneformer's shape every sum closes (within
#   {glue:text}`other.closure` of its largest part); the {term}`FVU` is {glue:text}`other.decoder.fvu` and
#   {glue:text}`other.encoder.fvu`. Of the right gene's logit, what other genes say through attention is
#   {glue:text}`other.decoder.gene_share` in the decoder and {glue:text}`other.encoder.gene_share` in the
#   encoder; of what tells {glue:text}`other.case_type` cells from others,
#   {glue:text}`other.decoder.state_share` and {glue:text}`other.encoder.state_share`.
# - **What it is worth.** Under the paper's likely rule {glue:text}`other.encoder.percentage` of the encoder's
#   features are called interpretable, and {glue:text}`other.random.percentage` of those of an encoder with
#   random weights. These models have a quarter of a million parameters and saw one donor's cells: they show
#   that the tools carry over, and nothing about Geneformer or MaxToki.
# ```
#
# The paper traces one model, which reads a cell as text. **Geneformer** {cite:p}`theodoris2023geneformer`
# and its successor **MaxToki** have a token for each gene and no text: a cell's genes are ranked by their
# counts over their medians in the cells that express them ({term}`rank-value encoding`). Geneformer is an
# encoder: every gene sees every other, and the model fills in a {term}`masked gene`. MaxToki is a decoder
# that writes the next gene. Their weights are not at hand without a network ({doc}`your_cells` says how to
# use them), so here a small model of each shape is trained on the same cells as in the other chapters, with
# the same code for transcoders, features, enrichment and circuits.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
from scfm_circuits.circuits.origins import EVERY, GENE, STATE
from scfm_circuits.report import other_models
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots.other_models import parts_of_readings

chapter = open_chapter("13_other_models", profile, overrides)
chapter.not_comparable(other_models.study_profile(chapter.profile, "geneformer_v2"))

# %% [markdown]
# ## Two models and one without learning
#
# - **A decoder of MaxToki's shape**: rotary positions, gated MLPs twice as wide as the stream.
# - **An encoder of Geneformer's shape**: learnt positions, norms on the stream itself, MLPs four times as
#   wide, trained on 15 % masked genes.
# - **The same encoder with random weights**, and transcoders trained on it: what comes out where the model
#   learnt nothing.
#
# They are this chapter's own and not the model of the other chapters. Each has {glue:text}`other.layers`
# layers of width {glue:text}`other.width`; the first two see {glue:text}`other.model_cells` cells in each of
# {glue:text}`other.steps` steps. Tokens are the
# {glue:text}`other.tokens` genes that most often stand among a cell's first {glue:text}`other.genes`.
# Held-out cells enter neither medians nor tokens. Features are counted in {glue:text}`other.counted` cells.

# %% [markdown] tags=["fold:How sizes were chosen and what differs from the originals"]
# Sizes of the models were fixed before a run, for a quarter of a minute each on one core; the transcoders
# take as many steps as the profile trains its own model for. One setting was changed after a first run,
# whose other results had been seen: the transcoders' learning rate, because the decoder's MLPs write little
# and its transcoders missed more than a constant would. It was chosen on FVU
# alone.
#
# The originals have 217 and 104 million parameters, 20,000 genes, up to 4,094 genes a cell, and medians
# over tens of millions of cells. With medians of one data set a gene that only one type expresses is
# measured against that type, so markers stand less far in front than under the originals' medians. Dropout
# is left out. Transcoders are trained on cells without masks, as features are counted in those too.

# %% tags=["unfold"]
compared = other_models.compare_models(chapter.profile, chapter.libraries)
table = compared.table

# %%
chapter.library_warnings()

# %%
chapter.table("other_models", table, rows=0, caption="The three models with all their measures")
learnt = {"model": "model", "loss": "loss, nats", "frequencies": "of genes' frequencies",
          "by_type": "of frequencies in the type", "fvu": "FVU", "l0": "L0",
          "closure": "sums are off by"}
chapter.show(table, columns=learnt, digits=3, caption="Loss of "
             f"{compared.asked:,} genes asked of {compared.cells} held-out cells; FVU and L0 are means over layers")

# %% [markdown]
# A model has learnt something if its loss is below that of genes' frequencies. That may be no more than which
# genes stand early and that none stands twice; the frequencies within a cell's type, which the models are not
# told, are a harder measure. *Sums are off by* is the largest
# difference between the sum of all parts and what the model itself gives, over the largest part, of all
# that was read below and of the strongest feature's pre-activation in each cell: the circuits close in
# single precision in either kind of model, norms on the stream and attention to both sides included.

# %% tags=["fold:The same per layer"]
chapter.show(compared.layers[["model", *compared.layers.columns.drop("model")]]
             .replace({"model": other_models.SHORT}), digits=3, caption="Per layer (random: the encoder with "
             "random weights)")

# %% [markdown]
# ## Are their features interpretable?
#
# Table 4's share of live features with a significant gene set ({doc}`06_enrichment`), beside features of an
# untrained encoder on the same model, of transcoders trained on a model with random weights, and beside
# lists of random genes as frequent as the feature's. The encoder with random weights is itself a control:
# beside it stand the lists only.

# %%
chapter.show(other_models.shares_shown(table), rows=12, digits=3, caption="Live features called "
             "interpretable, %, with Wilson's 95 % interval, beside what learnt nothing; random: the encoder "
             "with random weights")

# %% [markdown]
# Under the paper's likely rule {glue:text}`other.encoder.percentage` of the encoder's features are called
# interpretable, and {glue:text}`other.random.percentage` of the features of the encoder with random
# weights. The lead over the best control is {glue:text}`other.decoder.lead` points for the decoder's
# features and {glue:text}`other.encoder.lead` for the encoder's; below zero a control scores higher.
#
# With the genes of these cells as background and every term in the correction (the rule `corpus`),
# {glue:text}`other.decoder.corpus` of the decoder's and {glue:text}`other.encoder.corpus` of the encoder's
# features are called: {glue:text}`other.decoder.over_untrained` and
# {glue:text}`other.encoder.over_untrained` points more than features of an untrained encoder on the same
# model, and {glue:text}`other.decoder.over_reinitialised` and {glue:text}`other.encoder.over_reinitialised`
# more than features of a model with random weights. The first is about what dictionary learning adds, the
# second about what the model has learnt. Wilson's intervals take features one by one. They share genes, so
# what a share could have been by luck varies several times as much ({doc}`06_enrichment`), and leads of few
# points show nothing. Sub-words cannot be blamed for it here.
#
# ## What a guess is made of
#
# Two questions that need no answer in words:
#
# - **the right gene**: the logit of the gene that is masked (encoder) or comes next (decoder), less the mean
#   logit, for the same genes in both;
# - **the cell's type**: the mean embedding of the cell's genes, entering the last layer, read along the
#   direction from other types to the cell's own, as in-silico perturbation does
#   {cite:p}`theodoris2023geneformer`. Its parts are those of the distance between the type's cells and all
#   others, so that what every cell has cancels. The direction comes from training cells.
#
# Each is a sum, split by what was written where. *Own*: at the token that is read, and carried along its own
# stream or by its attention to itself; of a masked gene that is the mask, not the gene. *Other genes*, their
# *ranks* and *features*: brought by attention from other tokens. *Errors* are what transcoders miss. The
# decoder embeds no position: rank acts through its attention patterns alone, which are frozen here, so it
# has **no part for ranks**, which does not mean that rank does not matter to it.

# %% mystnb={"image": {"alt": "Two panels with a row for each kind of part: own token, own rank, own features, other genes, their ranks, features at other tokens, special tokens, errors, biases. Left, what each gives to the right gene's logit; right, its share of the distance between cells of the case's type and others; three models each, with 95 % intervals."}, "figure": {"caption": "Parts of the right gene's logit in all held-out cells (first panel), and of the distance between cells of the case's type and others (second panel). Bars are 95 % intervals over cells. A model whose sum could be zero has no shares.", "name": "fig-other-models"}}
chapter.figure("other_models", parts_of_readings(compared.parts, chapter.profile.case_type))

# %%
chapter.table("other_models_parts", compared.parts, rows=0, caption="Every part for every model, "
              "question and cell type")
chapter.show(other_models.parts_shown(compared.parts, GENE, EVERY), rows=10, caption="The right gene: "
             "share of each part in the sum, %, with 95 % intervals over cells; n/a: no such part, or a "
             "sum that could be zero; last row: the sum itself")

# %%
chapter.show(other_models.parts_shown(compared.parts, STATE, chapter.profile.case_type), rows=10,
             caption="The distance between cells of the case's type and all others, likewise")

# %% tags=["fold:For each cell type"]
chapter.browse("other_models_by_type", other_models.by_type_shown(compared.parts),
               caption="Share of each part, %, by cell type (random: the encoder with random weights)",
               rows=20)

# %%
used, parts = compared.profile, compared.parts
chapter.values({"layers": used.model_layers, "width": used.model_width, "steps": used.model_steps,
                "model_cells": used.model_batch_cells, "tokens": compared.tokens,
                "genes": used.genes_per_cell, "case_type": used.case_type,
                "counted": compared.counted}, prefix="other.")
chapter.value("other.closure", table["closure"].max(), f"{table['closure'].max():.0e}")
for row in table.to_dict("records"):
    name = other_models.SHORT[row["model"]]
    chapter.percent(f"other.{name}.fvu", row["fvu"])
    chapter.rounded(f"other.{name}.loss", row["loss"], 2)
    chapter.percent(f"other.{name}.percentage", row[f"percentage_{used.enrichment_rule}"] / 100)
    chapter.rounded(f"other.{name}.lead", other_models.lead(row, used.enrichment_rule), 1)
    chapter.percent(f"other.{name}.corpus", row["percentage_corpus"] / 100)
    for control in other_models.CONTROLS:
        chapter.rounded(f"other.{name}.over_{control}",
                        row["percentage_corpus"] - row[f"{control}_corpus"], 1)
for name, key, text, number in other_models.quoted(parts, used.case_type):
    chapter.value(f"other.{name}.{key}", number, text)

# %% [markdown] tags=["unfold"]
# The models' losses are {glue:text}`other.decoder.loss` (decoder) and {glue:text}`other.encoder.loss`
# (encoder) nats. In the decoder {glue:text}`other.decoder.gene_share` of the right gene's logit comes from the identity of
# other genes through attention and {glue:text}`other.decoder.gene_features` from features at the token that
# is read; in the encoder {glue:text}`other.encoder.gene_share` and {glue:text}`other.encoder.gene_features`,
# with {glue:text}`other.encoder.gene_rank` from the rank of the masked place and
# {glue:text}`other.encoder.gene_biases` from biases, a BERT's one embedding of a
# token's type among them. A part below zero speaks against the right
# gene; where there is one, the others may add up to more than 100 %. Of what tells {glue:text}`other.case_type` cells from others in the encoder,
# {glue:text}`other.encoder.state_own` is in the genes' own embeddings and
# {glue:text}`other.encoder.state_share` comes from other genes through attention. With random weights it
# is {glue:text}`other.random.state_own` and {glue:text}`other.random.state_share`: what a distance without any
# learning is made of, which genes the cells have.
#
# ## What may be concluded
#
# - The tools carry over to other models without a change: features, controls, circuits and closure are the same
#   code. That is about the tools and not about Geneformer or MaxToki.
# - A share is a share of one sum. Patterns, norms and which features are active were held as they are in each
#   cell; what decided on those is not in the parts.
# - Parts are direct: what a feature wrote counts as the feature's, whatever made it fire
#   ({doc}`07_endothelial_case_study` goes further upstream).
# - Intervals are over held-out cells of one donor, for one training of each model.
