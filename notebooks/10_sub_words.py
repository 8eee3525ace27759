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
#     applies: in_words
#     after: [01_cells_and_model]
#     produces: [tables/sub_words.csv, tables/sub_words_runs.csv]
#     libraries: [libraries]
#     exhibits: "beyond the paper"
#     modules: [cells/tokens, report/sub_words, report/plots/sub_words]
# ---

# %% [markdown]
# # What sub-words cost
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Does it hurt that the tokenizer cuts gene names into {term}`sub-words <sub-word token>`?
# - **The paper says.** It may: "Subword tokenization fragments gene symbols", one of two causes that it
#   supposes for the dip of layer 0, and "domain-specific tokenizers" could help. It does not try.
# - **We find.** With a token for each gene the small model is right for {glue:text}`sub_words.right_genes` %
#   of the held-out cells, with sub-words for {glue:text}`sub_words.right_sub_words` % (difference
#   {glue:text}`sub_words.right_difference` points, {glue:text}`sub_words.right_low` to
#   {glue:text}`sub_words.right_high` over {glue:text}`sub_words.seeds` seeds). Three expectations:
#   the first layer fires on fragments ({glue:text}`sub_words.fragments`); a token a gene lifts its percentage
#   ({glue:text}`sub_words.dip_shrinks`); its features then gain on features that learnt nothing
#   ({glue:text}`sub_words.lead_grows`).
# - **What it is worth.** With sub-words layer 0 is {glue:text}`sub_words.dip_sub_words` points from later
#   layers, and for features of an {term}`untrained encoder`
#   {glue:text}`sub_words.untrained_dip_sub_words`: what these show as well is not the transcoders' doing.
#   The lead over the best control changes by {glue:text}`sub_words.lead_difference` points
#   ({glue:text}`sub_words.lead_low` to {glue:text}`sub_words.lead_high`). The models are far smaller than
#   those of the other chapters.
# ```
#
# The paper finds fewer interpretable features in layer 0 and supposes two causes: early layers encode form
# and position, and "Layer-0 features often fire on token fragments", "depressing GSEA yields". Here the
# remedy for the second, which it leaves to future work, is tried: the same model and the same transcoders are trained twice, once with a tokenizer that cuts gene names into
# sub-words and once with **a token for each gene** (`tokenizer: genes` in a profile; the words of prompt
# and answer are cut as before).

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
from scfm_circuits.report import sub_words
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots.sub_words import both_tokenizers

chapter = open_chapter("10_sub_words", profile, overrides)
chapter.not_comparable()

# %% [markdown]
# ## The same cells, the same genes
#
# Both tokenizers are given the same {glue:text}`sub_words.cells` cells with at most
# {glue:text}`sub_words.genes` genes each, split alike, and train a new model of {glue:text}`sub_words.layers` layers of width {glue:text}`sub_words.width` for
# {glue:text}`sub_words.steps` steps of {glue:text}`sub_words.model_cells` cells each, in the same
# order. The transcoders take as many steps, each with as many tokens as
# {glue:text}`sub_words.batch_cells` cells have on average. So both runs see the same genes as often. The one
# with sub-words computes more: a cell has {glue:text}`sub_words.tokens_sub_words` tokens there and
# {glue:text}`sub_words.tokens_genes` with a token a gene ({glue:text}`sub_words.shorter` times fewer). All
# other settings are the profile's. The models are far smaller than those of the other chapters, so that
# {glue:text}`sub_words.seeds` seeds fit in: numbers here compare with each other only.

# %% [markdown] tags=["fold:Measures"]
# The measures are those of the chapters before: loss and right answers ({doc}`01_cells_and_model`,
# {doc}`03_validation`), FVU and L0, Table 4's percentage under the rule `corpus` with its controls
# ({doc}`06_enrichment`), the score without raters ({doc}`05_human_evaluation`), and a circuit
# ({doc}`07_endothelial_case_study`). Loss is given in nats for the whole text of a cell, as a token is
# not the same in both.

# %%
compared = sub_words.compare_tokenizers(chapter.corpus, chapter.profile, chapter.libraries)

# %%
chapter.library_warnings()

# %% mystnb={"image": {"alt": "Four panels, layer 0 and the later layers side by side, each with sub-words and with a token a gene: FVU, L0, percentage of features called interpretable with three controls, and shares of the automatic score."}, "figure": {"caption": "Both tokenizers, measured alike. Points are seeds, lines their means.", "name": "fig-sub-words"}} tags=["unfold"]
chapter.figure("sub_words", both_tokenizers(compared.runs))

