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

# %%
import pandas as pd

from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.cells.simulated import plan_of
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.profile import PLANTED_CELLS, ROOT, from_notebook
from scfm_circuits.enrichment.significance import wilson_interval
from scfm_circuits.features.baselines import untrained_statistics
from scfm_circuits.features.contexts import draw_features, feature_contexts
from scfm_circuits.features.gene_lists import check_live
from scfm_circuits.features.statistics import get_statistics
from scfm_circuits.interpretability.agreement import (
    POOLED,
    agreement_table,
    rate_table,
    separation_table,
)
from scfm_circuits.interpretability.cards import draw_deck
from scfm_circuits.interpretability.deck import FEATURE, RANDOM, UNTRAINED, deck_key, write_deck
from scfm_circuits.interpretability.ratings import (
    card_verdicts,
    rating_sheet,
    read_ratings,
    read_sheets,
)
from scfm_circuits.interpretability.score_checks import (
    known_feature_table,
    planted_score_table,
    program_sets,
    read_reading,
    table3_check,
    table3_summary,
)
from scfm_circuits.interpretability.scores import (
    ENOUGH_F1,
    FAMILY,
    GENE,
    MARGIN,
    MIN_FIRED,
    corpus_kinds,
    feature_scores,
    verdict_shares,
)
from scfm_circuits.models.loading import get_model
from scfm_circuits.report.plots import features as score_figures
from scfm_circuits.report.plots.features import frequency_distribution
from scfm_circuits.report.report import Report
from scfm_circuits.transcoders.training.run import get_transcoders

run = from_notebook(globals())
report = Report(run, "05_human_evaluation")
sheets = ROOT / "data" / "human_eval"
_ = read_sheets(sheets)  # a sheet that cannot be used is told before anything is computed
corpus = load_corpus(run)
model, _ = get_model(run, corpus)
transcoders, _ = get_transcoders(model, corpus, run)
statistics = get_statistics(model, transcoders, corpus, run)
layer = run.human_layer
check_live(statistics, layer, run.live_cut)
report.not_comparable(run)

# %% [markdown]
# ## Figure 3: how often live features fire

# %% mystnb={"image": {"alt": "Histogram of the logarithm of the firing frequency of the live features of one layer, with the live cut marked."}, "figure": {"caption": "Distribution of log10 E(f) over the live features of the rated layer, as in the paper's Figure 3.", "name": "fig-frequency"}} tags=["hide-input"]
report.figure("figure3_live_features", frequency_distribution(
    statistics.log10_frequency[layer], run.live_cut, layer))

# %% tags=["remove-input"]
report.value("live.layer", layer)
report.value("live.sampled_layer", int(statistics.live(run.live_cut)[layer].sum()))

# %% [markdown]
# Layer {glue:text}`live.layer` has {glue:text}`live.sampled_layer` live features.
#
# ## Table 3: the sample
#
# The features are drawn at random with the run's seed. For each the sheet shows the tokens it fires
# on and their share of its activations, the genes that contain these tokens, and its strongest
# contexts, the token in brackets. A leading space is shown as `_`.

# %%
drawn = draw_features(statistics, layer, run.human_features, run.live_cut, run.seed)
contexts = feature_contexts(statistics, corpus, layer, drawn, run.contexts_per_feature)
deck = draw_deck(model, transcoders, statistics, corpus, run)
key = deck_key(deck)
sheet = rating_sheet(deck.study, layer, drawn, statistics, contexts, corpus, run.gene_rule, key)

# %% tags=["hide-input"]
report.table("human_eval_sample", sheet)
report.table("human_eval_key", key, rows=0)
report.show(sheet[["feature", "log10_E_f", "activating_tokens", "genes"]],
            caption="The sampled features: tokens with their share of activations, and genes")

# %% tags=["hide-input"]
report.show(pd.DataFrame({
    "feature": drawn,
    "strongest contexts": [" | ".join(f"{c.before}[{c.token}]{c.after}" for c in one[:3])
                           for one in contexts],
}), caption="Where they fire most strongly")

# %% tags=["remove-input"]
_ = write_deck(deck, run.results / "human_eval" / "deck.json")
report.value("deck.cards", len(deck.cards))
report.value("deck.study", deck.study)
for source, name in ((UNTRAINED, "untrained"), (RANDOM, "random")):
    report.value(f"deck.{name}", len(deck.of_source(source)))

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
ratings = read_ratings(sheets, deck.study, key)
rates = rate_table(ratings.table)
features_rated = ratings.table[ratings.table["source"] == FEATURE]
verdicts = card_verdicts(features_rated)
yes, n = int(verdicts.sum()), len(verdicts)
paper = pd.read_csv(ROOT / "data" / "paper" / "table3.csv")
paper_yes = int((paper["gene_level_interpretable"] == "Yes").sum())
low, high = wilson_interval(paper_yes, len(paper))

