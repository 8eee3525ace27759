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
#     produces: [tables/human_eval_sample.csv]
#     exhibits: "Figure 3, Table 3"
#     modules: [features, human_evaluation]
# ---

# %% [markdown]
# # Do people find the features interpretable?
#
# The paper draws 20 live features of layer 12 and has them judged: a feature is *gene-level
# interpretable* if it fires consistently on tokens of specific genes or gene families. Seven of the
# 20 were. This chapter draws the same kind of sample, writes the sheet for raters, and reads filled
# sheets back.

# %% tags=["parameters"]
profile = "demo"

# %%
import pandas as pd

from scfm_circuits import figures
from scfm_circuits.enrichment import wilson_interval
from scfm_circuits.features import check_live, draw_features, feature_contexts, get_statistics
from scfm_circuits.human_evaluation import (
    feature_verdicts,
    foreign_rows,
    rating_sheet,
    read_ratings,
    study_name,
)
from scfm_circuits.language_model import get_model
from scfm_circuits.profile import ROOT, from_notebook
from scfm_circuits.report import Report
from scfm_circuits.sentences import load_corpus
from scfm_circuits.training import get_transcoders

run = from_notebook(globals())
report = Report(run, "05_human_evaluation")
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
report.figure("figure3_live_features", figures.frequency_distribution(
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
study = study_name(run, drawn, statistics)
sheet = rating_sheet(study, layer, drawn, statistics, contexts, corpus, run.gene_rule)

# %% tags=["hide-input"]
report.table("human_eval_sample", sheet)
report.show(sheet[["feature", "log10_E_f", "activating_tokens", "genes"]],
            caption="The sampled features: tokens with their share of activations, and genes")

# %% tags=["hide-input"]
report.show(pd.DataFrame({
    "feature": drawn,
    "strongest contexts": [" | ".join(f"{c.before}[{c.token}]{c.after}" for c in one[:3])
                           for one in contexts],
}), caption="Where they fire most strongly")

# %% [markdown]
# To rate them, fill the columns `rater`, `interpretable` (Yes, No or Unsure), `label` and `note` of
# `human_eval_sample.csv` and put the file into `data/human_eval/`; the next build counts it.
#
# ## The rate

# %%
sheets = ROOT / "data" / "human_eval"
ratings = read_ratings(sheets, study, drawn)
verdicts = feature_verdicts(ratings)
yes, n = int(verdicts.sum()), len(verdicts)
paper = pd.read_csv(ROOT / "data" / "paper" / "table3.csv")
paper_yes = int((paper["gene_level_interpretable"] == "Yes").sum())

# %% tags=["hide-input"]
rows = [("the paper", paper_yes, len(paper)), *([("this run", yes, n)] if n else [])]
report.table("human_eval_rate", pd.DataFrame([{
    "study": name, "yes": k, "features": total, "rate": k / total,
    "lower_95": wilson_interval(k, total)[0], "upper_95": wilson_interval(k, total)[1],
} for name, k, total in rows]), caption="Share rated gene-level interpretable, Wilson 95 % interval")

# %% tags=["remove-input"]
low, high = wilson_interval(paper_yes, len(paper))
report.value("human.rate", yes / n if n else None, f"{yes} of {n}" if n else "nobody has rated yet")
report.value("human.n", n if n else None, str(n))
report.value("human.raters", int(ratings["rater"].nunique()))
report.value("human.foreign", foreign_rows(sheets, study))
report.value("human.paper_low", low, f"{100 * low:.0f}")
report.value("human.paper_high", high, f"{100 * high:.0f}")

# %% [markdown]
# Seven of 20 is 35 %, with a 95 % interval from {glue:text}`human.paper_low` to
# {glue:text}`human.paper_high` %: one rating of 20 features of one layer leaves open whether less
# than a fifth or more than half of them are interpretable. For this run's sample:
# {glue:text}`human.rate` (raters: {glue:text}`human.raters`; rated rows of other studies in the
# folder, which are not counted: {glue:text}`human.foreign`). A feature counts as Yes if more than
# half of its ratings are.
#
# ### The paper's own table

# %% tags=["hide-input"]
report.show(paper, caption="The paper's Table 3, as printed")