# %% tags=["fold:Every measure in numbers"]
chapter.table("sub_words_runs", compared.runs, rows=0, caption="Every measure of every run")
chapter.table("sub_words", compared.table, rows=len(compared.table), digits=3,
              caption="Means over seeds; the difference is a token a gene less sub-words, with a "
              "95 % interval over the seeds (Student's t)")

# %%
used, found = compared.profile, compared.table.set_index(["where", "measure"])
chapter.values({"cells": compared.cells, "genes": used.genes_per_cell,
                "layers": used.model_layers, "width": used.model_width,
                "steps": used.model_steps, "model_cells": used.model_batch_cells,
                "batch_cells": sub_words.BATCH_CELLS, "seeds": sub_words.SEEDS},
               prefix="sub_words.")
names = {"sub_words": "sub-words", "genes": "a token a gene", "difference": "difference",
         "low": "lower_95", "high": "upper_95"}
for key, (where, measure) in sub_words.QUOTED.items():
    for part, column in names.items():
        chapter.rounded(f"sub_words.{key}_{part}", found.loc[(where, measure), column], 1)
for key, verdict in sub_words.judged(compared).items():
    told = {"holds": True, "fails": False}.get(verdict, "undecided")  # the ledger's word
    chapter.value(f"sub_words.{key}", told, verdict)
tokens = found.loc[sub_words.QUOTED["tokens"]]
chapter.rounded("sub_words.shorter", tokens["sub-words"] / tokens["a token a gene"], 1)

# %% [markdown] tags=["unfold"]
# The models are right for {glue:text}`sub_words.right_sub_words` % (sub-words) and
# {glue:text}`sub_words.right_genes` % (a token a gene) of the held-out cells; always saying the commonest
# type would be right for {glue:text}`sub_words.commonest_genes` %. Their loss on a cell's text is
# {glue:text}`sub_words.loss_sub_words` and {glue:text}`sub_words.loss_genes` nats, and replacing all MLPs by
# transcoders adds {glue:text}`sub_words.added_sub_words` and {glue:text}`sub_words.added_genes`.

# %% [markdown]
# ## Does the paper's expectation hold?
#
# The expectations were written down before any run was looked at. One **holds** if the whole interval lies
# on the expected side, **fails** if it lies on the other, and is otherwise **not decided** by so few seeds.
#
# - *Layer 0 fires on fragments: with sub-words, more of its features are scored sub-word than of later
#   layers' features.* The share in layer 0 less that in later layers is
#   {glue:text}`sub_words.fragments_sub_words` points: {glue:text}`sub_words.fragments`.
# - *That depresses layer 0: with a token a gene it is nearer to later layers, or further above them,
#   under the paper's gene rule.* Layer 0 less later layers is {glue:text}`sub_words.dip_sub_words`
#   points with sub-words and {glue:text}`sub_words.dip_genes` with a token a gene, a difference of
#   {glue:text}`sub_words.dip_difference` ({glue:text}`sub_words.dip_low` to
#   {glue:text}`sub_words.dip_high`): {glue:text}`sub_words.dip_shrinks`.
# - *Features of layer 0 gain on what learnt nothing.* Their lead over the best of three controls is
#   {glue:text}`sub_words.lead_sub_words` points with sub-words and {glue:text}`sub_words.lead_genes`
#   with a token a gene, a difference of {glue:text}`sub_words.lead_difference`
#   ({glue:text}`sub_words.lead_low` to {glue:text}`sub_words.lead_high`):
#   {glue:text}`sub_words.lead_grows`. A negative lead means that a control scores higher.
#
# The first two need a control as well. For features of an untrained encoder, which read random
# directions of the same models, the share scored sub-word in layer 0 less that in later layers is
# {glue:text}`sub_words.untrained_fragments_sub_words` points with sub-words, and Table 4's percentage
# in layer 0 less that in later layers is {glue:text}`sub_words.untrained_dip_sub_words` points with
# sub-words and {glue:text}`sub_words.untrained_dip_genes` with a token a gene. What untrained features show
# as well is a property of the model, not of transcoders.
#
# Nor can the percentages of two tokenizers be compared directly. Under the gene rule `token` a fragment
# counts for all genes that contain it and a gene's own token for one, so controls move with the tokenizer
# too. Under `occurrence` they do not, and with a token a gene both rules are the same.
