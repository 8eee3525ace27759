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
#     produces: [tables/steering.csv, tables/debugging.csv, tables/concept_scores.csv]
#     libraries: [libraries, case_library]
#     exhibits: "beyond the paper"
#     modules: [circuits/directions, circuits/steering, circuits/steering_curves, circuits/wrong_calls, features/concepts]
# ---

# %% [markdown]
# # Steering and debugging
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Can a feature be used: to push the model's call to a label, to repair a wrong call, to say
#   where a concept holds? At what cost, and better than plainer directions?
# - **The paper says.** It names model improvement and debugging as uses of interpretable features, and
#   shows neither.
# - **We find.** Pushes of the same norm move the log-odds of {glue:text}`steering.label` by
#   {glue:text}`steering.short_auroc_effect` nats along the feature that tells it best, by
#   {glue:text}`steering.short_means_effect` along the difference of means, by
#   {glue:text}`steering.short_random_effect` along random features, by {glue:text}`steering.short_by_effect` along
#   the feature that the circuits' {term}`frozen model` names, and by {glue:text}`steering.short_gradient_effect`
#   along the gradient of that model, which needs no feature (intervals below). Taking the
#   {glue:text}`debugging.features` features away that speak most for one wrong call
#   {glue:text}`debugging.case_short`. The best feature's F1 is ahead of every other kind of unit for
#   {glue:text}`concepts.ahead` of {glue:text}`concepts.all` concepts, and behind one at least for
#   {glue:text}`concepts.behind`.
# - **What it is worth.** A feature that tells a label need not make the call. What a feature does counts only
#   beside a direction that is chosen by the same means and needs no dictionary; a repair only beside what it
#   breaks in all other held-out cells.
# ```

# %% tags=["parameters"]
profile = "interferon"
overrides: dict = {}

# %%
import numpy as np

from scfm_circuits.circuits import steering, steering_curves, wrong_calls
from scfm_circuits.enrichment.gene_sets import commonest_sets, genes_of_terms
from scfm_circuits.features import concepts
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import steering as plots

chapter = open_chapter("15_steering", profile, overrides, exact=True)
settings, corpus = chapter.profile, chapter.corpus
model, transcoders, statistics = chapter.model, chapter.transcoders, chapter.statistics
chapter.not_comparable()

# %%
chapter.only_guesses()

# %%
study = steering.steering_study(model, transcoders, corpus, settings, statistics, settings.case_type)
curve, compared = (of(study, settings.seed) for of in (steering_curves.curve, steering_curves.compared))

# %% [markdown]
# ## Steering
#
# What the MLP of a layer writes is pushed along a direction at every token of a held-out cell's text, and
# the model is asked again. All pushes of one dose have one norm, so that directions can be compared. On
# training cells are chosen:
#
# - the **feature by AUROC**, which tells {glue:text}`steering.label` best where the question ends (AUROC
#   {glue:text}`steering.auroc` there, {glue:text}`steering.held_out_auroc` on held-out cells). It decides
#   the layer: {glue:text}`steering.layers` in the draws;
# - the **feature by effect**: of this layer that along which a push should move the call most, by the same
#   frozen model that circuits are traced in;
# - the **gradient** of the log-odds in the same frozen model and cells: no push should move them more, and
#   no dictionary is needed for it. The feature by effect is the feature that is nearest to it;
# - the **difference of means** of what the layer's MLP writes in the label's cells and in others;
# - **random features** that fire as often and as strongly as the first.

# %% mystnb={"image": {"alt": "Three panels against the dose of the push, for six kinds of directions: the change of the label's log-odds, the share of cells called so, and the rise of the loss on gene tokens, with bands over cells."}, "figure": {"caption": "What a push does to the log-odds of the label, to the calls and to the loss, by its norm in units of the mean norm of what the MLP writes. Bands: 95 % intervals over cells; thin lines: lowest and highest of the draws of training cells and random features.", "name": "fig-steering"}}
chapter.figure("steering", plots.steering_curves(curve, study.label))

# %%
chapter.table("steering", curve, rows=0, caption="Every direction at every dose, with intervals")
chapter.table("steering_compared", compared, rows=0, caption="Directions at one norm and at one "
              "cost, pushed towards the label and away from it")
