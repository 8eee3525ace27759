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
#   {glue:text}`known.n` known ones have the median rank {glue:text}`known.effect.rank` by what taking them
#   out does, and {glue:text}`known.paths.rank` by their paths in the circuit (random genes as frequent:
#   {glue:text}`known.effect.null`; p = {glue:text}`known.effect.p` and {glue:text}`known.paths.p`). What
#   taking any gene out does goes with the part that is only moved positions
#   (rank correlation {glue:text}`known.position_spearman`) and with the gene's own part
#   ({glue:text}`known.own_spearman`). With the own part circuits agree within cells with
#   {glue:text}`known.own_circuit_spearman`, with the whole with
#   {glue:text}`known.effect_circuit_spearman`.
# - **What it is worth.** The best rival agrees with the own part with
#   {glue:text}`known.own_rival_spearman`: {glue:text}`known.own_ahead`. And without any model, how much more
#   often a gene stands in such cells ranks the known ones at {glue:text}`known.difference.rank`. The
#   smallest q of the known terms is {glue:text}`known.effect.q` for the best genes by the whole effect,
#   {glue:text}`known.own.q` by the own part and {glue:text}`known.paths.q` by the circuit.
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
# The genes {glue:text}`known.names` were named before any result was seen. Every gene of
# {glue:text}`known.cells` held-out cells, half of them treated, is taken out, and what the
# {term}`contrast` of "{glue:text}`known.label`" loses is its effect ({glue:text}`known.cost`). Beside that
# stands what circuits and cheaper scores say of the same genes without taking anything out.

# %% mystnb={"image": {"alt": "A row for each way of ranking genes, measured ones, circuits and rivals: the ranks of the known genes, their median, and the range of medians of random genes as frequent."}, "figure": {"caption": "Ranks of the known genes among all genes (small points) and their median (large), by what is measured (black, in dark mode white), by circuits (blue) and by rivals (orange). Grey: the middle 95 % of medians of random genes that stand in as many cells.", "name": "fig-known-response"}}
chapter.figure("known_response", plots.known_ranks(ranks.genes, ranks.summary, known_response.CIRCUIT,
                                                   [*known_response.MEASURED]))

# %%
chapter.values({"label": settings.case_type, "n": len(settings.known_response),
                "names": ", ".join(settings.known_response), "cost": str(perturbed_cells.cost_of(
                    corpus, known_response.response_cells(corpus)))}, prefix="known.")
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
# - Measured: {glue:text}`known.by_effect`.
# - By all paths of the circuit: {glue:text}`known.by_paths`.
# - By the best of the rivals ({glue:text}`known.rival`, chosen after the fact):
#   {glue:text}`known.by_rival`.

# %% tags=["fold:Every known gene and every way"]
chapter.table("interferon_known_truth", ranks.genes, rows=12, digits=3, caption="The known genes by "
              "every way: value (mean over cells, 0 where a cell has not the gene) and rank")

# %%
chapter.table("interferon_ranks", ranks.summary, digits=3, caption="Median rank of the known genes, "
              "and of random genes as frequent")

# %% [markdown]
# A gene's score in a cell counts as 0 where the cell's sentence has it not, and is averaged over all cells,
# so a rare gene cannot come first by one cell alone. Positive numbers speak for the label in treated and
# untreated cells alike, as the contrast is the same. The null draws for each known gene one of the 20 others
# that stand in as nearly as many cells. *More often in training cells* needs no model: the share of treated
# training cells whose sentence has the gene, less that of the others.
#
# Cells of either label were measured apart from the other's, so a model may tell the measurements apart too:
# that a gene speaks for the label does not show that it responds. The known genes are known from elsewhere.

# %% [markdown]
# ## Said by the circuit, measured by taking out
#
# A gene's paths are all that its own embedding gives the contrast, through attention and active features;
# minus their sum is the change that the circuit predicts. Taking the gene out does two things, and their
# parts add up to the whole effect:
#
# - **its own part**: the gene is gone, and every other token keeps its position;
# - **the position part**: then all later tokens move up.
#
# Over all genes the own part correlates with the whole effect with {glue:text}`known.own_spearman`, the
# position part with {glue:text}`known.position_spearman`. A median gene changes the contrast by
# {glue:text}`known.effect_size` nats, by its own part {glue:text}`known.own_size`, by moved positions
# {glue:text}`known.position_size`. A frozen circuit knows nothing of moved positions.

# %%
chapter.values(known_response.numbers(study, settings.seed), prefix="known.")

# %% [markdown]
# | rank correlation within cells with | the circuit's best | the best rival | shuffled genes | |
# | --- | --- | --- | --- | --- |
# | the whole effect | {glue:text}`known.effect_circuit_spearman`, {glue:text}`known.effect_circuit` | {glue:text}`known.effect_rival_spearman`, {glue:text}`known.effect_rival` | {glue:text}`known.effect_shuffled` | {glue:text}`known.effect_ahead` |
# | its own part | {glue:text}`known.own_circuit_spearman`, {glue:text}`known.own_circuit` | {glue:text}`known.own_rival_spearman`, {glue:text}`known.own_rival` | {glue:text}`known.own_shuffled` | {glue:text}`known.own_ahead` |

