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
#     after: [04_sparsity]
#     applies: known_response
#     produces: [tables/perturbation.csv, tables/interferon_known_truth.csv, tables/interferon_ranks.csv,
#       tables/interferon_enrichment.csv, tables/interferon_features.csv]
#     libraries: [libraries]
#     exhibits: "beyond the paper"
#     modules: [circuits/known_response, circuits/perturbation, circuits/perturbed_cells, circuits/knock_out, circuits/contrast]
# ---

# %% [markdown]
# # An answer that is known: interferon
#
# ```{admonition} In short
# :class: in-short
# - **Question.** It is known which genes rise under "{glue:text}`known.label`". Does the model's call rest
#   on them, and do circuits say so before any gene is taken out?
# - **The paper says.** It leaves perturbation response to future work, and has no case in which the answer
#   is known.
# - **We find.** Among {glue:text}`known.in_all` genes of {glue:text}`known.cells` held-out cells, the
#   {glue:text}`known.n` known ones have the median rank {glue:text}`known.effect.rank` by what taking each
#   out does (random genes as frequent: {glue:text}`known.effect.null`; p = {glue:text}`known.effect.p`), and
#   {glue:text}`known.paths.rank` by their paths in the circuit (p = {glue:text}`known.paths.p`). Taking a
#   gene out also moves all later tokens up: of the variance of effects within cells that is
#   {glue:text}`known.position_share`, and the gene's own part {glue:text}`known.own_share`. Within cells
#   circuits have a rank correlation of {glue:text}`known.own_circuit_spearman` with the own part, and of
#   {glue:text}`known.effect_circuit_spearman` with the whole effect.
# - **What it is worth.** The best score that needs no circuit has one of
#   {glue:text}`known.own_rival_spearman` with the own part: {glue:text}`known.own_ahead`. Without any model,
#   how much more often a gene stands in such cells gives the known ones a median rank of
#   {glue:text}`known.difference.rank`. Of the known terms the smallest q is {glue:text}`known.effect.q` for
#   the {glue:text}`known.list_size` best genes by the whole effect, {glue:text}`known.own.q` by the own part
#   and {glue:text}`known.paths.q` by the circuit.
# ```

# %% tags=["parameters"]
profile = "interferon"
overrides: dict = {}

# %%
from scfm_circuits.circuits import known_response, perturbed_cells
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import circuits as plots

chapter = open_chapter("14_interferon", profile, overrides, exact=True)
settings, corpus = chapter.profile, chapter.corpus
chapter.not_comparable()

# %%
chapter.only_guesses()

# %%
chapter.library_warnings()

# %%
study = known_response.response_study(chapter.model, chapter.transcoders, corpus, settings)
ranks = known_response.known_ranks(study, settings.known_response, settings.seed)

# %% [markdown]
# ## Where the known genes stand
#
# The genes {glue:text}`known.names` were named before any result was seen. Cells of the label
# "{glue:text}`known.label`" are called *treated* here. Every gene of {glue:text}`known.cells` held-out
# cells, of each label in turn, is taken out, and what the {term}`contrast` of that label loses is
# the gene's effect, in nats: one nat more multiplies the odds of the label by 2.7. Beside that
# stands what circuits and cheaper scores say of the same genes without taking anything out; *paths* are all
# that a gene's own embedding gives the contrast in the {term}`frozen model`.

# %% mystnb={"image": {"alt": "A row for each way of ranking genes, measured ones, circuits and rivals: the ranks of the known genes, their median, and the range of medians of random genes as frequent."}, "figure": {"caption": "Ranks of the known genes among all genes (small points) and their median (large), by what is measured (black, in dark mode white), by circuits (blue) and by rivals that need none (orange). Grey: the middle 95 % of medians of random genes that stand in as many cells.", "name": "fig-known-response"}}
chapter.figure("known_response", plots.known_ranks(ranks.genes, ranks.summary, known_response.CIRCUIT,
                                                   [*known_response.MEASURED]))

# %%
chapter.values({"label": settings.case_type, "n": len(settings.known_response),
                "names": ", ".join(settings.known_response)}, prefix="known.")