shown = compared[compared["pushed"] == "towards"]
heads = {"compared": "compared at", "arm": "pushed along", "effect": "gain, nats", "lower_95": "95 % from",
         "upper_95": "95 % to", "lowest": "lowest draw", "highest": "highest", "cost": "cost"}
chapter.show(shown, columns=heads, digits=2,
             caption="Pushed towards the label, at one norm and at one cost: what its log-odds gain, with the "
             "95 % interval over cells and the lowest and highest draw, and the cost in nats per token of a gene")

# %%
first = study.chosen.iloc[0]
here = steering_curves.effects(compared, "towards", "equal norm")
at_cost = steering_curves.effects(compared, "towards", "equal cost")
names = {"auroc_effect": steering.BEST, "by_effect": steering.BY_EFFECT,
         "gradient_effect": steering.GRADIENT, "means_effect": steering.MEANS,
         "random_effect": steering.RANDOM}
for key, arm in names.items():
    chapter.value(f"steering.{key}", here[arm])
    chapter.value(f"steering.cost_{key}", at_cost[arm])
    for how, word in (("equal norm", "norm"), ("equal cost", "cost")):
        if arm != steering.BY_EFFECT:
            chapter.value(f"steering.{word}_beside_{key}",
                          steering_curves.beside(compared, "towards", how, arm))
chapter.values({"label": study.label, "cells": len(study.labels),
                "seeds": steering.SEEDS, "random_draws": steering.RANDOM_DRAWS,
                "training": int(first["cells"]), "cost": steering_curves.COST,
                "norm": steering_curves.NORM, "top": steering.BEST_SET.format(5),
                "layers": ", ".join(map(str, sorted(set(study.chosen["layer"])))),
                "features": study.chosen.groupby("arm")["feature"].nunique()[steering.BEST],
                "before": f"{study.before.loss.mean():.2f}"}, prefix="steering.")
for key, arm in (("auroc", steering.BEST), ("by_effect", steering.BY_EFFECT)):
    rows = study.chosen[study.chosen["arm"] == arm]
    chapter.rounded(f"steering.predicted_{key}", rows["predicted"].mean(), 2)
for key in ("auroc", "held_out_auroc"):
    chapter.rounded(f"steering.{key}", study.chosen.loc[study.chosen["arm"] == steering.BEST, key].mean(), 2)
for key in ("fires", "held_out_auroc"):
    by_effect = study.chosen.loc[study.chosen["arm"] == steering.BY_EFFECT, key]
    chapter.rounded(f"steering.{key}_by_effect", (100 if key == "fires" else 1) * by_effect.max(), 2)
chapter.rounded("steering.predicted_gradient", study.chosen["steepest"].mean(), 2)
at_norm = shown[shown["compared"] == "equal norm"].set_index("arm")
for key, arm in names.items():
    chapter.rounded(f"steering.short_{key}", at_norm.loc[arm, "effect"], 2)
told = at_norm.loc[steering.BEST]
chapter.value("steering.against", bool(max(told["upper_95"], told["highest"]) < 0))
chapter.value("steering.unclear", bool(told["lowest"] < 0 < told["highest"]))
away = curve[curve["done"] == steering_curves.TAKEN_AWAY].set_index("arm")
for key, arm in names.items():
    chapter.rounded(f"steering.without_{key}", away.loc[arm, "change"], 2)

# %% [markdown]
# At a norm of {glue:text}`steering.norm` (that of what the MLP itself writes) the log-odds of
# {glue:text}`steering.label` gain {glue:text}`steering.by_effect` along the feature by effect. That is
#
# - {glue:text}`steering.norm_beside_auroc_effect`: along it they gain {glue:text}`steering.auroc_effect`;
# - {glue:text}`steering.norm_beside_gradient_effect`: along it {glue:text}`steering.gradient_effect`;
# - {glue:text}`steering.norm_beside_means_effect`: along it {glue:text}`steering.means_effect`;
# - {glue:text}`steering.norm_beside_random_effect`: along it {glue:text}`steering.random_effect`.
#
# At a cost of {glue:text}`steering.cost` nats per token of a gene the feature by effect gains
# {glue:text}`steering.cost_by_effect`, the gradient {glue:text}`steering.cost_gradient_effect`, the feature
# by AUROC {glue:text}`steering.cost_auroc_effect`, the difference of means
# {glue:text}`steering.cost_means_effect`. A number below 0 is a push that works against the label that its
# direction stands for. Intervals over cells know nothing of which training cells were drawn, and other cells
# choose other directions: *more* and *less* are said only if every draw says so too.
#
# The features by effect fire on at most {glue:text}`steering.fires_by_effect` % of tokens, and their AUROC
# where the question ends is at most {glue:text}`steering.held_out_auroc_by_effect`: what is pushed along is
# a direction that the dictionary holds, not something that the model writes in these cells.
#
# **What the circuit's view says before.** In the frozen model a push of this norm along the feature by
# AUROC should change the log-odds by {glue:text}`steering.predicted_auroc` nats, along the feature by
# effect by {glue:text}`steering.predicted_by_effect`, and along the gradient, the most that any push of
# this norm can do, by {glue:text}`steering.predicted_gradient`.