# %% tags=["hide-input"]
printed = pd.DataFrame([{"source": "the paper's features", "rater": "the paper", "yes": paper_yes,
                         "cards": len(paper), "rate": paper_yes / len(paper), "lower_95": low,
                         "upper_95": high}])
report.table("human_eval_rate", pd.concat([printed, rates]) if len(rates) else printed,
             caption="Share rated gene-level interpretable, with Wilson 95 % intervals")

# %% tags=["hide-input"]
agreement = agreement_table(ratings.table)
report.table("human_eval_agreement", agreement, caption="Agreement of raters, over all cards") if len(
    agreement) else None

# %% tags=["hide-input"]
pooled = rates[rates["rater"] == POOLED].set_index("source")["rate"]
against = {"one half": 0.5, "one fifth": 0.2, **{
    f"this study's {source}": float(rate) for source, rate in pooled.items()}}
needed = separation_table(paper_yes / len(paper), against)
report.table("human_eval_size", needed, digits=3, caption="Cards of each of two kinds that tell the "
             "paper's rate from another one, with a power of 80 % at the 5 % level")

# %% tags=["remove-input"]
report.value("human.rate", yes / n if n else None, f"{yes} of {n}" if n else "nobody has rated yet")
report.value("human.n", n if n else None, str(n))
report.value("human.raters", int(ratings.table["rater"].nunique()))
report.value("human.foreign", ratings.foreign)
report.value("human.repeated", ratings.repeated)
decoys = pooled.drop(FEATURE, errors="ignore")
report.value("human.decoys", len(decoys) > 0, "; ".join(
    f"{100 * rate:.0f} % of the cards of {source}" for source, rate in decoys.items())
    or "nobody has rated one yet")
size = int(needed.set_index("against")["cards_of_each"]["one half"])
report.value("human.cards_for_half", size)
report.value("human.paper_low", low, f"{100 * low:.0f}")
report.value("human.paper_high", high, f"{100 * high:.0f}")

# %% [markdown]
# Seven of 20 is 35 %, with a 95 % interval from {glue:text}`human.paper_low` to
# {glue:text}`human.paper_high` %: one rating of 20 features of one layer leaves open whether less
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

# %%
simulated = run.cells == PLANTED_CELLS
plan = plan_of(run) if simulated else None
sets = program_sets(plan) if plan else None
scores = feature_scores(model, transcoders, statistics, corpus, run, sets)
shares = verdict_shares(scores)

# %% mystnb={"image": {"alt": "Stacked bars by layer, for live features, features of an untrained encoder, and random tokens: percentages explained by genes, families, either, sub-words, or nothing."}, "figure": {"caption": "What predicts where features fire on held-out cells, by layer, beside decoys that fire as often.", "name": "fig-feature-scores"}} tags=["hide-input"]
report.figure("feature_scores", score_figures.explained_per_layer(shares))

# %% mystnb={"image": {"alt": "Three panels, genes, families and sub-words: the share of features whose held-out F1 reaches a level, for live features and both kinds of decoys."}, "figure": {"caption": "How well each kind of explanation predicts held-out cells: share of features that reach an F1.", "name": "fig-score-kinds"}} tags=["hide-input"]
report.figure("feature_score_kinds", score_figures.prediction_by_kind(*scores))

# %% tags=["hide-input"]
report.table("feature_scores", scores.features, rows=0)
report.table("feature_score_decoys", scores.decoys, rows=0)
report.table("feature_score_shares", shares, rows=0)
report.show(shares[shares["layer"] == "all"].drop(columns="layer"), digits=3, caption="Verdicts over "
            "all layers, as shares of those that have one")

# %% tags=["hide-input"]
margins = pd.concat([verdict_shares(scores, margin).assign(margin=margin)
                     for margin in (MARGIN / 2, MARGIN, 2 * MARGIN)])
margins = margins[margins["layer"] == "all"]
columns = ["source", "margin", *(name for name in margins if name not in ("source", "margin", "layer"))]
report.show(margins[columns], digits=3, caption="The same under other margins")

# %% tags=["hide-input"]
table = scores.features.loc[scores.features["layer"] == layer].set_index("feature").loc[drawn]
report.show(table.reset_index()[["feature", "log10_E_f", "gene_items", "gene_f1", "family_items",
                                 "family_f1", "token_items", "token_f1", "verdict"]], digits=2,
            caption="The sampled features: the genes, families and sub-words that predict them best")