for row in ranks.summary.itertuples():
    chapter.rounded(f"known.{row.by}.rank", row.median_rank, 1)
    chapter.rounded(f"known.{row.by}.null", row.null, 0)
    chapter.p_value(f"known.{row.by}.p", row.p)
rival = known_response.best_rival(ranks)
chapter.values({"by_effect": known_response.ranks_said(ranks, "effect"),
                "by_paths": known_response.ranks_said(ranks, "paths"),
                "rival": known_response.SCORES[rival],
                "by_rival": known_response.ranks_said(ranks, rival)}, prefix="known.")

# %% [markdown]
# The known genes with their ranks:
#
# - measured: {glue:text}`known.by_effect`;
# - by all paths of the circuit: {glue:text}`known.by_paths`;
# - by the best of the rivals ({glue:text}`known.rival`, chosen after the fact):
#   {glue:text}`known.by_rival`.

# %% tags=["fold:Every known gene and every way"]
chapter.show(ranks.genes.pivot_table(index="what", columns="gene", values="rank", sort=False)
             .reset_index().rename(columns={"what": "ranked by"}),
             caption="Ranks of the known genes")

# %%
chapter.table("interferon_known_truth", ranks.genes, rows=0, caption="The known genes by every way: value "
              "(mean over cells, 0 where a cell has not the gene) and rank")

# %%
chapter.table("interferon_ranks", ranks.summary, digits=3, columns={
    "what": "ranked by", "median_rank": "median rank", "null": "of random genes",
    "null_low": "middle 95 % from", "null_high": "middle 95 % to", "p": "p"},
              caption="Median rank of the known genes, and of random genes as frequent: their median, the "
              "middle 95 % of them, and the share that is as low")

# %% [markdown]
# A gene's score in a cell counts as 0 where the cell's sentence has it not, and is averaged over all cells,
# so a rare gene cannot come first by one cell alone. Positive numbers speak for the label in treated and
# untreated cells alike, as the contrast is the same. The null draws for each known gene one of the others
# that stand in as nearly as many cells, 20 at least.
# *More often in training cells* needs no model: the share of treated
# training cells whose sentence has the gene, less that of the others.
#
# Cells of either label were measured apart from the other's, so a model may tell the measurements apart too:
# that a gene speaks for the label does not show that it responds. The known genes are known from elsewhere.

# %% [markdown]
# ## Does the circuit say what taking a gene out does?
#
# A gene's paths are all that its own embedding gives the contrast, through attention and active features:
# the circuit predicts that the contrast loses their sum. Taking the gene out does two things, and their
# parts add up to the whole effect:
#
# - **its own part**: the gene is gone, and every other token keeps its position;
# - **the position part**: then all later tokens move up, those of the question among them.
#
# Of the variance of effects within cells {glue:text}`known.own_share` goes with the own part and
# {glue:text}`known.position_share` with the position part. Ranks say more for positions, as they count the
# many genes that do little: within cells the whole effect has a rank correlation of
# {glue:text}`known.own_spearman` with the own part and {glue:text}`known.position_spearman` with the position
# part (a part goes with its whole by construction). The median gene
# changes the contrast by {glue:text}`known.effect_size` nats, its own part by {glue:text}`known.own_size`,
# moved positions by {glue:text}`known.position_size`. A circuit holds attention still and so knows nothing
# of moved positions.

# %%
chapter.values(known_response.numbers(study, settings.seed), prefix="known.")

# %% [markdown]
# | rank correlation within cells with | the circuit's best | the best rival | shuffled genes | ahead |
# | --- | --- | --- | --- | --- |
# | the whole effect | {glue:text}`known.effect_circuit_spearman`, {glue:text}`known.effect_circuit` | {glue:text}`known.effect_rival_spearman`, {glue:text}`known.effect_rival` | {glue:text}`known.effect_shuffled` | {glue:text}`known.effect_ahead` |
# | its own part | {glue:text}`known.own_circuit_spearman`, {glue:text}`known.own_circuit` | {glue:text}`known.own_rival_spearman`, {glue:text}`known.own_rival` | {glue:text}`known.own_shuffled` | {glue:text}`known.own_ahead` |
#
# Means over cells with 95 % intervals over cells and genes, resampled together: a gene stands in many cells,
# so cells alone would make them too narrow. *Shuffled genes* are dealt out in each cell by itself, which knows
# nothing of that: a number outside their range alone shows little. One is ahead where the whole interval of
# the difference is on its side; both are the best of several, chosen after the fact.

