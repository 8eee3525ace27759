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
#     produces: [tables/human_eval_sample.csv, tables/human_eval_key.csv, tables/feature_scores.csv, human_eval/deck.json]
#     exhibits: "Figure 3, Table 3"
#     modules: [features/statistics, interpretability/deck, interpretability/cards, interpretability/ratings, interpretability/agreement, interpretability/explanations, interpretability/mentions, interpretability/scores, interpretability/score_checks, report/plots/features]
# ---

# %% [markdown]
# # Do people find the features interpretable?
#
# The paper draws 20 live features of layer 12 and has them judged: a feature is *gene-level
# interpretable* if it fires consistently on tokens of specific genes or gene families. Seven of the
# 20 were. This chapter draws the same kind of sample, hides decoys in it, writes the deck of cards for
# raters, and reads their answers back. Beside people it sets a score that needs none: for every live
# feature of every layer, whether genes, gene families or sub-words predict where it fires.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import pandas as pd

from scfm_circuits.interpretability import agreement, cards, deck, ratings, score_checks, scores
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import features as plots

chapter = open_chapter("05_human_evaluation", profile, overrides)
_ = ratings.read_sheets(ratings.SHEETS)  # one that cannot be used is told before any computing
settings, corpus, statistics = chapter.profile, chapter.corpus, chapter.statistics
layer = settings.human_layer
chapter.not_comparable()

# %% [markdown]
# ## Figure 3: how often live features fire

# %% mystnb={"image": {"alt": "Histogram of the logarithm of the firing frequency of the features of one layer, with the live cut marked; below it the 20 frequencies of the paper's Table 3 as dots."}, "figure": {"caption": "How often the features of the rated layer fire, as in the paper's Figure 3; below, the only frequencies that the paper prints, those of the 20 features of its Table 3.", "name": "fig-frequency"}} tags=["hide-input"]
chapter.figure("figure3_live_features", plots.frequency_distribution(
    statistics.log10_frequency[layer], settings.live_cut, layer,
    chapter.paper.table3["log10_E_f"].to_numpy()))

# %% tags=["remove-input"]
chapter.values({"layer": layer, "sampled_layer": statistics.live(settings.live_cut)[layer].sum()},
               prefix="live.")

# %% [markdown]
# Layer {glue:text}`live.layer` has {glue:text}`live.sampled_layer` live features.
#
# ## Table 3: the sample
#
# The features are drawn at random with the run's seed. For each the sheet shows the tokens it fires
# on and their share of its activations, the genes that contain these tokens, and its strongest
# contexts, the token in brackets. A leading space is shown as `_`.

# %%
study = cards.draw_study(chapter.model, chapter.transcoders, statistics, corpus, settings)

# %% tags=["hide-input"]
chapter.table("human_eval_sample", study.sheet)
chapter.table("human_eval_key", study.key, rows=0)
chapter.show(study.sheet[["feature", "log10_E_f", "activating_tokens", "genes"]],
             caption="The sampled features: tokens with their share of activations, and genes")

# %% tags=["hide-input"]
chapter.show(pd.DataFrame({
    "feature": study.drawn,
    "strongest contexts": [" | ".join(f"{c.before}[{c.token}]{c.after}" for c in one[:3])
                           for one in study.contexts],
}), caption="Where they fire most strongly")

# %% tags=["remove-input"]
_ = deck.write_deck(study.deck, settings.results / "human_eval" / "deck.json")
chapter.values({"cards": len(study.deck.cards), "study": study.deck.study,
                "untrained": len(study.deck.of_source(deck.UNTRAINED)),
                "random": len(study.deck.of_source(deck.RANDOM))}, prefix="deck.")

