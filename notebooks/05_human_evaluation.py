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
# ```{admonition} In short
# :class: in-short
# - **Question.** Do features fire consistently on tokens of specific genes or gene families, so that a
#   person sees it?
# - **The paper says.** It draws 20 {term}`live features <live feature>` of layer 12 and has them judged:
#   seven are *gene-level interpretable*. That is 35 %, with a 95 % interval of
#   {glue:text}`human.paper_low` to {glue:text}`human.paper_high`.
# - **We find.** {glue:text}`human.said` A score that needs no raters calls
#   {glue:text}`score.features.gene_level` of {glue:text}`score.n` features gene- or family-level, and of
#   {glue:text}`score.features.either` it cannot tell whether they are that or fire on a sub-word.
# - **What it is worth.** For features of an {term}`untrained encoder` the two shares are
#   {glue:text}`score.untrained.gene_level` and {glue:text}`score.untrained.either`, for random sets of tokens
#   {glue:text}`score.random.gene_level` and {glue:text}`score.random.either`. A share that these reach is no
#   evidence that the model has learnt genes.
# ```

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

# %% mystnb={"image": {"alt": "Histogram of the logarithm of the firing frequency of the features of one layer, with the live cut marked; below it the 20 frequencies of the paper's Table 3 as dots."}, "figure": {"caption": "How often the features of the rated layer fire, as in the paper's Figure 3; below, the only frequencies that the paper prints, those of the 20 features of its Table 3.", "name": "fig-frequency"}}
chapter.figure("figure3_live_features", plots.frequency_distribution(
    statistics.log10_frequency[layer], settings.live_cut, layer,
    chapter.paper.table3["log10_E_f"].to_numpy()))

# %%
chapter.values({"layer": layer, "sampled_layer": statistics.live(settings.live_cut)[layer].sum()},
               prefix="live.")

# %% [markdown]
# Layer {glue:text}`live.layer` has {glue:text}`live.sampled_layer` live features. The sample for raters is
# drawn from them at random.

# %%
study = cards.draw_study(chapter.model, chapter.transcoders, statistics, corpus, settings)

# %%
_ = deck.write_deck(study.deck, settings.results / "human_eval" / "deck.json")
chapter.values({"cards": len(study.deck.cards), "study": study.deck.study,
                "untrained": len(study.deck.of_source(deck.UNTRAINED)),
                "random": len(study.deck.of_source(deck.RANDOM))}, prefix="deck.")

# %%
answered = ratings.read_ratings(ratings.SHEETS, study.deck.study, study.key)
rated = agreement.rating_study(answered.table, chapter.paper.table3)

# %% [markdown]
# ## What raters say
#
# {glue:text}`human.said` {glue:text}`human.decoys_said` {doc}`rate` shows the sample card by card, with
# decoys among it. Please rate before you open the folds below.
#
# The paper's 20 features of one layer leave open whether fewer than a fifth or more than half of all
# features are interpretable. To tell two kinds of features apart, one with a rate of
# 35 % and one of half, would take {glue:text}`human.cards_for_half` of each.

# %% tags=["fold:The rates and how many cards would be needed"]
chapter.table("human_eval_rate", rated.rates,
              caption="Share rated gene-level interpretable, with Wilson 95 % intervals")

# %%
chapter.table("human_eval_agreement", rated.agreement,
              caption="Agreement of raters, over all cards") if len(rated.agreement) else None

# %%
chapter.table("human_eval_size", rated.needed, digits=3, caption="Cards of each of two kinds that "
              "tell the paper's rate from another one, with a power of 80 % at the 5 % level")

# %%
chapter.value("human.rate", rated.yes / rated.n if rated.n else None,
              f"{rated.yes} of {rated.n}" if rated.n else "nobody has rated yet")
chapter.value("human.said", bool(rated.n), f"Raters call {rated.yes} of {rated.n} of this run's "
              "features gene-level interpretable." if rated.n else
              "Nobody has rated this run's features yet.")