# %% tags=["fold:Every score and every gene"]
chapter.table("perturbation_scores", study.summary, rows=14, digits=3, caption="Each score against "
              "what taking genes out does: means over cells, 95 % intervals, and those of shuffled genes")

# %%
chapter.table("perturbation", study.by_gene.rename(columns={"score_paths": "predicted"}), rows=15,
              digits=3, caption="Every gene: its measured effect with a 95 % interval over cells, the "
              "own and the position part, what the circuit predicts, and both tests (nats)")

# %%
chapter.table("perturbation_cells", study.genes, rows=0, caption="Every gene of every cell: what "
              "taking it out does, and its scores")

# %% [markdown]
# ## All known genes at once
#
# All known genes that a treated cell's sentence has are deleted together, and all of them are moved to the
# front of untreated cells. Beside each stand as many random genes: neighbours in rank of those deleted,
# and genes that stand in as nearly as many training cells.
#
# - Deleted: of treated cells {glue:text}`known.delete.before` are called so before and
#   {glue:text}`known.delete.after` after; without random genes {glue:text}`known.delete.random_after`.
# - To the front: of untreated cells {glue:text}`known.front.before` are called treated before and
#   {glue:text}`known.front.after` after; with random genes {glue:text}`known.front.random_after`.

# %%
together = perturbed_cells.changed_together(chapter.model, corpus, settings,
                                            known_response.response_cells(corpus),
                                            settings.case_type, settings.known_response)
by_type = perturbed_cells.together_by_type(together, settings.seed)

# %% tags=["fold:In numbers"]
chapter.show(by_type, digits=2, caption="Known and random genes deleted or moved to the front, by the "
             "cells' label: share of cells called the response, and the change of the contrast (nats) "
             "with its 95 % interval over cells")

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
# ## Which genes a test calls
#
# Geneformer's in-silico perturbation pools all deletions of all cells and asks by a rank-sum test whether a
# gene's effects differ from all others {cite:p}`theodoris2023geneformer`. Deletions in one cell share that
# cell, so here a gene's effect is compared with the median effect in the same cell, and the test is over
# cells. Of {glue:text}`known.tested` genes in at least {glue:text}`known.least` cells
#
# - the pooled test calls {glue:text}`known.pooled`, and {glue:text}`known.shuffled_pooled` with each cell's
#   effects dealt out to its genes at random;
# - the paired test calls {glue:text}`known.paired`, and {glue:text}`known.shuffled_paired` of shuffled
#   effects; of own parts {glue:text}`known.own_paired`.

# %%
library = chapter.library(settings.libraries[0])
terms = known_response.enriched(study, library, settings.known_terms, settings.list_size)
called = {by: what for by, what in {**known_response.MEASURED, **known_response.SCORES}.items()
          if by in ("effect", "own", "paths", "difference")}
best = terms[terms["list"].isin(called.values())]
for by, what in called.items():
    chapter.p_value(f"known.{by}.q", terms.loc[terms["list"] == what, "q"].min())

# %% tags=["unfold"]
chapter.show(best.drop(columns=["genes", "p", "best_term"]), digits=2, caption="Known terms among those of "
             f"{library.name.replace('_', ' ')}: the best genes by what is measured, by the circuit and "
             "without a model (place: among all terms, by p)")

# %% tags=["fold:All lists"]
chapter.table("interferon_enrichment", terms, rows=20, digits=2, caption="The best genes by every way, "
              "and the genes that either test calls and that speak for the label")

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
# {glue:text}`known.best_feature_auroc`, and {glue:text}`known.features_with` of {glue:text}`known.features`
# have a known gene in their gene list.

# %%
features, gene = known_response.telling_features(chapter.model, chapter.transcoders, chapter.statistics,
                                                 corpus, settings)
given = study.contributions[study.contributions["cell_type"] == settings.case_type]
features = features.merge(given[["layer", "feature", "contribution"]], how="left",
                          on=["layer", "feature"]).fillna({"contribution": 0.0})

# %% tags=["unfold"]
chapter.table("interferon_features", features, digits=3, caption="Features that tell the label's cells: "
              "how they are read, for whom they fire, AUROC, and what they write straight to the contrast "
              "of such a cell (nats, mean)")

# %%
chapter.table("interferon_contributions", study.contributions, rows=0, caption="What every active "
              "feature writes straight to the contrast, by label")

# %%
chapter.values({"best_gene": str(corpus.symbols[int(gene["gene"])]), "features": len(features),
                "features_with": int((features["known"] != "").sum())}, prefix="known.")
chapter.rounded("known.best_gene_auroc", gene["auroc"], 3)
chapter.rounded("known.best_feature_auroc", float(features["auroc"].iloc[0]), 3)