# %% [markdown]
# ## The deck
#
# The study {glue:text}`deck.study` has {glue:text}`deck.cards` cards in random order. Besides the
# features there are decoys that fire as often: {glue:text}`deck.untrained` features of an untrained
# encoder, which read random directions of the real model, and {glue:text}`deck.random` sets of tokens
# drawn at random. A card shows tokens, genes that contain them with the rate at which it fires on each,
# the strongest contexts, and contexts drawn from all strengths; it does not show what it is. The key is
# in `tables/human_eval_key.csv`, and whoever rates should not have looked at it, nor at the tables
# above.
#
# {doc}`rate` shows the deck card by card: answers by key or button, kept in the browser, saved as CSV
# with the columns `study`, `card`, `rater`, `interpretable` (Yes, No or Unsure), `label` and `note`.
# The sheet `human_eval_sample.csv`, filled in by hand, serves as well for the features. Put into
# `data/human_eval/`, a file is counted by the next build. Everything the run knows about a feature
# stands in {doc}`features`; whoever rates looks there afterwards.
#
# ## The rate

# %%
answered = ratings.read_ratings(ratings.SHEETS, study.deck.study, study.key)
rated = agreement.rating_study(answered.table, chapter.paper.table3)

# %% tags=["hide-input"]
chapter.table("human_eval_rate", rated.rates,
              caption="Share rated gene-level interpretable, with Wilson 95 % intervals")

# %% tags=["hide-input"]
chapter.table("human_eval_agreement", rated.agreement,
              caption="Agreement of raters, over all cards") if len(rated.agreement) else None

# %% tags=["hide-input"]
chapter.table("human_eval_size", rated.needed, digits=3, caption="Cards of each of two kinds that "
              "tell the paper's rate from another one, with a power of 80 % at the 5 % level")

# %% tags=["remove-input"]
chapter.value("human.rate", rated.yes / rated.n if rated.n else None,
              f"{rated.yes} of {rated.n}" if rated.n else "nobody has rated yet")
chapter.value("human.n", rated.n or None, str(rated.n))
chapter.value("human.decoys", len(rated.decoys) > 0, "; ".join(
    f"{100 * rate:.0f} % of the cards of {source}" for source, rate in rated.decoys.items())
    or "nobody has rated one yet")
chapter.values({"raters": answered.table["rater"].nunique(), "foreign": answered.foreign,
                "repeated": answered.repeated, "cards_for_half": rated.needed["cards_of_each"][0]},
               prefix="human.")
chapter.percent("human.paper_low", rated.paper[0])
chapter.percent("human.paper_high", rated.paper[1])

# %% [markdown]
# Seven of 20 is 35 %, with a 95 % interval from {glue:text}`human.paper_low` to
# {glue:text}`human.paper_high`: one rating of 20 features of one layer leaves open whether less
# than a fifth or more than half of them are interpretable. For this run's sample:
# {glue:text}`human.rate` (raters: {glue:text}`human.raters`; rated rows of other studies in the
# folder, which are not counted: {glue:text}`human.foreign`; rows that repeat another:
# {glue:text}`human.repeated`). A feature counts as Yes if more than half of its ratings are. Decoys
# called interpretable: {glue:text}`human.decoys`. To tell 35 % from one half would take
# {glue:text}`human.cards_for_half` features of each kind.
#
# ## A score without raters
#
# What does "consistently on tokens of specific genes or gene families" mean, if it is to be measured?
# Each mention of a gene in a cell is either one that the feature fires on or not (on that of the gene's
# tokens on which it fires most). Three simple explanations are given the same freedom:
# it fires on up to three genes; on up to three families; on every gene whose name contains one of up to
# three sub-word tokens. Families are genes whose symbols share a stem (ZBTB20 and ZBTB16), and the
# groups of a table where the profile's `gene_groups` names one. Items are chosen on the training cells,
# one by one while F1 rises, and the prediction is scored on the held-out cells: precision, recall, F1,
# and AUROC with the firing rate of each item in training as the score.
#
# - **gene**, **family**: naming genes or families predicts better than naming sub-words, by at least
#   {glue:text}`score.margin` of F1; this is what the paper calls gene-level interpretable.
# - **sub-word**: naming sub-words predicts better than either, by as much.
# - **either**: something predicts it, and these cells do not tell what, as where a token stands in the
#   names of one family alone.
# - **none**: no explanation reaches an F1 of {glue:text}`score.enough`, or none beats "fires on every
#   gene" by the margin. A feature that fires on fewer than {glue:text}`score.min_fired` held-out
#   mentions gets no verdict.
#
# {glue:text}`score.pieces`