# %% tags=["fold:Every score and every gene"]
chapter.table("perturbation_scores", study.summary, rows=len(study.summary), digits=2, columns={
    "truth": "with", "what": "score", "spearman": "rank correlation", "spearman_both_low": "95 % from",
    "spearman_both_high": "95 % to"},
              caption="Rank correlation of each score with the whole effect (effect) and with its own part "
              "(own) within cells: means over cells with 95 % intervals over cells and genes")

# %%
chapter.table("perturbation", study.by_gene.rename(columns={"score_paths": "predicted"}), rows=15,
              digits=2, columns={
    "gene": "gene", "cells": "cells", "effect": "effect", "low": "95 % from", "high": "95 % to",
    "own": "own part", "predicted": "by the circuit", "q": "q"},
              caption="Genes with the largest effects, added up over the cells that have them: mean effect "
              "there with its 95 % interval, its own part and what the circuit says of it (nats), and q of "
              "the paired test below; blank: too few cells")

# %%
chapter.table("perturbation_cells", study.genes, rows=0, caption="Every gene of every cell: what "
              "taking it out does, and its scores")

# %% [markdown]
# ## All known genes at once
#
# All known genes that a treated cell's sentence has are deleted together, and all of them are put at the
# front of untreated cells' sentences. The same is done with as many random genes: neighbours in rank of
# those deleted, and genes that stand in as nearly as many training cells.
#
# - Deleted: {glue:text}`known.delete.before` of treated cells are called treated before,
#   {glue:text}`known.delete.after` after, and {glue:text}`known.delete.random_after` where random genes are
#   deleted.
# - To the front: {glue:text}`known.front.before` of untreated cells are called treated before,
#   {glue:text}`known.front.after` after, and {glue:text}`known.front.random_after` where random genes come
#   to the front.

# %%
together = perturbed_cells.changed_together(chapter.model, corpus, settings,
                                            known_response.response_cells(corpus),
                                            settings.case_type, settings.known_response)
by_type = perturbed_cells.together_by_type(together, settings.seed)

# %% tags=["fold:In numbers"]
called = ["called_before", "called_after"]
chapter.show(by_type.assign(how=by_type["how"].map({"delete": "deleted", "front": "to the front"}),
                            **{name: 100 * by_type[name] for name in called})
             .drop(columns="genes").rename(columns={
    "how": "done", "cell_type": "label", "which": "genes", "called_before": "before, %",
    "called_after": "after, %", "change": "change, nats", "low": "95 % from", "high": "95 % to"}),
             digits=2, caption="Known and random genes deleted or put at the front, by the cells' label: the "
             "share of cells called treated before and after, and the change of the contrast with its "
             "interval over cells")

# %%
chapter.table("interferon_together", together, rows=0, caption="The same for every cell and draw of "
              "random genes")

# %%
for how, treated in (("delete", True), ("front", False)):
    rows = by_type[(by_type["how"] == how)
                   & ((by_type["cell_type"] == settings.case_type) == treated)]
    means = rows.groupby("which")[["called_before", "called_after"]].mean()
    for key, which, column in (("before", "known", "called_before"), ("after", "known", "called_after"),
                               ("random_after", "random", "called_after")):
        chapter.percent(f"known.{how}.{key}", float(means[column].get(which, float("nan"))))