# %% [markdown] tags=["only-if:steering.against"]
# To tell a label and to write it are two things: here the feature that tells
# {glue:text}`steering.label` best writes against it, as a layer does that corrects what earlier layers have
# settled.

# %% [markdown] tags=["only-if:steering.unclear"]
# Whether the feature that tells {glue:text}`steering.label` best writes for it or against it depends on
# which training cells chose it: in one draw a push along it helps the label, in another it works against.

# %% tags=["fold:How directions are chosen and compared at every dose"]
doses = np.where(curve["done"] == steering_curves.TAKEN_AWAY, "taken away", curve["dose"].map("{:g}".format))
heads = {"arm": "pushed along", "dose": "dose", "typical": "typical", "change": "gain, nats",
         "lower_95": "95 % from", "upper_95": "95 % to", "to_label": "turn to it, %",
         "from_label": "turn from it, %", "cost": "cost"}
# Rounded, as what is next to nothing would be a power of ten.
chapter.show(curve.round(4).replace(-0.0, 0.0).assign(dose=doses), columns=heads,
             digits=2, caption="Every direction and dose: what the label's log-odds gain, calls that turn to "
             "the label and from it, and the cost in nats per token of a gene")

# %%
chapter.table("steering_chosen", study.chosen, digits=2, columns={
    "seed": "draw", "arm": "chosen", "layer": "layer", "feature": "feature", "auroc": "AUROC, training",
    "held_out_auroc": "AUROC, held-out", "fires": "fires on (share)", "predicted": "predicted, nats"},
              caption="What each draw of training cells chooses, and what the frozen model predicts of a push")

# %% [markdown]
# - {glue:text}`steering.cells` held-out cells are read, of each label in turn. *Log-odds* are the
#   {term}`contrast`. The *dose* is the norm of the push, in units of the mean norm of what the MLP writes.
#   The *cost* is what the loss on tokens of genes gains over {glue:text}`steering.before` nats.
# - All is chosen anew on {glue:text}`steering.seeds` draws of {glue:text}`steering.training` training cells,
#   each with {glue:text}`steering.random_draws` random features; model and transcoders are the same. The
#   draws chose {glue:text}`steering.features` different features by AUROC, of layers
#   {glue:text}`steering.layers`.
# - *Typical*: how many times as strong the push is as what its features typically write where they fire. Far
#   above 1, no cell's text brings the model there.
# - *Taken away*: what the features write, wherever they fire; of the difference of means what is written
#   along it. The log-odds then change by {glue:text}`steering.without_auroc_effect` (feature by AUROC),
#   {glue:text}`steering.without_by_effect` (by effect) and {glue:text}`steering.without_means_effect` nats.
# - At equal cost each direction is read where its cost first reaches {glue:text}`steering.cost` nats, on a
#   straight line between two doses.
# - The feature by effect was added when the first look showed the others working against their label, and
#   after that look the doses, cells and draws were cut to save time. The gradient was added when the feature
#   by effect was seen to be far ahead of directions that are not chosen by what they do, and draws were
#   shown beside intervals over cells. How directions are chosen was not changed. In the last layer a push
#   reaches the log-odds through the final norm alone.

# %%
wrong = wrong_calls.wrong_calls(model, transcoders, corpus, settings, statistics)
chapter.value("debugging.known", wrong is not None)