# %%
scored = scores.feature_scores(chapter.model, chapter.transcoders, statistics, corpus, settings,
                               score_checks.program_sets(chapter.plan))
shares = scores.verdict_shares(scored)

# %% mystnb={"image": {"alt": "Stacked bars by layer, for live features, features of an untrained encoder, and random tokens: percentages explained by genes, families, either, sub-words, or nothing."}, "figure": {"caption": "What predicts where features fire on held-out cells, by layer, beside decoys that fire as often.", "name": "fig-feature-scores"}} tags=["hide-input"]
chapter.figure("feature_scores", plots.explained_per_layer(shares))

# %% mystnb={"image": {"alt": "Three panels, genes, families and sub-words: the share of features whose held-out F1 reaches a level, for live features and both kinds of decoys."}, "figure": {"caption": "How well each kind of explanation predicts held-out cells: share of features that reach an F1.", "name": "fig-score-kinds"}} tags=["hide-input"]
chapter.figure("feature_score_kinds", plots.prediction_by_kind(*scored))

# %% tags=["hide-input"]
chapter.table("feature_scores", scored.features, rows=0)
chapter.table("feature_score_decoys", scored.decoys, rows=0)
chapter.table("feature_score_shares", shares, rows=0)
overall = shares[shares["layer"] == "all"].drop(columns="layer")
chapter.show(overall, digits=3,
             caption="Verdicts over all layers, as shares of those that have one")

# %% tags=["hide-input"]
chapter.show(scores.margin_table(scored), digits=3, caption="The same under other margins")

# %% tags=["hide-input"]
table = scored.features.loc[scored.features["layer"] == layer].set_index("feature")
chapter.show(table.loc[study.drawn].reset_index()[[
    "feature", "log10_E_f", "gene_items", "gene_f1", "family_items", "family_f1", "token_items",
    "token_f1", "verdict"]], digits=2,
    caption="The sampled features: the genes, families and sub-words that predict them best")

# %% tags=["remove-input"]
own = overall.set_index("source").loc[deck.FEATURE]
chapter.values({"margin": scores.MARGIN, "enough": scores.ENOUGH_F1, "min_fired": scores.MIN_FIRED,
                "n": int(own["scored"]), "too_rare": int(own["too_rare"])}, prefix="score.")
chapter.value("score.pieces", corpus.has_sub_words,
              "Gene names are cut into sub-words here, so all of these can be." if
              corpus.has_sub_words else "Here every gene is one token. There is no sub-word to be "
              "named, so no feature can be scored sub-word or either.")
for key, share in scores.level_shares(shares).items():
    chapter.percent(f"score.{key}", share, 1, missing="none scored")

# %% [markdown]
# Of {glue:text}`score.n` live features with a verdict ({glue:text}`score.too_rare` more are too rare
# in the held-out cells), {glue:text}`score.features.gene_level` are gene- or family-level,
# {glue:text}`score.features.sub_word` sub-word, {glue:text}`score.features.either` either, and
# {glue:text}`score.features.none` are predicted by no explanation of three items. For features of an
# untrained encoder the four numbers are {glue:text}`score.untrained.gene_level`,
# {glue:text}`score.untrained.sub_word`, {glue:text}`score.untrained.either` and
# {glue:text}`score.untrained.none`; for random tokens {glue:text}`score.random.gene_level`,
# {glue:text}`score.random.sub_word`, {glue:text}`score.random.either` and
# {glue:text}`score.random.none`. What decoys reach as well is no evidence that the model has learnt
# genes. The score sees three items; a feature that fires on a longer list, or on a token in certain
# company, counts as none.
#
# ### Known truth
#
# Would the score see a gene's feature if there were one? Features are made that fire on one to three
# genes, families or sub-words of this corpus, purely or with other mentions mixed in, and are scored
# like the others. Of those that fire on genes, {glue:text}`score.made.gene_1` are scored gene- or
# family-level and {glue:text}`score.made.gene_1_either` either; with three of ten activations anywhere
# else {glue:text}`score.made.gene_07`. Of those that fire on sub-words of several families,
# {glue:text}`score.made.token_1` are wrongly scored gene- or family-level. {glue:text}`score.known`