# %% tags=["remove-input"]
report.values({"margin": MARGIN, "enough": ENOUGH_F1, "min_fired": MIN_FIRED}, prefix="score.")
overall = shares[shares["layer"] == "all"].set_index("source")
for source, name in ((FEATURE, "features"), (UNTRAINED, "untrained"), (RANDOM, "random")):
    row = overall.loc[source] if source in overall.index else None
    for part, verdicts_of in (("gene_level", [GENE, FAMILY]), ("sub_word", ["sub-word"]),
                              ("either", ["either"]), ("none", ["none"])):
        share = None if row is None or not row["scored"] else float(row[verdicts_of].sum())
        report.value(f"score.{name}.{part}", share,
                     "none scored" if share is None else f"{100 * share:.1f} %")
report.value("score.n", int(overall.loc[FEATURE, "scored"]))
report.value("score.too_rare", int(overall.loc[FEATURE, "too_rare"]))

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
kinds = corpus_kinds(statistics, corpus, run, sets)
made = known_feature_table(kinds, run.seed)
report.table("known_features", made, digits=3, caption="Verdicts on features made to fire on some "
             "genes, families or sub-words")

# %% tags=["remove-input"]
for kind in ("gene", "token"):
    for purity in (1.0, 0.7):
        of = made[(made["fires_on"] == kind) & (made["purity"] == purity)]
        name = f"score.made.{kind}_{purity:g}".replace("0.", "0")
        for suffix, column in (("", "gene_or_family"), ("_either", "either")):
            share = float(of[column].iloc[0]) if len(of) else None
            report.value(name + suffix, share,
                         "none could be made" if share is None else f"{100 * share:.0f} %")
report.value("score.known", simulated, "In this profile the programs of genes are known. If a "
             "feature's gene list matches one, its firing should be predicted by genes more often than "
             "a decoy's." if simulated else "What features should be is known for simulated cells "
             "only; in the book of the profile planted this section tells whether features whose "
             "program is known are scored as such.")
if simulated:
    other = untrained_statistics(model, statistics, corpus, run, n_features=transcoders.n_features)
    planted = planted_score_table(scores, {FEATURE: statistics, UNTRAINED: other}, corpus, run, plan)

# %% tags=["hide-input"]
report.table("planted_scores", planted, digits=3, caption="Verdicts of features whose planted program "
             "is known, of other features, and of decoys") if simulated else None

# %% tags=["remove-input"]
said = ""
if simulated:
    known = planted[planted["program"] == "known"].set_index("source")
    ideal = made[(made["fires_on"] == "program") & (made["purity"] == 1)]
    beyond = {f"{'trained' if source == FEATURE else source} features with a known program": part for source, part in
              known["program_beyond_sub_words"].items()}
    decoys = planted[planted["source"] != FEATURE]
    beyond["decoys of either kind, whatever their lists match"] = float(
        (decoys["program_beyond_sub_words"] * decoys["features"]).sum() / decoys["features"].sum())
    beyond["features made to fire on programs"] = ideal["program_beyond_sub_words"].mean()
    said = "Naming planted programs predicts better than naming sub-words for: " + "; ".join(
        f"{100 * share:.1f} % of {name}" for name, share in beyond.items()) + "."
report.value("score.planted", simulated, said)

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
reading = read_reading(ROOT / "data" / "paper" / "table3_reading.csv")
texts = token_texts(corpus.tokenizer, pd.unique(pd.Series(kinds.pairs.token).sort_values()))
check = table3_check(paper, reading, kinds, texts, corpus.symbols)
report.value("score.table3_n", int(check["verdict"].notna().sum()))
report.table("table3_check", check, digits=2, caption="The paper's Table 3 as printed, and the "
             "verdict on features that fire as described")

# %% tags=["hide-input"]
summary = table3_summary(check)
for answer, row in summary.set_index("paper").iterrows():
    report.value(f"score.table3_{answer.lower()}", int(row[[GENE, FAMILY]].sum()),
                 f"{row[[GENE, FAMILY]].sum()} of {row.sum()}")
report.show(summary, caption="The paper's judgement against the verdict")

# %% [markdown]
# ```{admonition} Key points
# - A rate without decoys has no zero: raters find patterns in features that mean nothing, too.
# - Whether a feature reads a gene or a sub-word can be measured, if both get the same freedom.
# - Where a token stands in one gene alone, nothing can tell the two apart, a rater included.
# ```