# %% [markdown]
# ## Debugging a wrong call
#
# The case is the wrong call of which the model is surest: of {glue:text}`debugging.wrong` held-out cells
# that are answered wrongly the one whose own label has the lowest log-odds. Its circuit names the features
# that speak for the call; taken away, do they repair it, and what do they break elsewhere?

# %% tags=["only-if:debugging.known"]
totals = wrong.table[wrong.table["label"] == wrong_calls.EVERY] if wrong else None
chapter.show(totals[["removed", "right_before", "right_after", "repaired", "broken", "p", "case_right"]],
             digits=2, caption="Taken away in all held-out cells but the case: right answers before and after, "
             "wrong ones repaired, right ones broken, p of the exact McNemar test, and whether the case itself "
             f"is answered rightly then; {wrong_calls.DRAWS} draws of random features") if wrong else None

# %%
said = {removed: wrong_calls.what_it_does(wrong, removed) if wrong else "" for removed in
        (wrong_calls.CASE, wrong_calls.TRAINING, wrong_calls.RANDOM)}
then = "right" if wrong and totals["case_right"].iloc[0] else "still wrong"
chapter.values({
    "wrong": wrong.wrong if wrong else 0, "answer": wrong.answer if wrong else "",
    "label": wrong.label if wrong else "",
    "features": int((wrong.features["removed"] == wrong_calls.CASE).sum()) if wrong else 0,
    "errors": wrong.training_errors if wrong else 0, "case": said[wrong_calls.CASE],
    "case_short": f"{said[wrong_calls.CASE].split(' (')[0]} other cells, and the call is {then} then"
    if wrong else "was not needed", "case_right": then,
    "training": said[wrong_calls.TRAINING], "random": said[wrong_calls.RANDOM]}, prefix="debugging.")
for key in ("contrast", "by_features", "predicted", "measured"):
    chapter.rounded(f"debugging.{key}", getattr(wrong, key) if wrong else None, 2)
kept = chapter.table("debugging", wrong.table if wrong else study.chosen.iloc[:0], rows=0,
                     caption="What taking features away does, by label and draw")
kept if wrong else None

# %% [markdown] tags=["only-if:debugging.known"]
# The case is a cell of the label "{glue:text}`debugging.label`" that the model calls
# "{glue:text}`debugging.answer`", by {glue:text}`debugging.contrast` nats. All features together, those that
# speak for this answer and those that speak against it, give {glue:text}`debugging.by_features` of them.
# Without the {glue:text}`debugging.features` that speak for it most, the {glue:text}`debugging.contrast`
# nats should change by {glue:text}`debugging.predicted`, and change by {glue:text}`debugging.measured`. The
# case is {glue:text}`debugging.case_right` then. Over all other held-out cells (it chose the features, so it
# is not counted)
#
# - taking these features away {glue:text}`debugging.case`;
# - taking as many away that speak most for {glue:text}`debugging.errors` wrong calls of training cells
#   {glue:text}`debugging.training`;
# - taking as many random features away that fire as often and as strongly {glue:text}`debugging.random`.
#
# What features do not give comes along paths of embeddings, biases and the transcoders' errors: where that
# is most of a call, no features can be blamed for it, and none repairs it.

# %% tags=["only-if:debugging.known", "fold:By label and by feature"]
chapter.show(wrong.table.loc[wrong.table["label"] != wrong_calls.EVERY, [
    "removed", "label", "cells", "right_before", "right_after", "repaired", "broken", "p"]], digits=2,
             caption="The same by label") if wrong else None

# %% tags=["only-if:debugging.known"]
chapter.show(wrong.features.rename(columns={"gives": "gives, nats"}), digits=2, caption="The features, and "
             "what each gives the log-odds of the wrong answer along all paths of the frozen model (of "
             "training errors the mean)") if wrong else None

# %% [markdown] tags=["only-if:debugging.known"]
# As many features are taken as together give the wrong call all of its log-odds, ten at most. With two
# labels, features that speak for one of them repair cells of the other and break cells of its own: the table
# by label tells a repair from a mere shift towards one label.

# %%
training = np.flatnonzero(~corpus.held_out)
sets = {"genes of the known response": settings.known_response,
        "terms of the known response": genes_of_terms(chapter.libraries, settings.known_terms),
        **commonest_sets(chapter.library(settings.case_library), concepts.times_in(corpus, training), 4)}