# %% [markdown]
# ## Which genes does a test find?
#
# Geneformer's in-silico perturbation pools all deletions of all cells and asks by a rank-sum test whether a
# gene's effects differ from all others {cite:p}`theodoris2023geneformer`. Deletions in one cell share that
# cell, so here a gene's effect is compared with the median effect in the same cell, and the test is over
# cells. Of {glue:text}`known.tested` genes in at least {glue:text}`known.least` cells
#
# - the pooled test finds {glue:text}`known.pooled`, and {glue:text}`known.shuffled_pooled` where each
#   cell's effects are dealt out to its genes at random;
# - the paired test finds {glue:text}`known.paired`, and {glue:text}`known.shuffled_paired` of shuffled
#   effects; of the genes' own parts it finds {glue:text}`known.own_paired`.
#
# And do the known terms come out among the best genes? One model is asked, which was trained once: another
# training that differs by rounding alone was seen to move the q of the own part across 0.05, as a list's q
# hangs on a few genes.

# %%
library = chapter.library(settings.libraries[0])
terms = known_response.enriched(study, library, settings.known_terms, settings.list_size)
ways = {"effect": "by effect", "own": "by own part", "paths": "by circuit", "difference": "without model"}
every = {**known_response.MEASURED, **known_response.SCORES}
for by in ways:
    chapter.p_value(f"known.{by}.q", terms.loc[terms["list"] == every[by], "q"].min())

# %% tags=["unfold"]
chapter.show(known_response.terms_shown(terms, {every[by]: short for by, short in ways.items()}),
             caption=f"Known terms of {library.title}: q of the {settings.list_size} best "
             "genes by what is measured, by the circuit and without a model, and how many of them the term "
             "holds")

# %% tags=["fold:All lists"]
chapter.show(known_response.best_terms(terms), digits=2, caption="The best genes by every way, and the "
             "genes that either test finds and that speak for the label: how many, q of the known term that "
             "fits best, and the best term of all")

# %%
chapter.table("interferon_enrichment", terms, rows=0, caption="Every known term and every list")

# %%
chapter.values({"least": perturbed_cells.LEAST, "list_size": settings.list_size,
                "library": library.name}, prefix="known.")

# %% [markdown]
# Lists are the {glue:text}`known.list_size` best genes; the background is all {glue:text}`known.in_all`
# genes in the cells, and Benjamini-Hochberg goes over all terms that hold one of them.

# %% [markdown]
# ## Which features tell the cells apart
#
# The features that tell treated cells best were chosen on training cells; the area under the ROC curve
# (AUROC) is that of held-out cells. The best single gene, chosen in the same way, is
# {glue:text}`known.best_gene` with {glue:text}`known.best_gene_auroc`; the best feature has
# {glue:text}`known.best_feature_auroc`. Best features with a known gene in their gene list:
# {glue:text}`known.features_with` of {glue:text}`known.features`.

# %%
features, gene = known_response.telling_features(chapter.model, chapter.transcoders, chapter.statistics,
                                                 corpus, settings)
given = study.contributions[study.contributions["cell_type"] == settings.case_type]
features = features.merge(given[["layer", "feature", "contribution"]], how="left",
                          on=["layer", "feature"]).fillna({"contribution": 0.0})

# %% tags=["unfold"]
heads = {"layer": "layer", "feature": "feature", "read": "read", "fires_for": "fires for",
         "held_out_auroc": "AUROC", "contribution": "writes, nats", "genes": "first genes"}
chapter.show(features.assign(genes=features["genes"].str.split(", ").str[:3].str.join(", ")),
             columns=heads, digits=2, caption="Features that tell treated cells: "
             "whether the largest, the mean or the last value over the question's tokens is read, for whom "
             "they fire, AUROC on held-out cells, what they write straight to the contrast of a treated cell "
             "(mean), and the first genes of their lists")

# %%
chapter.table("interferon_features", features, rows=0, caption="The same with AUROC on training cells and the "
              "known genes in the list")

# %%
chapter.table("interferon_contributions", study.contributions, rows=0, caption="What every active "
              "feature writes straight to the contrast, by label")

# %%
chapter.values({"best_gene": str(corpus.symbols[int(gene["gene"])]), "features": len(features),
                "features_with": int((features["known"] != "").sum())}, prefix="known.")
chapter.rounded("known.best_gene_auroc", gene["held_out_auroc"], 3)
chapter.rounded("known.best_feature_auroc", float(features["held_out_auroc"].iloc[0]), 3)