chapter.value("human.n", rated.n or None, str(rated.n))
decoys = "; ".join(f"{100 * rate:.0f} % of the cards of {source}"
                   for source, rate in rated.decoys.items())
chapter.value("human.decoys", bool(decoys), decoys or "nobody has rated one yet")
chapter.value("human.decoys_said", bool(decoys),
              f"Of the decoys they call so: {decoys}." if decoys else "")
chapter.values({"raters": answered.table["rater"].nunique(), "foreign": answered.foreign,
                "repeated": answered.repeated, "cards_for_half": rated.needed["cards_of_each"][0]},
               prefix="human.")
chapter.percent("human.paper_low", rated.paper[0])
chapter.percent("human.paper_high", rated.paper[1])

# %% [markdown]
# A feature counts as Yes if more than half of its ratings are. Raters: {glue:text}`human.raters`; rated
# rows of other studies in the folder, which are not counted: {glue:text}`human.foreign`; rows that repeat
# another: {glue:text}`human.repeated`.

# %% [markdown] tags=["fold:How the cards are made"]
# The study {glue:text}`deck.study` has {glue:text}`deck.cards` cards in random order. Besides the
# features there are {term}`decoys <decoy>` that fire as often: {glue:text}`deck.untrained` features of an
# untrained encoder, which read random directions of the real model, and {glue:text}`deck.random` sets of
# tokens drawn at random. A card shows tokens, genes that contain them with the rate at which it fires on
# each, the strongest contexts, and contexts drawn from all strengths; it does not show what it is.
#
# {doc}`rate` takes answers by key or button, keeps them in the browser, and saves them as CSV with the
# columns `study`, `card`, `rater`, `interpretable` (Yes, No or Unsure), `label` and `note`. The sheet
# `human_eval_sample.csv`, filled in by hand, serves as well for the features. Put into
# `data/human_eval/`, a file is counted by the next build. Everything the run knows about a feature
# is in {doc}`features`; please rate first and look there afterwards.

# %% [markdown] tags=["fold:Spoiler: the sampled features (rate first)"]
# For each feature of Table 3's kind of sample: the tokens it fires on with their share of its activations,
# the genes that contain these tokens, and its strongest contexts, the token in brackets. A leading space is
# shown as `_`. The key to the cards is `human_eval_key.csv`.

# %%
chapter.table("human_eval_sample", study.sheet, rows=0, caption="The sampled features, to be rated by hand")
chapter.table("human_eval_key", study.key, rows=0, caption="Which feature or decoy each card shows")
chapter.show(study.sheet[["feature", "log10_E_f", "activating_tokens", "genes"]],
             caption="The sampled features: tokens with their share of activations, and genes")

# %%
chapter.show(pd.DataFrame({
    "feature": study.drawn,
    "strongest contexts": [" | ".join(f"{c.before}[{c.token}]{c.after}" for c in one[:3])
                           for one in study.contexts],
}), caption="Where they fire most strongly")

# %% [markdown]
# ## A score without raters
#
# On which mentions of genes does a feature fire? Three simple explanations compete: it fires on up to
# three genes; on up to three gene families; on every gene whose name contains one of up to three
# {term}`sub-words <sub-word token>`. They are chosen on training cells and scored on
# {term}`held-out cells <held-out cell>`.

# %%
scored = scores.feature_scores(chapter.model, chapter.transcoders, statistics, corpus, settings,
                               score_checks.program_sets(chapter.plan))
shares = scores.verdict_shares(scored)

# %% mystnb={"image": {"alt": "Stacked bars by layer, for live features, features of an untrained encoder, and random tokens: percentages explained by genes, families, either, sub-words, or nothing."}, "figure": {"caption": "What predicts where features fire on held-out cells, by layer, beside decoys that fire as often.", "name": "fig-feature-scores"}}
chapter.figure("feature_scores", plots.explained_per_layer(shares))

# %%
chapter.table("feature_scores", scored.features, rows=0, caption="What predicts each live feature, "
              "and its verdict")