scored = concepts.concept_scores(model, transcoders, corpus, settings, statistics,
                                 {name: {gene.upper() for gene in genes} for name, genes in sets.items()})

# %% [markdown]
# ## Where a concept holds
#
# Is there a feature that fires where a concept holds, and nowhere else? A concept is a label of cells, or a
# set of genes, which holds where a token is part of one of them. A unit (a feature, a neuron, a direction)
# says yes where its value lies above a cut. Unit and cut are chosen on {glue:text}`concepts.training`
# training cells, and F1 is that of {glue:text}`concepts.held_out` held-out cells, as InterPLM and interpTFM
# report it.

# %% mystnb={"image": {"alt": "For every concept the F1 on held-out cells of the best feature and of the best unit of an untrained encoder, of random directions, of MLP neurons and of principal components, with intervals, and a bar for saying yes to everything."}, "figure": {"caption": "Held-out F1 of the best unit among as many candidates of every kind, with 95 % intervals over cells; upright bars: the F1 of saying yes everywhere.", "name": "fig-concepts"}}
chapter.figure("concept_scores", plots.concept_scores(scored.table))

# %%
table = scored.table
features = table[table["units"] == concepts.FEATURES].set_index("concept")
rivals = table[~table["units"].isin([concepts.FEATURES, concepts.EVERY])]
ahead = rivals.groupby("concept")["difference_lower_95"].min() > 0
behind = rivals.groupby("concept")["difference_upper_95"].min() < 0
response = features.loc[study.label] if study.label in features.index else features.iloc[0]
best_rival = rivals[rivals["concept"] == response.name].sort_values("f1").iloc[-1]
chapter.values({"training": scored.training_cells, "held_out": scored.held_out_cells,
                "ahead": int(ahead.sum()), "behind": int(behind.sum()), "all": len(features),
                "candidates": int(response["candidates"]), "response": response.name,
                "every": int(table.loc[table["units"] == concepts.EVERY, "candidates"].iloc[0]),
                "rival": best_rival["units"]}, prefix="concepts.")
for key, number in {"f1": response["f1"], "low": response["lower_95"], "high": response["upper_95"],
                    "rival_f1": best_rival["f1"], "always": response["always_yes"]}.items():
    chapter.rounded(f"concepts.{key}", number, 2)

# %% [markdown]
# For {glue:text}`concepts.response` the best feature reaches an F1 of {glue:text}`concepts.f1`
# ({glue:text}`concepts.low` to {glue:text}`concepts.high`), the best rival ({glue:text}`concepts.rival`)
# {glue:text}`concepts.rival_f1`, and saying yes everywhere {glue:text}`concepts.always`. Features are
# ahead of *every* rival, by intervals over cells and in every draw of candidates, for
# {glue:text}`concepts.ahead` of {glue:text}`concepts.all` concepts, and behind one at least for
# {glue:text}`concepts.behind`.

# %% tags=["fold:Every concept and how units are read"]
chapter.show(table[table["units"] != concepts.EVERY].pivot_table(index=["concept", "always_yes"], columns="units", values="f1", sort=False)
             .reset_index().rename(columns={"always_yes": "yes everywhere"}), digits=2,
             caption="Held-out F1 of the best unit of every kind")

# %%
chapter.table("concept_scores", table, rows=0, caption="The same with all features, intervals, draws, "
              "and what the features have more")

# %% [markdown]
# - All kinds offer {glue:text}`concepts.candidates` candidates; of a kind with more they are drawn, and
#   scores are means over draws. *All features* are {glue:text}`concepts.every`.
# - A label is read by a unit's largest value over the question's tokens, a set of genes at the genes'
#   tokens. Nine cuts of a unit are tried, at quantiles of its values in the first training cells that are
#   drawn, whose labels are mixed. Every count is exact. Two labels are two concepts but one question: a unit that is high in one is no candidate
#   for the other, as it would have to be low.
# - Held-out cells hold the same genes as training cells. Whether a token is part of a gene of a set can be
#   known by heart, so such a score says that a unit is about these tokens, not what it would say of a gene
#   that it has not met. The sets of cell types are the four whose genes occur most in training cells, of
#   those with 10 to 100 genes that occur: their names are the library's, and their genes need be no markers
#   here.