# %% tags=["hide-input"]
checks = score_checks.check_scores(statistics, corpus, settings, chapter.plan, chapter.paper.table3)
chapter.table("known_features", checks.made, digits=3, caption="Verdicts on features made to fire "
              "on some genes, families or sub-words")

# %% tags=["remove-input"]
for key, share in checks.made_shares().items():
    chapter.percent(f"score.made.{key}", share, missing="none could be made")
chapter.value("score.known", bool(chapter.plan), "In this profile the programs of genes are known. "
              "If a feature's gene list matches one, its firing should be predicted by genes more "
              "often than a decoy's." if chapter.plan else "What features should be is known for "
              "simulated cells only; in the book of the profile planted this section tells whether "
              "features whose program is known are scored as such.")

# %% tags=["hide-input"]
if chapter.plan:
    planted = score_checks.planted_score_table(
        scored, {deck.FEATURE: statistics, deck.UNTRAINED: chapter.untrained}, corpus, settings,
        chapter.plan)
chapter.table("planted_scores", planted, digits=3, caption="Verdicts of features whose planted "
              "program is known, of other features, and of decoys") if chapter.plan else None

# %% tags=["remove-input"]
of = {deck.FEATURE: "trained features with a known program",
      deck.UNTRAINED: "untrained encoder features with a known program",
      "decoys": "decoys of either kind, whatever their lists match",
      "made": "features made to fire on programs"}
beyond = score_checks.program_shares(planted, checks.made) if chapter.plan else {}
said = "; ".join(f"{100 * share:.1f} % of {of[key]}" for key, share in beyond.items())
chapter.value("score.planted", bool(chapter.plan), said and (
    f"Naming planted programs predicts better than naming sub-words for: {said}."))

# %% [markdown]
# {glue:text}`score.planted`

# %% [markdown]
# ### The paper's own table
#
# The score can be held against the paper's judgement as far as the printed descriptions go. For each
# row of Table 3 a feature is made that fires just as described, on every such token of this run's
# corpus, and is scored like the others. {glue:text}`score.table3_n` of the 20 can be made here: the
# others need a token or a gene that this corpus does not have. Of rows that the paper judged Yes and
# that can be made, {glue:text}`score.table3_yes` come out as gene- or family-level; of those that it
# judged No, {glue:text}`score.table3_no`. If the second share is high as well, the printed
# descriptions do not hold what the paper's judgement was made on.

# %% tags=["hide-input"]
chapter.value("score.table3_n", checks.table3["verdict"].notna().sum())
chapter.table("table3_check", checks.table3, digits=2, caption="The paper's Table 3 as printed, and "
              "the verdict on features that fire as described")

# %% tags=["hide-input"]
for answer in ("Yes", "No"):
    called, made = checks.called(answer)
    chapter.value(f"score.table3_{answer.lower()}", called, f"{called} of {made}")
chapter.show(checks.judged, caption="The paper's judgement against the verdict")

# %% [markdown]
# ```{admonition} Key points
# - A rate without decoys has no zero: it does not say how often a pattern is found where none is.
# - Whether a feature reads a gene or a sub-word can be measured, if both get the same freedom.
# - Where a token stands in one gene alone, nothing can tell the two apart, a rater included.
# ```