chapter.table("feature_score_decoys", scored.decoys, rows=0, caption="The same for decoys")
chapter.table("feature_score_shares", shares, rows=0, caption="Shares of the verdicts, by layer")
overall = shares[shares["layer"] == "all"].drop(columns="layer")

# %%
verdicts = overall.columns.difference(["source", "scored", "too_rare"])
percent = overall.assign(**{name: 100 * overall[name] for name in verdicts})
chapter.show(percent.replace({"source": {deck.FEATURE: "live features"}}), digits=2,
             caption="Verdicts over all layers, as percentages of the features that have one")

# %% [markdown]
# Of {glue:text}`score.n` live features with a verdict, {glue:text}`score.features.gene_level` are gene- or
# family-level, {glue:text}`score.features.sub_word` sub-word, {glue:text}`score.features.either` either,
# and {glue:text}`score.features.none` none. An explanation names at most three items: a feature that fires
# on a longer list, or on a token in certain company only, counts as none.

# %% [markdown] tags=["fold:What the verdicts mean"]
# - **gene**, **family**: naming genes or families predicts better than naming sub-words, by at least
#   {glue:text}`score.margin` of F1; this is what the paper calls gene-level interpretable.
# - **sub-word**: naming sub-words predicts better than both, by as much.
# - **either**: something predicts it, but these cells cannot tell which of the two: for example a token
#   that is in the names of one family alone.
# - **none**: no explanation reaches an F1 of {glue:text}`score.enough`, or none beats "fires on every
#   gene" by the margin. A feature that fires on fewer than {glue:text}`score.min_fired` held-out
#   mentions gets no verdict; {glue:text}`score.too_rare` features are too rare.
#
# {glue:text}`score.pieces` A mention counts with the one of its tokens on which the feature fires most.
# Families are genes whose symbols share a stem (ZBTB20 and ZBTB16), and the groups of a table where the
# profile's `gene_groups` names one. Items are chosen one by one while F1 rises. The prediction on held-out
# cells is scored by precision, recall, F1, and AUROC with the firing rate of each item in training as the
# score.
#
# For features of an untrained encoder the shares of sub-word, either and none are
# {glue:text}`score.untrained.sub_word`, {glue:text}`score.untrained.either` and
# {glue:text}`score.untrained.none`; for random tokens {glue:text}`score.random.sub_word`,
# {glue:text}`score.random.either` and {glue:text}`score.random.none`.

# %% mystnb={"image": {"alt": "Three panels, genes, families and sub-words: the share of features whose held-out F1 reaches a level, for live features and both kinds of decoys."}, "figure": {"caption": "How well each kind of explanation predicts held-out cells: share of features that reach an F1.", "name": "fig-score-kinds"}}
chapter.figure("feature_score_kinds", plots.prediction_by_kind(*scored))

# %%
chapter.show(scores.margin_table(scored), digits=3, caption="The same under other margins")

# %% tags=["fold:Spoiler: what predicts the sampled features (rate first)"]
table = scored.features.loc[scored.features["layer"] == layer].set_index("feature")
chapter.show(table.loc[study.drawn].reset_index()[[
    "feature", "verdict", "gene_items", "gene_f1", "family_items", "family_f1", "token_items",
    "token_f1"]], digits=2,
    caption="The sampled features: the genes, families and sub-words that predict them best")

# %%
own = overall.set_index("source").loc[deck.FEATURE]
chapter.values({"margin": scores.MARGIN, "enough": scores.ENOUGH_F1, "min_fired": scores.MIN_FIRED,
                "n": int(own["scored"]), "too_rare": int(own["too_rare"])}, prefix="score.")
chapter.value("score.pieces", corpus.has_sub_words,
              "Gene names are cut into sub-words here, so all of these can be." if
              corpus.has_sub_words else "Here every gene is one token. There is no sub-word to be "
              "named, so no feature can be scored sub-word or either.")
for key, share in scores.level_shares(shares).items():
    digits = int(share is not None and share < 0.1)
    chapter.percent(f"score.{key}", share, digits, missing="none scored")

# %% [markdown]
# ### Could the score detect a gene-specific feature?
#
# To test the score, features are made that fire on one to three genes, families or sub-words of this
# corpus, purely or with other mentions mixed in, and are scored like the others. Of those that fire on
# genes, {glue:text}`score.made.gene_1` are scored gene- or family-level and
# {glue:text}`score.made.gene_1_either` either; if three of ten activations are elsewhere,
# {glue:text}`score.made.gene_07` are scored gene- or family-level. Of those that fire on families,
# {glue:text}`score.made.family_1` are, and {glue:text}`score.made.family_1_either` either, as a family often
# shares a sub-word: *either* may hold families, too. Of those that fire on sub-words of several families,
# {glue:text}`score.made.token_1` are wrongly scored gene- or family-level. {glue:text}`score.known`

# %%
checks = score_checks.check_scores(statistics, corpus, settings, chapter.plan, chapter.paper.table3)

# %% tags=["fold:Every kind of feature that was made"]
chapter.table("known_features", checks.made, digits=2, caption="Verdicts on features made to fire "
              "on some genes, families or sub-words")

# %%
n_made = int(checks.table3["verdict"].notna().sum())
chapter.values({"table3_n": n_made, "table3_enough": n_made >= 5}, prefix="score.")
chapter.value("score.table3_few", n_made < 5, "That is too few to compare the score with the "
              "paper's judgements." if n_made < 5 else "")
for key, share in checks.made_shares().items():
    chapter.percent(f"score.made.{key}", share, missing="none could be made")
chapter.value("score.known", bool(chapter.plan), "In this profile the programs of genes are known. "
              "If a feature's gene list matches one, its firing should be predicted by genes more "
              "often than a decoy's." if chapter.plan else "")

# %%
if chapter.plan:
    planted = score_checks.planted_score_table(
        scored, {deck.FEATURE: statistics, deck.UNTRAINED: chapter.untrained}, corpus, settings,
        chapter.plan)
chapter.table("planted_scores", planted, digits=3, caption="Verdicts of features whose planted "
              "program is known, of other features, and of decoys") if chapter.plan else None

# %%
of = {deck.FEATURE: "trained features with a known program",
      deck.UNTRAINED: "untrained encoder features with a known program",
      "decoys": "decoys of either kind, whatever their lists match",
      "made": "features made to fire on programs"}
beyond = score_checks.program_shares(planted, checks.made) if chapter.plan else {}
said = "; ".join(f"{100 * share:.1f} % of {of[key]}" for key, share in beyond.items())
chapter.value("score.planted", bool(chapter.plan), said and (
    f"Naming planted programs predicts better than naming sub-words for: {said}."))

# %% [markdown] tags=["unfold", "only-if:score.planted"]
# {glue:text}`score.planted`

# %% [markdown]
# ### The paper's own table
#
# For each row of the paper's Table 3 a feature is made that fires just as described, on every such token of
# this run's corpus, and is scored like the others. {glue:text}`score.table3_n` of the 20 can be made here:
# the others need a token or a gene that this corpus does not have. {glue:text}`score.table3_few`

# %% [markdown] tags=["only-if:score.table3_enough"]
# Of rows that the paper judged Yes and that can be made, {glue:text}`score.table3_yes` come out as gene- or
# family-level; of those that it judged No, {glue:text}`score.table3_no`. If "No" rows are also scored
# gene-level, the printed descriptions omit the evidence on which the paper's raters decided.

# %% tags=["only-if:score.table3_enough", "fold:Every row of the paper's table"]
chapter.table("table3_check", checks.table3, digits=2, caption="The paper's Table 3 as printed, and "
              "the verdict on features that fire as described")

# %% tags=["only-if:score.table3_enough"]
for answer in ("Yes", "No"):
    called, made = checks.called(answer)
    chapter.value(f"score.table3_{answer.lower()}", called, f"{called} of {made}")
chapter.show(checks.judged, caption="The paper's judgement against the verdict")
